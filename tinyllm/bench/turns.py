"""Ours, theirs, ours, theirs: processes started in turn, so that a machine that slows down slows both, and what comes of their figures."""
import contextlib
import json
import math
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinyllm.backend import device_module
from tinyllm.bench.cases import Case, Job, Work
from tinyllm.bench.gpu_cases import BY_DEVICE
from tinyllm.bench.machine import installed
from tinyllm.bench.memory import MemoryWatch

HOW_TO_GET_PEERS = 'pip install -e ".[peers]" in a clone of tinyllm'
ROUNDS = 3  # one and the same process was seen to run at one of two speeds, a fifth apart, from start to start: three tell the usual one
MOST_THREADS = 1024
TRIAL = (1, 2, 0)  # units, as a Job has them, of a batch that is tried
BUSY = 0.01  # the share of the time that looking at the memory may take while something is timed


@dataclass(frozen=True)
class Measured:
    """What a process said: seconds of each timed unit, the most memory in MB, its parts if it was profiled, its version."""

    seconds: tuple[float, ...]
    peak_mb: float | None
    parts: dict[str, float] | None = None
    version: str | None = None


@dataclass(frozen=True)
class Result:
    """A line of the table. Rates are per second, in `unit`; ratio = ours / peer: above 1 tinyllm is the faster.

    spread : how far the middle half of our timings lies apart, as a share of the median; None for a single one.
    rate, machine_rate : what the work does, and what the machine can do at most, in rate_unit.     peak_mb, peer_peak_mb : see memory.py.
    share : rate / machine_rate.     parts : shares of our time.     batch, peer_batch : where each side took the fastest for it.
    """

    work: str
    size: str
    unit: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    spread: float | None = None
    peak_mb: float | None = None
    parts: dict[str, float] | None = None
    peer_name: str | None = None
    peer_peak_mb: float | None = None
    rate: float | None = None
    machine_rate: float | None = None
    rate_unit: str | None = None
    share: float | None = None
    batch: int | None = None
    peer_batch: int | None = None


class MemoryShort(ChildProcessError):
    """A process that ended because it found no memory."""


Launch = Callable[[list[str]], Measured]


def bench(
    work: str, *, sizes: Sequence[str] | None = None, peer: bool = False, rounds: int = ROUNDS, threads: int, device: str = "cpu"
) -> Iterator[Result]:
    """The results of a kind of work, one after the other; sizes None: its usual ones on that device.

    Raises ValueError for an unknown size, for a device that is not there or on which this work is not timed, for a peer that is not
    installed (saying how to get it) or that this work does not have, and ChildProcessError where a process fails.
    """
    kind = work_on(device, work)
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}: it must be at least 1")
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"--threads is {threads}: it must be from 1 to {MOST_THREADS}")
    if peer:
        check_peers(work, kind)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for case in kind.cases(tuple(dict.fromkeys(kind.sizes if sizes is None else sizes)), Path(folder)):
            found = measure(case, peer=peer, rounds=rounds, threads=threads)
            results += found
            yield from found
    if work == "scaling":
        yield from growth(results)


def work_on(device: str, name: str) -> Work:
    """Raise ValueError where there is no such work for the device."""
    if name not in BY_DEVICE[device]:
        raise ValueError(f"--device {device}: {' and '.join(BY_DEVICE[device])} are timed there, {name} on the CPU alone")
    device_module(device)  # says what is missing
    return BY_DEVICE[device][name]


def check_peers(name: str, work: Work) -> None:
    """Raise ValueError, saying what to do, where this work has no peers or they are not installed."""
    if not work.packages:
        raise ValueError(f"tinyllm bench {name} has nobody to compare with: leave --peer out")
    if missing := missing_packages(work):
        raise ValueError(f"--peer needs {' and '.join(missing)}, not installed here: {HOW_TO_GET_PEERS}")


def missing_packages(work: Work) -> list[str]:
    """The packages that its peers need and this Python has not."""
    return [package for package in work.packages if package not in installed(work.packages)]


def measure(case: Case, *, peer: bool, rounds: int, threads: int, launch: Launch | None = None) -> list[Result]:
    """Run the case's processes in turn: ours, theirs, ours, theirs, …; ours is profiled in the first round only. A result for each peer."""
    launch = launch or run
    machine = launch(case.yardstick.job.command(threads)) if case.yardstick else None
    ours, theirs = Side("tinyllm", case.ours), [Side(other.name, other.job) for other in case.peers if peer]
    for side in (ours, *theirs):
        side.choose_batch(case, threads, launch)
    for number in range(rounds):
        for side in (ours, *theirs):
            side.runs.append(launch(side.job.command(threads, profiled=number == 0)))
    own = median(ours.runs)
    seconds = [s for measured in ours.runs for s in measured.seconds]
    result = Result(
        case.work, case.size, case.unit, case.amount * ours.rows / own, spread=spread(seconds), peak_mb=ours.peak_mb(), parts=ours.runs[0].parts,
        batch=ours.batch,
    )  # fmt: skip
    if machine:
        limit, rate = case.yardstick.amount / median([machine]), case.cost * ours.rows / own
        result = replace(result, rate=rate, machine_rate=limit, rate_unit=case.yardstick.unit, share=rate / limit)
    return [_beside(result, case, ours, them) for them in theirs] or [result]


