"""`tinyllm bench --device cuda` as far as it goes without a GPU: cases, batches, tables, the profiler, and the work on the fake device."""
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import fake_cupy
import pytest
from device_worlds import WORLDS, entered
from test_bench import BENCH, TINY, work

from tinyllm.bench import cases, gpu, gpu_cases, turns
from tinyllm.bench.cases import GPT, Case, Job, Peer, Yardstick
from tinyllm.bench.costs import decoding_bytes, model_flops, training_flops
from tinyllm.bench.gpu_profiler import PART_OF_KERNEL, REST, GpuProfiler
from tinyllm.bench.profiler import NORMS, OTHER, PRODUCTS
from tinyllm.bench.turns import Measured, MemoryShort, measure, run
from tinyllm.cli.main import main

YARD = Yardstick("TFLOP/s", 100.0, Job("yard", {}, (0, 1, 0)))


@pytest.fixture(params=WORLDS[:1])
def device(request):
    """The fake device, for what runs no kernel."""
    with entered(request.param):
        yield fake_cupy


# Each side takes its own best batch

def batched(limits: dict[str, int], seconds) -> tuple[Case, list, object]:
    """A case with processes that take seconds(name, batch), up to a largest batch for each; and the list of what is launched."""
    launched = []

    def launch(command):
        settings = json.loads(command[-1])
        if command[-2].endswith("yard"):
            return Measured((0.5,), 1.0)
        name, batch = settings["name"], settings["batch"]
        launched.append((name, batch, settings["units"]))
        if batch > limits[name]:
            raise MemoryShort("the process of x.py ended with status 1: OutOfMemoryError: out of memory")
        return Measured((seconds(name, batch),) * 3, 100.0 * batch, None, "1.0")

    def job(name):
        return Job("x.py", dict(name=name, batch=0), (1, 3, 0))

    case = Case("train", "S", "tokens/s", 10, job("ours"), (Peer("a", job("a")), Peer("b", job("b"))), 20.0, YARD, (8, 16, 32))
    return case, launched, launch


def test_each_side_takes_the_batch_that_suits_it():
    case, launched, launch = batched(dict(ours=32, a=16, b=8), lambda name, batch: 1 + batch / 100 if name != "a" else batch)
    results = measure(case, peer=True, rounds=2, threads=1, launch=launch)
    trials, rounds = launched[:-6], launched[-6:]
    assert [(name, batch) for name, batch, _ in trials] == [
        ("ours", 8), ("ours", 16), ("ours", 32), ("a", 8), ("a", 16), ("a", 32), ("b", 8), ("b", 16),
    ]  # fmt: skip
    assert [(name, batch) for name, batch, _ in rounds] == [("ours", 32), ("a", 8), ("b", 8)] * 2  # at a, all batches are as fast
    assert {tuple(units) for *_, units in trials} == {turns.TRIAL} and {tuple(units) for *_, units in rounds} == {(1, 3, 0)}
    for result, name in zip(results, "ab", strict=True):
        assert (result.batch, result.peer_batch, result.peer_name) == (32, 8, f"{name} 1.0")
        assert result.ours == pytest.approx(320 / 1.32) and result.ratio == result.ours / result.peer
        assert (result.peak_mb, result.peer_peak_mb) == (800, 800)  # with the same batch
        assert result.rate == pytest.approx(20 * 32 / 1.32) and result.machine_rate == 200 and result.share == result.rate / 200
    assert [r.peer for r in results] == [10, pytest.approx(80 / 1.08)]


def test_a_case_whose_smallest_batch_does_not_fit_says_so():
    case, _, launch = batched(dict(ours=4, a=8, b=8), lambda name, batch: 1)
    with pytest.raises(MemoryShort, match="out of memory"):
        measure(case, peer=False, rounds=1, threads=1, launch=launch)


