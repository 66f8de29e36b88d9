"""The safetensors file format, by hand: named arrays in a file that can be mapped into memory and can hold nothing but numbers.

    8 bytes      length of the header, unsigned, little-endian
    header       JSON, filled up with spaces:
                 {"__metadata__": {str: str}, NAME: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the rest     the arrays, row-major and little-endian; data_offsets are counted from here

Loading runs no code from the file, unlike unpickling, and believes nothing in it: every byte must belong to exactly one array.
Source: https://github.com/huggingface/safetensors, section "Format".
"""
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.data.atomic import atomic_file

MAX_HEADER = 100_000_000  # the format's own limit: a damaged length must not make the reader ask for terabytes
MAX_DIMENSIONS = 64  # NumPy's limit
METADATA = "__metadata__"
BF16 = np.dtype([("bf16", "<u2")])  # NumPy has no bfloat16: bits.view(BF16) marks uint16 bits as such, array["bf16"] gives them back
DTYPES = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": BF16,
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"), "BOOL": np.dtype("?"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the header; start and end are byte offsets in the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The checked header of a file, tensors in the order in which they were saved."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def save(path: str | os.PathLike, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Write arrays of any shape, empty and 0-d ones too. The file appears whole or not at all (see data/atomic.py).

    Errors: ValueError for a dtype the format does not have or metadata that is not str -> str; OSError where the disk is full.
    """
    path = Path(path)
    arrays = {name: _little_endian(array, name, path) for name, array in tensors.items()}
    # Widest elements first: as every size is a multiple of all narrower ones, each array then starts at a multiple of its item size.
    layout = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    with atomic_file(path) as file:
        file.write(_pack_header(arrays, layout, metadata or {}, path))
        for name in layout:
            file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8))


def _little_endian(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if not isinstance(name, str) or name == METADATA:
        raise ValueError(f"{path}: {name!r} cannot be the name of a tensor")
    dtype = getattr(array, "dtype", None)
    if isinstance(array, np.ndarray | np.generic) and dtype.newbyteorder("<") in NAMES:
        return np.asarray(array, dtype=dtype.newbyteorder("<"))
    raise ValueError(f"{path}: tensor {name!r} is {dtype or type(array).__name__}, expected a NumPy array of one of {', '.join(DTYPES)}")


def _pack_header(arrays: dict[str, np.ndarray], layout: list[str], metadata: dict[str, str], path: Path) -> bytes:
    if not all(isinstance(key, str) and isinstance(value, str) for key, value in metadata.items()):
        raise ValueError(f"{path}: metadata must map strings to strings, found {metadata!r}")
    offsets, end = {}, 0
    for name in layout:
        offsets[name] = [end, end + arrays[name].nbytes]
        end += arrays[name].nbytes
    entries = {METADATA: metadata} if metadata else {}
    for name, array in arrays.items():
        entries[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": offsets[name]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8, the widest element
    return len(text).to_bytes(8, "little") + text


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Map a file into memory: read-only arrays that share its pages; nothing is read before it is used.

    Errors: FileNotFoundError, or ValueError in one line, starting with the path, for anything that is not a sound safetensors file.
    """
    header = read_header(path)
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    tensors = {}
    for name, info in header.tensors.items():
        try:
            tensors[name] = data[info.start : info.end].view(info.dtype).reshape(info.shape)
        except ValueError as error:  # a shape such as (0, 2^62, 2^62): no elements, but beyond what NumPy can count
            raise ValueError(f"{path}: tensor {name!r} has a shape NumPy cannot hold: {error}") from error
    return tensors


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header alone. Errors as in load()."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path}: not a safetensors file, or truncated: {size} bytes cannot hold a header of {length} bytes")
        text = file.read(length)
    try:
        return _parse_header(text, data_start=8 + length, file_size=size)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested too deep for the JSON parser
        raise ValueError(f"{path}: not a sound safetensors file: {error}") from error


def _parse_header(text: bytes, data_start: int, file_size: int) -> Header:
    if not text.startswith(b"{"):
        raise ValueError(f"the header must start with '{{', found {text[:1]!r}")
    entries = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} must map strings to strings")
    tensors = {name: _parse_entry(name, entry, data_start) for name, entry in entries.items()}
    _check_layout(tensors, data_start, file_size)
    return Header(tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {name!r} occurs twice")
    return entries


def _parse_entry(name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: shape and data_offsets must be short lists of integers from 0 to 2^63 - 1")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} and dtype {dtype} cannot take up {end - start} bytes")
    return TensorInfo(DTYPES[dtype], tuple(shape), data_start + start, data_start + end)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(tensors: dict[str, TensorInfo], data_start: int, file_size: int) -> None:
    """In order of position each array must begin where the one before ended, and the last must end with the file."""
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            kind = "overlaps the one before it" if info.start < position else f"leaves {info.start - position} bytes unused before it"
            raise ValueError(f"tensor {name!r} {kind}")
        position = info.end
    if position != file_size:
        raise ValueError(f"the header describes {position} bytes, the file has {file_size}")
