"""Learn four lines by heart: the first thing to try with any new model or training loop.

A model that cannot learn one batch by heart has a bug; one that can, has its forward, backward and optimizer right as far as one batch
tells. It takes seconds, so do it before any real training. You will see, for a tiny Llama and a tiny GPT-2

    1. a loss of about ln V at the start: the model knows nothing, and every character is equally likely to it
    2. AdamW's first step move every weight by the learning rate, as its formula says
    3. the loss fall to about 0
    4. the four lines come back, each from its first letter

    python examples/05_overfit_one_batch.py [--plot loss.png]
"""
import argparse
import math

import numpy as np

from tinyllm import ops
from tinyllm.generate import SamplingConfig, generate
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.optim import AdamW, clip_factor, global_norm
from tinyllm.tokenizer import CharTokenizer

# Each line starts with another letter, so that what is to come is certain everywhere and the loss can reach 0. (If two lines
# began alike, no model could do better than ln 2 where they part.)
LINES = [
    "Guess what comes next in a line.",
    "Measure how wrong the guess was.",
    "Find each weight's share in that",
    "and turn them all a little down.",
]
STEPS, LR = 120, 0.01


def batch_of(lines):
    """A tokenizer for the lines, the inputs and the targets: what follows each character.     -> tokenizer, (B, T), (B, T)"""
    tokenizer = CharTokenizer.train(lines)
    rows = np.array([tokenizer.encode(line) for line in lines])
    return tokenizer, rows[:, :-1], rows[:, 1:]


def new_model(arch, vocab_size, context):
    config = TransformerConfig(arch=arch, vocab_size=vocab_size, context=context, layers=2, heads=2, width=32, mlp_width=64)
    return Transformer(config, np.random.default_rng(0))


def overfit(model, ids, targets, steps=STEPS):
    """The training loop, in full. Returns the loss before each step, the gradient's norm, and how far the first step moved weights."""
    optimizer = AdamW(model.named_parameters(), weight_decay=0.0)
    losses, norms = [], []
    before = optimizer.flat.data.copy()
    for step in range(steps):
        optimizer.zero_grad()  # gradients add up until they are told not to
        loss = ops.cross_entropy(model(ids), targets)  # forward: mean of -ln p(right character)
        loss.backward()  # every parameter's gradient
        norm = global_norm(optimizer.flat.grad)
        optimizer.step(LR, clip_factor(norm, 1.0))  # a gradient longer than 1 is shortened to 1
        losses.append(loss.item())
        norms.append(norm)
        if step == 0:
            first_move = np.abs(optimizer.flat.data - before)[optimizer.flat.grad != 0]
    return losses, norms, first_move


def recite(model, tokenizer, lines):
    """What the model writes from the first letter of each line, always taking the likeliest character."""
    config = SamplingConfig(max_tokens=len(lines[0]) - 1, temperature=0)
    steps = generate(model, [tokenizer.encode(line[0]) for line in lines], config)
    ids = np.array([step.ids for step in steps]).T  # (B, T)
    return [line[0] + tokenizer.decode(row.tolist()) for line, row in zip(lines, ids, strict=True)]


def draw(curves, path):
    """The losses as a picture, on a logarithmic scale."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arch, losses in curves.items():
        axes.semilogy(losses, label=arch)
    axes.set(xlabel="step", ylabel="loss (nats per character)", title="one batch, learned by heart")
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"\nthe losses are drawn in {path}")


def main(plot=None):
    tokenizer, ids, targets = batch_of(LINES)
    V = tokenizer.vocab_size
    print(f"One batch: {ids.shape[0]} lines of {ids.shape[1]} characters to predict, V = {V} different ones, ln V = {math.log(V):.3f}")
    curves = {}
    for arch in ("llama", "gpt2"):
        model = new_model(arch, V, context=ids.shape[1])
        parameters = sum(p.size for _, p in model.named_parameters())
        losses, norms, first_move = overfit(model, ids, targets)
        curves[arch] = losses
        print(f"\n{arch}, {parameters:,} parameters")
        print(f"   first loss {losses[0]:.3f}: within {abs(losses[0] - math.log(V)):.3f} of ln V")
        print(f"   first step moved weights by {np.median(first_move):.4f} (median): the learning rate is {LR}")
        print("   step       " + "".join(f"{i:9}" for i in (0, 5, 10, 20, 40, 80, len(losses) - 1)))
        print("   loss       " + "".join(f"{losses[i]:9.4f}" for i in (0, 5, 10, 20, 40, 80, -1)))
        print("   grad norm  " + "".join(f"{norms[i]:9.4f}" for i in (0, 5, 10, 20, 40, 80, -1)))
        for line, written in zip(LINES, recite(model, tokenizer, LINES), strict=True):
            print(f"   {line[0]} → {written}{'' if written == line else '   WRONG'}")
    if plot:
        draw(curves, plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE", help="draw the losses into this file, such as loss.png")
    main(**vars(parser.parse_args()))
