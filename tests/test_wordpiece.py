"""WordPiece: the trainer against its definition, longest match, splitting, what is kept in a file."""

import json
import math
import pickle
import random
import re
from collections import Counter

import pytest

from tinyllm.tokenizer import StreamDecoder, WordPieceTokenizer, add_special_tokens, encode_chat, load_tokenizer, train_wordpiece, wordpiece
from tinyllm.tokenizer.basic import basic_split
from tinyllm.tokenizer.bpe import count_pairs, merge
from tinyllm.tokenizer.gain import alphabet, frequent_characters, gain, joined, spelled, train_incremental, train_naive
from tinyllm.tokenizer.wordpiece import BERT_TOKENS, count_words

TEXT = "the lower the lowest the slower wolf, unaffable: low! low low " * 3 + "naïve Straße 東京"


@pytest.fixture(scope="module")
def trained():
    return train_wordpiece([TEXT], 60, special_tokens=["<|a|>"])


def small(*tokens, **options):
    return WordPieceTokenizer([*BERT_TOKENS, *tokens], **options)


def tokens_of(tokenizer, text):
    return [tokenizer.vocabulary[i] for i in tokenizer.encode_ordinary(text)]


# ---- learning ----

def test_worked_example():
    """hug ×10, pug ×5, pun ×12, bun ×4, hugs ×5: 113 tokens, of which 36 are ##u, 20 ##g and 16 ##n."""
    words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    assert gain(20, 36, 20, 113) == pytest.approx(20 * math.log(113 / 36))       # ##ug: the greatest
    assert gain(5, 20, 5, 113) == pytest.approx(5 * math.log(113 / 20))          # ##gs: the greatest score, but of five places only
    assert train_naive(words, 99) == ["##ug", "##un", "hug", "pun", "pug", "bun", "hugs"]


def log_likelihood(pieces, probability):
    return sum(count * math.log(probability[token]) for piece, count in pieces.items() for token in piece)


def test_the_gain_is_that_of_the_likelihood():
    """Of a text whose tokens are drawn one by one, each with its share of them all; the new one with that of its places."""
    words = {"ab": 30, "acab": 70, "db": 50, "eb": 20, "af": 10, "cda": 40, "c": 9, "bca": 5}
    pieces = {spelled(word): count for word, count in words.items()}
    counts = Counter(token for piece, count in pieces.items() for token in piece for _ in range(count))
    probability = {token: count / counts.total() for token, count in counts.items()}
    gains = {}
    for pair, together in count_pairs(pieces).items():
        merged = {merge(piece, pair, joined(pair)): count for piece, count in pieces.items()}
        probability[joined(pair)] = together / counts.total()
        gains[pair] = log_likelihood(merged, probability) - log_likelihood(pieces, probability)
        assert gain(together, counts[pair[0]], counts[pair[1]], counts.total()) == pytest.approx(gains[pair], rel=1e-9)
    assert train_naive(words, 1) == [joined(max(gains, key=gains.get))]


@pytest.mark.parametrize("seed", range(40))
def test_incremental_trainer_equals_naive(seed):
    """Few letters and short words: runs of one letter, overlapping pairs and ties everywhere, tokens that are made in two ways."""
    draw = random.Random(seed)
    letters = "abcd"[: draw.randint(1, 4)]
    words = {"".join(draw.choices(letters, k=draw.randint(1, 9))): draw.randint(1, 6) for _ in range(draw.randint(1, 25))}
    for count in (0, 1, 7, 99):
        assert train_incremental(words, count) == train_naive(words, count)


def test_incremental_trainer_equals_naive_on_real_text():
    words = count_words([json.__doc__, random.__doc__, re.__doc__])
    assert train_incremental(words, 300) == train_naive(words, 300)


def test_no_pair_below_chance_is_merged():
    words = {"aaaa": 1}          # ##a ##a stands twice, by chance 9/4 times
    assert gain(2, 3, 3, 4) < 0 < gain(1, 1, 3, 4) and train_naive(words, 9) == train_incremental(words, 9) == ["aa", "aaa", "aaaa"]


