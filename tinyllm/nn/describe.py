"""What a model costs before it is run: parameters, arithmetic and memory, part by part, from its config alone.

Arithmetic counts a multiplication and an addition as two operations. A product with an (in, out) matrix takes 2·in·out per token
forward, and twice that backward (once for the input's gradient, once for the weight's). Attention takes 2·D per query-key pair for the
scores and 2·D for the mean of the values, in each of H heads. Pairs that are computed count, seen or not: all T² in the naive form, those
of the blocks that are not skipped in the tiled form.

Memory counts what backward closures hold per token when the forward has finished, and the temporaries on top of that where they are
largest. The comments below say which arrays those are. It is the memory of the ops as they are defined: where kernels take their place
(see tinyllm.kernels), less is kept, so that a real step stays below the prediction.
"""
from dataclasses import dataclass, replace

import numpy as np

from tinyllm import ops
from tinyllm.nn.config import GATED, TransformerConfig

BLOCK = ops.tiled_attention.array.__kwdefaults__["block"]

# Arrays of the MLP's inner width that the backward of the activation and of the map after it hold: its inputs, what it saved, its result.
MLP_ARRAYS = dict(relu=1.25, relu2=2, silu=2, gelu=3, gelu_tanh=3, swiglu=4, geglu=4)
# And those that come and go on top of them, at the worst moment of the forward (the erf of gelu and geglu) or of the backward.
MLP_TEMPORARIES = dict(relu=2, relu2=2, silu=2, gelu=7, gelu_tanh=5, swiglu=2, geglu=7)


@dataclass(frozen=True)
class Part:
    """One part of the model. shape : of its weights, as text.   flops : of one token's forward.   activations : elements kept per token.

    passes : FLOPs of a training step, in forwards: the forward and twice as much backward; the head and tiled attention compute their
    scores once more rather than keep them.      in_block : whether every block has one; `count` is then the number of blocks.
    """

    name: str
    shape: str
    parameters: int
    flops: float
    activations: float
    count: int = 1
    passes: float = 3
    in_block: bool = False


