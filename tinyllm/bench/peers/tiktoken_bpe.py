"""Encoding by tiktoken, which uses one thread for one text, with the vocabulary that tokenizers has trained."""
import json
from importlib import metadata
from pathlib import Path

import tiktoken

GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def byte_of_character() -> dict[str, int]:
    """GPT-2 files write each byte as a character that can be printed: those that cannot follow from 256 on, in order."""
    shown = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def run(settings, meter):
    """Encode the whole text, once for each of meter.units."""
    meter.notes["version"] = metadata.version("tiktoken")
    text = Path(settings["text"]).read_bytes().decode()
    byte = byte_of_character()
    vocabulary = json.loads(Path(settings["theirs"]).read_text(encoding="utf-8"))["model"]["vocab"]
    ranks = {bytes(byte[c] for c in token): number for token, number in vocabulary.items()}
    for _ in range(meter.units):
        encoding = tiktoken.Encoding("trained", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={})
        meter.start()
        encoding.encode_ordinary(text)
        meter.tick()