def test_a_token_made_in_two_ways_counts_once():
    for seed in range(30):
        draw = random.Random(seed)
        words = {"".join(draw.choices("ab", k=6)): draw.randint(1, 9) for _ in range(8)}
        made = train_incremental(words, 99)
        assert len(made) == len(set(made))


def test_vocabulary_is_what_was_asked_for(trained):
    assert trained.vocab_size == 60 == len(trained.vocabulary) + 1 and trained.vocabulary[:5] == list(BERT_TOKENS)
    assert trained.special_tokens == {name: i for i, name in enumerate(BERT_TOKENS)} | {"<|a|>": 59}
    assert (trained.pad, trained.unk, trained.cls, trained.sep, trained.mask) == (0, 1, 2, 3, 4) and trained.end_of_text == trained.sep
    assert tokens_of(trained, "The LOWER") == ["the", "lower"] and trained.unk not in trained.encode(TEXT)


def test_rare_characters_make_a_word_unknown():
    text = "aa ab ba bb " * 5 + "abz"
    tokenizer = train_wordpiece([text], 12, characters=2, or_fewer=True)
    assert tokens_of(tokenizer, "ab abz z") == ["ab", "[UNK]", "[UNK]"]
    assert frequent_characters({"abc": 1, "c": 1}, 2) == {"a", "c"} and alphabet(["ab", "b"]) == ["##b", "a", "b"]


def test_training_learns_nothing_from_special_tokens_and_endless_words():
    assert count_words(["ab[SEP]ab<x>ab " + "c" * 101], special_tokens=["<x>"]) == {"ab": 3}
    assert count_words(["Éa", "éa"]) == {"ea": 2} and count_words(["Éa"], lower_case=False) == {"Éa": 1}


@pytest.mark.parametrize("options, message", [
    (dict(vocab_size=8), r"8 \(--vocab-size\) is too small: 5 \+ 0 special tokens and 4 characters, with and without ##, need 9"),
    (dict(vocab_size=99), r"99 \(--vocab-size\) is more than this text can give: after 2 merges .* at most 11"),
    (dict(vocab_size=99, special_tokens=["[SEP]"]), "distinct"), (dict(vocab_size=99, special_tokens=[""]), "non-empty"),
    (dict(vocab_size=99, characters=0), "at least one"),
])  # fmt: skip
def test_training_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        train_wordpiece(["ab cd"], **options)


def test_training_on_one_string_or_nothing():
    with pytest.raises(ValueError, match=r"write \[text\]"):
        train_wordpiece("ab", 9)
    assert train_wordpiece(["", " "], 99, or_fewer=True).vocabulary == list(BERT_TOKENS)
    assert train_wordpiece(["ab cd"], 99, or_fewer=True).vocab_size == 11


# ---- text -> ids ----

def longest_match_by_definition(word, vocabulary):
    """All prefixes tried, no cleverness."""
    if not word.removeprefix("##") or len(word) > 100:
        return [] if len(word) <= 100 else None
    for end in range(len(word), word.startswith("##") * 2, -1):
        if word[:end] in vocabulary:
            rest = longest_match_by_definition("##" + word[end:], vocabulary)
            return None if rest is None else [word[:end], *rest]
    return None


@pytest.mark.parametrize("seed", range(20))
def test_longest_match(seed):
    draw = random.Random(seed)
    vocabulary = {draw.choice(["", "##"]) + "".join(draw.choices("abc", k=draw.randint(1, 3))) for _ in range(12)}
    tokenizer = small(*sorted(vocabulary))
    for _ in range(100):
        word = "".join(draw.choices("abc", k=draw.randint(1, 8)))
        assert tokens_of(tokenizer, word) == (longest_match_by_definition(word, vocabulary) or ["[UNK]"]), word


