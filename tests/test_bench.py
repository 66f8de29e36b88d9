"""`tinyllm bench`: whose turn it is, what is made of the figures, where the time is booked, how much memory a family takes."""
import ast
import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_describe import Counted

import tinyllm
from tinyllm.backend import random_stream
from tinyllm.bench import cases, turns
from tinyllm.bench.cases import GPT, READING, WORKS, Case, Job, Peer, decode_case, scaling_case, tokenizer_cases, train_case
from tinyllm.bench.costs import decoding_bytes, training_flops
from tinyllm.bench.memory import MemoryWatch, family, proportional_mb
from tinyllm.bench.profiler import CALLER, OTHER, PACKAGE, PART_OF, PARTS, PYTHON, TIMER, Profiler, part_of
from tinyllm.bench.report import Report, json_line
from tinyllm.bench.runner import Meter
from tinyllm.bench.turns import Measured, Result, bench, exponent, growth, measure, run, spread
from tinyllm.cli.main import main
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tensor import OPS
from tinyllm.train import next_token_loss
from tinyllm.train.config import TrainConfig

BENCH = Path(tinyllm.__file__).parent / "bench"
TINY = GPT(1, 2, 16, 8, 2, 65)
KEYS = "work size unit ours peer ratio spread peak_mb parts".split()  # what readers of --json count on
FAKE = '''
"""Says its turn in a file, and takes as long as it is told."""
import time
def run(settings, meter):
    with open(settings["log"], "a") as log: log.write(settings["name"] + " ")
    meter.notes["version"] = "1.0"
    print("a library prints this")
    for _ in range(meter.units):
        meter.start()
        time.sleep(settings["seconds"])
        meter.tick()
'''
linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="PSS is Linux's")


def fake_case(folder: Path, peers: dict[str, float], seconds: float = 0.002) -> Case:
    """Processes that only sleep."""
    script = folder / "fake.py"
    script.write_text(FAKE)

    def job(name, seconds):
        return Job(str(script), dict(name=name, seconds=seconds, log=str(folder / "log")), (1, 3, 0))

    return Case("train", "S", "tokens/s", 10, job("ours", seconds), tuple(Peer(name, job(name, s)) for name, s in peers.items()))


# Turns

def test_ours_and_theirs_in_turn(tmp_path):
    [result] = measure(fake_case(tmp_path, {"theirs": 0.1}), peer=True, rounds=2, threads=1)
    assert (tmp_path / "log").read_text().split() == ["ours", "theirs", "ours", "theirs"]
    assert result.ratio == result.ours / result.peer > 1 and result.peer_name == "theirs 1.0"
    assert result.peer <= 10 / 0.1 and result.ours <= 10 / 0.002
    assert result.peak_mb > 0 and result.peer_peak_mb > 0 and result.parts is None


def test_each_peer_has_its_turn_and_its_line():
    commands, seconds = [], {"ours": 2.0, "a": 1.0, "b": 4.0}

    def launch(command):
        settings = json.loads(command[-1])
        commands.append((settings["name"], settings["units"], settings["threads"]))
        return Measured((seconds[settings["name"]],) * 3, 7.0, {"norms": 1.0} if settings["units"][2] else None, "1.0")

    def job(name):
        return Job("x.py", dict(name=name), (0, 3, 2 if name == "ours" else 0))

    case = Case("tokenizer", "all", "MB/s", 10, job("ours"), (Peer("a", job("a")), Peer("b", job("b"))))
    results = measure(case, peer=True, rounds=2, threads=3, launch=launch)
    assert [name for name, _, _ in commands] == ["ours", "a", "b", "ours", "a", "b"] and {n for _, _, n in commands} == {3}
    assert [units for name, units, _ in commands if name == "ours"] == [[0, 3, 2], [0, 3, 0]]  # profiled once
    assert [(r.ours, r.peer, r.ratio, r.peer_name, r.spread, r.parts) for r in results] == [
        (5.0, 10.0, 0.5, "a 1.0", 0.0, {"norms": 1.0}), (5.0, 2.5, 2.0, "b 1.0", 0.0, {"norms": 1.0}),
    ]  # fmt: skip
    commands.clear()
    assert [r.peer for r in measure(case, peer=False, rounds=1, threads=3, launch=launch)] == [None] and len(commands) == 1


