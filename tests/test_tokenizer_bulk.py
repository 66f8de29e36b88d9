"""The fast twins of the tokenizer, held to their definitions: cutting, numbering, merging and encoding by array operations."""

import copy
import inspect
import itertools
import multiprocessing
import pickle
import random
import textwrap
import threading

import numpy as np
import pytest
import regex

import tinyllm
from tinyllm.threads import parallel
from tinyllm.tokenizer import GPT2, GPT4, BPETokenizer, CharTokenizer, Splitter, train_bpe
from tinyllm.tokenizer import bulk as bulk_module
from tinyllm.tokenizer.bpe import encode_naive
from tinyllm.tokenizer.bulk import BulkEncoder, count_bulk, cut, waves
from tinyllm.tokenizer.merge_many import Merger
from tinyllm.tokenizer.pieces import KeyTable, Pieces
from tinyllm.tokenizer.starts import END_BYTE, STARTS, codes_and_classes, joined

REAL_TEXT = inspect.getsource(textwrap)
ODD_TEXTS = [
    "", " ", "\n", "'", "a", "'s", "'ſ", "'LL", "a'll'll''s 's\n's'", "  two  spaces  ", "\x00\x01\x7f", "\ufeffbom", "\U0010ffff\uffff",
    "\r\n\r\n\t x \u00a0\u2003\u3000\u200b\x0b\x1c\x85\u2028", "e\u0301\u0327 क्षि", "👩‍👩‍👧‍👦🏳️‍🌈😉", "naïve 東京 привет مرحبا",
    "\ud800 \udfff!\udc80", "1234567 12 ٣٤٥٦ ²³½ Ⅻ", "a" * 300, "ab " * 100, "\n" * 99, "!\n\n \n b", "! \n\n  b", "x \n \n", "-" * 40,
    "x" * 15 + " " + "y" * 16 + " " + "z" * 8, "\ufffd\xff\x80",
]
PLANES = [
    (9, 14), (32, 127), (0, 0x250), (0x2000, 0x2070), (0x300, 0x370), (0x600, 0x700), (0x3040, 0x3100), (0xD7F0, 0xE010), (0x1F300, 0x1F700),
]
PATTERNS = {"gpt2": GPT2, "gpt4": GPT4}


def random_text(seed, count=400):
    draw = random.Random(seed)
    words = ["the", "I'll", "DON'T", " ", "  ", "\n", "\r\n", "\t", "123456", "self.", "\u00a0", "!!", " (", "'s", "\n\n", "some_rather_long_name"]
    pool = words + [chr(draw.randrange(*draw.choice(PLANES))) for _ in range(20)]
    return "".join(draw.choices(pool, k=count))


def pieces_of(texts, pattern):
    """The pieces of each text by the array operations, as strings."""
    codes, classes = codes_and_classes(texts)
    characters = [c for text in texts for c in (*text, None)]
    starts = STARTS[pattern](codes, classes)
    assert len(starts) == len(characters) and starts[0]
    result, pieces = [], []
    for character, start in zip(characters, starts, strict=True):
        if character is None:
            assert start
            result.append(pieces)
            pieces = []
        elif start or not pieces:
            pieces.append(character)
        else:
            pieces[-1] += character
    return result


# ---- where pieces begin ----

@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("alphabet, longest", [("as1 \t\n!'", 5), ("sſLlvé1 \u00a0\r\n'(.", 3)])
def test_every_short_text_is_cut_as_the_pattern_cuts_it(pattern, alphabet, longest):
    texts = ["".join(letters) for n in range(longest + 1) for letters in itertools.product(alphabet, repeat=n)]
    compiled = regex.compile(pattern)
    for text, pieces in zip(texts, pieces_of(texts, pattern), strict=True):
        assert pieces == compiled.findall(text), repr(text)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_any_text_is_cut_as_the_pattern_cuts_it(pattern):
    texts = [*ODD_TEXTS, REAL_TEXT, *map(random_text, range(60))]
    expected = [regex.findall(pattern, text) for text in texts]
    assert pieces_of(texts, pattern) == expected
    assert [pieces_of([text], pattern)[0] for text in texts] == expected


def test_contractions_are_all_that_the_pattern_takes():
    """Ignoring case takes in what Unicode says is the same letter; gpt4_starts lists these letters one by one."""
    characters = "".join(map(chr, range(0x110000)))
    assert "".join(regex.findall("(?i:[sdmt])", characters)) == "DMSTdmstſ"
    assert "".join(regex.findall("(?i:[lvre])", characters)) == "ELRVelrv"


# ---- cutting long texts ----

