"""The layers that hold weights: linear maps, tables of vectors, and norms.

Every layer takes the random generator that draws its first weights, and the precision in which it stores its result. Weights are
kept in fp32 (master weights) and rounded where they are used: `stored` marks each place where a value would lie in memory in 16 bits.
(What a fused kernel keeps in registers is not rounded here: attention weights inside attention, and the scores inside the loss.)
"""
from collections.abc import Callable
from functools import partial

import numpy as np

from tinyllm import ops
from tinyllm.nn.module import Module, Parameter
from tinyllm.tensor import Tensor


def storage(precision: str) -> Callable[[Tensor], Tensor]:
    """The function that rounds a value to the grid of `precision`; for fp32, one that does nothing."""
    return _unchanged if precision == "fp32" else partial(ops.cast, precision=precision)


def _unchanged(x):
    return x


def normal(rng: np.random.Generator, shape: tuple, std: float, dtype) -> Parameter:
    """A Parameter drawn from N(0, std²)."""
    return Parameter((rng.standard_normal(shape) * std).astype(dtype))


class Linear(Module):
    """y = x·wᵀ + b.     (..., K) -> (..., M)        weight (M, K) from N(0, std²), bias (M,) zero, or none."""

    def __init__(self, inputs, outputs, *, rng, std=0.02, bias=True, precision="fp32", dtype=np.float32):
        self.weight = normal(rng, (outputs, inputs), std, dtype)
        self.bias = Parameter(np.zeros(outputs, dtype)) if bias else None
        self.stored = storage(precision)

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """rng : for what takes a Linear's place and drops values in training (see nn/lora.py); here nothing is drawn."""
        bias = None if self.bias is None else self.stored(self.bias)
        return self.stored(ops.linear(x, self.stored(self.weight), bias))


class Embedding(Module):
    """A vector per id.     (...) int -> (..., C)        weight (count, C) from N(0, std²)."""

    def __init__(self, count, width, *, rng, std=0.02, precision="fp32", dtype=np.float32):
        self.weight = normal(rng, (count, width), std, dtype)
        self.stored = storage(precision)

    def forward(self, ids) -> Tensor:
        return self.stored(ops.embedding(self.weight, ids))


class LayerNorm(Module):
    """Rows to mean 0 and variance 1, then gain and (optional) bias, computed in fp32.     (..., C) -> (..., C)"""

    def __init__(self, width, *, eps=1e-5, bias=True, precision="fp32", dtype=np.float32):
        self.weight = Parameter(np.ones(width, dtype))
        self.bias = Parameter(np.zeros(width, dtype)) if bias else None
        self.eps = eps
        self.stored = storage(precision)

    def forward(self, x: Tensor) -> Tensor:
        return self.stored(ops.layernorm(x, self.weight, self.bias, eps=self.eps))


class RMSNorm(Module):
    """Rows to unit root-mean-square, then gain, computed in fp32.     (..., C) -> (..., C)"""

    def __init__(self, width, *, eps=1e-5, precision="fp32", dtype=np.float32):
        self.weight = Parameter(np.ones(width, dtype))
        self.eps = eps
        self.stored = storage(precision)

    def forward(self, x: Tensor) -> Tensor:
        return self.stored(ops.rmsnorm(x, self.weight, eps=self.eps))


def _layernorm(config, dtype):
    return LayerNorm(config.width, eps=config.norm_eps, bias=config.bias, precision=config.precision, dtype=dtype)


def _rmsnorm(config, dtype):
    return RMSNorm(config.width, eps=config.norm_eps, precision=config.precision, dtype=dtype)


NORMS = {"layernorm": _layernorm, "rmsnorm": _rmsnorm}  # (config, dtype) -> the norm of a row of the residual stream
