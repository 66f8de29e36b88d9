"""Byte-level BPE, characters, streaming, files: properties that hold for any text, known cases, and bad input."""

import inspect
import json
import os
import random
import re
import textwrap

import pytest

from tinyllm.tokenizer import GPT2, GPT4, BPETokenizer, CharTokenizer, StreamDecoder, load_tokenizer, train_bpe
from tinyllm.tokenizer.bpe import count_pairs, encode_heap, encode_naive, merge, merge_steps, train_naive
from tinyllm.tokenizer.byte_level import count_pieces
from tinyllm.tokenizer.learn import train_incremental
from tinyllm.tokenizer.patterns import Splitter

REAL_TEXT = inspect.getsource(textwrap)
ODD_TEXTS = [
    "", " ", "\n", "a", "  two  spaces  ", "\r\n\r\n\t x \u00a0\u2003\u3000\u200b\x0b\x1c\x85", "e\u0301\u0327 क्षि", "👩‍👩‍👧‍👦🏳️‍🌈😉",
    "\x00\x01\x7f", "\ufeffbom", "\U0010ffff\uffff", "naïve 東京 привет مرحبا", "<|endoftext|> as text", "'ll 'LL I'm", "1234567", "a" * 5000,
    "ab " * 3000, "\n" * 999,
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([REAL_TEXT], 600)


def random_pieces(draw, alphabet, pieces, longest):
    return {bytes(draw.choices(alphabet, k=draw.randint(0, longest))): draw.randint(1, 4) for _ in range(pieces)}


# ---- the algorithm ----

def test_worked_example_of_wikipedia():
    tokenizer = train_bpe(["aaabdaaabac"], 259, special_tokens=())
    assert tokenizer.encode("aaabdaaabac") == [258, 100, 258, 97, 99]
    assert tokenizer.merges == [(97, 97), (97, 98), (256, 257)]


def test_count_pairs_and_merge():
    assert count_pairs({(1, 2, 1, 2): 3, (5,): 9}) == {(1, 2): 6, (2, 1): 3}
    assert merge((1, 2, 3, 1, 2), (1, 2), 256) == (256, 3, 256)
    assert merge((1, 1, 1), (1, 1), 256) == (256, 1)


@pytest.mark.parametrize("seed", range(40))
def test_incremental_trainer_equals_naive(seed):
    """Few letters and short words: runs of one letter, overlapping pairs and ties everywhere; bytes of all kinds for the order of ties."""
    draw = random.Random(seed)
    alphabet = draw.choice([b"a", b"ab", b" a~", bytes(range(256)), b"\x00\x20\x21\x7f\xa0\xad\xff"])
    pieces = random_pieces(draw, alphabet, draw.randint(0, 30), draw.choice([3, 12, 40]))
    learned = train_naive(pieces, 60)
    assert train_incremental(pieces, 60) == learned
    assert len(set(learned)) == len(learned)


@pytest.mark.parametrize("pattern", [GPT2, GPT4])
def test_incremental_trainer_equals_naive_on_real_text(pattern):
    pieces = count_pieces([REAL_TEXT], Splitter(pattern))
    assert train_incremental(pieces, 150) == train_naive(pieces, 150)


def test_trainers_run_dry_at_the_same_merge():
    pieces = {b"banana": 2, b"bandana": 1}
    assert train_incremental(pieces, 1000) == train_naive(pieces, 1000)
    assert train_incremental({}, 5) == train_naive({}, 5) == []


def test_ties_go_to_visible_bytes_first():
    assert train_naive({b" a": 1, b"zz": 1}, 1) == [(ord("z"), ord("z"))]
    assert train_incremental({b" a": 1, b"zz": 1}, 1) == [(ord("z"), ord("z"))]


@pytest.mark.parametrize("seed", range(20))
def test_heap_encoder_equals_naive(seed):
    draw = random.Random(seed)
    alphabet = draw.choice([b"a", b"ab", b"abc"])
    ranks = {pair: 256 + i for i, pair in enumerate(train_incremental(random_pieces(draw, alphabet, 10, 30), 40))}
    for _ in range(20):
        data = bytes(draw.choices(alphabet, k=draw.randint(0, 60)))
        assert encode_heap(data, ranks) == encode_naive(data, ranks)


def test_encoders_agree_on_merges_that_no_training_gives():
    """Two merges may spell the same bytes when the list is written by hand; the pair decides, not the bytes."""
    merges = [(98, 99), (97, 256), (97, 98), (258, 99)]
    ranks = {pair: 256 + i for i, pair in enumerate(merges)}
    assert encode_naive(b"abc", ranks) == encode_heap(b"abc", ranks) == [257]
    assert [ids for _, ids in merge_steps(b"abc", ranks)] == [(97, 256), (257,)]


def test_long_pieces_are_not_quadratic():
    """A quarter of a million letters without a space: seconds would become hours if every merge scanned them all."""
    text = "".join(random.Random(0).choices("abcd", k=250_000))
    tokenizer = train_bpe([text], 1000)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    run = train_bpe(["a" * 250_000], 270)
    assert len(run.encode("a" * 250_000)) < 250_000 / 2**12


# ---- patterns ----

KNOWN_SPLITS = [
    ("gpt2", "Hello, world. Is this-- a test?", ["Hello", ",", " world", ".", " Is", " this", "--", " a", " test", "?"]),
    ("gpt2", "we'll DON'T 12345", ["we", "'ll", " DON", "'", "T", " 12345"]),
    ("gpt2", "a   b\n\n  c", ["a", "  ", " b", "\n\n ", " c"]),
    ("gpt2", "end  ", ["end", "  "]),
    ("gpt4", "we'll DON'T 12345", ["we", "'ll", " DON", "'T", " ", "123", "45"]),
    ("gpt4", "a   b\n\n  c", ["a", "  ", " b", "\n\n", " ", " c"]),
    ("gpt4", "(self.x)\n\nend \n  ", ["(self", ".x", ")\n\n", "end", " \n  "]),
    ("gpt4", "hello123!!!? (안녕하세요!) 😉", ["hello", "123", "!!!?", " (", "안녕하세요", "!)", " 😉"]),
]


@pytest.mark.parametrize("name, text, pieces", KNOWN_SPLITS)
def test_known_splits(name, text, pieces):
    assert list(Splitter(name)(text)) == pieces


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", r"\d+", r"\w*", "", r"x|(?i:y)|(?=z)"])
def test_splitting_loses_nothing(pattern):
    split = Splitter(pattern)
    for text in [*ODD_TEXTS, REAL_TEXT, "12 zz 3\n"]:
        assert "".join(split(text)) == text


def test_long_text_splits_as_short_text_does(monkeypatch):
    expected = list(Splitter("gpt4")(REAL_TEXT))
    monkeypatch.setattr("tinyllm.tokenizer.patterns.LONG_TEXT", 10)
    assert list(Splitter("gpt4")(REAL_TEXT)) == expected


BAD_PATTERNS = [("gpt3", "unknown split pattern 'gpt3'"), ("(a", "not a regular expression"), ("(a)|b", "capturing")]


@pytest.mark.parametrize("pattern, message", BAD_PATTERNS)
def test_bad_patterns(pattern, message):
    with pytest.raises(ValueError, match=message):
        Splitter(pattern)


# ---- round trips ----

@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", r"\w+", r"[^\n]+"])
def test_text_round_trips(pattern):
    tokenizer = train_bpe([REAL_TEXT], 400, pattern)
    for text in [*ODD_TEXTS, REAL_TEXT]:
        ids = tokenizer.encode(text, disallowed_special=())
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode_bytes(ids) == text.encode()
        assert tokenizer.encode(text, disallowed_special=()) == ids, "the cache changes nothing"
        assert ids == [i for piece in tokenizer.split(text) for i in encode_naive(piece.encode(), tokenizer.ranks)]


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_round_trip(bpe, seed):
    draw = random.Random(seed)
    data = b"".join(draw.choice([draw.randbytes(draw.randint(0, 9)), "é😉 the\n".encode(), b"return "]) for _ in range(50))
    assert bpe.decode_bytes(bpe.encode_bytes(data)) == data


def test_bytes_that_are_text_encode_as_the_text(bpe):
    assert bpe.encode_bytes(REAL_TEXT.encode()) == bpe.encode(REAL_TEXT)
    assert bpe.encode_bytes(b"the\xff\xfethe") == [*bpe.encode("the"), 255, 254, *bpe.encode("the")]
    with pytest.raises(ValueError, match="special token"):
        bpe.encode_bytes(b"\xff<|endoftext|>")
    assert bpe.encode_bytes(b"\xff<|endoftext|>", allowed_special="all") == [255, bpe.end_of_text]


def test_lone_surrogates_survive_with_surrogatepass(bpe):
    text = "a\ud83d b\udc80"
    ids = bpe.encode(text)
    assert bpe.decode(ids, errors="surrogatepass") == text
    assert "\ufffd" in bpe.decode(ids)


def test_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("tinyllm.tokenizer.byte_level.CACHED_PIECES", 3)
    tokenizer = BPETokenizer([])
    text = "one two three four five six " + "x" * 1000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer._cache) <= 3