@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("block, wave", [(1, 1), (7, 20), (1000, 3000)])
def test_blocks_change_nothing(monkeypatch, pattern, block, wave):
    """The parts' pieces, one part after the other, are the text's; block and wave only say how much is worked on at once."""
    monkeypatch.setattr(bulk_module, "BLOCK", block)
    monkeypatch.setattr(bulk_module, "WAVE", wave)
    split = Splitter(pattern)
    texts = [*ODD_TEXTS, REAL_TEXT[: 50 * block], *map(random_text, range(3))]
    for text in texts:
        parts = [part for part, _ in cut(text, block)]
        assert "".join(parts) == text
        assert [piece for part in parts for piece in split(part)] == list(split(text)), repr(text)
    there = [part for wave in waves(texts) for block in wave for part in block]
    assert sum(last for _, last in there) == len(texts) and "".join(part for part, _ in there) == "".join(texts)
    assert count_bulk(texts, PATTERNS[pattern]) == counted(texts, split)
    tokenizer = BPETokenizer(train_bpe([REAL_TEXT], 500, pattern).merges, pattern)
    assert [ids.tolist() for ids in tokenizer.encode_ordinary_batch(texts)] == [naive_ids(tokenizer, text) for text in texts]


def test_counting_nothing():
    assert count_bulk([], GPT2) == count_bulk(["", ""], GPT4) == {}


def counted(texts, split):
    counts = {}
    for text in texts:
        for piece in split(text):
            data = piece.encode("utf-8", "surrogatepass")
            counts[data] = counts.get(data, 0) + 1
    return counts


def naive_ids(tokenizer, text):
    ranks = tokenizer.ranks
    return [i for piece in tokenizer.split(text) for i in encode_naive(piece.encode("utf-8", "surrogatepass"), ranks)]


# ---- numbers for pieces ----

@pytest.mark.parametrize("worst", [False, True])
def test_key_table_equals_a_dictionary(monkeypatch, worst):
    if worst:   # every key wants the same slot
        monkeypatch.setattr("tinyllm.tokenizer.pieces.MIX", (np.uint64(0), np.uint64(0)))
    rng = np.random.default_rng(0)
    table, expected = KeyTable(), {}
    for _ in range(20):
        keys = rng.integers(0, [[9], [9]] if rng.random() < 0.5 else [[1 << 63], [20]], (2, 30)).astype(np.uint64)
        assert table.find(*keys).tolist() == [expected.get(key, -1) for key in zip(*keys.tolist(), strict=True)]
        new = [key for key in dict.fromkeys(zip(*keys.tolist(), strict=True)) if key not in expected]
        table.add(*np.array(new, np.uint64).reshape(-1, 2).T)
        expected |= {key: len(expected) + i for i, key in enumerate(new)}
    everything = np.array(list(expected), np.uint64)
    assert table.find(*everything.T).tolist() == list(range(len(expected)))


def test_pieces_of_every_length_are_told_apart():
    """Also those that differ only in zeros at their end, and those just too long for two words."""
    distinct = [byte * n for n in range(1, 40) for byte in (b"\0", b"a", b"\xfe")] + [b"a" * n + b"\0" for n in range(1, 20)]
    data = END_BYTE.join(distinct)
    lengths = np.array([len(piece) for piece in distinct])
    begins = np.cumsum(lengths + 1) - lengths - 1
    pieces = Pieces()
    keys = pieces.keys(data, begins, lengths)
    assert (pieces.find(*keys) == -1).all()
    added = pieces.add(*map(np.tile, keys, (2, 2)))
    assert sorted(added) == sorted(distinct) and pieces.all() == added and len(pieces) == len(distinct)
    assert [added[i] for i in pieces.find(*keys)] == distinct


# ---- merging many pieces ----

@pytest.mark.parametrize("seed", range(10))
def test_merging_together_equals_naive(seed):
    draw = random.Random(seed)
    alphabet = draw.choice([b"a", b"ab", b"abc", bytes(range(256))])
    ranks, tokens = {}, list(alphabet)
    for _ in range(40):     # any merges at all: also such as training would never give
        pair = draw.choice(tokens), draw.choice(tokens)
        if pair not in ranks:
            ranks[pair] = 256 + len(ranks)
            tokens.append(ranks[pair])
    pieces = [bytes(draw.choices(alphabet, k=draw.choice([0, 1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 70]))) for _ in range(150)]
    ids, begins, counts = Merger(ranks).encode(pieces)
    assert len(ids) == counts.sum()
    assert [ids[a : a + n].tolist() for a, n in zip(begins, counts, strict=True)] == [encode_naive(piece, ranks) for piece in pieces]


def test_merging_without_merges_or_pieces():
    assert [array.tolist() for array in Merger({}).encode([])] == [[], [], []]
    ids, begins, counts = Merger({}).encode([b"ab", b"", b"c" * 70])
    assert ids.tolist() == [*b"ab", *b"c" * 70] and begins[2] == 2 and counts.tolist() == [2, 0, 70]


# ---- the tokenizer ----

@pytest.fixture(scope="module", params=[GPT2, GPT4, r"\w+|[^\w]"])
def bpe(request):
    return train_bpe([REAL_TEXT], 600, request.param, ["<|endoftext|>", "<|pad|>"])


