"""The memory of a process and all its children while they run, no page counted twice.

Linux keeps for each process the proportional set size (PSS): a page that n processes share counts 1/n in each, so that the sum over a
family of processes is what the family takes. Reading it costs the kernel a walk over all pages, about 10 ms per GB, during which the
process can map no memory: so it is done often only while nothing is timed, and in less than a hundredth of the time while something is.

A peak between two looks goes unseen, and a short process is over before the first. The largest resident set (RSS), which the system keeps
of each process, misses nothing, but counts shared pages whole and no other process. Both stay below what was taken, up to the libraries
that other programs share; so the larger of the two is reported. Systems other than Linux have the second alone.
"""
import os
import threading
import time
from pathlib import Path

PROC = Path("/proc")


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir(PROC):
        if entry.isdigit():
            try:
                status = (PROC / entry / "stat").read_text()
            except OSError:  # has ended since
                continue
            parent = int(status.rpartition(")")[2].split()[1])  # after the name, which may hold anything
            children.setdefault(parent, []).append(int(entry))
    found = [pid]
    for one in found:  # grows while it is gone through
        found += children.get(one, [])
    return found


def proportional_mb(pids: list[int]) -> float:
    """The sum of their PSS, in MB; a process that has ended counts nothing."""
    total = 0
    for pid in pids:
        try:
            lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


class MemoryWatch:
    """`with MemoryWatch(pid) as watch:` looks at the family of a process again and again; `peak_mb` is the most it has seen.

    None where the system has no such figure, or the process was over before the first look.
    busy : the share of the time that looking may take, to be changed while it runs.
    """

    def __init__(self, pid: int):
        self.pid, self.busy, self.peak_mb = pid, 0.5, None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        if (PROC / "self" / "smaps_rollup").exists():
            self.thread.start()
        return self

    def __exit__(self, *exception):
        self.ended.set()
        if self.thread.ident is not None:
            self.thread.join()

    def _watch(self):
        pause = 0.0
        while not self.ended.wait(pause):
            began = time.perf_counter()
            self.peak_mb = max(self.peak_mb or 0.0, proportional_mb(family(self.pid))) or None  # nothing is there before it begins
            pause = max(0.01, (time.perf_counter() - began) * (1 / self.busy - 1))
