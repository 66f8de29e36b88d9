"""Texts with labels, for classification: a folder with a subfolder for each label, a .csv or a .jsonl file."""
import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.records import decode, field_of, json_kind, json_records, string_field
from tinyllm.data.text import files_below

TEXTS = (".txt", ".md", ".py")
FIELDS = ("text", "label")


@dataclass(frozen=True)
class Labelled:
    """A text, its label, and where it came from."""

    text: str
    label: str
    source: str


def read_labelled(path: str | os.PathLike) -> list[Labelled]:
    """The texts of a folder (LABEL/…/name.txt), of a .csv file whose first line names columns text and label, or of a .jsonl file with
    these fields.

    A label is a string or a whole number. Other columns and fields are left out; so are files of a folder with other suffixes than
    .txt, .md and .py.
    Errors: FileNotFoundError, or ValueError in one line with file, line and field: for a text or a label that is missing, empty or of
    another type, and for fewer than two labels in all.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if not path.is_dir() and path.suffix not in readers:
        raise ValueError(f"{path}: expected a folder with a subfolder for each label, a .csv or a .jsonl file")
    found = list(_read_folder(path) if path.is_dir() else readers[path.suffix](path))
    if len(labels := label_names(found)) < 2:
        raise ValueError(f"{path}: {len(found)} texts with {len(labels)} labels{f' ({labels[0]})' if labels else ''}: at least 2 are to be told apart")
    return found


def label_names(texts: list[Labelled]) -> list[str]:
    """The labels, sorted: a label's place here is its number."""
    return sorted({text.label for text in texts})


def _read_folder(folder: Path) -> Iterator[Labelled]:
    for path in files_below(folder, TEXTS):
        label, *rest = path.relative_to(folder).parts
        if not rest:
            raise ValueError(f"{path}: this file has no label: expected it in a subfolder of {folder} that is named like its label")
        yield _checked(decode(path.read_bytes(), str(path)), label, str(path), str(path))


def _read_jsonl(path: Path) -> Iterator[Labelled]:
    for number, where, record in json_records(path, dict(text="...", label="...")):
        label = field_of(record, "label", where)
        if type(label) not in (str, int):
            raise ValueError(f"{where}: the field 'label' must be a string or a whole number, found {json_kind(label)}")
        record = record | {"label": str(label)}
        yield _checked(*(string_field(record, field, where) for field in FIELDS), where, f"{path}:{number}")


def _read_csv(path: Path) -> Iterator[Labelled]:
    rows = csv.reader(io.StringIO(decode(path.read_bytes(), str(path)), newline=""), strict=True)
    try:
        names = next(rows, [])
        if missing := [field for field in FIELDS if names.count(field) != 1]:
            raise ValueError(f"{path}, line 1: expected one column {missing[0]!r}; columns found: {', '.join(map(repr, names)) or 'none'}")
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if row and len(row) != len(names):
                raise ValueError(f"{where}: {len(row)} fields, but the first line names {len(names)}; quote texts that hold a comma or a quote")
            if row:
                yield _checked(*(row[names.index(field)] for field in FIELDS), where, f"{path}:{rows.line_num}")
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not valid CSV ({error}); a .jsonl file can hold any text") from error


def _checked(text: str, label: str, where: str, source: str) -> Labelled:
    if not text.strip():
        raise ValueError(f"{where}: the text is empty")
    if not label.strip():
        raise ValueError(f"{where}: the label is empty")
    return Labelled(text, label, source)