def test_batch_equals_text_by_text(bpe):
    texts = [*ODD_TEXTS, REAL_TEXT, *map(random_text, range(5))]
    batch = bpe.encode_ordinary_batch(iter(texts))
    for text in texts:
        ids = next(batch)
        assert ids.dtype == np.uint32 and ids.tolist() == bpe.encode_ordinary(text) == naive_ids(bpe, text), repr(text)
    assert list(batch) == [] and list(bpe.encode_ordinary_batch([])) == []
    with pytest.raises(ValueError, match=r"write \[text\]"):
        next(bpe.encode_ordinary_batch("text"))


def test_texts_are_taken_as_they_are_needed(monkeypatch):
    monkeypatch.setattr(bulk_module, "BLOCK", 10)
    monkeypatch.setattr(bulk_module, "WAVE", 20)
    taken = itertools.count()
    batch = BPETokenizer([]).encode_ordinary_batch("some words" for _ in taken)
    assert next(batch).tolist() == list(b"some words") and next(taken) < 5


def test_encode_to_numpy_equals_encode(bpe):
    text = REAL_TEXT.replace("text", "<|endoftext|>").replace("width", "<|pad|>")
    for choice in [{"allowed_special": "all"}, {"allowed_special": {"<|pad|>"}, "disallowed_special": ()}, {"disallowed_special": ()}]:
        for part in (text, "", "<|pad|>", "<|pad|><|endoftext|>"):
            ids = bpe.encode_to_numpy(part, **choice)
            assert ids.dtype == np.uint32 and ids.tolist() == bpe.encode(part, **choice)
    with pytest.raises(ValueError, match="special token"):
        bpe.encode_to_numpy(text)


def test_characters_have_the_same_methods():
    tokenizer = CharTokenizer.train(["abc"])
    assert [ids.tolist() for ids in tokenizer.encode_ordinary_batch(["ab", "", "c"])] == [[0, 1], [], [2]]
    assert tokenizer.encode_to_numpy("cab").tolist() == [2, 0, 1] and tokenizer.encode_to_numpy("cab").dtype == np.uint32
    with pytest.raises(ValueError, match="character 'x'"):
        tokenizer.encode_to_numpy("x")


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr("tinyllm.tokenizer.byte_level.REMEMBERED_IDS", 100)
    tokenizer = BPETokenizer([])
    for text in ("a few words", REAL_TEXT, "and others"):
        assert tokenizer.encode_to_numpy(text).tolist() == list(text.encode())
        assert sum(encoder.size for encoder in tokenizer._encoders) <= 100


def test_training_and_encoding_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(bulk_module, "BLOCK", 500)
    before = tinyllm.threads()
    texts = [REAL_TEXT, *map(random_text, range(3))]
    try:
        results = []
        for count in (1, 2, 5):
            tinyllm.threads(count)
            tokenizer = train_bpe(texts, 700)
            results.append((tokenizer.fingerprint(), [ids.tolist() for ids in tokenizer.encode_ordinary_batch(texts)]))
        assert results[0] == results[1] == results[2]
    finally:
        tinyllm.threads(before)


def test_several_threads_may_use_one_tokenizer(monkeypatch):
    monkeypatch.setattr(bulk_module, "BLOCK", 200)
    tokenizer = train_bpe([REAL_TEXT], 500)
    texts = [random_text(seed, 2000) for seed in range(8)]
    found = [None] * len(texts)

    def encode(i):
        found[i] = tokenizer.encode_to_numpy(texts[i], disallowed_special=()).tolist()

    threads = [threading.Thread(target=encode, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [naive_ids(tokenizer, text) for text in texts]
    parallel(lambda part, _: [encode(i) for i in range(part.start, part.stop)], len(texts))
    assert found == [naive_ids(tokenizer, text) for text in texts]


def test_a_copy_and_another_process_give_the_same_ids():
    tokenizer = train_bpe([REAL_TEXT], 500)
    ids = tokenizer.encode(REAL_TEXT)
    assert pickle.loads(pickle.dumps(tokenizer)).encode(REAL_TEXT) == copy.deepcopy(tokenizer).encode(REAL_TEXT) == ids
    assert len(pickle.dumps(tokenizer)) < 50_000, "what was remembered stays here"
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(tokenizer.encode, [REAL_TEXT, REAL_TEXT]) == [ids, ids]


def test_an_interruption_leaves_nothing_half_learned(monkeypatch):
    tokenizer = train_bpe([REAL_TEXT], 500)
    tokenizer.encode_to_numpy(REAL_TEXT)

    def interrupted(self, pieces):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Merger, "encode", interrupted)
        tokenizer.encode_to_numpy("something quite new")
    for text in ("something quite new", REAL_TEXT):
        assert tokenizer.encode_to_numpy(text).tolist() == naive_ids(tokenizer, text)


def test_joined_ends_every_text():
    assert joined(["é", "", "a"]) == "é".encode() + END_BYTE * 2 + b"a" + END_BYTE
    assert [[part.tolist() for part in block] for block in BulkEncoder(GPT2, {}).encode([[("é", True), ("", False)], [("", True)]])] == [
        [[0xC3, 0xA9], []], [[]]]
