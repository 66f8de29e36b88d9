"""Sentences, pairs of them, and rows with masked tokens: what is drawn, how often, and that it depends on seed and step alone."""
from collections import Counter

import numpy as np
import pytest

from tinyllm.data import IGNORE, Document, MaskedBatches, Passages, SentencePairs, encode_sentences, split_sentences
from tinyllm.data.masking import RATE, corrupt
from tinyllm.data.sentences import IS_NEXT, IS_RANDOM, sentence_pieces, stored_sentences
from tinyllm.data.tinyworld import World
from tinyllm.tokenizer import CharTokenizer


class Letters(CharTokenizer):
    """Characters, and the special tokens of an encoder."""

    def __init__(self, characters):
        super().__init__(characters)
        names = ("[CLS]", "[SEP]", "[MASK]", "[PAD]")
        first = len(self._bytes)
        self.special_tokens = {name: first + i for i, name in enumerate(names)}
        self._bytes |= {i: name.encode() for name, i in self.special_tokens.items()}
        self.cls, self.sep, self.mask, self.pad = self.special_tokens.values()


LETTERS = Letters(" .abcdefghijklmnopqrstuvwxyz")
SPECIAL = np.arange(LETTERS.vocab_size) >= 28
DOCUMENTS = [[[0, 1], [2, 3, 4], [5]], [[6]], [[7, 8], [9]]]


def batches_of(documents=DOCUMENTS, context=12, batch=4, seed=0, **options):
    return MaskedBatches(SentencePairs(documents, context), LETTERS, batch, seed, **options)


# ---- sentences ----

@pytest.mark.parametrize("text, sentences", [
    ("A cat. It eats. ", ["A cat.", "It eats."]), ("", []), (" \n\n ", []), ("One", ["One"]), ("Really?! Yes… no", ["Really?!", "Yes…", "no"]),
    ('He said "go." She went.', ['He said "go."', "She went."]), ("Title\n\nText goes on\nhere.", ["Title", "Text goes on", "here."]),
    ("3.14 is pi.e.g. this", ["3.14 is pi.e.g.", "this"]), ("猫。它吃。鱼", ["猫。", "它吃。", "鱼"]), ("Où? Là !\tÇa 🦊.", ["Où?", "Là !", "Ça 🦊."]),
    ("...", ["..."]), (". . .", [".", ".", "."]),
])  # fmt: skip
def test_split_sentences(text, sentences):
    assert split_sentences(text) == sentences


def test_sentences_of_tinyworld_are_its_own():
    for item in World(0).documents("fact", 20):
        assert split_sentences(item.text) == item.sentences()


def test_what_says_nothing_is_left_out():
    found = encode_sentences(LETTERS, [Document("ab. c.", "a"), Document("", "b"), Document(" \n", "c"), Document("d", "d")])
    assert [[ids.tolist() for ids in sentences] for sentences in found] == [[[2, 3, 1], [4, 1]], [[5]]]
    assert encode_sentences(LETTERS, []) == []


# ---- pairs ----

def test_sentences_on_disk():
    texts = [Document("ab. c.", "a"), Document("", "b"), Document("d", "d"), Document("e. f. g.", "e")]
    pieces = list(sentence_pieces(texts, LETTERS, None))
    sep = LETTERS.sep
    assert [(ids.tolist(), size) for ids, size in pieces[:2]] == [([2, 3, 1, sep, 4, 1, sep, sep], 6), ([5, sep, sep], 1)]
    tokens = np.concatenate([ids for ids, _ in pieces])
    found = [[ids.tolist() for ids in sentences] for sentences in stored_sentences(tokens, sep)]
    assert found == [[ids.tolist() for ids in sentences] for sentences in encode_sentences(LETTERS, texts)]
    assert stored_sentences(np.array([], np.uint16), sep) == []


