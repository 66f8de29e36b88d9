"""Files and folders of text -> documents.

Text is kept exactly as it is on disk, line endings included: a model of a text is a model of those characters. Only a UTF-8 byte
order mark at the start of a file is dropped, because it says how the file is stored and is no part of what was written.
"""
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.records import decode, json_records, string_field

SUFFIXES = (".txt", ".md", ".py", ".jsonl")  # what is taken from a folder; a file that is named itself may have any suffix


@dataclass(frozen=True)
class Document:
    """A piece of text that belongs together, and where it came from: a path, with the line number for a record of a .jsonl file."""

    text: str
    source: str


def read_documents(paths: Iterable[str | os.PathLike], on_skip: Callable[[str], None] = warnings.warn) -> Iterator[Document]:
    """Read text files, .jsonl files and folders, in the order given.

    A .jsonl file gives one document a line, from the string field `text`; any other file is one document. A folder gives its
    .txt, .md, .py and .jsonl files at any depth, sorted by path; files and folders whose names start with a dot are left out.

    on_skip gets one line for every file of a folder that is passed over because it is binary, not UTF-8 or cannot be opened.
    Without it a Python warning is given. A file that was named itself, and a bad record in any .jsonl, is an error instead;
    so is a folder in which nothing is found. Empty files of a folder and records with an empty text hold nothing to lose.

    Errors: FileNotFoundError or ValueError, in one line with the file, the line or byte, and what to do.
    """
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        if not os.fspath(path):  # a shell variable that is not set; Path would take it for the current folder
            raise FileNotFoundError("the name of a text file or folder is empty")
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        documents = _read_folder(path, on_skip) if path.is_dir() else _read_file(path)
        first = next(documents, None)
        if first is None:
            found = f"a folder with no text in any {', '.join(SUFFIXES)} file" if path.is_dir() else "the file holds no text"
            raise ValueError(f"{path}: {found}")
        yield first
        yield from documents


def _read_file(path: Path) -> Iterator[Document]:
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    elif text := decode(path.read_bytes(), str(path)):
        yield Document(text, str(path))


def _read_folder(folder: Path, on_skip: Callable[[str], None]) -> Iterator[Document]:
    for path in files_below(folder, SUFFIXES):
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)  # its errors are not caught: by then half of the file may have been used
            continue
        try:
            text = decode(path.read_bytes(), str(path))
        except (ValueError, OSError) as error:
            on_skip(f"skipped {error}")
            continue
        if text:
            yield Document(text, str(path))


def files_below(folder: Path, suffixes: tuple[str, ...], leave_out: Iterable[str] = ()) -> list[Path]:
    """All files with one of the suffixes below a folder, sorted by path.

    Hidden folders, those named in leave_out, and those that hold a training run (its log is no text to learn from) are not entered.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        if {"config.json", "log.jsonl"} <= set(names):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".") and name not in leave_out]
        found += [Path(parent, name) for name in names if name.endswith(suffixes) and not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _read_jsonl(path: Path) -> Iterator[Document]:
    for number, where, record in json_records(path, {"text": "..."}):
        if text := string_field(record, "text", where):
            yield Document(text, f"{path}:{number}")
