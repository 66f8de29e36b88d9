"""All trainable parameters side by side in one flat array, and their gradients in another.

A transformer has hundreds of parameters, most of them small. Laid end to end they are one array: the gradient's norm and the
optimizer's update become a few array calls for the whole model. Each `p.data` is a view into its stretch, and each `p.buffer` one of the
gradients', where backward() writes.

    flat.data   | decayed: matrices … | not decayed: vectors … |
    flat.grad   | the same order                               |

The decay rule: matrices (two or more axes, so embeddings too) decay, vectors and scalars (gains, biases) do not. A matrix can shrink
without harm where a norm rescales what it gives; a gain pulled towards 0 would silence its channel.
"""
from collections.abc import Callable, Iterable

from tinyllm.backend import array_module
from tinyllm.tensor import Tensor
from tinyllm.threads import parallel


def block_length(xp) -> int:
    """How many elements of a flat array to work on at a time, in the array library xp.

    On the CPU the temporaries then stay in the second-level cache. On a GPU, where every array call is a launch, blocks are long and
    only bound the size of the temporaries.
    """
    return 2**16 if xp.__name__ == "numpy" else 2**24


def for_each(xp, items: list[tuple], work: Callable) -> None:
    """work(*item) for all items: on the CPU the items are shared out over its cores, a GPU has cores enough of its own."""

    def some(part, _):
        for item in items[part]:
            work(*item)

    if xp.__name__ == "numpy":
        parallel(some, len(items), at_least=2)
    else:
        some(slice(None), 0)


class FlatParameters:
    """Gathers the parameters that require a gradient; the others are left alone.

    named_parameters : (name, Tensor) pairs, all float32 or all float64, all on one device. Each Tensor appears once.

    From here on `p.data` is a view: write into it, do not replace it. backward() writes a parameter's first gradient into its stretch
    of `grad` and adds the others to it, so that nothing has to be set to 0 before.

    Attributes: `data`, `grad` (flat arrays; a stretch without gradient is 0), `decayed` (how many elements, from the front, decay), `tensors` {name: Tensor} in flat
    order, and `blocks`, the (slice, decays) pairs that an update goes through.

    Raises ValueError where nothing is trainable, for a repeated name or Tensor, and for mixed or 16-bit dtypes.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]]):
        trainable = [(name, p) for name, p in named_parameters if p.requires_grad]
        _check(trainable)
        trainable.sort(key=lambda pair: pair[1].ndim < 2)  # stable: matrices first, each group in the given order
        self.tensors = dict(trainable)
        self.decayed = sum(p.size for p in self.tensors.values() if p.ndim >= 2)
        first = trainable[0][1].data
        xp = array_module(first)
        self.data = xp.empty(sum(p.size for p in self.tensors.values()), first.dtype)
        for name, view in self.views(self.data).items():
            view[...] = self.tensors[name].data
        self.use(self.data, xp.empty_like(self.data))
        length = block_length(xp)
        self.blocks = _blocks(0, self.decayed, length, True) + _blocks(self.decayed, self.data.size, length, False)

    def use(self, data, grad) -> None:
        """Let these flat arrays hold the values and the gradients from here on."""
        self.data, self._grad = data, grad
        self._values, gradients = self.views(data), self.views(grad)
        for name, p in self.tensors.items():
            p.data, p.buffer = self._values[name], gradients[name]

    def views(self, flat) -> dict:
        """A flat array in the order of the parameters as {name: view of the parameter's shape}."""
        views, start = {}, 0
        for name, p in self.tensors.items():
            views[name] = flat[start : start + p.size].reshape(p.shape)
            start += p.size
        return views

    @property
    def grad(self):
        """All gradients as one flat array: what backward() wrote there, what a user set as `p.grad`, 0 for a parameter that got none.

        From then on `p.grad` is the parameter's stretch of it, also where it was None. Change it in place: `flat.grad[...] *= 0.5`.

        Raises ValueError for a gradient of another shape than its parameter's.
        """
        for name, p in self.tensors.items():
            if p.grad is p.buffer:
                continue
            if p.grad is not None and p.grad.shape != p.shape:
                raise ValueError(f"parameter {name!r} has the shape {p.shape}, its gradient {p.grad.shape}")
            p.buffer[...] = 0 if p.grad is None else p.grad
            p.grad = p.buffer
        return self._grad

    def zero_grad(self) -> None:
        """Forget every gradient."""
        self.check_attached()
        for p in self.tensors.values():
            p.grad = None

    def check_attached(self) -> None:
        """Raise RuntimeError where a parameter no longer reads and writes the flat arrays: its update would be lost."""
        for name, p in self.tensors.items():
            if p.data is not self._values[name]:
                raise RuntimeError(
                    f"parameter {name!r}: .data was replaced after the optimizer was made, which works on a view: "
                    "write p.data[...] = value, or make the optimizer afterwards (and only one for a model)"
                )
            if not p.requires_grad:
                raise RuntimeError(f"parameter {name!r} was frozen after the optimizer was made: make a new optimizer")

    def mark_changed(self) -> None:
        """Tell the engine that the values were changed in place: backward() through an older graph is then an error."""
        for p in self.tensors.values():
            p.version.count += 1


def _blocks(start: int, stop: int, length: int, decays: bool) -> list[tuple[slice, bool]]:
    return [(slice(i, min(i + length, stop)), decays) for i in range(start, stop, length)]


def _check(trainable: list[tuple[str, Tensor]]) -> None:
    if not trainable:
        raise ValueError("the optimizer got no parameter that requires a gradient: is the whole model frozen?")
    first_name, first = trainable[0]
    names, seen = set(), {}
    for name, p in trainable:
        if name in names:
            raise ValueError(f"the optimizer got two parameters named {name!r}")
        if id(p) in seen:
            raise ValueError(f"the optimizer got one parameter twice, as {seen[id(p)]!r} and {name!r}: name shared weights once")
        if p.dtype.name not in ("float32", "float64"):
            raise ValueError(f"parameter {name!r} is {p.dtype}: the optimizer works on float32 (or float64) master weights")
        if p.dtype != first.dtype or array_module(p.data) is not array_module(first.data):
            raise ValueError(f"parameters {first_name!r} ({_kind(first)}) and {name!r} ({_kind(p)}) cannot share one flat array")
        names.add(name)
        seen[id(p)] = name


def _kind(p: Tensor) -> str:
    return f"{array_module(p.data).__name__} {p.dtype}"
