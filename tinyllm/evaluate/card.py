"""The report card: what was measured, as Markdown and as one HTML page that needs nothing beside it."""
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tinyllm.evaluate.charts import Bar, Curve, bar_chart, line_chart
from tinyllm.evaluate.harness import Result
from tinyllm.evaluate.statistics import Comparison, Figure, Metric

EXAMPLES = 4  # answers that are shown of each task
LONGEST_CELL = 160
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}  # a model may write any character; a page may not hold these
HOW_TO_READ = (
    "± is the standard error, by bootstrap over the items (1,000 resamples); it says nothing where all items score alike. Chance is what the "
    "same metric gives to who knows nothing: a guess among the choices, or all tokens alike. Best, where it is known, is what the process "
    "that wrote the texts would reach itself."
)


@dataclass(frozen=True)
class Table:
    """Cells as text.     chart : an SVG that shows the same, "" for none; Markdown goes without.     words : not figures, which stand right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    chart: str = ""
    words: bool = False


@dataclass(frozen=True)
class Card:
    """What a card shows.

    columns : models, or stages of one, each with its results; those of a task stand side by side.
    facts : (what, value) about the whole.     curves : what is drawn first.
    comparisons : (label of the first, of the second, their paired comparisons).     tables : what else there is to tell, shown last.
    """

    title: str
    columns: Sequence[tuple[str, Sequence[Result]]]
    facts: Sequence[tuple[str, str]] = ()
    curves: Sequence[Curve] = ()
    comparisons: Sequence[tuple[str, str, Sequence[tuple[str, Comparison]]]] = ()
    tables: Sequence[Table] = ()


def markdown(card: Card) -> str:
    """The card as Markdown: tables only."""
    parts = [f"# {_cell(card.title)}", "\n".join(f"- {_cell(what)}: {_cell(value)}" for what, value in card.facts)]
    for table in tables(card):
        ruler = ["---", *["---" if table.words else "---:"] * (len(table.header) - 1)]
        head, *rows = [[_cell(cell) for cell in row] for row in (table.header, *table.rows)]
        parts += [f"## {_cell(table.title)}", "\n".join("| " + " | ".join(row) + " |" for row in (head, ruler, *rows))]
    return "\n\n".join([part for part in parts if part] + [HOW_TO_READ]) + "\n"


def html(card: Card) -> str:
    """The card as a page, curves and bars included."""
    facts = "".join(f"<dt>{_text(what)}</dt><dd>{_text(value)}</dd>" for what, value in card.facts)
    curves = "".join(f"<figure>{svg}</figure>" for curve in card.curves if (svg := line_chart(curve)))
    sections = "".join(_section(table) for table in tables(card))
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{_text(card.title)}</title><style>{STYLE}</style></head>\n<body><h1>{_text(card.title)}</h1>\n<dl>{facts}</dl>\n"
            f'{curves}\n{sections}\n<p class="how">{escape(HOW_TO_READ)}</p></body></html>\n')  # fmt: skip


def _section(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    chart, kind = f"<figure>{table.chart}</figure>" if table.chart else "", "words" if table.words else "figures"
    return (f'<h2>{_text(table.title)}</h2>\n{chart}<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead>'
            f"<tbody>\n{rows}\n</tbody></table></div>\n")  # fmt: skip


def tables(card: Card) -> list[Table]:
    """An overview; each task by metric, by subject, and some answers; and comparisons."""
    names = list(dict.fromkeys(result.task for _, results in card.columns for result in results))
    by_task = {name: [(label, r) for label, results in card.columns for r in results if r.task == name] for name in names}
    found = [_overview(card, by_task)] if by_task else []
    found += [_comparison(*comparison) for comparison in card.comparisons]
    for name, measured in by_task.items():
        found.append(_metrics(name, measured))
        if any(result.known_subjects() for _, result in measured):
            found.append(_subjects(name, measured))
        if answered := _answers(name, measured[-1]):
            found.append(answered)
    return [*found, *card.tables]


def _overview(card, by_task) -> Table:
    """The first metric of each task, a column for each model."""
    labels, rows = [label for label, _ in card.columns], []
    for name, measured in by_task.items():
        figures = {label: next(iter(result.figures().values())) for label, result in measured}
        metric, baseline = next(iter(figures.values())).metric, next(iter(figures.values()))
        shown = [with_error(figures[label]) if label in figures else "–" for label in labels]
        rows.append([f"{name}: {_titled(metric)}", *shown, number(baseline.chance, metric), number(baseline.best, metric), f"{baseline.items:,}"])
    return Table("Overview", ["task", *labels, "chance", "best", "items"], rows)


def _metrics(name, measured) -> Table:
    rows = []
    for label, result in measured:
        for figure in result.figures().values():
            interval = "–" if figure.low is None else f"{number(figure.low, figure.metric)} to {number(figure.high, figure.metric)}"
            rows.append([label, _titled(figure.metric), with_error(figure), interval, number(figure.chance, figure.metric),
                         number(figure.best, figure.metric)])  # fmt: skip
    _, last = measured[-1]
    styles = " and ".join(dict.fromkeys(result.style for _, result in measured))
    details = [f"{styles} prompts" if "prompt" in last.records[0] else "", f"{last.shots} shots" if last.shots else "",
               f"{last.truncated:,} prompts cut to fit the context" if last.truncated else ""]  # fmt: skip
    title = ", ".join([name, *(detail for detail in details if detail)])
    return Table(title, ["model", "metric", "value", "95 % interval", "chance", "best"], rows)


def _subjects(name, measured) -> Table:
    """The first metric by subject: a row each, a column for each model."""
    subjects = sorted({subject for _, result in measured for subject in result.subjects})
    figures = [[_first_figure(result, subject) for _, result in measured] for subject in subjects]
    metric = next(f for row in figures for f in row if f).metric
    rows = []
    for subject, row in zip(subjects, figures, strict=True):
        one = next(f for f in row if f)
        rows.append([subject or "(none)", *(with_error(f) if f else "–" for f in row), number(one.chance, metric), number(one.best, metric),
                     f"{one.items:,}"])  # fmt: skip
    labels = [label for label, _ in measured]
    complete = metric.percent and all(f for row in figures for f in row)
    bars = [[Bar(f.value, f.low, f.high, f.chance) for f in row] for row in figures] if complete else []
    chart = bar_chart(f"{name}: {metric.title}", [s or "(none)" for s in subjects], labels, bars) if complete else ""
    return Table(f"{name} by subject: {_titled(metric)}", ["subject", *labels, "chance", "best", "items"], rows, chart)


def _first_figure(result: Result, subject: str) -> Figure | None:
    if subject not in result.subjects:
        return None
    return next(iter(result.figures(subject).values()))


def _comparison(first: str, second: str, compared) -> Table:
    rows = []
    for task, c in compared:
        sign = "undecided" if c.p_value is None or c.p_value >= 0.05 else "better" if (c.difference > 0) == (c.metric.better == "higher") else "worse"
        interval = "–" if c.low is None else f"{number(c.low, c.metric, '+')} to {number(c.high, c.metric, '+')}"
        p_value = "–" if c.p_value is None else f"{c.p_value:.3f}"
        rows.append([f"{task}: {_titled(c.metric)}", number(c.first, c.metric), number(c.second, c.metric), number(c.difference, c.metric, "+"),
                     interval, p_value, sign])  # fmt: skip
    return Table(f"{second} against {first}, item by item", ["task", first, second, "difference", "95 % interval", "p", second + " is"], rows)


def _answers(name, last) -> Table | None:
    """What the last model made of some items: wrong ones first, since they teach more."""
    label, result = last
    if "prompt" not in result.records[0]:
        return None
    metric = next(iter(result.scores))
    chosen = sorted(result.records, key=lambda record: record[metric] > 0)[: EXAMPLES - 1]
    chosen += [record for record in result.records if record[metric] > 0 and record not in chosen][:1]
    rows = []
    for record in chosen:
        choices = record.get("choices")
        expected = choices[record["answer"]] if choices else record["expected"]
        given = choices[record["chosen"]] if choices else record["written"]
        rows.append([_tail(record["prompt"]), _tail(expected), _tail(given), "right" if record[metric] > 0 else "wrong"])
    return Table(f"{name}: some answers of {label}", ["question", "expected", "answer", ""], rows, words=True)


def number(value: float | None, metric: Metric, sign: str = "") -> str:
    """A figure of this metric as it is shown: percent with one digit, others with four significant ones."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "∞"
    return f"{100 * value:{sign}.1f} %" if metric.percent else f"{value:{sign},.4g}"