# ---- special tokens ----

def test_special_tokens_come_last(bpe):
    assert bpe.vocab_size == 600 and bpe.end_of_text == 599 and bpe.special_tokens == {"<|endoftext|>": 599}
    assert bpe.token_bytes(599) == b"<|endoftext|>"
    assert train_bpe([REAL_TEXT], 300, special_tokens=()).end_of_text is None


def test_special_token_in_text_is_refused_with_the_remedy(bpe):
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' at position 2.*allowed_special.*disallowed_special=\(\)"):
        bpe.encode("a <|endoftext|>")


def test_special_token_allowed_or_taken_as_text(bpe):
    text = "a<|endoftext|><|endoftext|>b"
    end = bpe.end_of_text
    for allowed in ("all", {"<|endoftext|>"}, ["<|endoftext|>"]):
        assert bpe.encode(text, allowed_special=allowed) == [97, end, end, 98]
    as_text = bpe.encode(text, disallowed_special=())
    assert end not in as_text and as_text == bpe.encode_ordinary(text)
    assert bpe.decode(as_text) == bpe.decode([97, end, end, 98]) == text


def test_disallowed_may_name_any_string_and_wins_over_allowed(bpe):
    with pytest.raises(ValueError, match="'secret' at position 4"):
        bpe.encode("the secret", disallowed_special={"secret"})
    with pytest.raises(ValueError, match="endoftext"):
        bpe.encode("<|endoftext|>", allowed_special="all", disallowed_special={"<|endoftext|>"})