def test_longest_match_never_goes_back():
    tokenizer = small("ab", "abc", "##cd", "a", "##b")
    assert tokens_of(tokenizer, "ab abcd aba acd") == ["ab", "[UNK]", "[UNK]", "a", "##cd"]


def test_long_words():
    tokenizer = small("a", "##a")
    assert tokens_of(tokenizer, "a" * 100) == ["a", *["##a"] * 99] and tokens_of(tokenizer, "a" * 101) == ["[UNK]"]


@pytest.mark.parametrize("text, words, cased", [
    ("", [], []), (" \t\r\n\u00a0\u3000\u2028", [], []), ("a", ["a"], ["a"]), ("Hello, World!", ["hello", ",", "world", "!"], ["Hello", ",", "World", "!"]),
    ("don't $5+x_y", ["don", "'", "t", "$", "5", "+", "x", "_", "y"], ["don", "'", "t", "$", "5", "+", "x", "_", "y"]),
    ("Éé e\u0301", ["ee", "e"], ["Éé", "e\u0301"]), ("İ ẞ Σ", ["i", "ß", "σ"], ["İ", "ẞ", "Σ"]), ("\u0301", [], ["\u0301"]),
    ("a東京b の", ["a", "東", "京", "b", "の"], ["a", "東", "京", "b", "の"]), ("a\u200b\x00\x85\ufffd\ue000b\ud800", ["ab"], ["ab"]),
    ("„a“…", ["„", "a", "“", "…"], ["„", "a", "“", "…"]), ("한", ["\u1112\u1161\u11ab"], ["한"]), ("😀a", ["😀a"], ["😀a"]),
])  # fmt: skip
def test_basic_splitting(text, words, cased):
    assert basic_split(text) == words and basic_split(text, lower_case=False) == cased


def test_chinese_characters_stand_alone():
    """The ends of each block, as far as there are characters there, and neighbours of blocks, which do not."""
    for code in (0x3400, 0x4DB5, 0x4E00, 0x9FA5, 0xF900, 0xFAD9, 0x20000, 0x2A6D6, 0x2A700, 0x2B81D, 0x2B920, 0x2CEA1, 0x2F800, 0x2FA1D):
        assert basic_split(f"a{chr(code)}b", False) == ["a", chr(code), "b"], hex(code)
    for code in (0x4DC0, 0x33FF, 0xA000, 0xFB00, 0x3042, 0xAC00):
        assert basic_split(f"a{chr(code)}b", False) == [f"a{chr(code)}b"]


def test_special_tokens_in_a_text(trained):
    with pytest.raises(ValueError, match=r"special token '\[SEP\]' at position 3"):
        trained.encode("low[SEP]")
    assert trained.encode("low[SEP]low<|a|>", allowed_special="all")[1::2] == [trained.sep, 59]
    assert not {trained.sep, 59} & set(trained.encode("[SEP] <|a|> [sep]", disallowed_special=()))


def test_arrays_bytes_and_the_cache(trained, monkeypatch):
    monkeypatch.setattr(wordpiece, "CACHED_WORDS", 2)
    tokenizer = WordPieceTokenizer(trained.vocabulary)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.encode(TEXT) == ids == tokenizer.encode_to_numpy(TEXT).tolist() == tokenizer.encode_bytes(TEXT.encode())
    assert 0 < len(tokenizer._cache) <= 2 and not pickle.loads(pickle.dumps(tokenizer))._cache
    with pytest.raises(UnicodeDecodeError):
        tokenizer.encode_bytes(b"a\xff")


# ---- ids -> text ----

def test_decoding(trained):
    ids = trained.encode("  The LOWEST,\n wolf!東京")
    assert trained.decode(ids) == "the lowest , wolf ! 東 京" and trained.decode([]) == ""
    assert trained.decode([trained.cls, *trained.encode("low xyzq"), trained.sep]) == "[CLS] low [UNK] [SEP]"
    assert trained.encode(trained.decode(ids)) == ids
    with pytest.raises(ValueError, match="id 60 is not in this tokenizer"):
        trained.decode([60])


