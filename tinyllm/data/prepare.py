"""Documents, a tokenizer and a folder -> train.bin and val.bin."""
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.data.shards import Shard, open_shard, token_dtype, write_shard
from tinyllm.data.split import split
from tinyllm.data.text import Document
from tinyllm.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedData:
    """The two parts of a data set as open shards; val is None where no text was set aside."""

    train: Shard
    val: Shard | None


Encode = Callable[[list[Document], Tokenizer, int | None], Iterator[tuple[np.ndarray, int]]]


def prepare(documents: Iterable[Document], tokenizer: Tokenizer, folder: str | os.PathLike, val_fraction: float, seed: int,
            encode: Encode | None = None) -> PreparedData:
    """Split the documents, encode them, and write folder/train.bin and, where val_fraction is not 0, folder/val.bin.

    If there is more than one document and the tokenizer has an end_of_text, it follows every document. A single text gets none: its
    training part does not end, it goes on in the validation part.
    encode : in place of `encode_documents`, for rows that want more than that to be seen in the tokens.

    Texts are encoded as ordinary text: a "<|endoftext|>" written in one is those 13 characters. All text is in memory, but the
    tokens of only one document, or of a few million characters of short ones, at a time. Shards already in the folder are replaced once the new ones are complete.
    """
    documents = [document for document in documents if document.text]
    train, val = split(documents, val_fraction, seed)
    end_of_text = tokenizer.end_of_text if len(documents) > 1 else None
    tokenizer_hash, dtype = tokenizer.fingerprint(), token_dtype(tokenizer.vocab_size)
    folder = Path(folder)
    staging = folder / "preparing"
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed here
    staging.mkdir(parents=True)
    try:
        for name, part in (("val.bin", val), ("train.bin", train)):
            if part:
                write_shard(staging / name, (encode or encode_documents)(part, tokenizer, end_of_text), tokenizer_hash, dtype)
        _install(staging, folder)
    finally:
        shutil.rmtree(staging)
    return PreparedData(open_shard(folder / "train.bin"), open_shard(folder / "val.bin") if val else None)


def open_prepared(folder: str | os.PathLike, tokenizer_hash: str) -> PreparedData:
    """Open what prepare() wrote earlier, if this tokenizer made it.

    The checksums are verified: these files have lain on a disk, and training reads every byte many times, so once more costs little.
    Errors: FileNotFoundError where train.bin is missing; ValueError for another tokenizer or a damaged file.
    """
    folder = Path(folder)
    train = open_shard(folder / "train.bin", tokenizer_hash)
    val = open_shard(folder / "val.bin", tokenizer_hash) if (folder / "val.bin").exists() else None
    for shard in (train, val):
        if shard is not None:
            shard.verify()
    return PreparedData(train, val)


def encode_documents(documents: list[Document], tokenizer: Tokenizer, end_of_text: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """The ids of each document, end_of_text (None: nothing) after them, and how many bytes of text they stand for."""
    ending = np.array([] if end_of_text is None else [end_of_text], np.uint32)
    encoded = tokenizer.encode_ordinary_batch(document.text for document in documents)
    for document, ids in zip(documents, encoded, strict=True):
        yield np.concatenate([ids, ending]), len(document.text.encode())


def _install(staging: Path, folder: Path) -> None:
    """Move the new shards into place. train.bin goes first and comes back last: killed in between, there is no train.bin, which
    open_prepared reports, and never a new validation part beside an old training part that may contain it."""
    (folder / "train.bin").unlink(missing_ok=True)
    (folder / "val.bin").unlink(missing_ok=True)
    for name in ("val.bin", "train.bin"):
        if (staging / name).exists():
            os.replace(staging / name, folder / name)
