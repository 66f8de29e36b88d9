"""Attention for four words, with numbers that can be checked on paper.

Every word asks a question (its query), carries a label (its key) and has something to say (its value). It hears a mean of what all
words up to itself say, weighted by how well their labels answer its question. You will see

    1. scores, mask, softmax and mean of the values, each matrix in full
    2. that a word never hears a later one
    3. the same result from two blocks of keys that never meet: the running softmax behind FlashAttention
    4. that RoPE makes scores depend on distances only
    5. that one new word costs one row of work if keys and values are kept: the key/value cache

    python examples/04_attention_by_hand.py [--plot attention.png]
"""
import argparse
import math
from fractions import Fraction

import numpy as np

from tinyllm import ops

WORDS = ["the", "cat", "sat", "down"]


def four_words():
    """Queries, keys and values (T, D) = (4, 4), chosen so that every score is a multiple of ln 2, hence every e^score a power of 2.

    Key j is ln 2 on axis j, so a query's components, halved by 1/√D, are its scores in units of ln 2. Value j is 24 on axis j, so the
    output shows how much of each word is in it.
    """
    q = 2.0 * np.array([[0, 1, 1, 0], [0, 1, 2, 0], [0, 2, 0, 1], [0, 1, 2, 0]])
    return q, math.log(2) * np.eye(4), 24 * np.eye(4)


def attention_by_hand(q, k, v):
    """Scores, weights and outputs.     (T, D), (T, D), (T, D) -> (T, T), (T, T), (T, D)"""
    s = q @ k.T / math.sqrt(q.shape[1])  # the product of D random terms has size √D
    future = np.triu(np.ones(s.shape, dtype=bool), 1)
    masked = np.where(future, -np.inf, s)  # e^-inf is 0: no weight
    e = np.exp(masked - masked.max(1, keepdims=True))  # the largest exponent becomes 0, and cannot overflow
    p = e / e.sum(1, keepdims=True)
    return s, p, p @ v


def running_softmax(s, v, block):
    """The output of one query from blocks of its scores (S,) and values (S, D), of which it sees only one at a time.

    m: largest score so far, l: Σ e^(s-m), o: Σ e^(s-m)·v. When m grows, what was summed with the old m is multiplied by e^(old - new).
    Returns (m, l, o) after each block; the output is the last o/l.
    """
    m, l, o, states = -np.inf, 0.0, np.zeros(v.shape[1]), []  # noqa: E741  l is its name in the literature
    for start in range(0, len(s), block):
        s_block, v_block = s[start : start + block], v[start : start + block]
        higher = max(m, s_block.max())
        shrink, e = math.exp(m - higher), np.exp(s_block - higher)
        m, l, o = higher, l * shrink + e.sum(), o * shrink + e @ v_block  # noqa: E741
        states.append((m, l, o))
    return states


def by_op(op, *arrays, **settings):
    """One of tinyllm's attention ops, whose arrays have two more axes in front: batch and heads."""
    return op(*(x[None, None] for x in arrays), **settings).numpy()[0, 0]


def rope_score(q, k, m, n):
    """Query at position m times key at position n, after RoPE has turned each by its position.     (D,), (D,) -> number"""
    cos, sin = ops.rope_table(np.array([m, n]), ops.rope_frequencies(len(q))[0])
    turned_q, turned_k = ops.rope(np.array([q, k]), cos, sin).numpy()
    return turned_q @ turned_k


def word_by_word(q, k, v):
    """Outputs as they come in generation: word t brings one query, key and value; earlier keys and values are kept, queries are not."""
    keys, values, outputs = np.zeros((0, k.shape[1])), np.zeros((0, v.shape[1])), []
    for t in range(len(q)):
        keys, values = np.vstack([keys, k[t]]), np.vstack([values, v[t]])
        outputs.append(by_op(ops.attention, q[t : t + 1], keys, values, offset=t)[0])  # offset: the query stands behind t others
    return np.array(outputs)


def table(matrix, cell):
    return "\n".join(f"   {word:>6}" + "".join(f"{cell(x):>9}" for x in row) for word, row in zip(WORDS, matrix, strict=True))


def draw(p, path):
    """The weights as a picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(4, 4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(p, cmap="Blues", vmin=0, vmax=1)
    axes.set(xticks=range(4), xticklabels=WORDS, yticks=range(4), yticklabels=WORDS, xlabel="is heard", ylabel="listens", title="weights")
    for (i, j), weight in np.ndenumerate(p):
        axes.text(j, i, Fraction(weight).limit_denominator(99) if weight else "", ha="center", color="white" if weight > 0.5 else "black")
    figure.savefig(path, dpi=150)
    print(f"\nthe weights are drawn in {path}")


def main(plot=None):
    q, k, v = four_words()
    s, p, o = attention_by_hand(q, k, v)
    print("1. Scores q·kᵀ/√D in units of ln 2: row = the word that listens, column = the word that is heard")
    print(" " * 9 + "".join(f"{word:>9}" for word in WORDS))
    print(table(s / math.log(2), lambda x: f"{x:.0f}"))
    print("   Weights: e^score is 2 to that power; the future is masked; each row is divided by its sum")
    print(table(p, lambda x: str(Fraction(x).limit_denominator(99)) if x else "·"))
    print("   Outputs: mean of the values with these weights (word j says 24 in column j)")
    print(table(o, lambda x: f"{x:.0f}"))
    print(f"   ops.attention differs by {np.abs(by_op(ops.attention, q, k, v) - o).max():.0e}\n")

    q2, k2, v2 = q.copy(), k.copy(), v.copy()
    q2[3], k2[3], v2[3] = 1.0, -5.0, 99.0
    changed = (attention_by_hand(q2, k2, v2)[2] != o).any(1)
    print("2. With another last word, these outputs change:", ", ".join(f"{w}: {'yes' if c else 'no'}" for w, c in zip(WORDS, changed, strict=True)))
    print("   So one pass over a text trains a prediction at every position, none of which has seen its answer.\n")

    print('3. The row of "down" in two blocks. First the, cat; then sat, down, whose larger score halves what was summed before:')
    states = running_softmax(s[3], v, block=2)
    for m, l, o_so_far in states:  # noqa: E741
        print(f"   m = {m / math.log(2):.0f}·ln 2   l = {l:<4g} o = {o_so_far}")
    print(f"   o/l = {states[-1][2] / states[-1][1]}, the last row of 1., from two scores at a time. Memory for the scores need not grow with the text.")
    print(f"   ops.tiled_attention with blocks of 2 differs by {np.abs(by_op(ops.tiled_attention, q, k, v, block=2) - o).max():.0e}\n")

    one = np.array([1.0, 0.0])
    print("4. RoPE turns a vector by its position. Query and key (1, 0), turned by m and n radians, have the product cos(m - n):")
    for m, n in [(2, 0), (9, 7), (1002, 1000), (3, 0)]:
        print(f"   m = {m:<5} n = {n:<5} score {rope_score(one, one, m, n):8.5f}    cos({m - n}) = {math.cos(m - n):8.5f}")
    print("   Same distance, same score, wherever the two words stand.\n")

    print(f"5. Word by word, with kept keys and values: differs from the whole by {np.abs(word_by_word(q, k, v) - o).max():.0e}")
    print("   Word t costs t products instead of t² for doing everything again; no query is ever needed twice.")
    if plot:
        draw(p, plot)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", metavar="FILE", help="draw the weights into this file, such as attention.png")
    main(**vars(parser.parse_args()))
