"""Records of .jsonl files: an object on each line; what is wrong in one is said with file, line and field."""
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tinyllm.data.atomic import atomic_file

BYTE_ORDER_MARK = "\ufeff"


def json_records(path: Path, example: dict) -> Iterator[tuple[int, str, dict]]:
    """(line number, "FILE, line N", record) of each line that is not empty.

    example : what a record looks like, for the errors; its first field is the one that is missed where a line is no object.
    Errors: ValueError, in one line, for what is not UTF-8, not JSON or not an object.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            line = decode(line, where)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not valid JSON ({error}); each line must be one object like {json.dumps(example)}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected an object with a field {next(iter(example))!r}, found {json_kind(record)}")
            yield number, where, record


def write_records(path: str | os.PathLike, records: Iterable[dict]) -> int:
    """Write a .jsonl file, a record a line, and return how many; the file is there whole or not at all."""
    count = 0
    with atomic_file(path) as file:
        for count, record in enumerate(records, start=1):  # noqa: B007
            # a source is a file's name, which may hold bytes that are no text: JSON can spell these
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    return count


def field_of(record: dict, name: str, where: str) -> object:
    """A field of a record. Raises ValueError where there is none."""
    if name not in record:
        raise ValueError(f"{where}: the field {name!r} is missing; fields found: {', '.join(map(repr, record)) or 'none'}")
    return record[name]


def string_field(record: dict, name: str, where: str) -> str:
    """A field that is text. Raises ValueError where it is missing, something else, or text that has no UTF-8 form."""
    text = field_of(record, name, where)
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field {name!r} must be a string, found {json_kind(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell "\ud800", which is no character and has no UTF-8 form
        problem = f"holds half of a surrogate pair at character {error.start}; correct the record"
        raise ValueError(f"{where}: the field {name!r} {problem}") from error
    return text


def json_kind(value: object) -> str:
    """What a value of JSON is, in words."""
    return {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def decode(data: bytes, where: str) -> str:
    """Bytes -> text. Raises ValueError, starting with `where`, for bytes that are not UTF-8 or hold a NUL, as only binary files do."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{where}: this is UTF-16, expected UTF-8; convert it, for example with iconv -f UTF-16 -t UTF-8")
    nul = data.find(0)
    if nul >= 0:
        raise ValueError(f"{where}: a binary file (byte {nul} is NUL), expected text; convert it to plain text or leave it out")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); "
            "convert it, for example with iconv -f LATIN1 -t UTF-8, or leave it out"
        ) from error
    return text.removeprefix(BYTE_ORDER_MARK)
