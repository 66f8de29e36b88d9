"""What all optimizers share: flat buffers, the walk over their blocks, named state. A subclass adds the formula for one block."""
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np

from tinyllm.backend import array_module, to_numpy
from tinyllm.config import suggestion
from tinyllm.optim.clip import sum_of_squares
from tinyllm.optim.control import Control
from tinyllm.optim.flat import FlatParameters, for_each
from tinyllm.optim.scaler import LossScaler
from tinyllm.tensor import Tensor


class Optimizer(ABC):
    """Updates the parameters of a model from their gradients.

    `flat` is the model's FlatParameters (`flat.grad` is what `global_norm` takes), `steps` the number of updates so far, `state` the
    flat arrays that an update needs of the past, by name.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], state_names: tuple[str, ...]):
        self.flat = FlatParameters(named_parameters)
        self.steps = 0
        xp = array_module(self.flat.data)
        self.state = {name: xp.zeros_like(self.flat.data) for name in state_names}

    def zero_grad(self) -> None:
        """Forget every gradient: backward() then starts from 0."""
        self.flat.zero_grad()

    def square(self):
        """Σ g² over the whole gradient, whose root is its norm: a number, or a 0-d array on a device where nothing shall wait for it."""
        return sum_of_squares(self.flat.grad)

    def control(self, scaler: LossScaler, *, clip: float = 0.0, detectors=None, precision: str = "fp32") -> Control:
        """What decides about each gradient of this optimizer (see `Control`), from `steps` and the scaler's scale on.

        precision : what the weights are used in. Where they live on a GPU, an update may write that copy of them, too.
        """
        return Control(self, scaler, clip, detectors)

    def step(self, lr: float, grad_scale: float = 1.0) -> None:
        """One update of every parameter with its gradient times grad_scale.

        grad_scale : everything the gradients still have to be multiplied by, in one number: 1 / loss scale, 1 / tokens, the clip factor.

        Raises ValueError where lr or grad_scale is not a finite number ≥ 0, and RuntimeError where a parameter was detached.
        """
        lr, grad_scale = float(lr), float(grad_scale)  # a NumPy scalar would widen float32 arrays
        if not (0 <= lr < math.inf and 0 <= grad_scale < math.inf):
            raise ValueError(f"an update needs a finite lr and grad_scale ≥ 0, got lr {lr} and grad_scale {grad_scale}")
        self.flat.check_attached()
        grad = self.flat.grad
        self.steps += 1
        for_each(array_module(grad), self.flat.blocks, lambda block, decays: self._update(block, grad[block], decays, lr, grad_scale))
        self.flat.mark_changed()

    @abstractmethod
    def _update(self, block: slice, g, decays: bool, lr: float, grad_scale: float) -> None:
        """Update one block of `flat.data` and of the state in place, from its gradients g; `steps` already counts this update."""

    def state_dict(self) -> dict[str, np.ndarray]:
        """{"exp_avg.NAME": array of the parameter's shape, …, "step": 0-d integer}: readable, whatever the order in the flat buffer.

        On the CPU these are the optimizer's own arrays, not copies, so that saving costs no memory: the next step changes them.
        """
        return {name: to_numpy(view) for name, view in self._named_state().items()} | {"step": np.array(self.steps, dtype=np.int64)}

    def _named_state(self) -> dict:
        return {f"{kind}.{name}": view for kind, flat in self.state.items() for name, view in self.flat.views(flat).items()}

    def load_state_dict(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over what `state_dict` gave; training then goes on bitwise as it would have there.

        Raises ValueError for missing, unknown or misshaped entries and for another dtype; nothing is changed then.
        """
        views = self._named_state()
        expected = views | {"step": np.array(0, dtype=np.int64)}
        for name in arrays:
            if name not in expected:
                raise ValueError(f"optimizer state: unknown entry {name!r}{suggestion(name, expected)} (saved for another model or optimizer?)")
        for name, mine in expected.items():
            if name not in arrays:
                raise ValueError(f"optimizer state: {name!r} is missing (saved for another model or optimizer?)")
            theirs = arrays[name]
            if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise ValueError(
                    f"optimizer state: {name!r} has shape {theirs.shape} and dtype {theirs.dtype}, expected {mine.shape} and {mine.dtype}"
                )
        xp = array_module(self.flat.data)
        self.steps = int(arrays["step"])
        for name, view in views.items():
            view[...] = xp.asarray(arrays[name])
