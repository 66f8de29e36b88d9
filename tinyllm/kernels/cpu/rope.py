"""RoPE in place, on rows in which several heads lie side by side.

A pair is (i, i + D/2) of a head, so that by the op's formula every array call works on pieces of D/2 numbers: 16 of a head of 32, for
which a call's inner loop costs more to start than to run. Here a row is turned in one piece, of all heads,

    x ← x·(cos, cos) + x̃·(-sin, sin)          x̃ the two halves of each head swapped

and only the swap works on halves. Measured inside a training step, one core of an AMD EPYC (Zen 4), 8 texts of 128 positions, 10 heads
of 32, fp32: 0.45 ms instead of 1.05 by the op.
"""
import numpy as np

from tinyllm.kernels.cpu.blocks import scratch
from tinyllm.threads import parallel

SHARE = 2**18  # numbers that a core must get for waking it to pay


def tables(cos, sin, heads: int):
    """`ops.rope`'s cos and sin for whole rows.     (T, D/2) twice -> (T, heads·D) twice"""
    return np.tile(np.hstack([cos, cos]), heads), np.tile(np.hstack([-sin, sin]), heads)


def turn(x, cos, sin, head_width: int, direction: int = 1) -> None:
    """Turn x, by the opposite angle with direction -1.     (B, T, heads·D), (T, heads·D) twice, as `tables` gave them"""
    _, T, width = x.shape

    def some(part, _):
        for row in x[part]:
            swapped = scratch("swapped", (T, width), x.dtype)
            swapped.reshape(T, -1, 2, head_width // 2)[...] = row.reshape(T, -1, 2, head_width // 2)[:, :, ::-1]
            swapped *= sin
            row *= cos
            (np.add if direction > 0 else np.subtract)(row, swapped, out=row)

    parallel(some, len(x), at_least=SHARE // (T * width) + 1)
