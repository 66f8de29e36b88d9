"""From raw text to a model that writes: the whole pipeline, by the library's own functions, in about half a minute.

The text is the documentation inside some modules of Python's standard library, which every machine has. You will see

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
from tinyllm.train.config import TrainConfig
from tinyllm.train.loop import train
from tinyllm.train.pretrain import next_token_loss
from tinyllm.train.progress import Progress, loss_curve

MODULES = (
    "bdb configparser http/client http/cookiejar imaplib logging/__init__ mailbox pdb shutil smtplib socketserver subprocess tarfile "
    "threading tkinter/__init__ turtle unittest/case"
).split()
PROMPTS = ("Return the ", "Raise ", "If the argument is ")


def documentation():
    """Each docstring of the modules as a Document."""
    for module in standard_library():
        if module.source.removesuffix(".py") in MODULES:
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


def run(steps, folder):
    """The pipeline, from the text to the trained model. Returns its figures by name."""
    documents = list(documentation())
    tokenizer = train_bpe([d.text for d in documents], vocab_size=512)
    data = prepare(documents, tokenizer, folder, val_fraction=0.1, seed=0)
    train_tokens, val_tokens = data.train.tokens, data.val.tokens
    print(f"1. {len(documents):,} docstrings, {sum(len(d.text) for d in documents):,} characters, {tokenizer.vocab_size} token kinds")
    print(f"   {len(train_tokens):,} tokens to learn from, {len(val_tokens):,} to measure with\n")

    config = TransformerConfig(vocab_size=tokenizer.vocab_size, layers=3, heads=4, width=96, context=64)
    settings = TrainConfig(batch=8, lr=4e-3, eval_every=max(1, steps // 5)).planned(steps)
    model = Transformer(config, random_stream(settings.seed, "weights"))
    windows = RandomWindows(train_tokens, config.context, settings.batch, settings.seed)
    validation = list(validation_batches(val_tokens, config.context, settings.batch))
    frequencies = loss_of_frequencies(train_tokens, val_tokens[1:], tokenizer.vocab_size)
    print(f"2. Knowing nothing costs ln V = {math.log(tokenizer.vocab_size):.3f} nats a token; knowing token frequencies, {frequencies:.3f}.")
    before = samples(model, tokenizer)
    print(f"   The model has {sum(p.size for _, p in model.named_parameters()):,} parameters, all random as yet.\n")

    print(f"3. {steps} steps of {settings.batch} windows of {config.context} tokens")
    losses = []

    def remember(record):
        if record["event"] == "step":
            losses.append((record["step"], record["loss"]))

    outcome = train(
        model, lambda n: [windows.batch(n)], next_token_loss(settings), settings,
        validation=lambda: validation, observers=[Progress(steps), remember],
    )  # fmt: skip
    val_loss = outcome.evaluations[-1][1]
    text_bytes = data.val.header.text_bytes
    val_text = tokenizer.decode_bytes(i for i in val_tokens.tolist() if i != tokenizer.end_of_text)
    return dict(
        vocab_size=tokenizer.vocab_size, frequencies=frequencies, losses=losses, evaluations=outcome.evaluations, seconds=outcome.seconds,
        bits=val_loss * (len(val_tokens) - 1) / math.log(2) / text_bytes,
        zlib=8 * len(zlib.compress(val_text, 9)) / len(val_text),
        before=before, after=samples(model, tokenizer),
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
    print(f"   Unseen documents take {figures['bits']:.2f} bits per byte. zlib, which learns from nothing else, needs {figures['zlib']:.2f}.\n")
    print("5. Before and after:")
    for prompt, before, after in zip(PROMPTS, figures["before"], figures["after"], strict=True):
        print(f"   before: {(prompt + before)!r}\n   after:  {(prompt + after)!r}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help="updates of the weights")
    parser.add_argument("--plot", metavar="FILE", help="draw the losses into this file, such as loss.png")
    main(**vars(parser.parse_args()))