def test_mistakes_in_the_special_arguments(bpe):
    with pytest.raises(ValueError, match="does not have; it has: <|endoftext|>"):
        bpe.encode("x", allowed_special={"<|pad|>"})
    with pytest.raises(ValueError, match='must be "all" or a collection'):
        bpe.encode("x", allowed_special="<|endoftext|>")


def test_longest_special_token_wins():
    tokenizer = BPETokenizer([], special_tokens=["<s>", "<s>>", "."])
    assert tokenizer.encode("<s>><s>.", allowed_special="all") == [257, 256, 258]


def test_training_learns_nothing_from_special_tokens():
    assert train_bpe(["abab<|endoftext|>abab"] * 9, 259).merges == [(97, 98), (256, 256)]


@pytest.mark.parametrize("special", [["a", "a"], [""], [3]])
def test_bad_special_tokens(special):
    with pytest.raises(ValueError, match="non-empty, distinct strings"):
        BPETokenizer([], special_tokens=special)
    with pytest.raises(ValueError, match="non-empty, distinct strings"):
        train_bpe(["abc abc"], 260, special_tokens=special)


# ---- vocabulary size, ids ----

def test_vocabulary_larger_than_the_text_can_give():
    with pytest.raises(ValueError, match=r"a vocabulary of 1000 \(--vocab-size\) is more than this text can give: after 3 merges .* ask for at most 260"):
        train_bpe(["abc abc"], 1000)
    assert train_bpe(["abc abc"], 260).vocab_size == 260
    with pytest.raises(ValueError, match="ask for at most 257"):
        train_bpe([], 300)


