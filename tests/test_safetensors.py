import errno
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllm.train.safetensors import BF16, DTYPES, load, read_header, save

GOLDEN = Path(__file__).parent / "golden" / "safetensors.safetensors"


def examples():
    """One array of every dtype, and the odd shapes; an odd number of bytes before wider ones."""
    tensors = {"odd": np.array([1, 2, 3], np.int8)}
    for name, dtype in DTYPES.items():
        bits = np.arange(6, dtype=np.uint16).view(BF16) if name == "BF16" else np.arange(6).astype(dtype)
        tensors[f"kind.{name}"] = bits.reshape(2, 3)
    tensors |= {"scalar": np.array(-1.5, np.float32), "empty": np.zeros((3, 0, 2)), "transposed": np.arange(12.0).reshape(3, 4).T}
    return tensors | {"name with \"quotes\", é, 😀, \n": np.array([np.nan, np.inf, -0.0, 5e-324])}


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_round_trip_keeps_every_bit_and_the_order(tmp_path):
    tensors = examples()
    save(tmp_path / "a.safetensors", tensors, {"é": "😀\n"})
    loaded = load(tmp_path / "a.safetensors")
    assert list(loaded) == list(tensors) and all(same(loaded[name], tensors[name]) for name in tensors)
    assert read_header(tmp_path / "a.safetensors").metadata == {"é": "😀\n"}
    save(tmp_path / "b.safetensors", loaded, {"é": "😀\n"})  # read-only, memory-mapped arrays can be saved again
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_arrays_are_mapped_aligned_and_read_only(tmp_path):
    save(tmp_path / "a.safetensors", examples())
    for array in load(tmp_path / "a.safetensors").values():
        assert array.flags.aligned and not array.flags.writeable and array.base is not None


def test_nothing_and_other_byte_order(tmp_path):
    save(tmp_path / "a.safetensors", {})
    assert load(tmp_path / "a.safetensors") == {}
    save(tmp_path / "a.safetensors", {"a": np.arange(3, dtype=">i4"), "b": np.float64(2.5)})
    loaded = load(tmp_path / "a.safetensors")
    assert loaded["a"].tolist() == [0, 1, 2] and loaded["a"].dtype == np.int32 and loaded["b"][()] == 2.5


