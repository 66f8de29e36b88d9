"""Reverse-mode automatic differentiation: a Tensor remembers which op made it, and backward() runs the ops' derivatives in reverse.

The chain rule on a graph. If a scalar L depends on x through y₁ … yₙ, then dL/dx = Σᵢ (∂yᵢ/∂x)ᵀ dL/dyᵢ. Going from L back to the
inputs, every dL/dy is complete once all users of y have handed in their part. Ops are numbered in the order in which they ran, and
a user always runs after what it uses: so taking the highest number first visits every op after all of its users, no recursion and
no sorting of the graph in advance.

An op is a pure function of arrays that returns its value and its backward (see `op`). What the backward needs is held by the
closure: arrays, never Tensors. A Tensor points to its Node and a Node to its parents' Nodes, not to their values, so an activation
lives exactly as long as some backward needs it, and is freed as backward passes.
"""
import functools
import heapq
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from tinyllm.anomaly import check_finite, guarded
from tinyllm.backend import array_module, to_numpy

OPS: dict[str, Callable] = {}  # every op by name: what the table of test cases must cover
_recording: ContextVar[bool] = ContextVar("recording", default=True)
_anomaly: ContextVar[bool] = ContextVar("anomaly", default=False)
_numbers = itertools.count()


class Version:
    """Counts the in-place changes of one Tensor's values; shared with every Node that saved them."""

    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class Node:
    """One op that ran: its parents (a Node, a leaf Tensor, or None where no gradient is wanted) and its backward closure."""

    __slots__ = ("name", "number", "parents", "shapes", "dtypes", "saved", "backward")

    def __init__(self, name, inputs, backward):
        self.name, self.number, self.backward = name, next(_numbers), backward
        self.parents = tuple((x.node or x) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)
        self.shapes = tuple(getattr(x, "shape", ()) for x in inputs)
        self.dtypes = tuple(getattr(x, "dtype", None) for x in inputs)
        self.saved = tuple((x.version, x.version.count) for x in inputs if isinstance(x, Tensor))

    def take(self) -> tuple[Callable, tuple]:
        """The backward closure and the parents; forgets both, so that activations die with this call's result."""
        if self.backward is None:
            raise RuntimeError(
                f"backward() reached the op {self.name!r}, whose activations an earlier backward() has used and freed: "
                "run the forward again, or add the losses up and call backward() once"
            )
        if any(version.count != count for version, count in self.saved):
            raise RuntimeError(
                f"backward() reached the op {self.name!r}, one of whose inputs was changed in place after the op had saved it: "
                "change values after backward(), or work on a copy"
            )
        backward, parents = self.backward, self.parents
        self.backward, self.parents, self.saved = None, (), ()
        return backward, parents


