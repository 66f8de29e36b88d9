"""What only whole runs, and only a GPU, can say. `pytest -m gpu -s` runs all that needs one and prints what was measured.

Training is the same on both devices, in every precision, across checkpoints and when memory runs out: small enough for the fake device
(marker cuda_on_cpu) and again as large as it should be on a GPU. The costs of launching are a GPU's alone.
"""
import math
import time

import numpy as np
import pytest
import tiny_run
from device_worlds import entered
from tiny_run import back_to, final_bytes

from tinyllm.backend import array_module
from tinyllm.cli.main import main
from tinyllm.kernels.cuda.linear import times
from tinyllm.kernels.cuda.storage import dtype_of
from tinyllm.stages import load_run
from tinyllm.train.checkpoint import list_checkpoints
from tinyllm.train.run import Run, read_log
from tinyllm.train.safetensors import load

gpu_only = pytest.mark.gpu


def shape(world) -> list[str]:
    """Options of a model that the kernels are made for."""
    layers, width, context, batch = world.size((1, 32, 16, 2), (4, 128, 128, 16))
    return f"--layers {layers} --heads {width // 32} --width {width} --context {context} --batch {batch} --lr 1e-3".split()


def trained(folder, world, *options, steps=None) -> Run:
    """A run of so many steps in folder/NAME; every step is logged."""
    steps = steps or world.size(6, 200)
    folder.mkdir(exist_ok=True)
    run = tiny_run.train(folder, *shape(world), "--steps", steps, "--eval-every", steps, "--log-every", 1, *options)
    return Run(run)


def losses(run: Run) -> np.ndarray:
    return np.array([r["loss"] for r in read_log(run.log) if r["event"] == "step"], dtype=float)


def weights(run: Run) -> dict[str, np.ndarray]:
    return load(list_checkpoints(run.checkpoints)[-1] / "model.safetensors")


# Training