def test_tokens_that_come_one_by_one_make_the_same_text(trained):
    stream = StreamDecoder(trained)
    ids = [trained.cls, *trained.encode(TEXT), trained.mask]
    assert "".join(map(stream.push, ids)) + stream.flush() == " " + trained.decode(ids)
    assert [trained.token_bytes(i) for i in (trained.vocabulary.index("##r"), trained.vocabulary.index("l"))] == [b"r", b" l"]


def test_words_come_back():
    """Whatever is decoded has the words of the text, as far as these are known."""
    draw = random.Random(1)
    tokenizer = train_wordpiece([TEXT], 60)
    words = ["low", "LOWER", "slow", "wolf", ",", "東京", "naive", "Naïve", "table", "xx", "the"]
    for _ in range(200):
        text = draw.choice(["", " ", "\n"]).join(draw.choices(words, k=8))
        ids = tokenizer.encode(text)
        if tokenizer.unk not in ids:
            assert tokenizer.decode(ids).split(" ") == basic_split(text)


# ---- in a file ----

@pytest.mark.parametrize("options", [{}, {"lower_case": False}, {"special_tokens": ["<|x|>", "é😀"]}])
def test_saved_and_loaded_is_the_same(tmp_path, options):
    tokenizer = train_wordpiece([TEXT], 60, **options)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, WordPieceTokenizer) and loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT) and loaded.special_tokens == tokenizer.special_tokens


def test_special_tokens_may_stand_anywhere_in_the_vocabulary(tmp_path):
    """As in BERT's own, where [PAD] is 0 and [MASK] 103."""
    tokenizer = WordPieceTokenizer(["[PAD]", "a", "[MASK]", "##b", "[UNK]", "[SEP]", "[CLS]"])
    tokenizer.save(tmp_path / "t.json")
    loaded = load_tokenizer(tmp_path / "t.json")
    assert loaded.encode("ab[MASK]", allowed_special="all") == [1, 3, 2] and (loaded.cls, loaded.sep, loaded.mask) == (6, 5, 2)


def test_chat_tokens_can_be_added(trained):
    tokenizer = add_special_tokens(trained)
    assert tokenizer.vocab_size == 64 and tokenizer.special_tokens["<|a|>"] == 59
    ids, learned = encode_chat(tokenizer, [{"role": "user", "content": "low <|end|>"}, {"role": "assistant", "content": "lower"}])
    assert ids.count(tokenizer.special_tokens["<|end|>"]) == 2 and sum(learned) == 2


GOOD = {"kind": "wordpiece", "version": 1, "vocabulary": [*BERT_TOKENS, "a"], "lower_case": True, "special_tokens": []}


@pytest.mark.parametrize("change, message", [
    ({"vocabulary": "abc"}, '"vocabulary" must be a list'), ({"lower_case": 1}, '"lower_case" must be true or false'),
    ({"special_tokens": None}, '"special_tokens" must be a list'), ({"vocabulary": [*BERT_TOKENS, 5]}, "list of strings"),
    ({"vocabulary": [*BERT_TOKENS, ["a"]]}, "list of strings"), ({"vocabulary": [*BERT_TOKENS, ""]}, "none of them empty"),
    ({"vocabulary": [*BERT_TOKENS, "a", "a"]}, "the token 'a' more than once"), ({"vocabulary": ["a"]}, r"no \[PAD\]: it must hold"),
    ({"vocabulary": BERT_TOKENS[:4]}, r"no \[MASK\]"), ({"special_tokens": ["[SEP]"]}, "distinct"), ({"special_tokens": [3]}, "strings"),
])  # fmt: skip
def test_bad_files(tmp_path, change, message):
    path = tmp_path / "tok.json"
    path.write_text(json.dumps(GOOD))
    assert load_tokenizer(path).encode("a b") == [5, 1]
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