def with_error(figure: Figure) -> str:
    """25.0 % ± 1.2"""
    if figure.error is None:
        return number(figure.value, figure.metric)
    error = f"{100 * figure.error:.1f}" if figure.metric.percent else f"{figure.error:.2g}"
    return f"{number(figure.value, figure.metric)} ± {error}"


def _titled(metric: Metric) -> str:
    return f"{metric.title} {'↑' if metric.better == 'higher' else '↓'}"


def _tail(text: str) -> str:
    """The end of a text, where the question is."""
    return text if len(text) <= LONGEST_CELL else "…" + text[1 - LONGEST_CELL :]


def _text(text: str) -> str:
    """Text that stays text in HTML."""
    return escape(text.translate(PICTURES))


def _cell(text: str) -> str:
    """Text that stays in its place in Markdown: no new line, no column, no tag."""
    line = " ⏎ ".join(text.replace("\\", "\\\\").split("\n")).translate(PICTURES)
    for mark in "|*_`<>[]#":
        line = line.replace(mark, "\\" + mark)
    return line


STYLE = """
:root { color-scheme: light dark; --ink: #1c2530; --faint: #6b7683; --line: #dde2e8; --ground: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --faint: #98a4b1; --line: #38424d; --ground: #161b21; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1.2rem; } dt, .how { color: var(--faint); } dd { margin: 0; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: pre-wrap; }
th:first-child, td:first-child, .words th, .words td { text-align: left; } th { font-weight: 600; color: var(--faint); }
svg text { fill: var(--ink); } svg .note { fill: var(--faint); }
svg .grid { stroke: var(--line); } svg .level { stroke: var(--faint); stroke-dasharray: 5 4; }
svg .whisker { stroke: var(--ink); stroke-width: 1.4; } svg .chance { stroke: var(--ink); stroke-width: 1.4; stroke-dasharray: 2 2; }
"""
