"""Rounding to 16-bit grids against the definition and PyTorch, random streams, and which library holds an array."""
import hashlib
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyllm.backend import array_module, device_module, random_stream, round_to_grid, to_numpy
from tinyllm.cli.main import main

GOLDEN = Path(__file__).parent / "golden" / "ops.npz"
UPPER = np.arange(65536, dtype=np.uint32)


def rounding_inputs() -> np.ndarray:
    """All upper halves of a float32 with lower halves at and around the tie, NaN left out.     -> (about 7·65536,) float32"""
    x = (UPPER[:, None] << 16 | np.array([0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)).reshape(-1).view(np.float32)
    return x[~np.isnan(x)]


def rounding_digest(x) -> str:
    return hashlib.sha256(np.ascontiguousarray(x, dtype="<f4").tobytes()).hexdigest()


def nearest(x, grid):
    """The definition: the nearer of the two neighbours in an ascending grid; at a tie, the one with the even index."""
    above = np.searchsorted(grid, x).clip(1, len(grid) - 1)
    below = above - 1
    to_below, to_above = x - grid[below], grid[above] - x
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(up, grid[above], grid[below])


def positive_grid(bits):
    """A format's values from 0 to infinity in float64, ascending, where infinity stands at the next power of two."""
    values = bits.astype(np.float64)
    return np.append(values, 2 * values[-1] - values[-2])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_is_to_the_nearest_ties_to_even(precision):
    if precision == "bf16":
        grid = positive_grid((UPPER[:0x7F80] << 16).view(np.float32))
    else:
        grid = positive_grid(np.arange(0x7C00, dtype=np.uint16).view(np.float16))
    x = rounding_inputs()
    if precision == "fp16":  # its grid is finer than the upper halves: add the midpoints of its own, and their neighbours
        middles = ((grid[:-1] + grid[1:]) / 2).astype(np.float32)
        x = np.concatenate([x, *(side for m in (middles, -middles) for side in (m, np.nextafter(m, np.float32(0)), np.nextafter(m, m * 2)))])
    expected = nearest(np.abs(x).astype(np.float64).clip(0, grid[-1]), grid)
    expected = np.copysign(np.where(expected == grid[-1], np.inf, expected), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # overflow is an answer here, not an accident
        found = round_to_grid(x, precision)
    assert found.dtype == np.float32
    assert found.tobytes() == expected.astype(np.float32).tobytes()  # signs of zeros too


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_is_pytorchs(precision):
    assert rounding_digest(round_to_grid(rounding_inputs(), precision)) == json.loads(str(np.load(GOLDEN)["rounding"]))[precision]


@pytest.mark.peers
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_is_pytorchs_live(precision):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    expected = torch.tensor(x).to({"bf16": torch.bfloat16, "fp16": torch.float16}[precision]).float().numpy()
    assert round_to_grid(x, precision).tobytes() == expected.tobytes()


def test_rounding_known_values():
    assert round_to_grid(np.float32(1 + 2**-8), "bf16") == 1  # a tie: down to even
    assert round_to_grid(np.float32(1 + 3 * 2**-8), "bf16") == 1 + 2**-6  # a tie: up to even
    assert round_to_grid(np.float32(65519.0), "fp16") == 65504
    assert round_to_grid(np.float32(65520.0), "fp16") == np.inf
    assert round_to_grid(np.float32(3.4e38), "bf16") == np.inf
    assert round_to_grid(np.float32(2**-25), "fp16") == 0
    assert round_to_grid(np.float32(2**-25 * 1.001), "fp16") == 2**-24  # the smallest there is


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_is_idempotent_and_keeps_nan_infinity_and_shape(precision):
    x = np.array([[np.nan, np.inf, -np.inf, -0.0]], np.float32)
    y = round_to_grid(x, precision)
    assert y.shape == x.shape and np.array_equal(y, x, equal_nan=True) and np.signbit(y[0, 3])
    assert np.isnan(round_to_grid(np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32), precision)).all()
    x = np.random.default_rng(0).standard_normal((5, 6), dtype=np.float32)[::2, ::-1]
    once = round_to_grid(x, precision)
    assert np.array_equal(round_to_grid(once, precision), once) and once.shape == x.shape
    assert round_to_grid(np.zeros((0, 3), np.float32), precision).shape == (0, 3)
    assert round_to_grid(np.float32(0.1), precision).shape == ()


def test_fp32_is_left_alone_and_unknown_precisions_are_named():
    x = np.ones(2)
    assert round_to_grid(x, "fp32") is x
    with pytest.raises(ValueError, match="'fp8' is unknown: use one of fp32, bf16, fp16"):
        round_to_grid(x, "fp8")


def test_random_streams_are_stable():
    """The first numbers of two streams, written down: a changed derivation would make every recorded run irreproducible."""
    assert random_stream(0, "init").integers(0, 2**32, 3).tolist() == FIRST_INIT
    assert random_stream(1337, "dropout", 7).integers(0, 2**32, 3).tolist() == FIRST_DROPOUT


FIRST_INIT = [3829117492, 4035656240, 2638588143]
FIRST_DROPOUT = [2562982388, 4020075579, 28867345]


def test_random_streams_are_the_same_in_another_process():
    code = "from tinyllm.backend import random_stream; print(random_stream(5, 'data', 3).integers(0, 2**32, 4).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    assert json.loads(out.stdout) == random_stream(5, "data", 3).integers(0, 2**32, 4).tolist()


def test_random_streams_are_independent_of_each_other():
    keys = [(seed, purpose, step) for seed in (0, 1, 2**40) for purpose in ("init", "data", "dropout") for step in (0, 1, 2, 1000)]
    draws = np.array([random_stream(*key).standard_normal(2000) for key in keys])
    correlation = np.corrcoef(draws) - np.eye(len(keys))
    assert np.abs(correlation).max() < 0.12  # 2000 numbers: standard deviation 0.022, over 630 pairs
    assert len(np.unique(draws[:, 0])) == len(keys)


def test_a_random_stream_starts_afresh_each_time():
    first = random_stream(3, "data", 4)
    first.random(100)
    assert random_stream(3, "data", 4).random() == random_stream(3, "data", 4).random()


def test_the_library_of_an_array():
    for x in (np.zeros(2), np.float32(1), 1, 1.5, True, [1], (1, 2)):
        assert array_module(x) is np
    assert to_numpy([1, 2]).tolist() == [1, 2]
    assert device_module("cpu") is np


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="device 'gpu' is unknown: use cpu or cuda"):
        device_module("gpu")