def test_one_string_is_not_many_texts():
    with pytest.raises(ValueError, match=r"write \[text\]"):
        train_bpe("abc abc", 260)


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match="vocab_size 256 is too small: 256 bytes and 1 special tokens need 257"):
        train_bpe(["abc"], 256)
    assert train_bpe([""], 257).encode("abc") == [97, 98, 99]


@pytest.mark.parametrize("bad", [-1, 600, 10**30])
def test_unknown_id(bpe, bad):
    with pytest.raises(ValueError, match=f"id {bad} is not in this tokenizer: its ids are 0 to 599"):
        bpe.decode([97, bad])


# ---- streaming ----

def test_stream_shows_only_whole_characters():
    tokenizer = BPETokenizer([])
    stream = StreamDecoder(tokenizer)
    shown = [stream.push(token) for token in "aé€😉".encode()]
    assert shown == ["a", "", "é", "", "", "€", "", "", "", "😉"]
    assert stream.flush() == ""


def test_stream_flush_shows_what_is_unfinished_and_starts_afresh():
    stream = StreamDecoder(BPETokenizer([]))
    assert stream.push(0xF0) + stream.push(0x9F) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(97) == "a"


@pytest.mark.parametrize("seed", range(20))
def test_stream_equals_decode(bpe, seed):
    draw = random.Random(seed)
    ids = [draw.randrange(bpe.vocab_size) for _ in range(200)]
    stream = StreamDecoder(bpe)
    assert "".join(map(stream.push, ids)) + stream.flush() == bpe.decode(ids)


# ---- characters ----

def test_characters():
    tokenizer = CharTokenizer.train(["héllo", " 😉"])
    assert tokenizer.characters == sorted("hélo 😉") and tokenizer.vocab_size == 6
    assert tokenizer.special_tokens == {} and tokenizer.end_of_text is None
    assert tokenizer.decode(tokenizer.encode("hello 😉".replace("e", "é"))) == "héllo 😉"
    assert tokenizer.encode_bytes("é".encode()) == tokenizer.encode("é")
    assert StreamDecoder(tokenizer).push(tokenizer.encode("😉")[0]) == "😉"
    assert tokenizer.encode("") == []


def test_character_not_in_the_vocabulary():
    with pytest.raises(ValueError, match=r"character 'é' \(U\+00E9\) at position 3 is not among the 3 characters"):
        CharTokenizer.train(["abc"]).encode("abcé")


def test_character_tokenizer_of_nothing():
    with pytest.raises(ValueError, match="empty text"):
        CharTokenizer.train(["", ""])


# ---- files ----

@pytest.mark.parametrize("pattern, special", [("gpt2", ()), (r"[a-z]+|\d", ("<é>", "<|endoftext|>")), (GPT4, ("\ud800",))])
def test_saved_and_loaded_bpe_is_the_same(tmp_path, pattern, special):
    tokenizer = train_bpe([REAL_TEXT], 350, pattern, special)
    path = tmp_path / "tok.json"
    tokenizer.save(path)
    again = load_tokenizer(path)
    assert isinstance(again, BPETokenizer)
    assert again.to_json() == tokenizer.to_json() and again.fingerprint() == tokenizer.fingerprint()
    assert again.encode(REAL_TEXT) == tokenizer.encode(REAL_TEXT)
    assert again.special_tokens == tokenizer.special_tokens and again.pattern == tokenizer.pattern
    assert os.listdir(tmp_path) == ["tok.json"]


def test_saved_and_loaded_characters_are_the_same(tmp_path):
    tokenizer = CharTokenizer.train(["abc\n\"\\ é😉\ud83d\ude09"])
    tokenizer.save(tmp_path / "tok.json")
    again = load_tokenizer(tmp_path / "tok.json")
    assert again.characters == tokenizer.characters and again.fingerprint() == tokenizer.fingerprint()


