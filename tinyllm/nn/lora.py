"""LoRA: the weights stay as they are, and beside chosen maps the product of two thin matrices is learned.

    y = x·Wᵀ + b + s·drop(x)·Aᵀ·Bᵀ          W (M, K) frozen     A (r, K)     B (M, r)     s = α/r

Fine-tuning moves a weight by ΔW. If ΔW needs only r directions, it is s·B·A, with r·(M + K) numbers instead of M·K. B starts at 0, so
the model starts as it was; A starts random, for where both are 0 neither has a gradient. The backward is that of the two products:

    dB = s·dyᵀ·(x·Aᵀ)          dA = s·Bᵀ·dyᵀ·x          and no dW: nothing of W's size is made, nor kept by the optimizer

Dividing α by r keeps the size of an update about the same when r is changed. Afterwards W + s·B·A takes W's place and costs nothing.

DoRA learns each output's direction and length apart: row i of the weight is mᵢ·vᵢ/‖vᵢ‖ with V = W + s·B·A and m = ‖W‖ at the start:

    y = (m/‖V‖)∘(x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ) + b          ‖V‖ (M,) by rows

(The paper takes ‖V‖ as constant in the backward, to save memory; here it is differentiated, as the formula says.)
Sources: Hu et al. 2021 (LoRA); Liu et al. 2024 (DoRA).
"""
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module, to_numpy
from tinyllm.config import check, setting, suggestion
from tinyllm.nn.freeze import freeze
from tinyllm.nn.layers import Linear
from tinyllm.nn.module import Module, Parameter, load_parameters
from tinyllm.nn.transformer import drop
from tinyllm.tensor import Tensor, no_grad


@dataclass(frozen=True)
class LoRAConfig:
    """How large an adapter is, and where it sits. Raises ValueError for values out of range."""

    rank: int = setting(8, "LoRA: directions in which each weight may move", minimum=1)
    alpha: float = setting(16.0, "LoRA: updates are scaled by alpha / rank", minimum=1e-6)
    targets: tuple[str, ...] = setting(
        (), "LoRA: linear maps to adapt, such as query value (default: all of the blocks)", metavar="NAME", several=True
    )
    adapter_dropout: float = setting(0.0, "LoRA: share of an adapter's inputs dropped in training", minimum=0, maximum=0.99)
    dora: bool = setting(False, "DoRA: learn the length of each row of a weight apart from its direction")

    def __post_init__(self):
        check(self)


class LoRALinear(Module):
    """A Linear with an adapter beside it, over the same weight and bias.     (..., K) -> (..., M)

    lora_a (r, K) from N(0, 1/K), so that x·Aᵀ is about as large as x; lora_b (M, r) zero; magnitude (M,), with DoRA, each row's length.
    """

    def __init__(self, linear: Linear, config: LoRAConfig, *, rng: np.random.Generator):
        self.weight, self.bias, self.stored = linear.weight, linear.bias, linear.stored
        (M, K), dtype, xp = self.weight.shape, self.weight.dtype, array_module(self.weight.data)
        self.lora_a = Parameter(xp.asarray((rng.standard_normal((config.rank, K)) / np.sqrt(K)).astype(dtype)))
        self.lora_b = Parameter(xp.zeros((M, config.rank), dtype))
        self.scale, self.dropout = config.alpha / config.rank, config.adapter_dropout
        self.magnitude = Parameter(_lengths(self.weight.detach()).data) if config.dora else None

    def forward(self, x: Tensor, rng: np.random.Generator | None = None) -> Tensor:
        """rng : given in training, draws dropout."""
        narrow = self.stored(ops.linear(drop(x, self.dropout, rng), self.stored(self.lora_a)))  # (..., r)
        y = ops.linear(x, self.stored(self.weight)) + ops.linear(narrow, self.stored(self.lora_b)) * self.scale
        if self.magnitude is not None:
            y = y * (self.magnitude / _lengths(self.moved()))
        return self.stored(y if self.bias is None else y + self.stored(self.bias))

    def as_linear(self) -> Linear:
        """An ordinary Linear whose weight is the sum. It does not learn, like all that an adapter stands beside."""
        linear = Linear.__new__(Linear)
        with no_grad():
            linear.weight, linear.bias, linear.stored = Parameter(self.merged().data), self.bias, self.stored
        linear.weight.requires_grad = False
        return linear

    def moved(self) -> Tensor:
        """V = W + s·B·A     (M, K)"""
        return self.weight + (self.lora_b @ self.lora_a) * self.scale

    def merged(self) -> Tensor:
        """The one weight that does the same, without dropout.     (M, K)"""
        moved = self.moved()
        return moved if self.magnitude is None else moved * (self.magnitude / _lengths(moved)).reshape(-1, 1)

    def adapter(self) -> dict[str, Parameter]:
        """What is learned."""
        parts = dict(lora_a=self.lora_a, lora_b=self.lora_b, magnitude=self.magnitude)
        return {name: parameter for name, parameter in parts.items() if parameter is not None}