class Side:
    """One of those that are compared: its process, the batch that it takes where it may choose, and what was measured."""

    def __init__(self, name: str, job: Job):
        self.name, self.job, self.batch, self.runs, self.trials = name, job, None, [], {}

    @property
    def rows(self) -> int:
        """What a case's amount is to be multiplied by."""
        return 1 if self.batch is None else self.batch

    def choose_batch(self, case: Case, threads: int, launch: Launch) -> None:
        """Try larger and larger batches, until the memory is too small for one, and take the one with the most rows a second."""
        for batch in case.batches:
            job = replace(self.job, settings=self.job.settings | dict(batch=batch), units=TRIAL)
            try:
                self.trials[batch] = launch(job.command(threads))
            except MemoryShort:
                if not self.trials:
                    raise
                break
        if self.trials:
            self.batch = max(self.trials, key=lambda batch: batch / median([self.trials[batch]]))
            self.job = replace(self.job, settings=self.job.settings | dict(batch=self.batch))

    def peak_mb(self, batch: int | None = None) -> float | None:
        """The most memory that was seen, with its own batch or with another that it has tried."""
        return peak(self.runs) if batch in (None, self.batch) else peak([self.trials[batch]])


def _beside(result: Result, case: Case, ours: Side, them: Side) -> Result:
    """Our result, with that of a peer beside it; where the batches differ, the memory is that of the smaller one on both sides."""
    rate, smaller = case.amount * them.rows / median(them.runs), min(ours.rows, them.rows) if case.batches else None
    return replace(
        result, peer=rate, ratio=result.ours / rate, peer_name=f"{them.name} {them.runs[0].version}", peer_batch=them.batch,
        peak_mb=ours.peak_mb(smaller), peer_peak_mb=them.peak_mb(smaller),
    )  # fmt: skip


def run(command: list[str]) -> Measured:
    """Start the process, watch its memory, take down its figures. Raises ChildProcessError, with its last words, where it fails."""
    last = {}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8") as process,
        MemoryWatch(process.pid) as watch,
        ended(process),
    ):
        for line in process.stdout:
            last = json.loads(line)
            watch.busy = BUSY  # the warm-up is over
            if "seconds" in last:
                break
        if process.wait() or "seconds" not in last:
            errors.seek(0)
            words = (errors.read().strip().splitlines() or ["it said nothing"])[-1]
            kind = MemoryShort if re.search("out of memory|MemoryError", words, re.IGNORECASE) else ChildProcessError
            raise kind(f"the process of {Path(command[-2]).name} ended with status {process.returncode}: {words}")
    peak = last.get("peak_mb", largest(watch.peak_mb, last["resident_mb"]))
    return Measured(tuple(last["seconds"]), peak, last.get("parts"), last.get("version"))


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """However the block is left, by Ctrl-C for one, the process does not go on after it."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()


def median(runs: Sequence[Measured]) -> float:
    return statistics.median(s for measured in runs for s in measured.seconds)


def spread(seconds: Sequence[float]) -> float | None:
    """How far the middle half lies apart, as a share of the median; None for fewer than two."""
    if len(seconds) < 2:
        return None
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle


def peak(runs: Sequence[Measured]) -> float | None:
    return largest(*(m.peak_mb for m in runs))


def largest(*values: float | None) -> float | None:
    """The largest of those that are known; None where none is."""
    return max((value for value in values if value is not None), default=None)


def growth(results: Sequence[Result]) -> list[Result]:
    """How memory and time per token grow with the length T: the exponents p of T^p that fit the longer half of the lengths best.

    The shorter half is left out, since what each call costs, whatever T is, still counts there.
    """
    longer = results[min(len(results) // 2, len(results) - 2) :]
    lengths = [int(r.size) for r in longer]
    curves = {"memory": [r.peak_mb for r in longer], "time per token": [1 / r.ours for r in longer]}
    return [Result("scaling", name, "power of T", exponent(lengths, values)) for name, values in curves.items()]


def exponent(lengths: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the line through (ln length, ln value) by least squares."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(v) for v in values]).slope
