"""The table of arguments with which every op and loss is checked: by the suite, by `tinyllm gradcheck`, and against PyTorch.

A case is a list of arguments and settings. An argument given as a tuple is a shape, filled with standard normal numbers; where an op
has corners (relu, max) or a limited domain (log), `away`, `positive` and the like keep clear of them. Numbers come from NumPy's
frozen legacy generator, so that values recorded from other libraries stay comparable.
"""
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tinyllm.tensor import OPS, Tensor


@dataclass(frozen=True)
class Case:
    """One call of an op: `arrays()` makes its arguments (arrays are differentiated, Tensors are constants); settings are passed by name."""

    op: str
    label: str
    arguments: tuple
    settings: dict = field(default_factory=dict)

    def arrays(self) -> list:
        random = self._random("arguments")
        return [_make(a, random) for a in self.arguments]

    def upstream(self, shape: tuple[int, ...]) -> np.ndarray:
        """A random dy of the result's shape, the same each time."""
        return np.asarray(self._random("upstream").standard_normal(shape))

    def _random(self, purpose):
        return np.random.RandomState(zlib.crc32(f"{self.op} {self.label} {purpose}".encode()))

    @property
    def function(self) -> Callable:
        """The op with the settings filled in. Generators are made afresh at each call, so that it is deterministic."""

        def call(*arrays):
            made = {k: v() if callable(v) else v for k, v in self.settings.items()}
            return OPS[self.op](*arrays, **made)

        return call


def _make(argument, random):
    if isinstance(argument, tuple):
        return random.standard_normal(argument)
    return argument(random) if callable(argument) else argument


def positive(*shape):
    return lambda random: random.uniform(0.5, 2.0, shape)


def away(*shape):
    """Normal numbers pushed away from 0 by 0.1, so that no difference step crosses a corner there."""
    return lambda random: (x := random.standard_normal(shape)) + 0.1 * np.sign(x)


def distinct(*shape):
    """A shuffled ladder: no two elements closer than 0.1, so that a maximum stays one under small steps."""
    return lambda random: random.permutation(int(np.prod(shape))).reshape(shape) * 0.1 - 1.0


def integers(high, *shape, ignored=0):
    """Token ids below `high`, the first `ignored` of them -1."""

    def make(random):
        ids = random.randint(0, high, shape)
        ids.reshape(-1)[:ignored] = -1
        return ids

    return make


def booleans(*shape):
    return lambda random: random.uniform(size=shape) < 0.5


def real_tokens(*lengths, of):
    """A padding mask: row b has lengths[b] real keys."""
    return np.arange(of) < np.array(lengths)[:, None]


def transposed(*shape):
    """A view that is not contiguous."""
    return lambda random: random.standard_normal(shape[::-1]).T


QKV = ((2, 2, 5, 3), (2, 2, 5, 3), (2, 2, 5, 3))
GROUPED = ((2, 4, 5, 2), (2, 2, 5, 2), (2, 2, 5, 2))
CACHED = ((2, 4, 3, 2), (2, 2, 7, 2), (2, 2, 7, 2))
DOCUMENTS = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
SLOPES = Tensor(np.array([0.5, 0.25, 0.125, 0.0625]))

_ATTENTION = {
    "causal": (QKV, {}),
    "bidirectional": (QKV, dict(causal=False)),
    "one position": (((1, 2, 1, 4), (1, 2, 1, 4), (1, 2, 1, 4)), {}),
    "grouped": (GROUPED, {}),
    "multi-query": (((2, 3, 5, 2), (2, 1, 5, 2), (2, 1, 5, 2)), {}),
    "cache offset": (CACHED, dict(offset=4)),
    "padding": ((*QKV, real_tokens(5, 3, of=5)), dict(causal=False)),
    "all padding": ((*QKV, real_tokens(5, 0, of=5)), {}),
    "documents": ((*QKV, None, DOCUMENTS), {}),
    "window": (QKV, dict(window=2)),
    "two-sided window": (QKV, dict(window=2, causal=False)),
    "soft cap": (GROUPED, dict(softcap=1.5)),
    "alibi": ((*GROUPED, None, None, SLOPES), {}),
    "scale": (QKV, dict(scale=0.3)),
    "everything": ((*GROUPED, real_tokens(5, 4, of=5), DOCUMENTS, SLOPES), dict(window=3, softcap=2.0)),
}
_CROSS_ENTROPY = {
    "plain": {},
    "ignored": dict(ignored=2),
    "smoothing": dict(label_smoothing=0.1),
    "z-loss": dict(z_loss=0.05),
    "everything": dict(ignored=1, label_smoothing=0.2, z_loss=0.1, weights=True),
}