@pytest.mark.parametrize("error, kind", [
    ("MemoryError('no luck')", MemoryShort), ("RuntimeError('CUDA out of memory. Tried to allocate 1 GiB')", MemoryShort),
    ("RuntimeError('no luck')", ChildProcessError),
])  # fmt: skip
def test_a_process_short_of_memory_is_known(error, kind, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(f"def run(settings, meter):\n    raise {error}")
    with pytest.raises(ChildProcessError) as raised:
        run(Job(str(script), {}, (0, 1, 0)).command(1))
    assert type(raised.value) is kind


# What is timed

def test_costs_of_the_known_sizes():
    gpt2, llama = (gpt.config() for gpt in gpu_cases.TRAIN.values())
    assert model_flops(gpt2) == pytest.approx(6 * 123.53e6 + 12 * 12 * 768 * 1024, rel=1e-3) and gpt2.precision == "bf16"
    assert 340e6 < (model_flops(llama) - 12 * 24 * 1024 * 2048) / 6 < 360e6
    seen = 12 * gpt2.layers * gpt2.width * (gpt2.context - 1) / 2
    assert model_flops(gpt2) - training_flops(gpt2) == seen
    assert decoding_bytes(gpu_cases.DECODE["124M"].config()) == pytest.approx(0.247e9, rel=0.01)


def test_every_case_is_for_both_sides_the_same_work():
    for name, kind in gpu_cases.WORKS.items():
        found = kind.cases(kind.sizes, Path())
        assert found and [case.work for case in found] == [name] * len(found)
        for case in found:
            assert case.ours.settings["device"] == "cuda" and case.ours.settings["precision"] == "bf16" and (BENCH / case.ours.script).is_file()
            for peer in case.peers:
                assert (BENCH / peer.job.script).is_file() and peer.job.settings.items() >= case.ours.settings.items()
                assert json.loads(peer.job.command(1)[-1])["root"] is None
    training = gpu_cases.WORKS["train"].cases(["gpt2-124M"], Path())[0]
    assert [(peer.name, peer.job.settings["compiled"]) for peer in training.peers] == [("PyTorch", False), ("torch.compile", True)]


def printed(device, capfd, monkeypatch, *words):
    """A command line, with processes that end at once."""
    monkeypatch.setattr(turns, "run", lambda command: Measured((0.1, 0.1), 5000.0, {NORMS: 0.5, REST: 0.5}, "2.13.0"))
    monkeypatch.setattr(turns, "installed", lambda packages: dict.fromkeys(packages, "1.0"))
    return (main(["bench", *words, "--device", "cuda"]), *capfd.readouterr())


def test_command_line(device, capfd, monkeypatch):
    code, out, err = printed(device, capfd, monkeypatch, "train", "--sizes", "gpt2-124M", "--peer")
    lines = out.splitlines()
    assert (code, err) == (0, "") and "Fake H200" in lines[0] and "CUDA 13.0" in lines[0] and "bf16" in lines[0]
    assert len({len(line) for line in lines[2:5]}) == 1 and len(lines[2]) < 140
    assert re.search(r"^gpt2-124M .*\b64\b.*\b64\b.*1\.00.*PyTorch 2.13.0$", lines[3]) and "torch.compile 2.13.0" in lines[4]
    assert "norms" in out and REST in out and "6·N + 12·L·H·D·T" in out
    code, out, _ = printed(device, capfd, monkeypatch, "decode", "--json")
    assert code == 0 and [json.loads(line)["size"] for line in out.splitlines()] == ["124M batch 1", "124M batch 8"]


@pytest.mark.parametrize("words, message", {
    "train --sizes S": "--sizes 'S' is unknown: it takes gpt2-124M, llama-350M",
    "tokenizer": "--device cuda: train and decode are timed there, tokenizer on the CPU alone",
    "scaling": "scaling on the CPU alone",
}.items())  # fmt: skip
def test_bad_arguments(words, message, device, capfd, monkeypatch):
    code, out, err = printed(device, capfd, monkeypatch, *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


# Where a GPU's time goes

class Clock:
    """Events whose times a test sets: each is at the sum of all work done before it."""

    now = 0.0

    class Event:
        def record(self):
            self.at = Clock.now

        def synchronize(self):
            pass

    @staticmethod
    def get_elapsed_time(before, after):
        return after.at - before.at


def test_profiler_books_kernels_and_products(device, monkeypatch):
    from tinyllm.kernels.cuda import cublaslt, launch

    def spend(milliseconds):
        Clock.now += milliseconds
        return milliseconds

    def find(xp, file, name, shared=0, **macros):
        return lambda grid, block, arguments, shared_mem=0: spend(arguments[0])

    monkeypatch.setattr(launch, "function", find)
    monkeypatch.setattr(cublaslt.Plan, "run", lambda plan, milliseconds: spend(milliseconds))
    before = launch.function, cublaslt.Plan.run
    profiler = GpuProfiler()
    profiler.cuda, plan = Clock, object.__new__(cublaslt.Plan)
    plan.run(50.0)  # before it starts: not counted
    profiler.start()
    launch.launch(device, "norms", "rms_norm", (1,), 32, 2.0)
    plan.run(4.0)
    launch.launch(device, "forgotten", "x", (1,), 32, 1.0)
    spend(1.0)  # of CuPy's own
    launch.launch(device, "norms", "rms_norm_backward", (1,), 32, 2.0)
    profiler.stop()
    assert profiler.shares() == {PRODUCTS: 0.4, NORMS: 0.4, OTHER: 0.1, REST: 0.1}
    assert (launch.function, cublaslt.Plan.run) == before


def test_every_kernel_has_a_part():
    files = {path.stem for path in Path(gpu.__file__).parent.parent.glob("kernels/cuda/*.cu")}
    assert files <= PART_OF_KERNEL.keys()


# The work itself, on the fake device and on a GPU

SMALL = replace(TINY, precision="bf16")


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_training_runs(arch, world):
    case = gpu_cases.train_case("tiny", replace(SMALL, arch=arch), (1, 2, 1), (2,), steps=3)
    notes = work(case.ours.script, case.ours.settings, case.ours.units).notes
    assert notes["peak_mb"] > 0 and sum(notes["parts"].values()) == pytest.approx(1) and PRODUCTS in notes["parts"]


def test_decoding_runs(world):
    case = gpu_cases.decode_case("tiny", GPT(1, 2, 16, 32, 1, 65, bias=True, precision="bf16"), 2, (1, 2, 0), new=5)
    assert work(case.ours.script, case.ours.settings, case.ours.units).notes["peak_mb"] > 0


def test_the_machines_rates(world):
    """An operation that is asked for is done, and is of the size that is counted."""
    copy, moved = gpu.copying(world.size(1000, gpu.COPY_BYTES))
    copy()
    assert moved == 2 * world.size(1000, gpu.COPY_BYTES)
    multiply, operations = gpu.product(*world.size((32, 2), (gpu.PRODUCT, gpu.PRODUCTS_AT_ONCE)))
    multiply()
    assert operations == 2 * world.size(32**3 * 2, gpu.PRODUCT**3 * gpu.PRODUCTS_AT_ONCE)
    gpu.wait_for_gpu()
    assert gpu.pool_mb() > 0


# The peers, on the CPU

@pytest.mark.peers
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_trains_both_kinds(arch, precision):
    pytest.importorskip("torch")
    case = gpu_cases.train_case("tiny", replace(TINY, arch=arch, precision=precision), (1, 2, 0), steps=2)
    for peer in case.peers:
        if not peer.job.settings["compiled"] or (precision == "bf16" and shutil.which("g++")):  # compiling takes its time, and a compiler
            work(peer.job.script, peer.job.settings | dict(device="cpu"), peer.job.units)


@pytest.mark.peers
def test_both_sides_try_batches_through_real_processes():
    """As on a GPU, but for the device, and for torch.compile, which takes its time."""
    pytest.importorskip("torch")
    case = gpu_cases.train_case("tiny", TINY, (1, 2, 0), (2, 4), steps=2)
    on_cpu = [replace(job, settings=job.settings | dict(device="cpu")) for job in (case.ours, case.peers[0].job)]
    case = replace(case, ours=on_cpu[0], peers=(Peer("PyTorch", on_cpu[1]),), yardstick=cases.PRODUCTS)
    [result] = measure(case, peer=True, rounds=1, threads=1)
    assert result.batch in (2, 4) and result.peer_batch in (2, 4) and result.ratio > 0 and 0 < result.share < 1


@pytest.mark.peers
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_torch_decodes_with_its_cache_as_without(precision):
    torch = pytest.importorskip("torch")
    case = gpu_cases.decode_case("tiny", GPT(2, 2, 16, 32, 1, 65, bias=True, precision=precision), 3, (1, 1, 0), new=6)
    settings = case.peers[0].job.settings | dict(device="cpu")
    assert [peer.name for peer in case.peers][0] == "PyTorch"
    for peer in case.peers:
        work(peer.job.script, peer.job.settings | dict(device="cpu"), peer.job.units)
    namespace: dict = {}
    exec((BENCH / "peers" / "torch_decode.py").read_text(encoding="utf-8"), namespace)
    with torch.inference_mode():
        torch.manual_seed(0)
        model, ids = namespace["Model"](settings), torch.randint(65, (3, 4))
        texts = torch.cat([ids, model(ids, 0)], 1)
        for position in range(4, 9):
            texts = torch.cat([texts, model(texts[:, -1:], position)], 1)
        for length in range(4, 10):
            assert (model(texts[:, :length], 0)[:, 0] == texts[:, length]).all()