@dataclass(frozen=True)
class Description:
    """All parts, and the totals of a training step with a batch of B windows of T tokens."""

    config: TransformerConfig
    parts: tuple[Part, ...]
    batch: int

    @property
    def parameters(self) -> int:
        return sum(p.parameters * p.count for p in self.parts)

    @property
    def flops_per_token(self) -> float:
        """Operations of one token's forward and backward."""
        return sum(p.flops * p.count * (p.passes + (self.config.recompute and p.in_block)) for p in self.parts)

    @property
    def state_bytes(self) -> int:
        """fp32 weights, gradients and AdamW's two moments."""
        return self.parameters * 4 * 4

    @property
    def activation_bytes(self) -> int:
        """What is held between forward and backward of one micro-batch; 4 bytes an element, as 16-bit formats are emulated in fp32."""
        blocks = 0 if self.config.recompute else self.config.layers * self._block()
        outside = sum(p.activations for p in self.parts if not p.in_block)
        head = 0 if self.config.precision == "fp32" else self.config.vocab_size * self.config.width  # the 16-bit copy of its weights
        return int(4 * (blocks + self._tokens * outside + head))

    @property
    def transient_bytes(self) -> int:
        """The largest temporaries of a step on top of the activations, most of which are still held at each of these moments."""
        c = self.config
        again = self._block() if c.recompute else 0  # the last block's activations, remade
        mlp = self._tokens * (MLP_TEMPORARIES[c.mlp] * c.mlp_width + c.width) + c.mlp_width * c.width
        freed = self._tokens * sum(p.activations for p in self.parts if p.name in ("mlp norm", "gate", "up", "down"))
        return int(4 * max(self._head(), again + mlp, again + self._attention() - freed))

    @property
    def _tokens(self) -> int:
        return self.batch * self.config.context

    def _block(self) -> float:
        """Elements that one block holds: activations, and in 16 bits the copy of its weights."""
        parts = [p for p in self.parts if p.in_block]
        copies = 0 if self.config.precision == "fp32" else sum(p.parameters for p in parts)
        return self._tokens * sum(p.activations for p in parts) + copies

    def _head(self) -> float:
        """dx and, slice by slice, scores, scores - lse and their exponential; then dw and its next part."""
        c, weights = self.config, self.config.vocab_size * self.config.width
        rows = min(self._tokens, max(1, 2**22 // c.vocab_size))
        rounding = 4 * weights if c.precision != "fp32" else 0  # of dw
        return self._tokens * c.width + max(3 * rows * c.vocab_size + weights, rows * c.vocab_size + 2 * weights, rounding)

    def _attention(self) -> float:
        """dp and ds (and the soft cap's slope) for all pairs, or a few arrays of one block of them; and dq, dk, dv."""
        c = self.config
        gradients = self._tokens * (c.width + 2 * c.kv_heads * c.head_width)
        if c.attention == "naive":
            return self._tokens * c.heads * c.context * (3 if c.softcap else 2) + gradients
        arrays = 4 if not c.softcap else 5 if c.context <= BLOCK else 7  # from the second block on, those of the one before too
        return self.batch * c.heads * min(c.context, BLOCK) ** 2 * arrays + gradients

    @property
    def peak_bytes(self) -> int:
        """The most memory that arrays take during a training step."""
        return self.state_bytes + self.activation_bytes + self.transient_bytes


def describe(config: TransformerConfig, batch: int = 1) -> Description:
    """Parameters, FLOPs and memory of a model and of a training step on `batch` windows of its full context."""
    c = config.resolved()
    C, T, V, L = c.width, c.context, c.vocab_size, c.layers
    post = c.norm_placement == "post"
    parts = [
        Part("token embedding", f"{V} x {C}", V * C, 0, C * bool(c.dropout) + C * post),  # post: its sum enters the maps without a norm
        *([Part("position embedding", f"{T} x {C}", T * C, C, 0)] if c.positions == "learned" else []),
        *([Part("block inputs", f"{L} x {C}", 0, 0, L * C)] if c.recompute else []),
        *(replace(part, count=L, in_block=True) for part in (*_attention_parts(c), *_mlp_parts(c))),
        *([] if post else [_norm("final norm", c)]),
        Part("head", f"{V} x {C}" + (" (tied)" if c.tie else ""), 0 if c.tie else V * C, 2 * C * V, 5, passes=4),  # lse, share, targets
    ]
    return Description(c, tuple(parts), batch)


def _attention_parts(c) -> list[Part]:
    C, D, H, G, T = c.width, c.head_width, c.heads, c.kv_heads, c.context
    dropped = C if c.dropout else 0
    if c.attention == "naive":
        pairs, held, passes = T, H * T * (2 if c.softcap else 1), 3  # p (and the cap's slope)
    else:
        pairs, held, passes = _pairs_of_blocks(T, c.window or T), H, 3.5  # lse; o is what the output map holds; scores are computed again
        held += C if c.precision != "fp32" else 0  # o, which is not what the output map holds after rounding
    return [
        _norm("attention norm", c),
        _matrix("query", C, C, c),
        _matrix("key", C, G * D, c),
        _matrix("value", C, G * D, c),
        *([Part("query and key norm", f"{D} + {D}", 2 * D, 5 * (C + G * D), C + G * D)] if c.qk_norm else []),
        Part("attention", f"{H} heads of {D}", 0, 4 * C * pairs, C + 2 * G * D + held, passes=passes),  # q, k, v
        _matrix("output", C, C, c, C + dropped),
    ]


def _mlp_parts(c) -> list[Part]:
    C, F = c.width, c.mlp_width
    gate = [_matrix("gate", C, F, c)] if c.mlp in GATED else []
    return [_norm("mlp norm", c), *gate, _matrix("up", C, F, c), _matrix("down", F, C, c, MLP_ARRAYS[c.mlp] * F + (C if c.dropout else 0))]


def _matrix(name, inputs, outputs, c, activations=0.0) -> Part:
    return Part(name, f"{outputs} x {inputs}", outputs * (inputs + bool(c.bias)), 2 * inputs * outputs, activations)


def _norm(name, c) -> Part:
    """It holds x_hat, and the result, which the next map holds."""
    size = c.width * (2 if c.norm == "layernorm" and c.bias else 1)
    return Part(name, f"{c.width}", size, 5 * c.width, 2 * c.width + 1)


def _pairs_of_blocks(T, window) -> float:
    """Query-key pairs in the blocks that tiled attention does not skip, per query."""
    starts = np.arange(0, T, BLOCK)
    sizes = np.minimum(BLOCK, T - starts)
    first = np.maximum(0, (starts - window + 1) // BLOCK) * BLOCK  # key that each block of queries begins with
    return float((sizes * (starts + sizes - first)).sum() / T)