def test_file_written_by_the_real_package():
    loaded = load(GOLDEN)
    assert read_header(GOLDEN).metadata == {"format": "pt", "é": "😀"}
    for name in ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"):
        assert same(loaded.pop(f"counting.{name}"), np.arange(6).reshape(2, 3).astype(DTYPES[name]))
    bits = loaded.pop("counting.BF16")["bf16"].astype(np.uint32) << 16  # a bfloat16 is the upper half of a float32
    assert bits.view(np.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded.pop("scalar")[()] == -1.5 and loaded.pop("empty").shape == (3, 0, 2) and not loaded


@pytest.mark.peers
def test_both_directions_with_the_real_package(tmp_path):
    real = pytest.importorskip("safetensors.torch")
    torch = pytest.importorskip("torch")
    tensors = examples()
    save(tmp_path / "ours.safetensors", tensors, {"k": "v"})
    theirs = real.load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == tensors.keys()
    for name, array in tensors.items():
        tensor = theirs[name].contiguous()
        bits = tensor.view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)
        assert tuple(tensor.shape) == array.shape and bits.numpy().tobytes() == array.tobytes()
    real.save_file(theirs, tmp_path / "theirs.safetensors", metadata={"k": "v"})
    loaded = load(tmp_path / "theirs.safetensors")
    assert loaded.keys() == tensors.keys() and all(same(loaded[name], tensors[name]) for name in tensors)
    assert read_header(tmp_path / "theirs.safetensors").metadata == {"k": "v"}


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"a": np.zeros(2, complex)}, None, "tensor 'a' is complex128, expected"),
        ({"a": np.array(["text"])}, None, "tensor 'a' is <U4"),
        ({"a": np.array([None])}, None, "tensor 'a' is object"),
        ({"a": [1.0, 2.0]}, None, "tensor 'a' is list"),
        ({"__metadata__": np.zeros(2)}, None, "cannot be the name of a tensor"),
        ({3: np.zeros(2)}, None, "3 cannot be the name of a tensor"),
        ({}, {"step": 3}, "metadata must map strings to strings"),
    ],
)
def test_what_cannot_be_saved_leaves_the_old_file(tmp_path, tensors, metadata, message):
    path = tmp_path / "a.safetensors"
    save(path, {"old": np.arange(3)})
    with pytest.raises(ValueError, match=message):
        save(path, tensors, metadata)
    assert list(load(path)) == ["old"] and os.listdir(tmp_path) == [path.name]


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save(path, {"old": np.arange(3)})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.safetensors: No space left on device"):
        save(path, {"new": np.arange(3)})
    assert list(load(path)) == ["old"] and os.listdir(tmp_path) == [path.name]


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "truncated: 0 bytes"),
        (b"\x02\0\0", "truncated"),
        (file_of({}, length=3), "10 bytes cannot hold a header of 3 bytes"),
        (file_of({}, length=2**63), "cannot hold a header of 9223372036854775808 bytes"),
        (file_of({}, length=100_000_001), "cannot hold a header"),
        (file_of(b"[]"), "must start with '{', found b'\\['"),
        (file_of(b""), "must start with '{', found b''"),
        (file_of(b'{"a'), "Unterminated string"),
        (file_of(b'{"\xff": 1}'), "can't decode byte 0xff"),
        (file_of(b'{"a":' * 100_000), "recursion"),
        (file_of(b'{"a":' + b"9" * 5000 + b"}"), "4300"),
        (file_of(b'{"a": 1, "a": 2}'), "the name 'a' occurs twice"),
        (file_of(b"{" + b",".join(b'"%d":1' % (i % 99_999) for i in range(100_000)) + b"}"), "the name '0' occurs twice"),
        (file_of({"__metadata__": {"a": 1}}), "must map strings to strings"),
        (file_of({"__metadata__": []}), "must map strings to strings"),
        (file_of({"a": []}), "must have exactly"),
        (file_of({"a": entry(0, 1) | {"more": 1}}, b"x"), "must have exactly"),
        (file_of({"a": entry(0, 1, dtype="F8_E4M3")}, b"x"), "dtype 'F8_E4M3', expected one of F64"),
        (file_of({"a": entry(0, 1, dtype=["U8"])}, b"x"), "dtype"),
        (file_of({"a": entry(0, 1, shape=[True])}, b"x"), "short lists of integers"),
        (file_of({"a": entry(0, 1, shape=[-1])}, b"x"), "short lists of integers"),
        (file_of({"a": entry(0, 1, shape=[1.0])}, b"x"), "short lists of integers"),
        (file_of({"a": entry(0, 1, shape=[1] * 65)}, b"x"), "short lists of integers"),
        (file_of({"a": entry(0, 0, shape=[0, 2**64])}), "short lists of integers"),
        (file_of({"a": entry(0, 0, shape=[0, 2**62, 2**62])}), "NumPy cannot hold"),
        (file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x"), "short lists of integers"),
        (file_of({"a": entry(0, 4, shape=[2])}, b"1234"), r"shape \[2\] and dtype U8 cannot take up 4 bytes"),
        (file_of({"a": entry(4, 0, shape=[4])}, b"1234"), "cannot take up -4 bytes"),
        (file_of({"a": entry(0, 4, shape=[2**62, 4, 2**62])}, b"1234"), "cannot take up 4 bytes"),
        (file_of({"a": entry(0, 3), "b": entry(2, 4)}, b"1234"), "'b' overlaps"),
        (file_of({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), "'b' overlaps"),
        (file_of({"a": entry(1, 4)}, b"1234"), "'a' leaves 1 bytes unused"),
        (file_of({"a": entry(0, 4)}, b"123"), "the file has"),
        (file_of({"a": entry(0, 4)}, b"12345"), "the file has"),
        (file_of({}, b"1"), "the header describes 10 bytes, the file has 11"),
    ],
)
def test_unsound_files(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.safetensors: no such file"):
        load(tmp_path / "a.safetensors")


def test_unaligned_and_unsorted_files_of_others_are_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"b": entry(1, 9, [], "F64"), "a": entry(0, 1)}, b"x" + np.float64(2.5).tobytes()))
    loaded = load(path)
    assert loaded["b"][()] == 2.5 and loaded["a"].tolist() == [ord("x")]


def test_mutated_headers_never_crash(tmp_path):
    """Each mutant loads as arrays that lie inside the file, or is refused with ValueError; nothing else may happen."""
    save(tmp_path / "a.safetensors", examples(), {"k": "v"})
    sound = (tmp_path / "a.safetensors").read_bytes()
    header_size = 8 + int.from_bytes(sound[:8], "little")
    chance = random.Random(0)
    refused = 0
    for _ in range(1500):
        mutant = bytearray(sound)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(header_size)
            piece = bytes(chance.choices(b'0123456789[]{},:"-.eE \x00\xff', k=chance.randint(0, 3)))
            mutant[place : place + chance.randint(0, 3)] = piece
        if chance.random() < 0.2:
            del mutant[chance.randrange(len(mutant)) :]
        elif chance.random() < 0.7:  # keep the length field true, so that the checks behind it are reached
            mutant[:8] = max(0, header_size - 8 + len(mutant) - len(sound)).to_bytes(8, "little")
        (tmp_path / "mutant").write_bytes(mutant)
        try:
            assert sum(array.nbytes for array in load(tmp_path / "mutant").values()) <= len(mutant)
        except ValueError as error:
            assert str(error).startswith(str(tmp_path / "mutant"))
            refused += 1
    assert 1000 < refused < 1500


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_reads_no_data(tmp_path):
    save(tmp_path / "a.safetensors", {"a": np.zeros(16 << 20, np.uint8)})

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    array = load(tmp_path / "a.safetensors")["a"]
    assert resident() - before < 4 << 20 and array.nbytes == 16 << 20
