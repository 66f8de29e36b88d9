"""One process of a benchmark: run a piece of work some times, and print what the clock said as a line of JSON.

    python -P runner.py WORK.py '{"units": [3, 10, 5], "root": null, …}'

WORK.py holds run(settings, meter): it does the work meter.units times and calls meter.tick() after each. Of units, the first number warm
up, the second are timed, the third are done once more for the profiler. root, where given, is where the package to be imported lies.
This file imports nothing but the standard library, so that the process of a peer holds the peer alone, and is as large as that makes it.
"""
import importlib.util
import json
import os
import sys
import time


class Meter:
    """The clock of a piece of work, and what there is to report besides: `notes`.

    profiler : set by the work before its first tick, where it wants the last units profiled; has start(), stop() and shares().
    wait : set by work on a GPU, which goes on after it was asked for: returns when all of it is done. Called before the clock is read.
    """

    def __init__(self, warmup: int, timed: int, profiled: int, say=lambda message: None):
        self.warmup, self.timed, self.profiled, self.units = warmup, timed, profiled, warmup + timed + profiled
        self.say, self.done, self.seconds, self.notes, self.profiler = say, 0, [], {}, None
        self.wait = lambda: None
        self._announce()

    def start(self) -> None:
        """Time counts from here: for work that must prepare something anew before each unit."""
        self.wait()
        self.began = time.perf_counter()

    def tick(self) -> None:
        """A unit is done, and the next one begins."""
        self.wait()
        ended = time.perf_counter()
        self.done += 1
        if self.warmup < self.done <= self.warmup + self.timed:
            self.seconds.append(ended - self.began)
        self._announce()

    def _announce(self):
        if self.done == self.warmup:
            self.say({"phase": "timed"})  # whoever looks at the memory should do it less often now
        if self.profiler is not None and self.profiled:
            if self.done == self.warmup + self.timed:
                self.profiler.start()
            elif self.done == self.units:
                self.profiler.stop()
                self.notes["parts"] = self.profiler.shares()
        self.start()


def largest_resident_mb() -> float | None:
    """The most memory this process has held, in MB, shared pages included; None on Windows, which does not keep the figure."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main(path: str, settings: dict) -> None:
    """Do the work in the file at `path`; messages, the last one with all figures, go to standard output, a line each."""
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not come between them

    def say(message):
        print(json.dumps(message), file=messages, flush=True)

    if settings["root"] is not None:
        sys.path.insert(0, settings["root"])
    spec = importlib.util.spec_from_file_location("work", path)
    work = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(work)
    meter = Meter(*settings["units"], say)
    work.run(settings, meter)
    say({"seconds": meter.seconds, "resident_mb": largest_resident_mb(), **meter.notes})


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
