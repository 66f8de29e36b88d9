"""From raw text to a model that writes: the whole pipeline, by the library's own functions, in about half a minute.

The text is the documentation inside four modules of Python's standard library, which every machine has. You will see

    1. text → documents → tokens in a file
    2. two yardsticks that need no model, and the loss before training
    3. training, with the loss on documents that the model never sees
    4. the loss as a curve, and in bits per byte beside zlib
    5. what the model wrote before, and what it writes now

`tinyllm train` does the same with more text, checkpoints and a log.

    python examples/06_train_and_sample.py [--steps 500] [--plot loss.png]
"""
import argparse
import ast
import math
import tempfile
import zlib
from pathlib import Path

import numpy as np

from tinyllm.backend import random_stream
from tinyllm.data import Document, RandomWindows, prepare, standard_library, validation_batches
from tinyllm.generate import SamplingConfig, complete
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tokenizer import train_bpe
from tinyllm.train import Progress, TrainConfig, loss_curve, next_token_loss, train

MODULES = {"shutil.py", "threading.py", "tkinter/__init__.py", "turtle.py"}
PROMPTS = ("Return the", "Set the", "Move the turtle")  # no space at the end: it belongs to the token of the next word


def documentation():
    """Each docstring of the modules as a Document."""
    for module in standard_library():
        if module.source in MODULES:
            for node in ast.walk(ast.parse(module.text)):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module) and (text := ast.get_docstring(node)):
                    yield Document(text, module.source)


def loss_of_frequencies(tokens, val_tokens, vocab_size):
    """Mean -ln p(token) on val_tokens, with p from how often each token occurs in `tokens`, once more each, so that no p is 0."""
    p = (np.bincount(tokens, minlength=vocab_size) + 1) / (len(tokens) + vocab_size)
    return -np.log(p)[val_tokens].mean()


def samples(model, tokenizer):
    """What the model makes of the prompts. A low temperature: it prefers what it is sure of."""
    return [c.text for c in complete(model, tokenizer, PROMPTS, SamplingConfig(max_tokens=40, temperature=0.5))]


def learn(model, data, settings):
    """Train the model. Returns (step, loss) of every step, and of every evaluation on the validation part."""
    context, losses = model.config.context, []
    windows = RandomWindows(data.train.tokens, context, settings.batch, settings.seed)
    validation = list(validation_batches(data.val.tokens, context, settings.batch))

    def remember(record):
        if record["event"] == "step":
            losses.append((record["step"], record["loss"]))

    outcome = train(
        model,
        batches=lambda step: [windows.batch(step)],
        loss_fn=next_token_loss(settings),
        config=settings,
        validation=lambda: validation,
        observers=[Progress(settings.steps), remember],
    )
    return losses, outcome.evaluations


def bits_per_byte(val_loss, data):
    """Nats per token as bits per byte of text, which does not depend on the tokenizer."""
    return val_loss / math.log(2) * (len(data.val) - 1) / data.val.header.text_bytes


def run(steps, folder):
    """The pipeline, from the text to the trained model. Returns its figures by name."""
    documents = list(documentation())
    tokenizer = train_bpe([d.text for d in documents], vocab_size=512)
    data = prepare(documents, tokenizer, folder, val_fraction=0.1, seed=0)
    V, val_tokens = tokenizer.vocab_size, data.val.tokens
    print(f"1. {len(documents):,} docstrings, {sum(len(d.text) for d in documents):,} characters, {V} different tokens")
    print(f"   {len(data.train):,} tokens to learn from, {len(data.val):,} to measure with\n")

    config = TransformerConfig(vocab_size=V, layers=3, heads=4, width=96, context=64)
    settings = TrainConfig(batch=8, lr=4e-3, eval_every=max(1, steps // 5)).planned(steps)
    model = Transformer(config, random_stream(settings.seed, "weights"))
    frequencies = loss_of_frequencies(data.train.tokens, val_tokens[1:], V)
    print(f"2. Knowing nothing costs ln V = {math.log(V):.3f} nats a token; knowing how frequent each token is, {frequencies:.3f}.")
    print(f"   The model has {sum(p.size for _, p in model.named_parameters()):,} parameters, all random as yet.\n")

    print(f"3. {steps} steps of {settings.batch} windows of {config.context} tokens")
    before = samples(model, tokenizer)
    losses, evaluations = learn(model, data, settings)
    val_text = tokenizer.decode_bytes(i for i in val_tokens.tolist() if i != tokenizer.end_of_text)
    return dict(
        vocab_size=V, frequencies=frequencies, losses=losses, evaluations=evaluations, before=before, after=samples(model, tokenizer),
        bits=bits_per_byte(evaluations[-1][1], data), zlib=8 * len(zlib.compress(val_text, 9)) / len(val_text),
    )  # fmt: skip


def draw(figures, path):
    """Both losses as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*figures["losses"], strict=True), linewidth=0.7, label="training")
    axes.plot(*zip(*figures["evaluations"], strict=True), marker="o", label="validation")
    axes.axhline(figures["frequencies"], color="gray", linestyle="--", label="token frequencies")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"\nthe losses are drawn in {path}")


def main(steps=500, plot=None):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps files that are mapped into memory
        figures = run(steps, Path(folder))
    print(f"\n4. {loss_curve(figures['losses'], figures['evaluations'])}")
    print("   Where the training loss runs below the validation loss, the model begins to know its text by heart.")
    print(f"   Unseen documents take {figures['bits']:.2f} bits per byte. zlib, which learns from nothing else, needs {figures['zlib']:.2f}.\n")
    print("5. Before and after:")
    for prompt, before, after in zip(PROMPTS, figures["before"], figures["after"], strict=True):
        print(f"   before: {(prompt + before)!r}\n   after:  {(prompt + after)!r}")
    if plot:
        draw(figures, plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="updates of the weights")
    parser.add_argument("--plot", metavar="FILE", help="draw the losses into this file, such as loss.png")
    main(**vars(parser.parse_args()))
