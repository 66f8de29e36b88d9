import errno
import os
from dataclasses import replace

import numpy as np
import pytest

from tinyllm.data import Document, open_prepared, open_shard, prepare, token_dtype, write_shard
from tinyllm.data.shards import HEADER_SIZE

HASH, OTHER = "ab" * 32, "cd" * 32


class Bytes:
    """A tokenizer for tests: one id a byte, and 256 for the end of a text."""

    vocab_size = 257
    end_of_text: int | None = 256

    def encode_ordinary(self, text):
        return list(text.encode())

    def encode_ordinary_batch(self, texts):
        return (np.array(self.encode_ordinary(text), np.uint32) for text in texts)

    def fingerprint(self):
        return HASH


def written(folder, ids=(1, 2, 65535), dtype=np.uint16):
    path = folder / "a.bin"
    write_shard(path, [(list(ids), 5)], HASH, dtype)
    return path


@pytest.mark.parametrize("dtype, largest", [(np.uint16, 2**16 - 1), (np.uint32, 2**32 - 1), (">u4", 2**32 - 1)])
def test_shard_round_trip(tmp_path, dtype, largest):
    pieces = [([1, 2, 3], 7), ([], 0), (np.array([largest, 0]), 4)]
    header = write_shard(tmp_path / "a.bin", iter(pieces), HASH, dtype)
    shard = open_shard(tmp_path / "a.bin", HASH)
    assert shard.header == header and header.text_bytes == 11 and len(shard) == 5
    assert shard.tokens.tolist() == [1, 2, 3, largest, 0]
    assert (tmp_path / "a.bin").stat().st_size == HEADER_SIZE + 5 * np.dtype(dtype).itemsize
    shard.verify()
    with pytest.raises(ValueError, match="read-only"):
        shard.tokens[0] = 9


def test_token_dtype_at_the_border():
    assert token_dtype(65536) == np.uint16 and token_dtype(65537) == np.uint32


