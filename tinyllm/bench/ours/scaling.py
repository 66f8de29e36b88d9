"""Tiled attention over texts of growing length: is its memory linear in T, and its time per token too?"""
import tracemalloc

import numpy as np

from tinyllm import Tensor, ops, threads
from tinyllm.backend import random_stream


def run(settings, meter):
    """Forward and backward; during the first unit, which slows it down, all arrays are traced."""
    threads(settings["threads"])
    shape = (1, settings["heads"], settings["length"], settings["head_width"])
    random = random_stream(0, "bench")
    q, k, v = (Tensor(random.standard_normal(shape, dtype=np.float32), requires_grad=True) for _ in range(3))
    dy = random.standard_normal(shape, dtype=np.float32)

    def both():
        ops.tiled_attention(q, k, v).backward(dy)
        q.grad = k.grad = v.grad = None

    tracemalloc.start()
    both()
    meter.notes["peak_mb"] = (tracemalloc.get_traced_memory()[1] + 4 * dy.nbytes) / 1e6  # with q, k, v and dy, which were there before
    tracemalloc.stop()
    meter.tick()
    for _ in range(meter.units - 1):
        both()
        meter.tick()
