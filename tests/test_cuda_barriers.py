"""Every barrier of the kernels is there for a reason: without any one of them the emulator sees a race.

Decoding, whose barriers depend on the path that a launch takes, has planted errors in its own tests.
"""
import functools

import numpy as np
import pytest
from cuda_on_cpu import CudaError
from device_worlds import entered

from tinyllm.kernels.cuda import adamw, attention, cross_entropy, launch, norms, sums

pytestmark = pytest.mark.cuda_on_cpu

BARRIER = "__syncthreads();"
ELSEWHERE = {"decode.cu", "decode_attention.cu"}  # test_cuda_decode.py


def run_norms(xp):
    """LayerNorm, a warp to each row and a block to each row; backward over several rows a block."""
    for width in (64, 1100):
        x, w = xp.ones((9, width), dtype=np.float32), xp.ones(width, dtype=np.float32)
        _, statistics = norms.forward(x, w, w, 1e-5, True)
        norms.backward(x, x, statistics, w, True)


def run_cross_entropy(xp):
    """Rows of several warps, with everything that is summed over them."""
    z, ones = xp.ones((2, 300), dtype=np.float32), xp.ones(2, dtype=np.float32)
    cross_entropy.in_place(z, xp.zeros(2, dtype=np.int32), ones, xp.empty_like(ones), 0.1, 0.1, 1.0)


def run_attention(xp):
    """Several tiles, two heads to a key; and queries that are past all keys, so that no tile is visited."""
    for queries, keys, settings in ((140, 140, dict(window=None)), (20, 70, dict(window=3, offset=300))):
        q, k, v, do = (xp.ones((1, heads, length, 32), dtype=np.float16) for heads, length in ((2, queries), (1, keys), (1, keys), (2, queries)))
        settings |= dict(causal=True, scale=0.2)
        o, lse = attention.forward(q, k, v, **settings)
        for exact in (True, False):
            attention.backward(q, k, v, o, lse, do, deterministic=exact, **settings)


RUNS = {
    "attention.cu": run_attention,
    "attention_backward.cu": run_attention,
    "adamw.cu": lambda xp: adamw.sum_of_squares(xp.ones(3000, dtype=np.float32)),
    "norms.cu": run_norms,
    "prelude.cuh": run_cross_entropy,  # block_max, then block_sum twice, with the same scratch memory
    "sums.cu": lambda xp: sums.column_sums(xp.ones((300, 70), dtype=np.float32)),
}
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in launch.FOLDER.glob("*.cu*")}


@pytest.fixture
def xp(monkeypatch):
    """The fake device; what is compiled in a test is forgotten after it."""
    for cached in ("function", "_module"):
        monkeypatch.setattr(launch, cached, functools.cache(getattr(launch, cached).__wrapped__))
    with entered("fake") as world:
        yield world.xp


def test_every_file_with_barriers_has_a_test():
    assert {name for name, text in TEXTS.items() if BARRIER in text} == RUNS.keys() | ELSEWHERE


@pytest.mark.parametrize("name", RUNS)
def test_with_all_of_them_nobody_complains(name, xp):
    RUNS[name](xp)


@pytest.mark.parametrize("name, number", [(name, i) for name in RUNS for i in range(TEXTS[name].count(BARRIER))])
def test_without_one_the_emulator_sees_a_race(name, number, xp, monkeypatch):
    parts = TEXTS[name].split(BARRIER)
    without = BARRIER.join(parts[: number + 1]) + ";" + BARRIER.join(parts[number + 1 :])
    monkeypatch.setattr(launch, "_text", lambda file: without if file == name else TEXTS[file])
    with pytest.raises(CudaError, match="race"):
        RUNS[name](xp)
