"""A Module is an object whose attributes are Parameters, other Modules, or lists of Modules. All else follows from walking them."""
from collections.abc import Iterator
from typing import Self

import numpy as np

from tinyllm.backend import array_module, to_numpy
from tinyllm.tensor import Tensor


class Parameter(Tensor):
    """A Tensor that is learned. Frozen ones (requires_grad = False) stay parameters: they are saved, but get no gradient."""

    __slots__ = ()

    def __init__(self, data):
        super().__init__(data, requires_grad=True)


class Module:
    """Base of every layer. Subclasses set Parameters and Modules as attributes and define forward()."""

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """(path, Parameter) in the order in which attributes were set; one that is used in several places comes once."""
        seen = set()
        for name, parameter in self._walk(prefix):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter

    def _walk(self, prefix):
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value._walk(f"{prefix}{name}.")
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    if isinstance(item, Module):
                        yield from item._walk(f"{prefix}{name}.{i}.")

    def to(self, xp) -> Self:
        """The module itself, its parameters moved to the device of an array library (see backend.device_module)."""
        for _, parameter in self.named_parameters():
            parameter.data = xp.asarray(to_numpy(parameter.data)) if xp is not array_module(parameter.data) else parameter.data
        return self

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every parameter's values by name, as NumPy arrays that share memory with the parameters where they live on the CPU."""
        return {name: to_numpy(p.data) for name, p in self.named_parameters()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Copy values in by name. Raises ValueError naming what is missing, unknown or of another shape; then nothing is changed."""
        load_parameters(dict(self.named_parameters()), state)


def load_parameters(parameters: dict[str, Parameter], state: dict[str, np.ndarray]) -> None:
    """Copy saved values into parameters by name. Raises ValueError naming what is missing, unknown or of another shape; then nothing is changed."""
    if missing := sorted(parameters.keys() - state.keys()):
        raise ValueError(f"the saved weights lack {missing[0]!r} ({len(missing)} missing): they belong to another model")
    if unknown := sorted(state.keys() - parameters.keys()):
        raise ValueError(f"the saved weights hold {unknown[0]!r} ({len(unknown)} unknown), which this model has not")
    for name, p in parameters.items():
        if p.shape != state[name].shape:
            raise ValueError(f"the saved weights have {name} of shape {state[name].shape}, this model {p.shape}")
    for name, p in parameters.items():
        p.data[...] = array_module(p.data).asarray(state[name], dtype=p.dtype)
        p.version.count += 1
