"""Where the time goes: every millisecond the main thread is interrupted, and the time since the last look booked to the part at work.

The part is that of the innermost file of tinyllm in the main thread's stack. Nothing in the code under test knows of it, and what the
other threads and processes do meanwhile is not looked at: they do the same work on other rows. A function that runs inside NumPy is
seen in its caller's frame, so that time in a product is booked to the file that multiplies.

Python runs a signal's handler after the call during which it came, in the frame that made the call; of several that came during one long
call it runs one, which is why a look counts with the time that went by. (An operator, a @ b, is no call: where
it is the last thing that a function does, its time goes to whoever calls the next function.) The usual other way, a second thread that
looks at sys._current_frames(), cannot be had here: it needs Python's lock, which the main thread gives up when it enters NumPy, and so it
sees the main thread nowhere else. Measured on pieces of 15 µs, shares of plain Python, ufuncs in calls and products by operator:

    really 0.27 0.39 0.34      by a thread, at any switch interval 0.00 0.66 0.34      by a signal 0.25 0.40 0.35 (at the caller)

Windows has no such timer: there no parts are known.
"""
import signal
from collections import Counter
from pathlib import Path
from time import perf_counter
from types import CodeType, FrameType

import tinyllm

PACKAGE = Path(tinyllm.__file__).parent
INTERVAL = 1e-3  # seconds between two looks
TIMER = hasattr(signal, "setitimer")

PRODUCTS, ATTENTION, NORMS, ACTIVATIONS, LOSS = "matrix products", "attention", "norms", "activations", "loss"
ELEMENTWISE, OPTIMIZER, SAMPLING, WAITING, PYTHON = "elementwise", "optimizer", "sampling", "waiting", "Python"
PARTS = (PRODUCTS, ATTENTION, NORMS, ACTIVATIONS, LOSS, ELEMENTWISE, OPTIMIZER, SAMPLING, WAITING, PYTHON)
OTHER = "other"  # a file that the table has forgotten
CALLER = "caller"  # a file that works for others: the time is theirs

# A file's entry goes before its folder's, and that before the folder's around it.
PART_OF = {
    "ops/linear.py": PRODUCTS, "kernels/cpu/linear.py": PRODUCTS, "kernels/cpu/few_rows.py": PRODUCTS,
    "ops/attention.py": ATTENTION, "ops/tiled_attention.py": ATTENTION, "ops/softmax.py": ATTENTION, "ops/positions.py": ATTENTION,
    "kernels/cpu/attention.py": ATTENTION, "kernels/cpu/rope.py": ATTENTION, "kernels/packed.py": ATTENTION, "nn/cache.py": ATTENTION,
    "kernels/cpu/decode.py": ATTENTION, "kernels/cpu/folded.py": ATTENTION,  # beside which norms and sums of a few rows are little
    "ops/norm.py": NORMS, "kernels/cpu/norms.py": NORMS,
    "ops/activations.py": ACTIVATIONS, "ops/erf.py": ACTIVATIONS, "kernels/cpu/activations.py": ACTIVATIONS,
    "ops/cross_entropy.py": LOSS, "ops/losses.py": LOSS, "ops/preference.py": LOSS, "ops/policy.py": LOSS, "kernels/cpu/cross_entropy.py": LOSS,
    "ops/elementwise.py": ELEMENTWISE, "ops/embedding.py": ELEMENTWISE, "ops/reduce.py": ELEMENTWISE, "ops/shape.py": ELEMENTWISE,
    "ops/cast.py": ELEMENTWISE, "ops/dropout.py": ELEMENTWISE, "kernels/cpu/embedding.py": ELEMENTWISE,
    "kernels/cpu/block.py": ELEMENTWISE,  # itself only residual sums and biases: for all else it calls the other kernels
    "kernels/known.py": PYTHON, "optim": OPTIMIZER, "train/parallel.py": OPTIMIZER,  # which adds up the gradients of all processes
    "generate/samplers.py": SAMPLING,
    "processes.py": WAITING,
    "threads.py": CALLER, "kernels/cpu/blocks.py": CALLER, "bench": CALLER,
    "ops/__init__.py": PYTHON, "ops/cases.py": PYTHON, "kernels/__init__.py": PYTHON, "kernels/cpu/__init__.py": PYTHON,
    "kernels/cuda": PYTHON,  # which only launches
    "tensor.py": PYTHON, "recompute.py": PYTHON, "nn": PYTHON, "train": PYTHON, "generate": PYTHON, "finetune": PYTHON, "align": PYTHON, "evaluate": PYTHON, "stages": PYTHON, "data": PYTHON, "tokenizer": PYTHON, "cli": PYTHON,
    "backend.py": PYTHON, "config.py": PYTHON, "memory.py": PYTHON, "anomaly.py": PYTHON, "gradcheck.py": PYTHON,
    "__init__.py": PYTHON, "__main__.py": PYTHON,
}  # fmt: skip


def part_of(file: str) -> str | None:
    """The part that a file's time is booked to, or CALLER, as for files outside the package; None for one that the table has forgotten."""
    path = Path(file)
    if not path.is_relative_to(PACKAGE):
        return CALLER
    inside = path.relative_to(PACKAGE)
    return next((PART_OF[name] for place in (inside, *inside.parents) if (name := place.as_posix()) in PART_OF), None)


class Profiler:
    """start() and stop() in the main thread, then shares(): part -> its share of the time between, None where there is no timer."""

    def __init__(self, part_of=part_of):
        self.part_of = part_of
        self.seconds: Counter[str] = Counter()
        self.known: dict[CodeType, str | None] = {}

    def start(self) -> None:
        if TIMER:
            self.last, self.before = perf_counter(), signal.signal(signal.SIGALRM, self._look)
            signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)

    def stop(self) -> None:
        if TIMER:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)

    def shares(self) -> dict[str, float] | None:
        """Parts in the order of PARTS, those that were seen; the shares add up to 1."""
        order = [*PARTS, *sorted(self.seconds.keys() - set(PARTS))]
        return {part: self.seconds[part] / self.seconds.total() for part in order if self.seconds[part]} if TIMER else None

    def _look(self, number: int, frame: FrameType | None) -> None:
        now = perf_counter()
        self.seconds[self._part(frame)] += now - self.last
        self.last = now

    def _part(self, frame: FrameType | None) -> str:
        """That of the innermost frame that is nobody's helper; OTHER for a file without an entry."""
        while frame is not None:
            code = frame.f_code
            if code not in self.known:
                self.known[code] = self.part_of(code.co_filename)
            if self.known[code] != CALLER:
                return self.known[code] or OTHER
            frame = frame.f_back
        return PYTHON
