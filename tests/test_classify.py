"""Classification: pooling, batches, frozen parts, the loss, and metrics against their definitions."""
import numpy as np
import pytest

from tinyllm.finetune import (
    LabelledBatches,
    accuracy,
    classification_loss,
    confusion_matrix,
    encode_texts,
    f1_scores,
    learn_top,
    predict,
    report,
)
from tinyllm.nn import Classifier, Transformer, TransformerConfig, unfreeze
from tinyllm.optim import AdamW
from tinyllm.tensor import no_grad
from tinyllm.tokenizer import BPETokenizer, CharTokenizer
from tinyllm.train import TrainConfig, train

ROWS = [[3, 1, 4], [1, 5, 9, 2, 6], [5], [3, 5, 8, 9]]
LABELS = [0, 2, 1, 0]


def model_of(dtype=np.float32, **choices):
    config = TransformerConfig(**(dict(vocab_size=20, layers=3, heads=2, width=16, context=12) | choices))
    return Transformer(config, np.random.default_rng(0), dtype)


def classifier_of(dtype=np.float32, pooling="last", **choices):
    classifier = Classifier(model_of(dtype, **choices), 3, pooling=pooling)
    classifier.head.weight.data[...] = np.random.default_rng(1).standard_normal(classifier.head.weight.shape)
    return classifier


