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

from tinyllm.anomaly import check_finite, guarded, looking_for_anomalies
from tinyllm.backend import array_module, is_floating, to_numpy

OPS: dict[str, Callable] = {}  # every op of this package by name: what the table of test cases must cover
_recording: ContextVar[bool] = ContextVar("recording", default=True)
_numbers = itertools.count()


class Version:
    """Counts the in-place changes of one Tensor's values; shared with every Node that saved them."""

    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class Node:
    """One op that ran: its parents (a Node, a leaf Tensor, or None where no gradient is wanted) and its backward closure."""

    __slots__ = ("name", "number", "parents", "shapes", "dtypes", "saved", "backward")

    def __init__(self, name, inputs, result, backward):
        self.name, self.number, self.backward = name, next(_numbers), backward
        self.parents = tuple((x.node or x) if isinstance(x, Tensor) and x.requires_grad else None for x in inputs)
        self.shapes = tuple(getattr(x, "shape", ()) for x in inputs)
        self.dtypes = tuple(getattr(x, "dtype", None) for x in inputs)
        self.saved = tuple((x.version, x.version.count) for x in (*inputs, result) if isinstance(x, Tensor))

    def take(self) -> tuple[Callable, tuple]:
        """The backward closure and the parents; forgets both, so that activations die with this call's result."""
        if self.backward is None:
            raise RuntimeError(
                f"backward() reached the op {self.name!r}, whose activations an earlier backward() has used and freed: "
                "run the forward again, or add the losses up and call backward() once"
            )
        if any(version.count != count for version, count in self.saved):
            raise RuntimeError(
                f"backward() reached the op {self.name!r}, whose inputs or result were changed in place after the op had saved them: "
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

    `.grad` is an array of the same shape, or None before the first backward(). Gradients of several backward() calls add up. The first
    is written into `.buffer`, where an array was put there (see `tinyllm.optim.flat`), into one of its own otherwise.
    Operators and methods (`+`, `@`, `.sum()`, …) are attached by `tinyllm.ops`.
    """

    __slots__ = ("data", "grad", "buffer", "requires_grad", "node", "version", "__weakref__")
    __array_ufunc__ = None  # array + Tensor asks Tensor.__radd__ instead of looping over the elements; np.exp(Tensor) is a TypeError

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise TypeError("Tensor(data) got a Tensor: use .detach() for the same values outside the graph")
        if isinstance(data, np.generic):
            data = np.asarray(data)  # NumPy turns 0-d results into scalars (and its float64 scalar passes for a Python float)
        elif isinstance(data, bool | int | float | complex | list | tuple):
            data = np.asarray(data, dtype=np.float32)
        if requires_grad and not is_floating(data):
            raise ValueError(f"only floating-point values can have a gradient, got {data.dtype}")
        self.data, self.grad, self.buffer, self.requires_grad = data, None, None, requires_grad
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

    def __bool__(self) -> bool:
        return bool(self.data)  # of one value, as in NumPy; without this, Python would ask for the length

    def __iter__(self) -> Iterator["Tensor"]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        made_by = f", op={self.node.name}" if self.node else ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({np.array2string(to_numpy(self.data), precision=4, threshold=20)}, {self.dtype}{made_by})"

    def __setitem__(self, index, value):
        """Write values in place. Refused while a gradient is recorded, which could not flow through the write."""
        if _recording.get() and (self.requires_grad or (isinstance(value, Tensor) and value.requires_grad)):
            raise RuntimeError("writing to or from a Tensor that requires a gradient: wrap it in no_grad(), or use where() or concatenate()")
        self.data[_plain(index)] = _plain(value)
        self.version.count += 1

    def item(self) -> float:
        return self.data.item()

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array (not copied where they are one already)."""
        return to_numpy(self.data)

    def detach(self) -> "Tensor":
        """The same values (the same array, not a copy), outside the graph."""
        result = Tensor(self.data)
        result.version = self.version
        return result

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
        grad = xp.ones_like(self.data) if grad is None else xp.asarray(_plain(grad), dtype=self.dtype)
        if grad.shape != self.shape:
            if grad.ndim:
                raise ValueError(f"the upstream gradient has shape {grad.shape}, the Tensor {self.shape}")
            grad = xp.broadcast_to(grad, self.shape)
        _backward(self.node or self, grad)


def _backward(start, grad) -> None:
    pending = _Pending()
    pending.add(start, grad, fresh=False)
    while pending.order:
        _visit(*pending.pop(), pending)  # a function of its own, so that nothing of one op lives on while the next one works


def _visit(node: Node, dy, pending: "_Pending") -> None:
    """Run one op's backward and hand its gradients on."""
    backward, parents = node.take()
    gradients = backward(dy)
    if isinstance(gradients, Tensor):  # a checkpoint that has run again: go on into the graph of that run
        if gradients.requires_grad:
            pending.add(gradients.node or gradients, dy, fresh=False)
        return
    each = _one_by_one(node, gradients, parents, dy) if isinstance(gradients, Iterator) else _gradients(node, gradients, parents, dy)
    for i, dx, fresh in each:
        if isinstance(dx, Into) and isinstance(parents[i], Tensor) and not looking_for_anomalies():
            dx.reach(parents[i])
            continue
        dx = dx.array(array_module(dy), node.shapes[i], node.dtypes[i]) if isinstance(dx, Into) else dx
        if looking_for_anomalies():
            check_finite(f"the backward of {node.name!r} for its input {i}", dx, [dy])
        fitted = _fit(dx, node.shapes[i], node.dtypes[i], node.name)
        pending.add(parents[i], fitted, fresh or (fitted is not dx and fitted.base is None))


class Into:
    """A gradient that can be written where it belongs, which spares an array of the parameter's size and the time to add it.

    write(out) : sets out, an array of the input's shape and dtype, to the gradient.
    add(out) : adds the gradient to out; by default the gradient is made in an array of its own and added.
    """

    __slots__ = ("write", "add")

    def __init__(self, write: Callable, add: Callable | None = None):
        self.write, self.add = write, add

    def array(self, xp, shape, dtype):
        out = xp.empty(shape, dtype)
        self.write(out)
        return out

    def reach(self, leaf: Tensor) -> None:
        """Add this to leaf.grad."""
        if leaf.grad is not None and self.add is not None:
            self.add(leaf.grad)
        elif leaf.grad is not None or leaf.buffer is None:
            _add_to_leaf(leaf, self.array(array_module(leaf.data), leaf.shape, leaf.dtype), fresh=True)
        else:
            self.write(leaf.buffer)
            leaf.grad = leaf.buffer


def _gradients(node: Node, gradients, parents: tuple, dy) -> Iterator[tuple]:
    """(number, gradient, whether nobody else holds it) for each parent that wants one, computed when it is asked for."""
    gradients = list(gradients) if isinstance(gradients, tuple) else [gradients]
    if len(gradients) != len(parents):
        raise RuntimeError(f"the backward of {node.name!r} returned {len(gradients)} gradients for {len(parents)} inputs")
    for i, parent in enumerate(parents):
        dx = gradients[i] if parent is not None else None
        dx = gradients[i] = dx() if callable(dx) else dx
        if isinstance(dx, Into):
            yield i, dx, True
        elif dx is not None:
            others = (dy, *gradients[:i], *gradients[i + 1 :])
            yield i, dx, dx.base is None and not any(dx is o or dx is getattr(o, "base", None) for o in others)


def _one_by_one(node: Node, gradients: Iterator, parents: tuple, dy) -> Iterator[tuple]:
    """The same for a backward that is a generator."""
    missing = {i for i, parent in enumerate(parents) if parent is not None}
    for i, dx in gradients:
        missing.discard(i)
        dx = dx() if callable(dx) and parents[i] is not None else dx
        if parents[i] is not None and dx is not None:
            yield i, dx, isinstance(dx, Into) or (dx is not dy and dx.base is None)
    if missing:
        raise RuntimeError(f"the backward of {node.name!r} gave no gradient for its input {min(missing)}; None says that there is none")


class _Pending:
    """Gradients that wait for more parts, handed out by descending op number, so that each is complete when it is taken.

    Those of leaves do not wait: they are added to `.grad` at once.
    """

    def __init__(self):
        self.order, self.parts, self.owned = [], {}, set()

    def add(self, node: Node | Tensor, dx, fresh: bool) -> None:
        if isinstance(node, Tensor):
            return _add_to_leaf(node, dx, fresh)
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
    if leaf.grad is None and leaf.buffer is not None:
        leaf.buffer[...] = dx
        leaf.grad = leaf.buffer
    elif leaf.grad is None:
        leaf.grad = array_module(leaf.data).asarray(dx if fresh else dx.copy())  # NumPy makes scalars of 0-d results
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
        total = dx.sum(axes, keepdims=True)
        if total.shape[extra:] != shape:
            raise RuntimeError(f"the backward of {name!r} returned a gradient of shape {dx.shape} for an input of shape {shape}")
        dx = total.reshape(shape)
    return dx if dx.dtype == dtype else dx.astype(dtype)


def op(function: Callable) -> Callable:
    """Make a differentiable op of a pure array function.

        @op
        def mul(a, b):
            return a * b, lambda dy: (dy * b, dy * a)

    The function gets arrays (positional; Python numbers and None pass through; those with a default, None, may be left out or given
    by name) and settings (keyword-only). It returns its value y and `backward(dy)`, which returns one gradient per positional
    argument, of any shape that broadcasts over the argument's: the engine sums it back. None stands for "no gradient" (integers,
    masks). A gradient may be given as a function without arguments; it is called only if that input requires one, so frozen inputs
    cost no work. A gradient is a new array, a view, or dy itself, never an array that somebody else keeps: the engine may add into
    it. One that is as large as a parameter may be an `Into`. A backward with many inputs may be a generator of (number of the input,
    gradient) in the order in which they are ready, each a new array or dy, so that what it no longer needs can go meanwhile.
    `op.array` is the plain function.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]  # of the inputs; none for *xs
    required = len(names) - len(function.__defaults__ or ())

    @functools.wraps(function)
    def apply(*inputs, **settings):
        if len(inputs) < len(names):  # inputs with a default may be left out, or be given by name
            inputs += tuple(settings.pop(name, None) for name in names[len(inputs) :])
            if any(x is None for x in inputs[:required]):
                raise TypeError(f"{function.__name__}() needs its first {required} arguments: {', '.join(names[:required])}")
        arrays = [_plain(x) for x in inputs]
        settings = {name: _setting(function.__name__, name, value) for name, value in settings.items()}
        y, backward = apply.run(*arrays, **settings)
        if looking_for_anomalies():
            check_finite(f"the op {function.__name__!r}", y, [*arrays, *settings.values()])
            backward = guarded(function.__name__, [*arrays, y], backward)
        result = Tensor(y)
        for x in inputs:
            if isinstance(x, Tensor) and _is_view(result.data, x.data):
                result.version = x.version  # writing into one changes the other
        if _recording.get() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            result.requires_grad = True
            result.node = Node(function.__name__, inputs, result, backward)
        return result

    if str(function.__module__).startswith("tinyllm.ops."):  # the library's own; those of users are nobody else's business
        if function.__name__ in OPS:
            raise ValueError(f"an op named {function.__name__!r} exists already")
        OPS[function.__name__] = apply
    apply.array = apply.run = function  # `run` may be replaced by a faster twin, see tinyllm.kernels
    return apply


def _plain(x):
    """The array of a Tensor; the Python number of a NumPy scalar, whose float64 would turn every float32 it meets into float64."""
    return x.data if isinstance(x, Tensor) else x.item() if isinstance(x, np.generic) else x


def _setting(op_name: str, name: str, value):
    """The value of a setting. TypeError for a Tensor that waits for a gradient, since none flows through a setting."""
    if isinstance(value, Tensor) and value.requires_grad and _recording.get():
        raise TypeError(f"{op_name}(): no gradient flows through the setting {name!r}, but it got a Tensor that requires one: .detach() it")
    return _plain(value)


def _is_view(y, x) -> bool:
    """Whether y was made as a view of x (or is x), so that both are the same memory."""
    return y is x or (y.base is not None and (y.base is x or y.base is x.base))


@contextmanager
def _set(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def recording() -> bool:
    """Whether ops record a graph now; a kernel may prepare its gradient only then."""
    return _recording.get()


def no_grad():
    """`with no_grad():` ops record nothing: no graph, no saved activations."""
    return _set(_recording, False)


def enable_grad():
    """`with enable_grad():` ops record again, inside a `no_grad` or a backward."""
    return _set(_recording, True)