@pytest.mark.parametrize("ids, message", [([65536], "between 0 and 65535 for uint16, found 65536"), ([-1], "found -1"), ([], "no tokens")])
def test_bad_ids_leave_the_old_shard(tmp_path, ids, message):
    path = written(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_shard(path, [([1], 1), (ids, 1)] if ids else [], HASH, np.uint16)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(ValueError, match="uint16 or uint32, found int64"):
        write_shard(path, [], HASH, np.int64)


def test_failing_source_and_full_disk_leave_the_old_shard(tmp_path, monkeypatch):
    path = written(tmp_path)
    before = path.read_bytes()

    def pieces():
        yield [1, 2], 2
        raise FileNotFoundError(errno.ENOENT, "gone", "text.txt")

    with pytest.raises(FileNotFoundError, match="text.txt"):
        write_shard(path, pieces(), HASH, np.uint16)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*a\.bin: No space left on device"):
        write_shard(path, [([1], 1)], HASH, np.uint16)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.bin"]


def test_every_length_but_the_right_one_is_an_error(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated|not a token shard"):
            open_shard(path)
    with pytest.raises(ValueError, match=r"a\.bin: the shard is truncated: expected 134 bytes, found 133"):
        open_shard(path)
    path.write_bytes(data + b"x")
    with pytest.raises(ValueError, match="too long: expected 134 bytes, found 135"):
        open_shard(path)


def test_verify_finds_every_changed_byte_of_the_fields_and_the_tokens(tmp_path):
    path = written(tmp_path)
    data = path.read_bytes()
    for position in [*range(96), *range(HEADER_SIZE, len(data))]:
        damaged = bytearray(data)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            open_shard(path).verify()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_open_shard_errors(tmp_path):
    path = written(tmp_path)
    with pytest.raises(ValueError, match=r"made by another tokenizer \(abababababab…, expected cdcdcdcdcdcd…\)"):
        open_shard(path, OTHER)
    with pytest.raises(FileNotFoundError, match="no such token shard"):
        open_shard(tmp_path / "b.bin")
    path.write_bytes(path.read_bytes()[:8] + b"\x02" + path.read_bytes()[9:])
    with pytest.raises(ValueError, match="shard version 2, expected 1"):
        open_shard(path)


def test_prepare_puts_end_of_text_after_each_of_several_documents(tmp_path):
    documents = [Document("één", "a"), Document("", "empty"), Document("bb<|endoftext|>", "b"), Document("c" * 9, "c")]
    data = prepare(iter(documents), Bytes(), tmp_path / "data", 0.3, seed=0)
    parts = [bytes(part) for shard in (data.train, data.val) for part in _cut(shard.tokens.tolist())]
    assert sorted(parts) == sorted(document.text.encode() for document in documents if document.text)
    assert data.train.header.text_bytes + data.val.header.text_bytes == sum(len(document.text.encode()) for document in documents)
    assert sorted(os.listdir(tmp_path / "data")) == ["train.bin", "val.bin"]


def _cut(ids):
    """The documents between the end_of_text ids, which must also be the last id."""
    ends = [i for i, token in enumerate(ids) if token == 256]
    assert ends[-1] == len(ids) - 1
    return [ids[start:end] for start, end in zip([0] + [end + 1 for end in ends[:-1]], ends, strict=True)]


def test_prepare_gives_a_single_text_no_end(tmp_path):
    data = prepare([Document("0123456789", "a"), Document("", "empty")], Bytes(), tmp_path, 0.2, seed=0)
    assert bytes(data.train.tokens.tolist()) == b"01234567" and bytes(data.val.tokens.tolist()) == b"89"


def test_prepare_without_end_of_text(tmp_path):
    tokenizer = Bytes()
    tokenizer.end_of_text = None
    data = prepare([Document("aa", "a"), Document("bb", "b")], tokenizer, tmp_path, 0, seed=0)
    assert bytes(data.train.tokens.tolist()) == b"aabb"


def test_prepare_again_replaces_and_failure_keeps_what_was_there(tmp_path, monkeypatch):
    old = [Document("old text", "a"), Document("more", "b")]
    prepare(old, Bytes(), tmp_path, 0.3, seed=0)
    before = {name: (tmp_path / name).read_bytes() for name in ("train.bin", "val.bin")}

    def failing(self, text):
        raise ValueError("the character 'x' is not in the vocabulary")

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="vocabulary"):
        patch.setattr(Bytes, "encode_ordinary", failing)
        prepare(old, Bytes(), tmp_path, 0.3, seed=0)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before

    (tmp_path / "preparing").mkdir()
    (tmp_path / "preparing" / "val.bin").write_bytes(b"left by a killed run")
    data = prepare([Document("new", "a")], Bytes(), tmp_path, 0, seed=0)
    assert data.val is None and os.listdir(tmp_path) == ["train.bin"]  # no stale validation part beside new training data


def test_open_prepared(tmp_path):
    made = prepare([Document("a" * 90, "a")], Bytes(), tmp_path, 0.1, seed=0)
    data = open_prepared(tmp_path, HASH)
    assert data.train.header == made.train.header and data.val.header == made.val.header
    with pytest.raises(ValueError, match="another tokenizer"):
        open_prepared(tmp_path, OTHER)
    (tmp_path / "val.bin").write_bytes((tmp_path / "val.bin").read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"val\.bin: the checksum does not match"):
        open_prepared(tmp_path, HASH)
    (tmp_path / "val.bin").unlink()
    assert open_prepared(tmp_path, HASH).val is None
    (tmp_path / "train.bin").unlink()
    with pytest.raises(FileNotFoundError, match="train.bin"):
        open_prepared(tmp_path, HASH)


def test_header_text_bytes_is_covered_by_the_checksum(tmp_path):
    shard = open_shard(written(tmp_path))
    with pytest.raises(ValueError, match="checksum"):
        replace(shard, header=replace(shard.header, text_bytes=6)).verify()
