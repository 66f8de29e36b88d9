"""Turn a model that continues texts into one that sorts them, with two dozen labels.

A language model that has read many guests' notes has seen that "superb" and "lovely" go together, though nobody told it that they are
praise. A few labelled notes then tell it which side is which. The labels show only a few of the words: those that are tested
occur in no labelled note. You will see

    1. the notes, and how little of them is labelled
    2. a language model learn to continue them, without any label
    3. four ways to make a classifier: from scratch, with frozen weights, with an adapter (LoRA), with everything learned
    4. how sure the fine-tuned one is of its guesses, and its table of errors

    python examples/07_classify.py [--steps 250]
"""
import argparse
import copy

import numpy as np

from tinyllm import ops
from tinyllm.backend import random_stream
from tinyllm.data import RandomWindows
from tinyllm.finetune import LabelledBatches, accuracy, classification_loss, confusion_matrix, encode_texts, learn_top, predict, report
from tinyllm.nn import Classifier, LoRA, LoRAConfig, Transformer, TransformerConfig
from tinyllm.tensor import Tensor
from tinyllm.tokenizer import train_bpe
from tinyllm.train import TrainConfig, next_token_loss, train

THINGS = "room bed view soup bread coffee garden pool music staff".split()
WORDS = {
    "praise": "good lovely superb bright perfect charming splendid delightful excellent wonderful".split(),
    "complaint": "bad dirty gloomy awful poor dreadful terrible horrible miserable shabby".split(),
}
ENDS = {"praise": "I will come again.", "complaint": "Never again."}
NAMES = list(WORDS)
LABELLED, SHOWN = 24, 3  # labelled notes, and how many of each side's words they use


def note(label, words, rng):
    """Two sentences about two things, both praised or both not."""
    first, second = rng.choice(THINGS, 2, replace=False)
    return f"The {first} was {rng.choice(words)}. The {second} was {rng.choice(words)}."


def unlabelled(count, rng):
    """Notes as they come, most with a last sentence."""
    for label in rng.choice(NAMES, count):
        yield note(label, WORDS[label], rng) + rng.choice(["", f" {ENDS[label]}"])


def labelled(count, words_of, rng):
    """Texts and the numbers of their labels, in turn."""
    labels = [i % len(NAMES) for i in range(count)]
    return [note(NAMES[i], words_of(WORDS[NAMES[i]]), rng) for i in labels], labels


def quiet_train(model, batches, loss_fn, steps, lr):
    """The one training loop. Returns the loss of every step."""
    losses = []
    config = TrainConfig(lr=lr, weight_decay=0.01, threads=1).planned(steps)
    train(model, lambda n: [batches.batch(n)], loss_fn, config, observers=[lambda record: losses.append(record["loss"])])
    return losses


def pretrain(tokenizer, texts, steps):
    """A small language model of the texts."""
    tokens = np.concatenate([[tokenizer.end_of_text, *tokenizer.encode(text)] for text in texts])
    model = Transformer(TransformerConfig(vocab_size=tokenizer.vocab_size, layers=2, heads=4, width=64, context=32), random_stream(0, "weights"))
    losses = quiet_train(model, RandomWindows(tokens, 32, 16, seed=0), next_token_loss(TrainConfig()), steps, lr=4e-3)
    return model, losses


def ways(pretrained):
    """Four classifiers before they see a label, by name."""
    fresh = Transformer(pretrained.config, random_stream(1, "weights"))
    yield "from scratch", Classifier(fresh, len(NAMES))
    frozen = Classifier(copy.deepcopy(pretrained), len(NAMES))
    learn_top(frozen, blocks=0)
    yield "head alone, rest frozen", frozen
    adapted = Classifier(copy.deepcopy(pretrained), len(NAMES))
    LoRA(adapted.model, LoRAConfig(rank=4), random_stream(0, "adapter"))
    yield "head and LoRA of rank 4", adapted
    yield "everything", Classifier(copy.deepcopy(pretrained), len(NAMES))


def run(steps):
    """The whole experiment. Returns (name, learned parameters, loss on the labelled notes, accuracy, confusion matrix) of each way."""
    rng = np.random.default_rng(0)
    texts = list(unlabelled(2000, rng))
    tokenizer = train_bpe(texts, 400, or_fewer=True)
    known = labelled(LABELLED, lambda words: words[:SHOWN], rng)
    unseen = labelled(200, lambda words: words[SHOWN:], rng)
    print(f"1. {len(texts):,} notes without labels, {LABELLED} with one. The {len(unseen[0])} that are tested praise and blame in other words:")
    for name, (notes, labels) in {"labelled": known, "tested": unseen}.items():
        print(f"   {name:<8} {notes[0]!r} {NAMES[labels[0]]}\n            {notes[1]!r} {NAMES[labels[1]]}")

    model, losses = pretrain(tokenizer, texts, steps)
    print(f"\n2. {steps} steps on notes without labels: from {losses[0]:.2f} to {np.mean(losses[-20:]):.2f} nats a token\n")
    print(f"3. {'what is learned':<26}parameters   loss on labelled notes   right on unseen words")
    results = []
    for name, classifier in ways(model):
        rows, tests = (encode_texts(tokenizer, part, model.config.context) for part in (known[0], unseen[0]))
        losses = quiet_train(classifier, LabelledBatches(rows, known[1], LABELLED, seed=0), classification_loss, 60, lr=3e-3)
        scores = predict(classifier, LabelledBatches(tests, unseen[1], 50, seed=0).in_order())
        confusion = confusion_matrix(unseen[1], scores.argmax(1), len(NAMES))
        learned = sum(p.size for _, p in classifier.named_parameters() if p.requires_grad)
        print(f"   {name:<26}{learned:>10,}{losses[-1]:>25.3f}{accuracy(confusion):>23.1%}")
        results.append((name, learned, losses[-1], accuracy(confusion), confusion))
    return results, unseen[0], scores


def main(steps=250):
    results, texts, scores = run(steps)
    print("\n4. The last one's probabilities, then its errors:")
    for text, p in zip(texts[:4], ops.softmax(Tensor(scores[:4])).numpy(), strict=True):
        print(f"   {text:<62} " + "  ".join(f"{name} {x:.3f}" for name, x in zip(NAMES, p, strict=True)))
    print("\n" + "\n".join(f"   {line}" for line in report(results[-1][-1], NAMES).splitlines()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250, help="updates of the language model")
    main(**vars(parser.parse_args()))