@pytest.mark.parametrize("pooling", ["last", "first", "mean"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_scores_are_those_of_each_text_alone(pooling, arch):
    classifier = classifier_of(np.float64, pooling, arch=arch)
    together = predict(classifier, LabelledBatches(ROWS, LABELS, 4, seed=0).in_order())
    with no_grad():
        for row, scores in zip(ROWS, together, strict=True):
            hidden = classifier.model.hidden(np.array([row])).numpy()[0]
            vector = {"last": hidden[-1], "first": hidden[0], "mean": hidden.mean(0)}[pooling]
            np.testing.assert_allclose(scores, classifier.head.weight.data @ vector, rtol=1e-10, atol=1e-12)
    assert (np.abs(together[0] - together[3]).max() < 1e-12) == (pooling == "first")  # both texts begin alike, and no token looks ahead


def test_a_new_head_finds_all_classes_equally_likely():
    classifier = Classifier(model_of(), 3)
    assert classification_loss(classifier, LabelledBatches(ROWS, LABELS, 4, 0).batch(0), None).item() == pytest.approx(np.log(3))
    with pytest.raises(ValueError, match="at least 2 classes"):
        Classifier(model_of(), 1)
    with pytest.raises(ValueError, match="pooling 'lst' is unknown; did you mean last"):
        Classifier(model_of(), 2, pooling="lst")


def test_batches():
    batches = LabelledBatches(ROWS, LABELS, 3, seed=0)
    first, second = batches.in_order()
    np.testing.assert_array_equal(first.ids, [[3, 1, 4, 0, 0], [1, 5, 9, 2, 6], [5, 0, 0, 0, 0]])
    assert first.lengths.tolist() == [3, 5, 1] and first.labels.tolist() == [0, 2, 1] and first.weight == len(first) == 3
    assert second.ids.shape == (1, 4)
    assert [first.part(i, 2).labels.tolist() for i in range(2)] == [[0], [2, 1]] and first.part(1, 2).ids.shape == (2, 5)
    drawn = [label for step in range(4) for label in batches.batch(step).labels.tolist()]
    assert all(sorted(drawn[i : i + 4]) == sorted(LABELS) for i in range(0, 12, 4))
    for rows, labels, size in (([], [], 1), (ROWS, [0], 1), (ROWS, LABELS, 0)):
        with pytest.raises(ValueError, match="at least one each"):
            LabelledBatches(rows, labels, size, 0)


def test_texts_become_rows_and_what_is_cut_is_said():
    said, tokenizer = [], BPETokenizer([])
    assert encode_texts(tokenizer, ["ab", "", "abcdef", "<|endoftext|>"], 5, said.append) == [[256, 97, 98], [256], [256, *b"abcd"], [256, *b"<|en"]]
    assert said == ["2 of 4 texts are longer than the model's context of 5 tokens: only their beginning is read"]
    assert encode_texts(CharTokenizer("ab"), ["ba"], 5) == [[1, 0]]


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_only_the_top_is_learned_and_the_rest_costs_nothing(blocks):
    classifier = classifier_of()
    learn_top(classifier, blocks)
    learned = {name for name, p in classifier.named_parameters() if p.requires_grad}
    top = tuple(f"model.blocks.{i}." for i in range(3 - blocks, 3))
    assert learned == {n for n in classifier.state_dict() if n.startswith(("head.", *top)) or (blocks and n == "model.norm.weight")}
    before = {name: array.copy() for name, array in classifier.state_dict().items()}
    classification_loss(classifier, LabelledBatches(ROWS, LABELS, 4, 0).batch(0), None).backward()
    assert {name for name, p in classifier.named_parameters() if p.grad is not None} == learned
    optimizer = AdamW(classifier.named_parameters())
    assert optimizer.flat.data.size == sum(before[name].size for name in learned)
    optimizer.step(0.1)
    assert {name for name, array in classifier.state_dict().items() if (array != before[name]).any()} == learned
    unfreeze(classifier)
    assert all(p.requires_grad for _, p in classifier.named_parameters())
    with pytest.raises(ValueError, match="the model has 3 blocks, of which 4 cannot"):
        learn_top(classifier, 4)


def test_below_the_lowest_learned_part_nothing_is_recorded():
    """A frozen block's result asks for no gradient, so that backward ends above it."""
    classifier = classifier_of()
    learn_top(classifier, 0)
    batch = LabelledBatches(ROWS, LABELS, 4, 0).batch(0)
    assert not classifier.model.hidden(batch.ids).requires_grad and classifier(batch.ids, batch.lengths).requires_grad


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_one_batch_is_learned_by_heart_through_the_loop(pooling):
    classifier, batches, losses = Classifier(model_of(), 3, pooling=pooling), LabelledBatches(ROWS, LABELS, 4, seed=0), []
    config = TrainConfig(lr=1e-2, weight_decay=0.0, threads=1).planned(60)
    train(classifier, lambda n: [batches.batch(n)], classification_loss, config, observers=[lambda record: losses.append(record["loss"])])
    assert losses[0] == pytest.approx(np.log(3), abs=1e-4) and losses[-1] < 0.01
    assert predict(classifier, batches.in_order()).argmax(1).tolist() == LABELS


def test_metrics_by_their_definitions():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 4, (2, 300))
    confusion = confusion_matrix(labels, guesses, 5)  # class 4 never occurs
    pairs = list(zip(labels.tolist(), guesses.tolist(), strict=True))
    assert confusion.tolist() == [[pairs.count((i, j)) for j in range(5)] for i in range(5)]
    assert accuracy(confusion) == sum(a == b for a, b in pairs) / 300
    for k, (p, r, f) in enumerate(zip(*f1_scores(confusion), strict=True)):
        hits = pairs.count((k, k))
        taken, real = sum(b == k for _, b in pairs), sum(a == k for a, _ in pairs)
        expected = (hits / taken, hits / real) if k < 4 else (0, 0)
        assert (p, r) == pytest.approx(expected)
        assert f == pytest.approx(2 * p * r / (p + r) if k < 4 else 0)


def test_metrics_on_paper():
    confusion = confusion_matrix([0, 0, 0, 1, 1], [0, 0, 1, 1, 0], 2)
    assert confusion.tolist() == [[2, 1], [1, 1]] and accuracy(confusion) == 0.6
    assert f1_scores(confusion)[2] == pytest.approx([2 / 3, 1 / 2])
    lines = report(confusion, ["ham", "spam"]).splitlines()
    assert lines[1].split() == ["ham", "2", "1", "0.667", "0.667", "0.667"] and lines[-1] == "accuracy 0.600, macro F1 0.583"
    assert len({len(line) for line in lines[:-1]}) == 1
    empty = confusion_matrix([], [], 2)
    assert np.isnan(accuracy(empty)) and f1_scores(empty)[2].tolist() == [0, 0]
    for labels, guesses, message in (([0], [0, 1], "a guess is needed for each"), ([0], [2], "from 0 to 1, found 2"), ([-1], [0], "found -1")):
        with pytest.raises(ValueError, match=message):
            confusion_matrix(labels, guesses, 2)
