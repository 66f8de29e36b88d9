"""The table of arguments with which every op and loss is checked: by the suite, by `tinyllm gradcheck`, and against PyTorch.

A case is a list of arguments and settings. An argument given as a tuple is a shape, filled with standard normal numbers; where an op
has corners (relu, max) or a limited domain (log), `away`, `positive` and the like keep clear of them. Numbers come from NumPy's
frozen legacy generator, so that values recorded from other libraries stay comparable.
"""
import zlib
from collections.abc import Callable, Iterator
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


def _case(op, *arguments, label="", **settings) -> Case:
    return Case(op, label or ", ".join(f"{k}={v}" for k, v in settings.items()) or "plain", arguments, settings)


def _elementwise() -> Iterator[Case]:
    for name in ("add", "sub", "mul"):
        yield _case(name, (3, 4), (3, 4))
        yield _case(name, (2, 3, 4), (3, 1), label="broadcast")
        yield _case(name, (3, 4), 2.5, label="number")
    yield _case("div", (3, 4), positive(3, 4))
    yield _case("div", (2, 3, 4), positive(4), label="broadcast")
    for name in ("neg", "exp", "tanh", "sigmoid", "erf", "gelu", "gelu_tanh", "silu"):
        yield _case(name, (3, 4))
    yield _case("erf", lambda random: random.uniform(-4, 4, (3, 7)), label="both branches")
    yield _case("sigmoid", transposed(3, 4), label="not contiguous")
    for name in ("log", "sqrt"):
        yield _case(name, positive(3, 4))
    yield _case("pow", positive(3, 4), exponent=3)
    yield _case("pow", positive(3, 4), exponent=-0.5)
    for name in ("abs", "relu", "relu2"):
        yield _case(name, away(3, 4))
    for name in ("maximum", "minimum"):
        yield _case(name, distinct(3, 4), 0.05)
        yield _case(name, distinct(4, 3), lambda random: random.permutation(12).reshape(4, 3) * 0.1 - 0.95, label="two arrays")
    yield _case("where", booleans(3, 4), (3, 4), (4,))
    yield _case("clip", distinct(3, 4), low=-0.55, high=0.05)
    yield _case("masked_fill", (3, 4), booleans(3, 4), value=-2.0)


def _reductions() -> Iterator[Case]:
    for name in ("sum", "mean", "var", "logsumexp", "max", "min"):
        x = distinct(3, 4, 2) if name in ("max", "min") else (3, 4, 2)
        yield _case(name, x, axis=1)
        yield _case(name, x, axis=(0, 2), keepdims=True)
        if name != "logsumexp":
            yield _case(name, x, axis=None)
    yield _case("var", (3, 4), axis=-1, correction=1)


def _shapes() -> Iterator[Case]:
    yield _case("reshape", (3, 4), shape=(2, -1))
    yield _case("transpose", (2, 3, 4))
    yield _case("transpose", (2, 3, 4), axes=(1, 2, 0))
    yield _case("swapaxes", (2, 3, 4), first=0, second=-1)
    yield _case("expand", (3, 1), shape=(2, 3, 4))
    yield _case("concatenate", (2, 3), (2, 1), (2, 4), axis=1)
    yield _case("stack", (2, 3), (2, 3), axis=1)
    yield _case("getitem", (4, 5), index=(slice(1, 3), slice(None, None, 2)))
    yield _case("getitem", (4, 5), index=(np.array([0, 2, 2, 3]),), label="repeated rows")
    yield _case("getitem", (4, 5), index=(slice(None), None, 1), label="new axis")
    yield _case("gather", (3, 5), integers(5, 3, 4), axis=-1)
    yield _case("gather", (5, 3), integers(5, 4, 3), axis=0)
    yield _case("pad", (2, 3), widths=((1, 0), (2, 1)), value=0.5)


def _products() -> Iterator[Case]:
    yield _case("matmul", (3, 4), (4, 2))
    yield _case("matmul", (2, 3, 4), (2, 4, 5), label="batched")
    yield _case("matmul", (2, 1, 3, 4), (5, 4, 2), label="broadcast")
    yield _case("matmul", (3, 4), (4,), label="times vector")
    yield _case("matmul", (4,), (2, 4, 3), label="vector times")
    yield _case("matmul", (4,), (4,), label="inner product")
    yield _case("matmul", transposed(3, 4), transposed(4, 2), label="not contiguous")
    yield _case("linear", (2, 3, 4), (5, 4))
    yield _case("linear", (2, 3, 4), (5, 4), (5,), label="bias")
    yield _case("linear", (4,), (5, 4), (5,), label="one row")
    yield _case("einsum", (2, 3), (3, 4), subscripts="ij,jk->ik")
    yield _case("einsum", (2, 3, 4), (2, 4), (3,), subscripts="bij,bj,i->b")
    yield _case("einsum", (2, 3), (4,), subscripts="ij,k->ik")
    yield _case("einsum", (2, 3), subscripts="ij->")
    for name in ("swiglu", "geglu"):
        yield _case(name, (3, 4), (3, 4))


