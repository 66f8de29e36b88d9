"""What a model costs before it is run: parameters, arithmetic and memory, part by part, from its config alone.

Arithmetic counts a multiplication and an addition as two operations. A product with an (in, out) matrix takes 2·in·out per token
forward, and twice that backward (once for the input's gradient, once for the weight's). Attention takes 2·D per query-key pair for the
scores and 2·D for the mean of the values, in each of H heads; under a causal mask a query sees half of the T keys on average, but the
naive form computes all of them, so all are counted for it.

Memory counts what backward closures hold per token when the forward has finished. The comments below say which arrays those are.
"""
from dataclasses import dataclass

from tinyllm.nn.config import GATED, TransformerConfig

TRAINING_FLOPS = 3  # forward once, backward twice

# Arrays of the MLP's inner width that the backward of the activation and of the map after it hold: its inputs, what it saved, its result.
MLP_ARRAYS = dict(relu=1.25, relu2=2, silu=2, gelu=3, gelu_tanh=3, swiglu=4, geglu=4)


@dataclass(frozen=True)
class Part:
    """One part of the model. shape : of its weights, as text.   flops : of one token's forward.   activations : elements kept per token."""

    name: str
    shape: str
    parameters: int
    flops: float
    activations: float
    count: int = 1


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
        recomputed = 1 if self.config.recompute else 0
        return sum(p.flops * p.count for p in self.parts) * (TRAINING_FLOPS + recomputed)

    @property
    def state_bytes(self) -> int:
        """fp32 weights, gradients and AdamW's two moments."""
        return self.parameters * 4 * 4

    @property
    def activation_bytes(self) -> int:
        """What is held between forward and backward of one micro-batch; 4 bytes an element, as 16-bit formats are emulated in fp32."""
        held = sum(p.activations * p.count for p in self.parts if not (self.config.recompute and p.count > 1))
        rounded = 0 if self.config.precision == "fp32" else self.parameters  # the 16-bit copy of the weights in use
        return int(4 * (self.batch * self.config.context * held + rounded))

    @property
    def transient_bytes(self) -> int:
        """The largest temporaries of a backward that runs while nearly all activations are still held."""
        c, tokens = self.config, self.batch * self.config.context
        rows = min(tokens, max(1, 2**22 // c.vocab_size))
        head = 3 * rows * c.vocab_size + tokens * c.width + 2 * c.vocab_size * c.width  # scores, their gradient; dx; dw
        mlp = tokens * (4 * c.mlp_width + 2 * c.width)
        scores = tokens * (3 * c.heads * (c.context if c.attention == "naive" else 128) + 2 * c.width)
        again = tokens * sum(p.activations for p in self.parts if p.count > 1) if c.recompute else 0  # one block's activations, remade
        return int(4 * max(head, max(mlp, scores) + again))

    @property
    def peak_bytes(self) -> int:
        """The most memory that arrays take during a training step."""
        return self.state_bytes + self.activation_bytes + self.transient_bytes


def describe(config: TransformerConfig, batch: int = 1) -> Description:
    """Parameters, FLOPs and memory of a model and of a training step on `batch` windows of its full context."""
    c = config.resolved()
    C, D, G, F, T, V, L = c.width, c.head_width, c.kv_heads, c.mlp_width, c.context, c.vocab_size, c.layers
    seen = min(T, c.window or T)
    norm_size = C * (2 if c.norm == "layernorm" and c.bias else 1)
    dropped = C if c.dropout else 0

    def matrix(name, inputs, outputs, activations=0.0, count=L, bias=c.bias):
        return Part(name, f"{outputs} x {inputs}", outputs * (inputs + bool(bias)), 2 * inputs * outputs, activations, count)

    def norm(name, count):  # x_hat, and the result, which the next map holds
        return Part(name, f"{C}", norm_size, 5 * C, 2 * C + 1, count)

    attention_held = C + 2 * G * D  # q, k, v
    attention_held += c.heads * T * (2 if c.softcap else 1) if c.attention == "naive" else C + c.heads  # p (and the cap's slope) | o, lse
    qk_norms = [Part("query and key norm", f"{D} + {D}", 2 * D, 5 * (C + G * D), C + G * D, L)] if c.qk_norm else []
    pairs = T if c.attention == "naive" else seen / 2 if seen == T else seen
    mlp = [matrix("gate", C, F)] * (c.mlp in GATED) + [matrix("up", C, F), matrix("down", F, C, MLP_ARRAYS[c.mlp] * F + dropped)]
    parts = [
        Part("token embedding", f"{V} x {C}", V * C, 0, dropped),
        *([Part("position embedding", f"{T} x {C}", T * C, C, 0)] if c.positions == "learned" else []),
        norm("attention norm", L),
        matrix("query", C, C),
        matrix("key", C, G * D),
        matrix("value", C, G * D),
        *qk_norms,
        Part("attention", f"{c.heads} heads of {D}", 0, 4 * C * pairs, attention_held, L),
        matrix("output", C, C, C + dropped),
        norm("mlp norm", L),
        *mlp,
        *([norm("final norm", 1)] if c.norm_placement == "pre" else []),
        Part("head", f"{V} x {C}" + (" (tied)" if c.tie else ""), 0 if c.tie else V * C, 2 * C * V, 5),  # lse, share, targets
    ]
    if c.recompute:
        parts.insert(1, Part("block inputs", f"{L} x {C}", 0, 0, L * C))
    return Description(c, tuple(parts), batch)