@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_cpu_and_gpu_train_alike(arch, world, tmp_path):
    """fp32, the same seed: the losses of all steps agree to 1e-4."""
    cpu, cuda = (trained(tmp_path / device, world, "--arch", arch, "--device", device) for device in ("cpu", "cuda"))
    assert len(losses(cpu)) == world.size(6, 200)
    np.testing.assert_allclose(losses(cuda), losses(cpu), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_end_near_fp32(precision, world, tmp_path):
    """The mean loss of the last steps within 1 %."""
    steps = world.size(12, 400)
    plain, half = (trained(tmp_path / p, world, "--precision", p, "--device", "cuda", steps=steps) for p in ("fp32", precision))
    last = slice(-max(1, steps // 10), None)
    found, expected = np.nanmean(losses(half)[last]), np.nanmean(losses(plain)[last])
    print(f"{precision}: loss {found:.4f}, fp32 {expected:.4f}")
    assert found == pytest.approx(expected, rel=0.01) and expected < losses(plain)[0]


def test_overflows_are_survived(world, tmp_path, monkeypatch):
    """A loss scale that is far too large at first, and grows every third step: updates are left out, and training goes on."""
    tiny_run.nervous(monkeypatch.setattr)
    run = trained(tmp_path, world, "--precision", "fp16", "--device", "cuda", steps=world.size(24, 100))
    steps = [r for r in read_log(run.log) if r["event"] == "step"]
    skipped = [r.get("skipped") == "overflow" for r in steps]
    assert any(skipped) and not all(skipped) and len({r["loss_scale"] for r in steps}) > 2
    assert all(math.isfinite(np.sum(np.abs(array))) for array in weights(run).values())


ROUTES = [("cpu fp32", "cuda fp32"), ("cuda fp32", "cpu fp32"), ("cuda fp32", "cuda bf16"), ("cuda bf16", "cuda fp16"), ("cuda fp16", "cpu fp32")]


@pytest.mark.parametrize("before, after", ROUTES)
def test_checkpoints_move(before, after, world, tmp_path):
    """A run that goes on elsewhere, or in another precision, ends near where it would have ended anyway."""
    half = world.size(3, 50)
    options = [["--device", place.split()[0], "--precision", place.split()[1]] for place in (before, after)]
    run = trained(tmp_path, world, *options[0], "--checkpoint-every", half, steps=2 * half)
    expected, stayed = losses(run), weights(run)
    back_to(run.folder, half)
    assert main(["train", "--resume", str(run.folder), *options[1]]) == 0
    np.testing.assert_allclose(losses(run), expected, rtol=0, atol=1e-4 if "16" not in before + after else 0.05)
    moved = weights(run)
    assert moved.keys() == stayed.keys() and all(array.dtype == np.float32 for array in moved.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_runs_are_bitwise_the_same(precision, world, tmp_path):
    runs = [
        trained(tmp_path / name, world, "--deterministic", "--precision", precision, "--device", "cuda", steps=world.size(3, 50)) for name in "ab"
    ]  # fmt: skip
    assert final_bytes(runs[0].folder) == final_bytes(runs[1].folder) and losses(runs[0]).tolist() == losses(runs[1]).tolist()


def test_out_of_memory_is_one_line(world, tmp_path, capfd):
    pool = world.xp.get_default_memory_pool()
    trained(tmp_path / "before", world, "--device", "cuda", steps=1)  # what is made once and kept: scratch memory, tables
    pool.free_all_blocks()
    capfd.readouterr()
    pool.set_limit(pool.used_bytes() + world.size(50_000, 10_000_000))
    try:
        assert main([*tiny_run.arguments(tmp_path, "--device", "cuda", "--steps", 3), *shape(world)]) == 2
    finally:
        pool.set_limit(0)
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "not enough memory on the GPU: a step on" in err and "try a smaller --batch" in err


def test_a_model_writes_the_same_on_both_devices(world, tmp_path, capfd):
    """Greedy, in fp32; and a run of a GPU is read on the CPU."""
    run = trained(tmp_path, world, "--device", "cuda", steps=world.size(3, 100))
    assert array_module(load_run(run.folder, device="cuda")[0].embedding.weight.data) is world.xp
    capfd.readouterr()
    texts = []
    for device in ("cpu", "cuda"):
        words = ["sample", str(run.folder), "--prompt", "the quick", "--temperature", "0", "--max-tokens", str(world.size(10, 60))]
        assert main([*words, "--device", device]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1]


# CUDA, CuPy and cuBLASLt

@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_products_can_be_captured(precision, world):
    """A graph replays a product on whatever its arrays hold by then."""
    xp, n = world.xp, world.size(16, 1024)
    draw = np.random.default_rng(0)
    with xp.cuda.Stream(non_blocking=True) as stream:
        a, b, first = (xp.asarray(draw.standard_normal((n, n), dtype=np.float32)).astype(dtype_of(precision)) for _ in range(3))
        y = xp.empty_like(a)
        times(a, b, out=y)  # plan and scratch memory are made once
        stream.begin_capture()
        times(a, b, out=y)
        graph = stream.end_capture()
        a[...] = first
        y.fill(0)
        graph.launch(stream)
        stream.synchronize()
        expected = times(first, b).astype(np.float32).get()
        np.testing.assert_array_equal(y.astype(np.float32).get(), expected)
        wide = first.astype(np.float32).get().astype(np.float64) @ b.astype(np.float32).get()
    assert np.abs(expected - wide).max() < {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2}[precision] * np.abs(wide).max()


@gpu_only
def test_what_cupy_does_with_batches_of_16_bits():
    """The reasons for a binding of our own, as they were found in CuPy 14.2's source: prints whether they still hold."""
    with entered("gpu") as world:
        xp = world.xp
        for precision in ("fp16", "bf16"):
            a = xp.ones((16, 1024, 1024), dtype=np.float32).astype(dtype_of(precision))
            ours = milliseconds(xp, lambda a=a: times(a, a))
            try:
                theirs = f"{milliseconds(xp, lambda a=a: xp.matmul(a, a)):.2f} ms"
            except Exception as error:
                theirs = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            print(f"16 products of 1024 x 1024, {precision}: cuBLASLt {ours:.2f} ms, cupy.matmul {theirs}")
            assert ours < 10


def milliseconds(xp, work, times=20) -> float:
    """Of one work() on the device, the mean of so many after a first that does not count."""
    work()
    before, after = xp.cuda.Event(), xp.cuda.Event()
    before.record()
    for _ in range(times):
        work()
    after.record()
    after.synchronize()
    return xp.cuda.get_elapsed_time(before, after) / times


EMPTY = 'extern "C" __global__ void empty(float* x, int n) { if (n < 0) x[0] = 0.0f; }'


@gpu_only
def test_costs_of_starting_work():
    """Microseconds of the host for each call, and of the GPU for each of 100 empty kernels in a graph."""
    with entered("gpu") as world:
        xp = world.xp
        with xp.cuda.Stream(non_blocking=True) as stream:
            kernel = xp.RawModule(code=EMPTY, backend="nvrtc").get_function("empty")
            x, half = xp.zeros(256, dtype=np.float32), xp.zeros((64, 64), dtype=np.float16)
            y = xp.empty_like(half)

            def launch():
                kernel((1,), (32,), (x, np.int32(256)))

            costs = {name: host_microseconds(stream, work) for name, work in dict(
                kernel=launch, ufunc=lambda: xp.add(x, x, out=x), cublaslt=lambda: times(half, half, out=y), event=lambda: xp.cuda.Event().record(stream),
            ).items()}  # fmt: skip
            stream.begin_capture()
            for _ in range(100):
                launch()
            graph = stream.end_capture()
            costs["graph of 100"] = host_microseconds(stream, lambda: graph.launch(stream))
            costs["kernel in a graph"] = 10 * milliseconds(xp, lambda: graph.launch(stream))  # 1000 / 100
    print("microseconds: " + ", ".join(f"{name} {cost:.1f}" for name, cost in costs.items()))
    assert all(cost < 1000 for cost in costs.values())


def host_microseconds(stream, work, calls=200) -> float:
    work()
    stream.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    seconds = time.perf_counter() - began
    stream.synchronize()
    return seconds / calls * 1e6