def _table() -> list[Case]:
    table: list[Case] = []

    def case(op, *arguments, label="", **settings):
        table.append(Case(op, label or ", ".join(f"{k}={v}" for k, v in settings.items()) or "plain", arguments, settings))

    for name in ("add", "sub", "mul"):
        case(name, (3, 4), (3, 4))
        case(name, (2, 3, 4), (3, 1), label="broadcast")
        case(name, (3, 4), 2.5, label="number")
    case("div", (3, 4), positive(3, 4))
    case("div", (2, 3, 4), positive(4), label="broadcast")
    for name in ("neg", "exp", "tanh", "sigmoid", "erf", "gelu", "gelu_tanh", "silu"):
        case(name, (3, 4))
    case("erf", lambda random: random.uniform(-4, 4, (3, 7)), label="both branches")
    case("sigmoid", transposed(3, 4), label="not contiguous")
    for name in ("log", "sqrt"):
        case(name, positive(3, 4))
    case("pow", positive(3, 4), exponent=3)
    case("pow", positive(3, 4), exponent=-0.5)
    for name in ("abs", "relu", "relu2"):
        case(name, away(3, 4))
    for name in ("maximum", "minimum"):
        case(name, distinct(3, 4), 0.05)
        case(name, distinct(4, 3), lambda random: random.permutation(12).reshape(4, 3) * 0.1 - 0.95, label="two arrays")
    case("where", booleans(3, 4), (3, 4), (4,))
    case("clip", distinct(3, 4), low=-0.55, high=0.05)
    case("masked_fill", (3, 4), booleans(3, 4), value=-2.0)

    for name in ("sum", "mean", "var", "logsumexp", "max", "min"):
        x = distinct(3, 4, 2) if name in ("max", "min") else (3, 4, 2)
        case(name, x, axis=1)
        case(name, x, axis=(0, 2), keepdims=True)
        if name != "logsumexp":
            case(name, x, axis=None)
    case("var", (3, 4), axis=-1, correction=1)

    case("reshape", (3, 4), shape=(2, -1))
    case("transpose", (2, 3, 4))
    case("transpose", (2, 3, 4), axes=(1, 2, 0))
    case("swapaxes", (2, 3, 4), first=0, second=-1)
    case("expand", (3, 1), shape=(2, 3, 4))
    case("concatenate", (2, 3), (2, 1), (2, 4), axis=1)
    case("stack", (2, 3), (2, 3), axis=1)
    case("getitem", (4, 5), index=(slice(1, 3), slice(None, None, 2)))
    case("getitem", (4, 5), index=(np.array([0, 2, 2, 3]),), label="repeated rows")
    case("getitem", (4, 5), index=(slice(None), None, 1), label="new axis")
    case("gather", (3, 5), integers(5, 3, 4), axis=-1)
    case("gather", (5, 3), integers(5, 4, 3), axis=0)
    case("pad", (2, 3), widths=((1, 0), (2, 1)), value=0.5)

    case("matmul", (3, 4), (4, 2))
    case("matmul", (2, 3, 4), (2, 4, 5), label="batched")
    case("matmul", (2, 1, 3, 4), (5, 4, 2), label="broadcast")
    case("matmul", (3, 4), (4,), label="times vector")
    case("matmul", (4,), (2, 4, 3), label="vector times")
    case("matmul", (4,), (4,), label="inner product")
    case("matmul", transposed(3, 4), transposed(4, 2), label="not contiguous")
    case("linear", (2, 3, 4), (5, 4))
    case("linear", (2, 3, 4), (5, 4), (5,), label="bias")
    case("linear", (4,), (5, 4), (5,), label="one row")
    case("einsum", (2, 3), (3, 4), subscripts="ij,jk->ik")
    case("einsum", (2, 3, 4), (2, 4), (3,), subscripts="bij,bj,i->b")
    case("einsum", (2, 3), (4,), subscripts="ij,k->ik")
    case("einsum", (2, 3), subscripts="ij->")
    for name in ("swiglu", "geglu"):
        case(name, (3, 4), (3, 4))

    case("layernorm", (3, 5), (5,), (5,))
    case("layernorm", (2, 3, 5), (5,), label="gain")
    case("layernorm", (3, 5), label="no gain")
    case("layernorm", (3, 5), None, (5,), label="bias only", eps=0.1)
    case("rmsnorm", (3, 5), (5,))
    case("rmsnorm", (2, 3, 5), label="no gain", eps=0.1)
    for name in ("softmax", "log_softmax"):
        case(name, (3, 5))
        case(name, (3, 5, 2), axis=1)

    for label, options in _CROSS_ENTROPY.items():
        settings = {k: v for k, v in options.items() if k in ("label_smoothing", "z_loss")}
        rest = (integers(7, 2, 4, ignored=options.get("ignored", 0)), *([Tensor(np.linspace(0.5, 2, 8).reshape(2, 4))] * ("weights" in options)))
        case("cross_entropy", (2, 4, 7), *rest, label=label, **settings)
        case("linear_cross_entropy", (2, 4, 3), (7, 3), *rest, label=label, rows=3, **settings)
    case("linear_cross_entropy", (8, 3), (7, 3), integers(7, 8), label="one slice")
    case("binary_cross_entropy", (3, 4), lambda random: random.uniform(size=(3, 4)))
    case("mse", (3, 4), (3, 4))
    case("kl_divergence", (3, 4), (3, 4))

    case("embedding", (6, 3), integers(6, 2, 5))
    angles = np.arange(5)[:, None] * np.array([1.0, 0.3, 0.1])
    cos, sin = Tensor(np.cos(angles)), Tensor(np.sin(angles))
    case("rope", (2, 3, 5, 6), cos, sin)
    case("rope", (2, 3, 5, 6), cos, sin, interleaved=True)
    case("dropout", (4, 5), rate=0.4, rng=lambda: np.random.default_rng(3), label="rate=0.4")
    case("cast", (3, 4), precision="fp32")
    for label, (arguments, settings) in _ATTENTION.items():
        case("attention", *arguments, label=label, **settings)
        case("tiled_attention", *arguments, label=label, block=2, **settings)
    return table


CASES: tuple[Case, ...] = tuple(_table())
