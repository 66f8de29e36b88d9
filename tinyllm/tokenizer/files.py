"""Reading a tokenizer's file: one JSON object {"kind": "bpe" | "char" | "wordpiece", "version": 1, …}, nothing that can run code."""

import json
from pathlib import Path

from tinyllm.tokenizer.base import VERSION, Tokenizer
from tinyllm.tokenizer.byte_level import BPETokenizer
from tinyllm.tokenizer.characters import CharTokenizer
from tinyllm.tokenizer.wordpiece import WordPieceTokenizer

KINDS = {kind.kind: kind for kind in (BPETokenizer, CharTokenizer, WordPieceTokenizer)}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer that was saved at path, or as tokenizer.json in the folder at path.

    FileNotFoundError when there is none, ValueError when the file is not a whole tokenizer.
    """
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no tokenizer file {path}: `tinyllm tokenizer train` makes one") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a tokenizer file, or it is cut short: it is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("kind") not in list(KINDS):
        raise ValueError(f'{path} is not a tokenizer file: it must be a JSON object whose "kind" is one of {", ".join(KINDS)}')
    if content.get("version") != VERSION:
        raise ValueError(f"{path} has tokenizer file version {content.get('version')!r}, but only version {VERSION} can be read")
    try:
        return KINDS[content["kind"]].from_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a valid tokenizer file: {error}") from None