def test_a_process_that_fails_says_why(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("def run(settings, meter):\n    raise RuntimeError('no luck')")
    with pytest.raises(ChildProcessError, match=r"the process of broken.py ended with status 1: RuntimeError: no luck"):
        run(Job(str(script), {}, (0, 1, 0)).command(1))
    script.write_text("import os\ndef run(settings, meter):\n    os._exit(0)")
    with pytest.raises(ChildProcessError, match="status 0: it said nothing"):
        run(Job(str(script), {}, (0, 1, 0)).command(1))


def test_no_process_outlives_an_interrupt():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(KeyboardInterrupt), turns.ended(process):
        raise KeyboardInterrupt
    assert process.wait(10) != 0


def test_meter_times_what_it_should():
    said, meter = [], None
    meter = Meter(1, 2, 1, said.append)
    for pause in (0.0, 0.01, 0.02, 0.0):
        time.sleep(0.03)
        meter.start()  # what was before does not count
        time.sleep(pause)
        meter.tick()
    assert len(meter.seconds) == 2 and 0.01 <= meter.seconds[0] and 0.02 <= meter.seconds[1] and sum(meter.seconds) < 0.06
    assert said == [{"phase": "timed"}]
    assert [Meter(0, 1, 0, said.append).seconds, said[1:]] == [[], [{"phase": "timed"}]]


def test_meter_waits_for_the_device_before_it_looks_at_the_clock():
    """What was asked for in a unit counts in it, though it goes on after the call; what was asked for before the start does not."""
    meter, left = Meter(0, 2, 0), [0.05]

    def wait():
        time.sleep(left.pop() if left else 0.0)

    meter.wait = wait
    meter.start()
    for pause in (0.02, 0.0):
        left.append(pause)
        meter.tick()
    assert 0.02 <= meter.seconds[0] < 0.05 and meter.seconds[1] < 0.02 and not left


@pytest.mark.parametrize("units, calls", [((1, 1, 2), ["start 2", "stop 4"]), ((0, 2, 1), ["start 2", "stop 3"]), ((1, 2, 0), [])])
def test_meter_profiles_the_last_units(units, calls):
    class Profiler:
        called = []

        def start(self):
            self.called.append(f"start {meter.done}")

        def stop(self):
            self.called.append(f"stop {meter.done}")

        def shares(self):
            return {"norms": 1.0}

    meter = Meter(*units)
    meter.profiler = Profiler()
    for _ in range(meter.units):
        meter.tick()
    assert meter.profiler.called == calls and meter.notes == ({"parts": {"norms": 1.0}} if units[2] else {})


def test_spread_and_growth():
    assert spread([1.0]) is None and spread([2.0, 2.0]) == 0 and spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    lengths = [256, 512, 1024, 2048]
    assert exponent(lengths, [n**1.5 for n in lengths]) == pytest.approx(1.5)
    results = [Result("scaling", str(n), "tokens/s", ours=1e6 / n**0.9, peak_mb=n * 2.0) for n in lengths]
    results[0] = Result("scaling", "256", "tokens/s", ours=1.0, peak_mb=1000.0)  # short ones are left out
    memory, seconds = growth(results)
    assert (memory.size, memory.ours, seconds.size, seconds.ours) == ("memory", pytest.approx(1), "time per token", pytest.approx(0.9))
    assert growth(results[2:])[0].ours == pytest.approx(1)  # two are the fewest


# The work itself

def work(script: str, settings: dict, units: tuple) -> Meter:
    """Run a file of bench/ in this process."""
    namespace: dict = {}
    exec(compile((BENCH / script).read_text(encoding="utf-8"), script, "exec"), namespace)
    meter = Meter(*units)
    namespace["run"](settings | dict(threads=tinyllm.threads()), meter)
    assert len(meter.seconds) == units[1] and meter.done == meter.units
    return meter


def test_a_training_case_as_json():
    """Through real processes, at a size that takes no time."""
    [result] = measure(train_case("tiny", TINY, (1, 2, 8)), peer=False, rounds=2, threads=2)
    record = json.loads(json_line(result))
    assert record.keys() >= set(KEYS) and all(re.fullmatch("[a-z_]+", key) for key in record)
    assert (record["work"], record["size"], record["unit"], record["peer"], record["ratio"]) == ("train", "tiny", "tokens/s", None, None)
    assert record["ours"] > 0 and record["peak_mb"] > 10 and 0 <= record["spread"] < 100
    assert 0 < record["rate"] < record["machine_rate"] and record["rate_unit"] == "GFLOP/s"
    if TIMER:
        assert set(record["parts"]) <= set(PARTS) and sum(record["parts"].values()) == pytest.approx(1, abs=1e-4)


def test_decoding_and_scaling_run():
    case = decode_case("tiny", GPT(1, 2, 16, 32, 1, 65, bias=True), 2, (1, 1, 1), new=5)
    work(case.ours.script, case.ours.settings, case.ours.units)
    assert (case.size, case.amount, case.yardstick) == ("tiny batch 2", 10, READING)
    case = scaling_case(300)
    peak = work(case.ours.script, case.ours.settings, (1, 1, 0)).notes["peak_mb"]
    arrays = 4 * 300 * 64 * 4 / 1e6  # one of q, k, v, dy, dq, dk, dv, o
    assert 8 * arrays < peak < 30 * arrays


def test_tokenizer_runs(tmp_path):
    train, encode = tokenizer_cases("x", b"the cat sat on the mat. " * 50, tmp_path, vocabulary=300)
    assert (train.amount, [p.name for p in encode.peers]) == (0.0012, ["tokenizers", "tiktoken"])
    for case in (train, encode):
        work(case.ours.script, case.ours.settings, case.ours.units)


@pytest.mark.peers
def test_peers_run(tmp_path):
    for package in ("torch", "transformers", "tokenizers", "tiktoken"):
        pytest.importorskip(package)
    decode = decode_case("tiny", GPT(1, 2, 16, 32, 1, 65, bias=True), 2, (1, 1, 0), new=5)
    for case in (train_case("tiny", TINY, (1, 2, 0)), decode, *tokenizer_cases("x", b"the cat sat on the mat. " * 50, tmp_path, 300)):
        for result in measure(case, peer=True, rounds=1, threads=1):
            assert result.peer > 0 and result.ratio > 0, result
            assert result.peak_mb > 10 and result.peer_peak_mb > 10, result


@pytest.mark.peers
def test_the_peers_model_is_ours():
    """As many weights, and the same loss at the start: both sides time the same work."""
    torch = pytest.importorskip("torch")
    namespace: dict = {}
    torch.manual_seed(0)
    exec((BENCH / "peers" / "torch_train.py").read_text(encoding="utf-8"), namespace)
    for arch in ("gpt2", "llama"):
        gpt = replace(TINY, arch=arch)
        model, ours = namespace["Model"](gpt.settings()), Transformer(gpt.config(), random_stream(0, "x"))
        assert sum(p.numel() for p in model.parameters()) == sum(p.data.size for _, p in ours.named_parameters())
        ids, targets = torch.randint(gpt.vocab, (2, 2, gpt.context))
        assert abs(model(ids, targets).item() - math.log(gpt.vocab)) < 0.3


def test_peers_and_the_runner_know_nothing_of_tinyllm():
    for path in [BENCH / "runner.py", *(BENCH / "peers").glob("*.py")]:
        names = [a.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for a in node.names]
        names += [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any(name.startswith("tinyllm") for name in names), path


def test_the_text_is_pythons_own():
    assert b"def python_text" not in cases.python_text()[:1000] and len(cases.python_text()) > 5e6
    cases.python_text().decode()


# Costs

@pytest.mark.parametrize("choices", [dict(arch="gpt2", bias=False), dict(arch="gpt2"), dict(arch="llama", kv_heads=1, tie=False)], ids=str)
def test_arithmetic_is_what_is_counted(choices, monkeypatch):
    """The definitions do more than must be: the head's scores once more in the backward, and the pairs that the mask hides."""
    for op in OPS.values():
        monkeypatch.setattr(op, "run", op.array)
    config = TransformerConfig(**(dict(vocab_size=50, layers=2, heads=2, width=24, context=16) | choices)).resolved()
    model = Transformer(config, random_stream(0, "x"))
    for _, parameter in model.named_parameters():
        parameter.data = parameter.data.view(Counted)
    ids = random_stream(0, "ids").integers(config.vocab_size, size=(3, config.context))
    batch = tinyllm.data.batches.Batch(ids, ids)
    Counted.done = 0
    next_token_loss(TrainConfig())(model, batch, None).backward()
    tokens, T = ids.size, config.context
    again = 2 * config.vocab_size * config.width * tokens
    hidden = 12 * config.layers * config.width * (T - (T + 1) / 2) * tokens
    assert Counted.done - again - hidden == pytest.approx(training_flops(config) * tokens, rel=1e-12)


def test_costs_of_the_known_sizes():
    """6·N·tokens of the sizes, N with the tied head once; GPT-2 124M reads half a gigabyte a token."""
    floors = dict(S=3.7, M=131, L=380)
    for size, gpt in cases.TRAIN.items():
        attention = 12 * gpt.layers * gpt.width * (gpt.context + 1) / 2
        assert (training_flops(gpt.config()) - attention) * gpt.batch * gpt.context / 1e9 == pytest.approx(floors[size], rel=0.03)
    assert decoding_bytes(cases.DECODE["124M"].config()) == pytest.approx(0.494e9, rel=0.01)


# Where the time goes

def test_every_file_has_a_part():
    files = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    assert [f for f in files if part_of(str(PACKAGE / f)) is None] == []
    folders = {parent.as_posix() for f in files for parent in Path(f).parents}
    gone = [entry for entry in PART_OF if entry not in files and entry not in folders]
    assert [entry for entry in gone if not entry.startswith("kernels/") or "kernels" in folders] == []  # kernels/ may be deleted as a whole
    assert set(PART_OF.values()) <= {*PARTS, CALLER}
    assert part_of(np.__file__) == CALLER and part_of(str(PACKAGE / "ops" / "new.py")) is None
    assert part_of(str(PACKAGE / "nn" / "cache.py")) == "attention" != part_of(str(PACKAGE / "nn" / "mlp.py"))


def functions_in(files: dict[str, str]) -> dict:
    """Functions as if each was written in a file of that name."""
    namespace = dict(np=np, a=np.linspace(0, 1, 40_000, dtype=np.float32), b=np.empty(40_000, np.float32))
    for name, source in files.items():
        exec(compile(source, name, "exec"), namespace)
    return namespace


@pytest.mark.skipif(not TIMER, reason="no timer")
def test_profiler_sees_python_and_numpy():
    """In slices far shorter than its interval; time in a helper is its caller's, time in a file that it does not know is nobody's."""
    made = functions_in({
        "plain.py": "def plain():\n    s = 0\n    for i in range(2000): s += i\n",
        "help.py": "def help():\n    for _ in range(3): np.exp(a, out=b)\n",
        "norms.py": "def norms():\n    help()\n",
        "new.py": "def new():\n    np.exp(a, out=b)\n",
    })  # fmt: skip
    table = {"plain.py": "Python", "help.py": CALLER, "norms.py": "norms", "new.py": None}
    profiler, truth = Profiler(lambda file: table.get(file, CALLER)), dict.fromkeys(("plain", "norms", "new"), 0.0)
    profiler.start()
    end = time.perf_counter() + 0.4
    while time.perf_counter() < end:
        for name in truth:
            began = time.perf_counter()
            made[name]()
            truth[name] += time.perf_counter() - began
    profiler.stop()
    shares, total = profiler.shares(), sum(truth.values())
    assert list(shares)[:2] == ["norms", PYTHON] and sum(shares.values()) == pytest.approx(1) and profiler.seconds.total() > 0.04
    for name, part in dict(plain=PYTHON, norms="norms", new=OTHER).items():
        assert abs(shares[part] - truth[name] / total) < 0.2, (name, shares, truth)


@pytest.mark.skipif(not TIMER, reason="no timer")
def test_profiler_leaves_no_trace():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    profiler = Profiler()
    profiler.start()
    assert signal.getitimer(signal.ITIMER_REAL)[1] > 0
    profiler.stop()
    assert signal.getsignal(signal.SIGALRM) == before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


# Memory

HOLD = """
import mmap, os, sys, time
shared = mmap.mmap(-1, 40_000_000)
shared.write(b"x" * 40_000_000)
if os.fork() == 0:
    shared[:] = b"y" * 40_000_000
    own = b"z" * 30_000_000
    os.write(1, b".")
    time.sleep(60)
os.write(1, b".")
time.sleep(60)
"""


@linux
def test_shared_pages_count_once():
    """A parent and its child share 40 MB, and the child has 30 of its own."""
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE)
    try:
        assert process.stdout.read(2) == b".."
        pids = family(process.pid)
        both, parent, child = (proportional_mb(p) for p in (pids, pids[:1], pids[1:]))
        assert len(pids) == 2 and both == pytest.approx(parent + child, rel=0.02)
        assert 70 < both < 70 + 40 and 20 < parent < 40 and 50 < child < 70
        with MemoryWatch(process.pid) as watch:
            time.sleep(0.1)
        assert watch.peak_mb == pytest.approx(both, rel=0.05)
    finally:
        for pid in reversed(pids):
            subprocess.run(["kill", "-9", str(pid)])
        process.wait()
    assert proportional_mb([process.pid]) == 0 and family(process.pid) == [process.pid]


# What is printed

def test_tables_are_aligned():
    results = [
        Result(
            "train", "S", "tokens/s", 12345.6, peer=20000.0, ratio=0.617, spread=0.034, peak_mb=79.2, parts=dict(norms=0.25, Python=0.75),
            peer_name="PyTorch 2.13.0", peer_peak_mb=359.0, rate=55.5, machine_rate=196.0, rate_unit="GFLOP/s",
        ),
        Result("train", "M", "tokens/s", 99.4, peer_name="PyTorch 2.13.0"),
    ]
    for peer in (True, False):
        report = Report(WORKS["train"], results[0], peer, "2 threads, a CPU")
        heading, rows = report.heading().splitlines()[-1], [report.line(r) for r in results]
        assert len({len(line) for line in (heading, *rows)}) == 1 and len(heading) <= 120 and "a CPU" in report.heading()
        assert ("ratio" in heading, "0.62" in rows[0], "12,346" in rows[0], "99.4" in rows[1]) == (peer, peer, True, True)
    names, shares = report.closing(results).splitlines()[1:3]
    assert names.split() == ["time", "in", "%", "norms", "Python"] and shares.split() == ["S", "25", "75"] and len(names) == len(shares)
    assert report.line(Result("scaling", "memory", "power of T", 1.004)) == "memory grows as T^1.00"


def printed(capfd, monkeypatch, *words) -> tuple[int, str, str]:
    """A command line, with processes that end at once."""
    monkeypatch.setattr(turns, "run", lambda command: Measured((0.1, 0.1), 50.0, {"Python": 1.0}, "1.0"))
    code = main(["bench", *words])
    return (code, *capfd.readouterr())


def test_command_line(capfd, monkeypatch):
    monkeypatch.setattr(turns, "installed", lambda packages: dict.fromkeys(packages, "1.0"))
    code, out, err = printed(capfd, monkeypatch, "train", "--sizes", "S,M", "--peer", "--threads", "2")
    assert (code, err) == (0, "") and len(re.findall(r"^[SM] .*\b1\.00\b.*PyTorch 1.0$", out, re.MULTILINE)) == 2 and "2 threads" in out
    code, out, _ = printed(capfd, monkeypatch, "decode", "--json")
    sizes = [json.loads(line)["size"] for line in out.splitlines()]
    assert code == 0 and sizes == [f"{name} batch {batch}" for name in ("124M", "small") for batch in (1, 8)]
    code, out, _ = printed(capfd, monkeypatch, "scaling", "--sizes", "512,256")
    assert code == 0 and "time per token grows as T^-1.00" in out  # each takes a tenth of a second here
    monkeypatch.setattr(cases, "python_text", lambda: b"text " * 10**6)
    code, out, _ = printed(capfd, monkeypatch, "tokenizer", "--sizes", "1MB,all,1MB", "--json", "--peer")
    records = [json.loads(line) for line in out.splitlines()]
    assert [(r["size"], r["ours"], r["peer_name"]) for r in records[:3]] == [
        ("train 1MB", 10, "tokenizers 1.0"), ("encode 1MB", 10, "tokenizers 1.0"), ("encode 1MB", 10, "tiktoken 1.0"),
    ]  # fmt: skip
    assert [r["size"] for r in records[3:]] == ["train all", "encode all", "encode all"]


def test_without_the_peers_packages(capfd, monkeypatch):
    monkeypatch.setattr(turns, "installed", lambda packages: {"torch": "2.13"} if "torch" in packages else {})
    code, out, err = printed(capfd, monkeypatch, "decode", "--peer")
    assert (code, out) == (2, "") and err == 'tinyllm: error: --peer needs transformers, not installed here: pip install -e ".[peers]" in a clone of tinyllm\n'
    code, out, err = printed(capfd, monkeypatch, "tokenizer", "--peer")
    assert code == 2 and "needs tokenizers and tiktoken, not" in err
    code, out, err = printed(capfd, monkeypatch, "decode", "--sizes", "small")
    assert (code, err) == (0, "")
    assert out.endswith('--peer times torch and transformers beside it; not installed here: pip install -e ".[peers]" in a clone of tinyllm.\n')
    _, out, _ = printed(capfd, monkeypatch, "train", "--sizes", "S")
    assert out.endswith("--peer times torch beside it.\n")


@pytest.mark.parametrize("words, message", {
    "": "the following arguments are required: train|decode|tokenizer|scaling",
    "trian": "invalid choice: 'trian'",
    "train --sizes s": "--sizes 's' is unknown: it takes S, M, L",
    "train --sizes S,,M": "--sizes '' is unknown",
    "decode --sizes smal": "it takes 124M, small; did you mean small?",
    "tokenizer --sizes 5": "--sizes '5': tokenizer takes all, or a number of megabytes such as 5MB",
    "tokenizer --sizes 0MB": "--sizes '0MB'",
    "scaling --sizes 256": "--sizes 256: scaling compares lengths, so it takes at least two",
    "scaling --sizes 0,2": "--sizes '0': scaling takes lengths in tokens",
    "scaling --peer": "scaling has nobody to compare with: leave --peer out",
    "train --rounds 0": "--rounds is 0: it must be at least 1",
    "train --threads 0": "--threads is 0: it must be from 1 to 1024",
    "train --threads 99999": "--threads is 99999: it must be from 1 to 1024",
    "train --threads two": "'two' is not a whole number",
    "train --size S": "unknown option --size; did you mean --sizes?",
}.items(), ids=str)  # fmt: skip
def test_bad_arguments(words, message, capfd):
    try:
        status = main(["bench", *words.split()])
    except SystemExit as error:
        status = error.code
    out, err = capfd.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("tinyllm: error: ") and message in err


def test_every_work_says_how_to_read_it():
    assert all(kind.how_to_read.endswith(".") for kind in WORKS.values())
    with pytest.raises(ValueError, match="rounds"):
        next(bench("train", rounds=-1, threads=1))