def test_fingerprint_tells_tokenizers_apart():
    several = [BPETokenizer([]), BPETokenizer([], GPT2), BPETokenizer([], special_tokens=()), BPETokenizer([(97, 98)]), CharTokenizer("ab")]
    assert len({tokenizer.fingerprint() for tokenizer in several}) == len(several)
    assert BPETokenizer([]).fingerprint() == BPETokenizer([], "gpt4").fingerprint()


def test_failed_save_keeps_the_old_file(tmp_path, bpe, monkeypatch):
    path = tmp_path / "tok.json"
    bpe.save(path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        BPETokenizer([]).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["tok.json"]


def test_save_into_a_folder_that_is_not_there(tmp_path, bpe):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        bpe.save(tmp_path / "nowhere" / "tok.json")
    with pytest.raises(IsADirectoryError, match="that is a folder; name a file in it"):
        bpe.save(tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no tokenizer file .*tinyllm tokenizer train"):
        load_tokenizer(tmp_path / "tok.json")


def test_truncated_file_at_every_length(tmp_path):
    path = tmp_path / "tok.json"
    BPETokenizer([(97, 98), (256, 99)]).save(path)
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut short") as caught:
            load_tokenizer(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


GOOD = {"kind": "bpe", "version": 1, "pattern": GPT4, "merges": [[97, 98], [256, 99]], "special_tokens": ["<|endoftext|>"]}
BAD_FILES = [
    (b"\xff\xfe\x00", "not JSON"), (b"[" * 100_000, "not JSON"), ([], '"kind"'), ({}, '"kind"'), (GOOD | {"kind": ["bpe"]}, '"kind"'),
    (GOOD | {"kind": "unigram"}, '"kind" is one of bpe, char, wordpiece'), (GOOD | {"version": 2}, "version 2, but only version 1"),
    (GOOD | {"merges": None}, '"merges" must be a list'), (GOOD | {"merges": [5]}, '"merges" must be a list'),
    (GOOD | {"merges": [[97, 256]]}, "merge 0 must be two ids from 0 to 255"), (GOOD | {"merges": [[97, -1]]}, "merge 0 must be two ids"),
    (GOOD | {"merges": [[97, 98], [97, 257]]}, "merge 1 must be two ids from 0 to 256"),
    (GOOD | {"merges": [[97]]}, "merge 0 must be two ids"),
    (GOOD | {"merges": [[97, 1.5]]}, "merge 0 must be two ids"), (GOOD | {"merges": [[97, True]]}, "merge 0 must be two ids"),
    (GOOD | {"merges": [[97, [1]]]}, "merge 0 must be two ids"), (GOOD | {"merges": [[1, 2], [1, 2]]}, "merge 1 repeats merge 0"),
    (GOOD | {"pattern": 3}, '"pattern" must be a string'), (GOOD | {"pattern": "("}, "not a regular expression"),
    (GOOD | {"special_tokens": {}}, '"special_tokens" must be a list'), (GOOD | {"special_tokens": ["a", "a"]}, "distinct"),
    ({"kind": "char", "version": 1}, '"characters" must be a list'), ({"kind": "char", "version": 1, "characters": ["b", "a"]}, "sorted"),
    ({"kind": "char", "version": 1, "characters": []}, "at least one"), ({"kind": "char", "version": 1, "characters": ["ab"]}, "length 1"),
]


@pytest.mark.parametrize("content, message", BAD_FILES)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "tok.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_the_good_file_is_good(tmp_path):
    path = tmp_path / "tok.json"
    path.write_text(json.dumps(GOOD, indent=2), encoding="utf-8")
    assert load_tokenizer(path).encode("abc") == [257]


def test_or_fewer_takes_what_the_text_gives():
    with pytest.raises(ValueError) as error:
        train_bpe(["abc abc"], 1000)
    most = int(re.search(r"ask for at most (\d+)", str(error.value))[1])
    assert train_bpe(["abc abc"], 1000, or_fewer=True).to_json() == train_bpe(["abc abc"], most).to_json()
