"""The MLP: each position on its own, through a wider space and back."""
import numpy as np

from tinyllm import ops
from tinyllm.nn.config import GATED, PLAIN
from tinyllm.nn.layers import Linear, storage
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor


class MLP(Module):
    """y = f(x·W_up)·W_down, f one of the plain activations.     (..., C) -> (..., C)"""

    def __init__(self, config, *, rng, dtype=np.float32):
        options = dict(rng=rng, bias=config.bias, precision=config.precision, dtype=dtype)
        self.up = Linear(config.width, config.mlp_width, std=config.init_std, **options)
        self.down = Linear(config.mlp_width, config.width, std=config.init_std / np.sqrt(2 * config.layers), **options)
        self.activation = ACTIVATIONS[config.mlp]
        self.stored = storage(config.precision)

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        return self.down(self.stored(self.activation(self.up(x, rng))), rng)


class GatedMLP(Module):
    """y = (f(x·W_gate)·(x·W_up))·W_down: SwiGLU or GeGLU.     (..., C) -> (..., C)"""

    def __init__(self, config, *, rng, dtype=np.float32):
        options = dict(rng=rng, bias=config.bias, precision=config.precision, dtype=dtype)
        self.gate = Linear(config.width, config.mlp_width, std=config.init_std, **options)
        self.up = Linear(config.width, config.mlp_width, std=config.init_std, **options)
        self.down = Linear(config.mlp_width, config.width, std=config.init_std / np.sqrt(2 * config.layers), **options)
        self.activation = ACTIVATIONS[config.mlp]
        self.stored = storage(config.precision)

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        return self.down(self.stored(self.activation(self.gate(x, rng), self.up(x, rng))), rng)


ACTIVATIONS = {name: getattr(ops, name) for name in (*PLAIN, *GATED)}
MLPS = {**dict.fromkeys(PLAIN, MLP), **dict.fromkeys(GATED, GatedMLP)}
