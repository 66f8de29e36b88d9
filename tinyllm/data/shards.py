"""A file of token ids that is mapped into memory, so that a corpus far larger than the memory can be read at random places.

    bytes 0-127   header, little-endian:   magic, version, bytes per token (2 or 4), number of tokens, UTF-8 bytes of the text they
                  encode (for bits per byte), SHA-256 of the tokenizer, SHA-256 of all else (the fields before it, then the tokens), zeros
    then          the tokens, unsigned 16-bit or 32-bit integers
"""
import hashlib
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.data.atomic import atomic_file

MAGIC = b"tinyllm\0"
VERSION = 1
HEADER_SIZE = 128
FIELDS = struct.Struct("<8s I I Q Q 32s")  # magic, version, bytes per token, tokens, text bytes, tokenizer
DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says about itself; hashes in hexadecimal."""

    bytes_per_token: int
    token_count: int
    text_bytes: int
    tokenizer_hash: str
    checksum: str

    def fields(self) -> bytes:
        """The packed header up to the checksum."""
        tokenizer = bytes.fromhex(self.tokenizer_hash)
        return FIELDS.pack(MAGIC, VERSION, self.bytes_per_token, self.token_count, self.text_bytes, tokenizer)


@dataclass(frozen=True)
class Shard:
    """An open shard. tokens is a read-only 1-D array backed by the file: slices and fancy indices read only what they touch."""

    path: Path
    header: ShardHeader
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def verify(self) -> None:
        """Read the whole file once and raise ValueError if a bit of it has changed since it was written."""
        if _checksum(self.header, hashlib.sha256(self.tokens)) != self.header.checksum:
            raise ValueError(f"{self.path}: the checksum does not match: the file is damaged; delete it and prepare the data again")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of the two types of a shard that holds every id below vocab_size."""
    return DTYPES[2] if vocab_size <= 2**16 else DTYPES[4]


def write_shard(
    path: str | os.PathLike,
    pieces: Iterable[tuple[Sequence[int] | np.ndarray, int]],
    tokenizer_hash: str,
    dtype: np.dtype | type,
) -> ShardHeader:
    """Write (ids, UTF-8 bytes of the text they encode) pieces one after the other to a new shard, holding one piece at a time.

    tokenizer_hash is the tokenizer's fingerprint() (64 hexadecimal digits), dtype uint16 or uint32. The file appears whole or not at
    all. Errors: ValueError for an id that dtype cannot hold or no ids at all; OSError where the disk is full.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    if dtype not in DTYPES.values():
        raise ValueError(f"a shard holds uint16 or uint32, found {dtype}")
    token_count = text_bytes = 0
    payload = hashlib.sha256()
    with atomic_file(path) as file:
        file.write(bytes(HEADER_SIZE))  # its place; it can be filled in only at the end
        for ids, size in pieces:
            data = _checked(ids, dtype, path).tobytes()
            file.write(data)
            payload.update(data)
            token_count += len(data) // dtype.itemsize
            text_bytes += size
        if token_count == 0:
            raise ValueError(f"{path}: no tokens to write: the text is empty")
        unsigned = ShardHeader(dtype.itemsize, token_count, text_bytes, tokenizer_hash, "")
        header = ShardHeader(dtype.itemsize, token_count, text_bytes, tokenizer_hash, _checksum(unsigned, payload))
        file.seek(0)
        file.write(header.fields() + bytes.fromhex(header.checksum))
    return header


def _checked(ids: Sequence[int] | np.ndarray, dtype: np.dtype, path: str | os.PathLike) -> np.ndarray:
    ids = np.asarray(ids, dtype=np.int64)
    limit = np.iinfo(dtype).max
    if ids.size and not (0 <= ids.min() and ids.max() <= limit):
        raise ValueError(f"{path}: token ids must lie between 0 and {limit} for {dtype.name}, found {ids.min()} to {ids.max()}")
    return ids.astype(dtype)


def _checksum(header: ShardHeader, payload: "hashlib._Hash") -> str:
    """SHA-256 over the header's fields and the SHA-256 of the tokens: the tokens come first in time, the header first in the file."""
    return hashlib.sha256(header.fields() + payload.digest()).hexdigest()


def open_shard(path: str | os.PathLike, tokenizer_hash: str | None = None) -> Shard:
    """Map a shard into memory. Takes the same time for any size: the tokens are not read, so call verify() where that matters.

    Checked here: magic, version, that the file is exactly as long as the header says, and, where one is given, the tokenizer's hash.
    Errors: FileNotFoundError, or ValueError in one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such token shard")
    with open(path, "rb") as file:
        header = _parse_header(file.read(HEADER_SIZE), path)
    expected, found = HEADER_SIZE + header.token_count * header.bytes_per_token, path.stat().st_size
    if found != expected:
        kind = "truncated" if found < expected else "too long"
        raise ValueError(f"{path}: the shard is {kind}: expected {expected} bytes, found {found}; delete it and prepare the data again")
    if tokenizer_hash is not None and header.tokenizer_hash != tokenizer_hash:
        raise ValueError(
            f"{path}: the tokens were made by another tokenizer ({header.tokenizer_hash[:12]}…, expected {tokenizer_hash[:12]}…); "
            "use that tokenizer, or prepare the data again with this one"
        )
    tokens = np.memmap(path, dtype=DTYPES[header.bytes_per_token], mode="r", offset=HEADER_SIZE, shape=(header.token_count,))
    return Shard(path, header, np.asarray(tokens))


def _parse_header(data: bytes, path: Path) -> ShardHeader:
    if not data.startswith(MAGIC):
        raise ValueError(f"{path}: not a token shard: it starts with {data[:8]!r}, expected {MAGIC!r}")
    if len(data) < HEADER_SIZE:
        raise ValueError(f"{path}: the shard is truncated: expected a header of {HEADER_SIZE} bytes, found {len(data)}")
    _, version, width, token_count, text_bytes, tokenizer = FIELDS.unpack_from(data)
    if version != VERSION:
        raise ValueError(f"{path}: shard version {version}, expected {VERSION}; prepare the data again")
    if width not in DTYPES or token_count == 0:
        raise ValueError(f"{path}: damaged header: {token_count} tokens of {width} bytes; delete it and prepare the data again")
    checksum = data[FIELDS.size : FIELDS.size + 32]
    return ShardHeader(width, token_count, text_bytes, tokenizer.hex(), checksum.hex())