class Tensor:
    """An array that takes part in differentiation.

    Parameters
    ----------
    data : array, number or nested list; arrays keep their dtype, Python numbers and lists become float32.
    requires_grad : whether backward() shall accumulate into `.grad` (only for floating-point data).

    `.grad` is an array of the same shape, or None before the first backward(). Gradients of several backward() calls add up.
    Operators and methods (`+`, `@`, `.sum()`, …) are attached by `tinyllm.ops`.
    """

    __slots__ = ("data", "grad", "requires_grad", "node", "version", "__weakref__")
    __array_priority__ = 1000  # array + Tensor asks Tensor.__radd__ instead of looping over the elements

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor(data) got a Tensor: use .detach() for a copy outside the graph")
        if isinstance(data, np.generic):
            data = np.asarray(data)  # NumPy turns 0-d results into scalars (and its float64 scalar passes for a Python float)
        elif isinstance(data, bool | int | float | complex | list | tuple):
            data = np.asarray(data, dtype=np.float32)
        if requires_grad and data.dtype.kind not in "fc":
            raise ValueError(f"only floating-point values can have a gradient, got {data.dtype}")
        self.data, self.grad, self.requires_grad = data, None, requires_grad
        self.node: Node | None = None
        self.version = Version()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self):
        return self.data.dtype

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        made_by = f", op={self.node.name}" if self.node else ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({np.array2string(to_numpy(self.data), precision=4, threshold=20)}, {self.dtype}{made_by})"

    def __setitem__(self, index, value):
        """Write values in place. Refused while a gradient is recorded, which could not flow through the write."""
        if self.requires_grad and _recording.get():
            raise RuntimeError("writing into a Tensor that requires a gradient: wrap it in no_grad(), or use where() or concatenate()")
        self.data[index] = value.data if isinstance(value, Tensor) else value
        self.version.count += 1

    def item(self) -> float:
        return self.data.item()

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array (not copied where they are one already)."""
        return to_numpy(self.data)

    def detach(self) -> "Tensor":
        """The same values, outside the graph."""
        return Tensor(self.data)

    def backward(self, grad=None) -> None:
        """Add the gradient of this value to `.grad` of every leaf that it depends on and that requires one.

        grad : upstream gradient of this Tensor's shape (array or number); may be left out for a single value, where it is 1.

        Raises ValueError when grad is missing or has another shape, RuntimeError when nothing requires a gradient or the graph
        was used before.
        """
        if not self.requires_grad:
            raise RuntimeError("backward() from a Tensor that depends on nothing with requires_grad=True")
        if grad is None and self.size != 1:
            raise ValueError(f"backward() from a Tensor of shape {self.shape} needs the upstream gradient: pass one of that shape")
        xp = array_module(self.data)
        grad = xp.ones_like(self.data) if grad is None else xp.asarray(grad, dtype=self.dtype)
        if grad.shape != self.shape:
            if grad.size != 1:
                raise ValueError(f"the upstream gradient has shape {grad.shape}, the Tensor {self.shape}")
            grad = xp.broadcast_to(grad, self.shape)
        _backward(self.node or self, grad)


def _backward(start, grad) -> None:
    if isinstance(start, Tensor):
        return _add_to_leaf(start, grad, fresh=False)
    pending = _Pending()
    pending.add(start, grad, fresh=False)
    while pending.order:
        node, dy = pending.pop()
        backward, parents = node.take()
        for i, (dx, fresh) in enumerate(_gradients(node, backward, parents, dy)):
            if dx is not None and _anomaly.get():
                check_finite(f"the backward of {node.name!r} for its input {i}", dx, [dy])
            if dx is None:
                continue
            fitted = _fit(dx, node.shapes[i], node.dtypes[i], node.name)
            add = _add_to_leaf if isinstance(parents[i], Tensor) else pending.add
            add(parents[i], fitted, fresh or (fitted is not dx and fitted.base is None))


def _gradients(node: Node, backward: Callable, parents: tuple, dy) -> Iterator[tuple]:
    """(gradient, whether nobody else holds it) for each parent, computed when it is asked for; (None, False) where none is wanted."""
    gradients = backward(dy)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    if len(gradients) != len(parents):
        raise RuntimeError(f"the backward of {node.name!r} returned {len(gradients)} gradients for {len(parents)} inputs")
    for i, parent in enumerate(parents):
        dx = gradients[i] if parent is not None else None
        dx = dx() if callable(dx) else dx
        others = (dy, *gradients[:i], *gradients[i + 1 :])
        yield dx, dx is not None and dx.base is None and not any(dx is o or dx is getattr(o, "base", None) for o in others)


class _Pending:
    """Gradients that wait for more parts, handed out by descending op number, so that each is complete when it is taken."""

    def __init__(self):
        self.order, self.parts, self.owned = [], {}, set()

    def add(self, node: Node, dx, fresh: bool) -> None:
        if node not in self.parts:
            heapq.heappush(self.order, (-node.number, node))
            self.parts[node] = dx
        elif node in self.owned:
            self.parts[node] += dx
        else:  # both parts may be one array (add returns dy twice): the sum needs a buffer of its own before it is added to in place
            self.parts[node] = self.parts[node] + dx
            fresh = True
        if fresh:
            self.owned.add(node)

    def pop(self) -> tuple:
        _, node = heapq.heappop(self.order)
        self.owned.discard(node)
        return node, self.parts.pop(node)


def _add_to_leaf(leaf: Tensor, dx, fresh: bool) -> None:
    if leaf.grad is None:
        leaf.grad = dx if fresh else dx.copy()
    else:
        leaf.grad += dx


def _fit(dx, shape, dtype, name):
    """dx summed back to the shape that the op's input had before broadcasting, in that input's dtype.

    Broadcasting copies an input along new leading axes and along axes of length 1; the gradient of a copy is a sum over the copies.
    """
    if dx.shape != shape:
        extra = dx.ndim - len(shape)
        if extra < 0:
            raise RuntimeError(f"the backward of {name!r} returned a gradient of shape {dx.shape} for an input of shape {shape}")
        axes = tuple(range(extra)) + tuple(extra + i for i, n in enumerate(shape) if n == 1 and dx.shape[extra + i] != 1)
        dx = dx.sum(axes, keepdims=True).reshape(dx.shape[extra:] if not axes else shape)
        if dx.shape != shape:
            raise RuntimeError(f"the backward of {name!r} returned a gradient that does not reduce to its input's shape {shape}")
    return dx if dx.dtype == dtype else dx.astype(dtype)


def op(function: Callable) -> Callable:
    """Make a differentiable op of a pure array function.

        @op
        def mul(a, b):
            return a * b, lambda dy: (dy * b, dy * a)

    The function gets arrays (positional; Python numbers and None pass through) and settings (keyword-only), and returns its value y
    and `backward(dy)`, which returns one gradient per positional argument, of any shape that broadcasts over the argument's: the
    engine sums it back. None stands for "no gradient" (integers, masks). A gradient may be given as a function without arguments; it
    is called only if that input requires one, so frozen inputs cost no work. A gradient is a new array, a view, or dy itself, never an
    array that somebody else keeps: the engine may add into it. `op.array` is the plain function.
    """

    arity = function.__code__.co_argcount  # inputs with a default may be left out; 0 for *xs

    @functools.wraps(function)
    def apply(*inputs, **settings):
        inputs += (None,) * (arity - len(inputs))
        arrays = [x.data if isinstance(x, Tensor) else x for x in inputs]
        y, backward = function(*arrays, **settings)
        if _anomaly.get():
            check_finite(f"the op {function.__name__!r}", y, [*arrays, *settings.values()])
            backward = guarded(function.__name__, arrays, backward)
        result = Tensor(y)
        if _recording.get() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            result.requires_grad = True
            result.node = Node(function.__name__, inputs, backward)
        return result

    if function.__name__ in OPS:
        raise ValueError(f"an op named {function.__name__!r} exists already")
    OPS[function.__name__] = apply
    apply.array = function
    return apply


@contextmanager
def _set(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def no_grad():
    """`with no_grad():` ops record nothing: no graph, no saved activations."""
    return _set(_recording, False)


def detect_anomaly():
    """`with detect_anomaly():` the first op that makes NaN or infinity out of finite arguments raises FloatingPointError.

    The message names the op and gives each argument's shape and range. An input that was changed behind the engine's back (through
    `.data`) raises RuntimeError at backward(). Slow: for looking, not for training.
    """
    return _set(_anomaly, True)


def checkpoint(function: Callable, *inputs, rng: np.random.Generator | None = None) -> Tensor:
    """function(*inputs), without keeping its activations: backward() runs it again to get them.

    Memory falls from all activations inside `function` to its inputs; the price is one more forward. Gradients are bitwise those of
    the plain call, since the second run repeats the first: where `function` draws random numbers, pass the generator that it uses as
    `rng`, and its state is put back for the second run. Parameters that `function` reaches on its own get their gradients too.
    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    state = rng.bit_generator.state if rng else None
    with no_grad():
        y = function(*inputs)
    if not _recording.get():
        return y

    def backward(dy):
        leaves = [Tensor(x, wanted) if wanted is not None else x for x, wanted in kept]
        with _set(_recording, True), _replayed(rng, state):
            again = function(*leaves)
        again.backward(dy)
        return tuple(x.grad if isinstance(x, Tensor) else None for x in leaves)

    kept = [(x.data, x.requires_grad) if isinstance(x, Tensor) else (x, None) for x in inputs]  # arrays: a Tensor would hold its graph
    result = Tensor(y.data, requires_grad=True)
    result.node = Node("checkpoint", inputs, backward)
    return result


@contextmanager
def _replayed(rng: np.random.Generator | None, state: dict | None) -> Iterator[None]:
    """rng set back to an earlier state inside the block, and put where it was after it."""
    if rng is None:
        yield
        return
    now, rng.bit_generator.state = rng.bit_generator.state, state
    yield
    rng.bit_generator.state = now
