"""Ours, theirs, ours, theirs: processes started in turn, so that a machine that slows down slows both, and what comes of their figures."""
import contextlib
import json
import math
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinyllm.bench.cases import WORKS, Case
from tinyllm.bench.machine import installed
from tinyllm.bench.memory import MemoryWatch

HOW_TO_GET_PEERS = 'pip install "tinyllm[peers]"'
ROUNDS = 3  # one and the same process was seen to run at one of two speeds, a fifth apart, from start to start: three tell the usual one
MOST_THREADS = 1024
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
    parts : shares of our time.
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


Launch = Callable[[list[str]], Measured]


def bench(work: str, *, sizes: Sequence[str] | None = None, peer: bool = False, rounds: int = ROUNDS, threads: int) -> Iterator[Result]:
    """The results of a kind of work, one after the other; sizes None: its usual ones.

    Raises ValueError for an unknown size, for a peer that is not installed (saying how to get it) or that this work does not have, and
    ChildProcessError where a process fails.
    """
    kind = WORKS[work]
    if rounds < 1:
        raise ValueError(f"--rounds is {rounds}: it must be at least 1")
    if not 1 <= threads <= MOST_THREADS:
        raise ValueError(f"--threads is {threads}: it must be from 1 to {MOST_THREADS}")
    if peer:
        check_peers(work)
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for case in kind.cases(tuple(dict.fromkeys(kind.sizes if sizes is None else sizes)), Path(folder)):
            found = measure(case, peer=peer, rounds=rounds, threads=threads)
            results += found
            yield from found
    if work == "scaling":
        yield from growth(results)


def check_peers(work: str) -> None:
    """Raise ValueError, saying what to do, where this work has no peers or they are not installed."""
    if not WORKS[work].packages:
        raise ValueError(f"tinyllm bench {work} has nobody to compare with: leave --peer out")
    if missing := missing_packages(work):
        raise ValueError(f"--peer needs {' and '.join(missing)}, not installed here: {HOW_TO_GET_PEERS}")


def missing_packages(work: str) -> list[str]:
    """The packages that its peers need and this Python has not."""
    wanted = WORKS[work].packages
    return [package for package in wanted if package not in installed(wanted)]


def measure(case: Case, *, peer: bool, rounds: int, threads: int, launch: Launch | None = None) -> list[Result]:
    """Run the case's processes in turn: ours, theirs, ours, theirs, …; ours is profiled in the first round only. A result for each peer."""
    launch = launch or run
    machine = launch(case.yardstick.job.command(threads)) if case.yardstick else None
    peers = case.peers if peer else ()
    ours, theirs = [], {other.name: [] for other in peers}
    for number in range(rounds):
        ours.append(launch(case.ours.command(threads, profiled=number == 0)))
        for other in peers:
            theirs[other.name].append(launch(other.job.command(threads)))
    own = median(ours)
    seconds = [s for measured in ours for s in measured.seconds]
    result = Result(case.work, case.size, case.unit, case.amount / own, spread=spread(seconds), peak_mb=peak(ours), parts=ours[0].parts)
    if machine:
        limit = case.yardstick.amount / median([machine])
        result = replace(result, rate=case.cost / own, machine_rate=limit, rate_unit=case.yardstick.unit)
    return [_beside(result, case, name, them) for name, them in theirs.items()] or [result]


def _beside(result: Result, case: Case, name: str, them: Sequence[Measured]) -> Result:
    """Our result, with that of a peer beside it."""
    rate, version = case.amount / median(them), them[0].version
    return replace(result, peer=rate, ratio=result.ours / rate, peer_name=f"{name} {version}", peer_peak_mb=peak(them))


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
            raise ChildProcessError(f"the process of {Path(command[-2]).name} ended with status {process.returncode}: {words}")
    known = last.get("peak_mb", watch.peak_mb)
    return Measured(tuple(last["seconds"]), last["resident_mb"] if known is None else known, last.get("parts"), last.get("version"))


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
    return max((m.peak_mb for m in runs if m.peak_mb is not None), default=None)


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