def test_a_gpu_without_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"needs CuPy.*pip install"):
        device_module("cuda")


def cupy_with(count: int | None, driver: int, made_for: int = 13020, capability: str = "90", nvrtc: bool = True) -> SimpleNamespace:
    """A CuPy that finds so many GPUs of a compute capability, or cannot count them; with NVRTC or without."""

    class CUDARuntimeError(RuntimeError):
        pass

    def get_device_count():
        if count is None:
            raise CUDARuntimeError("cudaErrorSomething: something")
        return count

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError, getDeviceCount=get_device_count, driverGetVersion=lambda: driver, runtimeGetVersion=lambda: made_for
    )  # fmt: skip
    def get_version():
        if not nvrtc:
            raise RuntimeError("CuPy failed to load libnvrtc.so.13:\n OSError")
        return 13, 0

    device = SimpleNamespace(compute_capability=capability)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Device=lambda: device, nvrtc=SimpleNamespace(getVersion=get_version)))


@pytest.mark.parametrize("found, message", [
    ((None, 0), "no usable GPU: no NVIDIA driver is installed: install one (nvidia-smi then shows it), or use --device cpu"),
    ((None, 12080), 'the NVIDIA driver is for CUDA 12, but CuPy was made for CUDA 13: update the driver, or take the CuPy for it (pip uninstall '
                    'cupy-cuda13x; pip install "cupy-cuda12x[ctk]")'),
    ((None, 13000), "no usable GPU: cudaErrorSomething: something: see nvidia-smi, or use --device cpu"),
    ((0, 13000), "no GPU that this process may use: see nvidia-smi and CUDA_VISIBLE_DEVICES"),
    ((1, 13000, 13020, "90", False), 'needs NVRTC, which compiles kernels (CuPy failed to load libnvrtc.so.13: OSError): pip install "cupy-cuda13x[ctk]"'),
    ((1, 13000, 13020, "75"), "needs a GPU of compute capability 8.0 or newer (A100, RTX 30, ...), and this one's is 7.5: use --device cpu"),
])  # fmt: skip
def test_without_a_usable_gpu_one_line_says_why(found, message, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(*found))
    for words in (["train", "--device", "cuda", "--out", "nowhere"], ["bench", "train", "--device", "cuda"], ["bench", "decode", "--device", "cuda"]):
        assert main(words) == 2
        out, err = capfd.readouterr()
        assert (out, err.count("\n")) == ("", 1) and err.startswith("tinyllm: error: --device cuda") and message in err
    assert not Path("nowhere").exists()


def test_a_cupy_that_cannot_be_loaded_says_so(tmp_path, monkeypatch):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcuda is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(ValueError, match=r"CuPy cannot be loaded \(libcuda is broken\): uninstall it, then pip install"):
        device_module("cuda")