def _norms() -> Iterator[Case]:
    yield _case("layernorm", (3, 5), (5,), (5,))
    yield _case("layernorm", (2, 3, 5), (5,), label="gain")
    yield _case("layernorm", (3, 5), label="no gain")
    yield _case("layernorm", (3, 5), None, (5,), label="bias only", eps=0.1)
    yield _case("rmsnorm", (3, 5), (5,))
    yield _case("rmsnorm", (2, 3, 5), label="no gain", eps=0.1)
    for name in ("softmax", "log_softmax"):
        yield _case(name, (3, 5))
        yield _case(name, (3, 5, 2), axis=1)


def _losses() -> Iterator[Case]:
    for label, options in _CROSS_ENTROPY.items():
        settings = {k: v for k, v in options.items() if k in ("label_smoothing", "z_loss")}
        rest = (integers(7, 2, 4, ignored=options.get("ignored", 0)), *([Tensor(np.linspace(0.5, 2, 8).reshape(2, 4))] * ("weights" in options)))
        yield _case("cross_entropy", (2, 4, 7), *rest, label=label, **settings)
        yield _case("linear_cross_entropy", (2, 4, 3), (7, 3), *rest, label=label, rows=3, **settings)
    yield _case("linear_cross_entropy", (8, 3), (7, 3), integers(7, 8), label="one slice")
    yield _case("binary_cross_entropy", (3, 4), lambda random: random.uniform(size=(3, 4)))
    yield _case("mse", (3, 4), (3, 4))
    yield _case("kl_divergence", (3, 4), (3, 4))


def negative(*shape):
    """Log-probabilities that are clear of 0."""
    return lambda random: random.uniform(-2.0, -0.3, shape)


def constant_weights(*shape):
    """Weights in [0, 1), the first of them 0."""

    def make(random):
        weights = random.uniform(size=shape)
        weights.reshape(-1)[0] = 0
        return Tensor(weights)

    return make


def constant(*shape):
    """Normal numbers that are not differentiated: measured ones."""
    return lambda random: Tensor(random.standard_normal(shape))


def _alignment() -> Iterator[Case]:
    yield _case("linear_log_probabilities", (2, 4, 3), (7, 3), integers(7, 2, 4, ignored=3), label="ignored", rows=2)
    yield _case("linear_log_probabilities", (8, 3), (7, 3), integers(7, 8), label="one slice")
    weights = Tensor(np.array([0.5, 0.0, 2.0, 1.0, 0.25]))
    yield _case("bradley_terry", (5,), (5,))
    yield _case("bradley_terry", (5,), (5,), weights, label="margin, weights", margin=0.3)
    for name in ("dpo", "ipo"):
        yield _case(name, (5,), (5,), (5,), (5,), beta=0.7)
        yield _case(name, (5,), (5,), (5,), (5,), weights, label="weights")
    yield _case("dpo", (5,), (5,), (5,), (5,), beta=0.7, label_smoothing=0.2)
    yield _case("simpo", (5,), (5,), weights)
    yield _case("orpo", negative(5), negative(5), weights, strength=0.4)
    yield _case("kto", (5,), (5,), booleans(5), Tensor(np.array(0.3)), weights, beta=0.7)
    yield _case("policy_gradient", (2, 5), constant(2, 5), constant_weights(2, 5))
    yield _case("clipped_policy_loss", (2, 5), constant(2, 5), constant(2, 5))
    yield _case("clipped_policy_loss", (2, 5), constant(2, 5), constant(2, 5), constant_weights(2, 5), low=0.1, high=2.0)
    yield _case("clipped_value_loss", (2, 5), constant(2, 5), constant(2, 5), constant_weights(2, 5), clip=0.5)
    for estimator in ("k1", "k2", "k3"):
        yield _case("kl_estimate", (2, 5), (2, 5), constant_weights(2, 5), estimator=estimator)
    yield _case("entropy", (3, 4, 5))


def _embeddings_and_attention() -> Iterator[Case]:
    yield _case("embedding", (6, 3), integers(6, 2, 5))
    angles = np.arange(5)[:, None] * np.array([1.0, 0.3, 0.1])
    cos, sin = Tensor(np.cos(angles)), Tensor(np.sin(angles))
    yield _case("rope", (2, 3, 5, 6), cos, sin)
    yield _case("rope", (2, 3, 5, 6), cos, sin, interleaved=True)
    yield _case("dropout", (4, 5), rate=0.4, rng=lambda: np.random.default_rng(3), label="rate=0.4")
    yield _case("cast", (3, 4), precision="fp32")
    for label, (arguments, settings) in _ATTENTION.items():
        yield _case("attention", *arguments, label=label, **settings)
        yield _case("tiled_attention", *arguments, label=label, block=2, **settings)


CASES: tuple[Case, ...] = (*_elementwise(), *_reductions(), *_shapes(), *_products(), *_norms(), *_losses(), *_alignment(),
                            *_embeddings_and_attention())