class LoRA:
    """An adapter on a model, which changes in place: everything in it is frozen, and the target maps of its blocks get a LoRALinear.

        adapter = LoRA(model, LoRAConfig(rank=4), rng)          then make the optimizer, or call train(model, …)
        adapter.merge()                                         an ordinary model again, as fast as before
        adapter.unmerge()                                       bitwise what it was before merge()
        adapter.remove()                                        bitwise the model without it, for example as reference; unmerge() undoes it

    The weights' names stay what they were; a checkpoint of the model holds them and the adapter's. What else shall be learned, such as
    the rows of new tokens, is unfrozen afterwards: unfreeze(model, "embedding").
    Raises ValueError for a target that no block has, and for a row of zeros where DoRA asks for its direction.
    """

    def __init__(self, model: Module, config: LoRAConfig, rng: np.random.Generator):
        self.config, self.places = config, _chosen(model, config.targets)
        self.originals = {path: getattr(*place) for path, place in self.places.items()}
        if config.dora and (flat := [path for path, linear in self.originals.items() if not _lengths(linear.weight.detach()).data.all()]):
            raise ValueError(f"DoRA: a row of {flat[0]}.weight is all zeros, which has no direction: use LoRA without it")
        freeze(model)
        self.layers = {path: LoRALinear(linear, config, rng=rng) for path, linear in self.originals.items()}
        self.unmerge()

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(path, Parameter) of what the adapter learns, named as in the model."""
        for path, layer in self.layers.items():
            yield from ((f"{path}.{name}", parameter) for name, parameter in layer.adapter().items())

    def state_dict(self) -> dict[str, np.ndarray]:
        """The adapter alone, as NumPy arrays by name (see `Module.state_dict`)."""
        return {name: to_numpy(p.data) for name, p in self.named_parameters()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Copy values in by name. Raises ValueError naming what does not fit; then nothing is changed. Not into a merged model's weights."""
        load_parameters(dict(self.named_parameters()), state)

    def merge(self) -> None:
        """Put ordinary Linears in the layers' places, whose weights are the sums. The originals are kept, untouched, for `unmerge`."""
        self._put({path: layer.as_linear() for path, layer in self.layers.items()})

    def unmerge(self) -> None:
        """Put the layers with adapters in their places (again)."""
        self._put(self.layers)

    def remove(self) -> None:
        """Put the original maps back."""
        self._put(self.originals)

    def _put(self, layers: dict[str, Module]) -> None:
        for path, place in self.places.items():
            setattr(*place, layers[path])


def merge_adapters(model: Module) -> None:
    """Put ordinary Linears in the places of all layers with adapters, for good."""
    for block in model.blocks:
        for _, (holder, name) in _linears(block, "", LoRALinear):
            setattr(holder, name, getattr(holder, name).as_linear())


def _chosen(model: Module, targets: tuple[str, ...]) -> dict[str, tuple[Module, str]]:
    """{path: (the module that holds it, its name there)} of the Linears in the model's blocks that are meant."""
    found = {}
    for number, block in enumerate(model.blocks):
        found |= dict(_linears(block, f"blocks.{number}."))
    names = dict.fromkeys(name for _, name in found.values())
    if not names:
        raise ValueError("LoRA: the model's blocks hold no Linear: do they carry an adapter already?")
    for target in targets:
        if target not in names:
            raise ValueError(f"LoRA: no linear map of the blocks is called {target!r}{suggestion(target, names)} (they are {', '.join(names)})")
    return {path: place for path, place in found.items() if not targets or place[1] in targets}


def _linears(module: Module, prefix: str, kind: type[Module] = Linear) -> Iterator[tuple[str, tuple[Module, str]]]:
    for name, value in list(vars(module).items()):
        if isinstance(value, kind):
            yield prefix + name, (module, name)
        elif isinstance(value, Module):
            yield from _linears(value, f"{prefix}{name}.", kind)


def _lengths(weight: Tensor) -> Tensor:
    """‖row‖ of each row.     (M, K) -> (M,)"""
    return ops.sqrt((weight * weight).sum(axis=1))
