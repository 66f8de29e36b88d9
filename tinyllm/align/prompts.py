"""What is to be answered, from .jsonl: a prompt is a text, which a user says, or a list of messages."""
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.records import field_of, json_kind, json_records, string_field
from tinyllm.tokenizer.chat import Message, check_messages


@dataclass(frozen=True)
class Prompt:
    """Messages to be answered, the answer that a verifier expects ("" where nobody asks for one), and where they came from (file:line)."""

    messages: list[Message]
    answer: str = ""
    source: str = ""


def read_prompts(paths: Iterable[str | os.PathLike], answers: bool) -> Iterator[Prompt]:
    """Read .jsonl files of objects with the field prompt and, with `answers`, answer; other fields are left alone.

    Errors: FileNotFoundError or ValueError, in one line with the file, the line, the field and what to do; a file without any prompt is one.
    """
    fields = ("prompt", "answer") if answers else ("prompt",)
    for number, where, record in records_with(paths, fields, "prompts"):
        answer = string_field(record, "answer", where) if answers else ""
        if answers and not answer.strip():
            raise ValueError(f"{where}: the field 'answer' is empty: nothing could be verified; correct or remove the record")
        yield Prompt(messages_of(record, where), answer, number)


def records_with(paths: Iterable[str | os.PathLike], fields: tuple[str, ...], what: str) -> Iterator[tuple[str, str, dict]]:
    """("FILE:N", "FILE, line N", record) of .jsonl files with these fields; a file that is missing or holds none is an error."""
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path, found = Path(path), False
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; {what} come from a .jsonl file with the fields {', '.join(fields)}")
        for number, where, record in json_records(path, dict.fromkeys(fields, "...")):
            found = True
            yield f"{path}:{number}", where, record
        if not found:
            raise ValueError(f"{path}: the file holds no {what}; each line must be one object with the fields {', '.join(fields)}")


def messages_of(record: dict, where: str) -> list[Message]:
    """The field prompt as messages, the last of which is a user's. ValueError where it is neither text nor such a list, or says nothing."""
    prompt = field_of(record, "prompt", where)
    if not isinstance(prompt, str | list):
        raise ValueError(f"{where}: the field 'prompt' must be a string or a list of messages, found {json_kind(prompt)}")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": string_field(record, "prompt", where)}]
    messages = check_messages(prompt, where)
    if messages[-1]["role"] != "user":
        raise ValueError(f"{where}: the last message of 'prompt' is the {messages[-1]['role']}'s: it must be a user's, to be answered")
    if not messages[-1]["content"].strip():
        raise ValueError(f"{where}: the field 'prompt' is empty: there is nothing to answer; correct or remove the record")
    return messages
