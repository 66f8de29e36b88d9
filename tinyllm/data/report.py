"""What was done to the data, as JSON for programs and as one page for people. The page needs no other file and no network."""
import html
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.atomic import atomic_file

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin: 2em 0 .3em } p { margin: .3em 0 .8em }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #ddd; padding: .25em .8em .25em 0; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.text { font: 12px/1.4 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 60em }
.bar { display: inline-block; height: .8em; background: #4a7ebb; vertical-align: baseline }
"""


class Excerpt(str):
    """A piece of a document: shown as it is, in a typewriter's letters."""


class Share(float):
    """A part of a whole, from 0 to 1: shown in per cent, with a bar."""


@dataclass(frozen=True)
class Table:
    """A heading, a sentence, and rows of strings, numbers, Excerpts and Shares."""

    heading: str
    note: str
    columns: Sequence[str]
    rows: Iterable[Sequence]


def write_report(folder: Path, title: str, figures: dict, tables: Iterable[Table]) -> None:
    """Write report.json (the figures) and report.html (the tables) into a folder."""
    for name, text in (("report.json", json.dumps(figures, indent=1, ensure_ascii=False)), ("report.html", page(title, tables))):
        with atomic_file(folder / name) as file:
            file.write(text.encode("utf-8", "replace"))


def page(title: str, tables: Iterable[Table]) -> str:
    """The tables as an HTML page. Whatever stands in a document is shown, never interpreted."""
    head = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>\n'
    return head + f"<h1>{html.escape(title)}</h1>\n" + "".join(map(_table, tables)) + "</html>\n"


def _table(table: Table) -> str:
    header = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>\n" for row in table.rows)
    note = f"<p>{html.escape(table.note)}</p>\n" if table.note else ""
    return f"<h2>{html.escape(table.heading)}</h2>\n{note}" + (f"<table><tr>{header}</tr>\n{rows}</table>\n" if rows else "<p>None.</p>\n")


def _cell(value) -> str:
    if isinstance(value, Share):
        return f'<td class="number">{value:.2%}</td><td><span class="bar" style="width:{12 * value:.2f}em"></span></td>'
    if isinstance(value, int | float):
        return f'<td class="number">{value:,}</td>' if isinstance(value, int) else f'<td class="number">{value:,.4g}</td>'
    return f'<td class="{"text" if isinstance(value, Excerpt) else "name"}">{html.escape(str(value))}</td>'
