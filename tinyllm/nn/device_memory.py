"""The memory of a training step on a GPU, foreseen from a model's config: what to expect before it is run, and what to lower if it fails.

Master weights, gradients and AdamW's two moments are fp32, 16 bytes a parameter; in a 16-bit precision their copies for the products come
on top. Activations are stored in the precision's format of b bytes. A block that runs as one function (tinyllm.kernels.cuda.block; what it
is made for is `fused` here) keeps, for each token and with b bytes a number,

    its input and the residual stream after attention   2·C
    queries, keys, values                               C + 2·G·D
    attention's output                                  C
    what the activation is made of                      F, gated 2·F

and in fp32 the log-sum-exp of H heads and two rows' statistics. Any other block runs op by op and keeps about what `describe` counts. The head's
scores are made a slice of rows at a time; its dx is fp32. All else is freed before the next block needs it.
"""
from dataclasses import dataclass

from tinyllm.nn.config import GATED
from tinyllm.nn.describe import Description

FUSED_MLPS, FUSED_HEADS, FUSED_MULTIPLE = ("gelu_tanh", "swiglu"), (32, 64, 96, 128), 8  # kinds; widths; what widths are a multiple of
SLICE_BYTES, SLICE_ROWS = 2**30, 1024  # of the head's scores: at most, but at least so many rows
WORKSPACE = 32 * 2**20  # cuBLASLt's


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of each kind; see above."""

    state_bytes: int
    activation_bytes: int
    transient_bytes: int

    @property
    def peak_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes + self.transient_bytes


def device_memory(d: Description) -> DeviceMemory:
    """What a step with d's config and batch takes on a GPU."""
    c, tokens = d.config, d.batch * d.config.context
    number = 4 if c.precision == "fp32" else 2
    whole, inner = fused(c), 2 if c.mlp in GATED else 1  # arrays of width F that the activation is made of
    block = tokens * (_fused_block(c, number, inner) if whole else number * _op_by_op(d))
    kept = block * (1 if c.recompute else c.layers) + tokens * number * c.width * (c.layers if c.recompute else 0)
    outside = tokens * number * 3 * c.width  # the first block's input, the last norm's input and result
    rows = min(tokens, max(SLICE_ROWS, SLICE_BYTES // (number * c.vocab_size)))
    head = rows * c.vocab_size * number + tokens * c.width * (4 + number)
    backward = tokens * number * ((inner + whole) * c.mlp_width + 4 * c.width)  # whole: the activation is made again
    copies = d.parameters * number if number == 2 else 0
    return DeviceMemory(d.state_bytes + copies, int(kept + outside), int(max(head, backward) + WORKSPACE))


def fused(c) -> bool:
    """Whether a block of this (resolved) config runs as one function."""
    return (
        c.precision != "fp32" and c.norm_placement == "pre" and c.mlp in FUSED_MLPS and c.positions != "alibi"
        and c.head_width in FUSED_HEADS and c.mlp_width % FUSED_MULTIPLE == 0 and not (c.dropout or c.softcap or c.qk_norm)
    )  # fmt: skip


def _fused_block(c, number: int, inner: int) -> int:
    """Bytes that a token's pass through such a block leaves."""
    return number * (4 * c.width + 2 * c.kv_heads * c.head_width + inner * c.mlp_width) + 4 * (c.heads + 4)


def _op_by_op(d: Description) -> float:
    """Numbers that a token's pass through any other block leaves."""
    spared = d.config.mlp_width if d.config.mlp in FUSED_MLPS else 0  # these activations' kernels keep nothing of their own
    return sum(p.activations for p in d.parts if p.in_block) - spared