def test_each_sentence_with_a_next_one_is_a_first():
    pairs = SentencePairs(DOCUMENTS, 20)
    firsts = [parts[0] for parts, _ in pairs.rows(range(len(pairs)), np.random.default_rng(0))]
    assert len(pairs) == 3 and firsts == [[0, 1], [2, 3, 4], [7, 8]]


def test_seconds_are_next_or_drawn_as_they_should():
    pairs, follows = SentencePairs(DOCUMENTS, 20), {(0, 1): (2, 3, 4), (2, 3, 4): (5,), (7, 8): (9,)}
    rows = pairs.rows([0, 1, 2] * 4000, np.random.default_rng(0))
    assert all(tuple(b) == follows[tuple(a)] for (a, b), label in rows if label == IS_NEXT)
    drawn = Counter(tuple(b) for (_, b), label in rows if label == IS_RANDOM)
    total = sum(drawn.values())
    assert abs(total / len(rows) - 0.5) < 4 * 0.5 / len(rows) ** 0.5
    expected = {tuple(s): 1 / (3 * len(d)) for d in DOCUMENTS for s in d}  # a random sentence of a random document
    assert drawn.keys() == expected.keys()
    for sentence, p in expected.items():
        assert abs(drawn[sentence] / total - p) < 4 * (p / total) ** 0.5


@pytest.mark.parametrize("lengths, room, kept", [((3, 3), 6, (3, 3)), ((9, 2), 6, (4, 2)), ((2, 9), 6, (2, 4)), ((9, 9), 7, (4, 3)), ((1, 9), 2, (1, 1))])
def test_the_longer_sentence_loses_its_end(lengths, room, kept):
    first, second = list(range(lengths[0])), list(range(lengths[1]))
    said = []
    pairs = SentencePairs([[first, second]], room + 3, said.append)
    found = [parts for parts, label in pairs.rows([0] * 20, np.random.default_rng(0)) if label == IS_NEXT]
    assert found[0] == [first[: kept[0]], second[: kept[1]]]
    cut = sum(lengths) > room
    assert said == [f"1 of 1 pairs of sentences are longer than a row of {room + 3} tokens: the longer sentence loses its end"] * cut


def test_pairs_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="none of 2 documents has two sentences"):
        SentencePairs([[[1]], [[2]]], 20)
    with pytest.raises(ValueError, match="none of 0 documents"):
        SentencePairs([], 20)
    with pytest.raises(ValueError, match="context of at least 5 tokens, got 4"):
        SentencePairs(DOCUMENTS, 4)


def test_passages():
    rows = Passages([[1, 2, 3, 4, 5], [], [6]], 4).rows([0, 1, 2, 3], np.random.default_rng(0))
    assert [parts for parts, _ in rows] == [[[1, 2]], [[3, 4]], [[5]], [[6]]]
    with pytest.raises(ValueError, match="all documents are empty"):
        Passages([[], []], 4)
    with pytest.raises(ValueError, match="at least 3 tokens, got 2"):
        Passages([[1]], 2)


# ---- masks ----

def test_shares_are_those_of_bert():
    """Each within four standard deviations of a count."""
    ids = np.random.default_rng(0).integers(32, size=(400, 500))
    unreadable, targets = corrupt(ids, SPECIAL, LETTERS.mask, np.random.default_rng(1))
    chosen, ordinary = targets != IGNORE, ~SPECIAL[ids]

    def near(count, total, p):
        return abs(count - total * p) < 4 * (total * p * (1 - p)) ** 0.5

    assert near(chosen.sum(), ordinary.sum(), RATE) and not (chosen & ~ordinary).any()
    np.testing.assert_array_equal(targets[chosen], ids[chosen])
    np.testing.assert_array_equal(unreadable[~chosen], ids[~chosen])
    masked, same = unreadable[chosen] == LETTERS.mask, unreadable[chosen] == ids[chosen]
    assert near(masked.sum(), chosen.sum(), 0.8) and near(same.sum(), chosen.sum(), 0.1 + 0.1 / 28)
    others = unreadable[chosen][~masked & ~same]
    assert not SPECIAL[others].any() and all(near((others == i).sum(), len(others), 1 / 28) for i in range(28))


