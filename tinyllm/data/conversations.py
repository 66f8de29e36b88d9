"""Conversations from disk: a .jsonl file whose lines hold a list `messages` (see tokenizer/chat.py)."""
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyllm.data.atomic import atomic_file
from tinyllm.data.records import field_of, json_records
from tinyllm.tokenizer.chat import Message, check_messages

EXAMPLE = {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}


@dataclass(frozen=True)
class Conversation:
    """Messages that belong together, and where they came from."""

    messages: list[Message]
    source: str


def holds_conversations(path: str | os.PathLike) -> bool:
    """Whether this is a .jsonl file whose first record has `messages`. ValueError where that record is none."""
    path = Path(path)
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    first = next(json_records(path, EXAMPLE), None)
    return first is not None and "messages" in first[2]


def read_conversations(paths: Iterable[str | os.PathLike]) -> Iterator[Conversation]:
    """The conversations of .jsonl files, in the order given. Fields besides `messages`, and in a message besides role and content, are left out.

    Errors: FileNotFoundError, or ValueError in one line with file, line and field; also where a file holds no conversation, or one of
    them no answer of the assistant, from which alone there is something to learn.
    """
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file: expected a .jsonl file with a conversation on each line")
        number = 0
        for number, where, record in json_records(path, EXAMPLE):
            messages = check_messages(field_of(record, "messages", where), where)
            if all(message["role"] != "assistant" for message in messages):
                raise ValueError(f"{where}: none of the messages is the assistant's, so there is nothing to learn: add an answer")
            yield Conversation(messages, f"{path}:{number}")
        if not number:
            raise ValueError(f"{path}: the file holds no conversation")


def append_conversation(path: str | os.PathLike, messages: Sequence[Message]) -> None:
    """Write a conversation as the last line of a .jsonl file, which is made where there is none.

    Errors: ValueError for a name that does not end in .jsonl, so that nothing else is ever changed; OSError, with the file as it was.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: conversations are kept in .jsonl files: give a name that ends in .jsonl")
    before = path.read_bytes() if path.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    with atomic_file(path.resolve()) as file:  # what a link points to, not the link
        file.write(before + json.dumps({"messages": list(messages)}, ensure_ascii=False).encode() + b"\n")
