"""Activation checkpointing: memory bought with time."""
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from tinyllm.anomaly import looking_for_anomalies
from tinyllm.backend import on_host, to_numpy
from tinyllm.tensor import Node, Tensor, enable_grad, no_grad, recording


def checkpoint(function: Callable, *inputs, rng: np.random.Generator | None = None) -> Tensor:
    """function(*inputs), without keeping its activations: backward() runs it again to get them.

    Memory falls from all activations inside `function` to its inputs; the price is one more forward. The second run takes the place
    of the first in the graph, so that gradients are bitwise those of the plain call. Where `function` draws random numbers, pass the
    generator that it uses as `rng`, and its state is put back for the second run. Tensors that `function` reaches on its own, such as
    parameters, get their gradients too. Raises RuntimeError at backward() if the second run gives another result (compared by its sum; on
    a GPU only under detect_anomaly(), since looking makes the host wait).
    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    """
    state = rng.bit_generator.state if rng else None
    with no_grad():
        y = function(*inputs)
    if not recording():
        return y
    looked = looking_for_anomalies()
    total = _sum(y.data)

    def run_again(dy):
        with enable_grad(), _replayed(rng, state):
            again = function(*inputs)
        same = total is None or np.array_equal(_sum(again.data), total, equal_nan=True)
        if not same and looking_for_anomalies() == looked:  # who looks only now goes by other ways, whose last bits may differ
            raise RuntimeError(
                "checkpoint: the function gave another result when backward() ran it again: pass the generator that it draws from as rng, "
                "and change no parameter between forward and backward"
            )
        return again

    result = Tensor(y.data, requires_grad=True)
    result.node = Node("checkpoint", inputs, result, run_again)
    return result


def _sum(y) -> np.ndarray | None:
    """Σ y on the host; None where that would make the host wait for a device, and nobody looks for faults."""
    return np.asarray(to_numpy(y.sum())) if on_host(y) or looking_for_anomalies() else None


@contextmanager
def _replayed(rng: np.random.Generator | None, state: dict | None) -> Iterator[None]:
    """rng set back to an earlier state inside the block, and put where it was after it."""
    if rng is None:
        yield
        return
    now, rng.bit_generator.state = rng.bit_generator.state, state
    try:
        yield
    finally:
        rng.bit_generator.state = now