def test_rows_of_special_tokens_and_no_rows():
    ids = np.full((2, 3), LETTERS.sep)
    unreadable, targets = corrupt(ids, SPECIAL, LETTERS.mask, np.random.default_rng(0), 0.9)
    assert (unreadable == ids).all() and (targets == IGNORE).all()
    assert corrupt(np.zeros((0, 3), int), SPECIAL, 1, np.random.default_rng(0))[0].shape == (0, 3)


# ---- batches ----

def test_a_row_is_framed_and_padded():
    batch = batches_of([[[0, 1], [2]], [[0, 1], [2]], [[0, 1], [2, 3, 4]]], batch=3, seed=3).batch(0).restored()
    cls, sep, pad = LETTERS.cls, LETTERS.sep, LETTERS.pad
    rows = {tuple(row[row != pad].tolist()) for row in batch.ids}
    assert rows <= {(cls, 0, 1, sep, *second, sep) for second in ((0, 1), (2,), (2, 3, 4))}
    for ids, segments, documents in zip(batch.ids, batch.segments, batch.documents, strict=True):
        n = np.count_nonzero(ids != pad)
        assert segments.tolist() == [0] * 4 + [1] * (n - 4) + [0] * (len(ids) - n)
        assert documents.tolist() == [0] * n + [IGNORE] * (len(ids) - n)
    one = MaskedBatches(Passages([[0, 1, 2]], 8), LETTERS, 1, seed=0).batch(0).restored()
    assert one.ids.tolist() == [[cls, 0, 1, 2, sep]] and one.segments.tolist() == [[0] * 5] and one.labels is None and one.part(0, 1).labels is None


def test_a_batch_depends_on_seed_and_step_alone():
    items = [[LETTERS.encode_ordinary(s.lower()) for s in item.sentences()] for item in World(0).documents("fact", 9)]
    one, other = batches_of(items, 90, seed=1), batches_of(items, 90, seed=1)
    for step in (5, 0, 5):
        for name, array in vars(one.batch(step)).items():
            np.testing.assert_array_equal(array, getattr(other.batch(step), name))
    assert one.batch(0).ids.tolist() != batches_of(items, 90, seed=2).batch(0).ids.tolist()
    steps = -(-len(one.source) // 4) * 2
    firsts = Counter(tuple(row[1:9]) for step in range(steps) for row in one.batch(step).restored().ids)
    assert len(firsts) >= 10  # each pair in every epoch
    masks = [one.batch(step).targets != IGNORE for step in range(4)]
    assert len({mask.tobytes() for mask in masks}) == 4


def test_each_row_once_in_order_and_the_same_each_time():
    batches = batches_of(batch=2)
    first, again = list(batches.in_order()), list(batches.in_order())
    assert [len(batch) for batch in first] == [1, 2] and len({batch.mean_targets for batch in first}) == 1
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
    assert [row[1] for batch in first for row in batch.restored().ids] == [0, 2, 7]
    count = sum(np.count_nonzero(batch.targets != IGNORE) for batch in first)
    assert count == pytest.approx(first[0].mean_targets * 3)


def test_parts():
    whole = batches_of(batch=7).batch(0)
    parts = [whole.part(i, 3) for i in range(3)]
    assert [len(part) for part in parts] == [part.weight for part in parts] == [2, 2, 3] and {p.mean_targets for p in parts} == {whole.mean_targets}
    for name in ("ids", "segments", "documents", "targets", "labels"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize("options, message", [(dict(batch=0), "at least 1 row, got 0"), (dict(rate=0.0), "between 0 and 1, got 0.0"), (dict(rate=1.5), "got 1.5")])
def test_batches_of_another_kind_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches_of(**options)
