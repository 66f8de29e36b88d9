"""Where a GPU's time goes: an event before and after everything that tinyllm starts on it, each with a time of its own.

A GPU does what it was given in the order in which it was given, and an event notes when its turn came. So the time between the events
around a kernel is that kernel's, whatever the host does meanwhile, as long as the host is ahead; where it is not, the GPU's waiting shows
in no part. Two places start everything: `launch.function`, which all kernels come from, and `cublaslt.Plan.run`, all products. Both are
wrapped between start() and stop() and as they were otherwise, so that nothing is paid where nobody looks. What CuPy starts by itself
(sums, copies), the gaps between kernels and the events themselves (about 1 µs each on the GPU) make up the rest.
"""
from collections import Counter

from tinyllm.backend import device_module
from tinyllm.bench.profiler import ACTIVATIONS, ATTENTION, ELEMENTWISE, LOSS, NORMS, OPTIMIZER, OTHER, PARTS, PRODUCTS

REST = "CuPy and gaps"
PART_OF_KERNEL = {  # by name of the .cu file
    "attention": ATTENTION, "rope": ATTENTION, "norms": NORMS, "activations": ACTIVATIONS, "cross_entropy": LOSS, "adamw": OPTIMIZER,
    "embedding": ELEMENTWISE, "sums": ELEMENTWISE, "attention_backward": ATTENTION, "decode": PRODUCTS, "decode_attention": ATTENTION,
}  # fmt: skip


class GpuProfiler:
    """start(), stop(), then shares(): part -> its share of the GPU's time between, REST for what belongs to none."""

    def __init__(self):
        from tinyllm.kernels.cuda import cublaslt, launch

        self.cuda, self.seen = device_module("cuda").cuda, []  # (part, event before, event after)
        self.places = {(launch, "function"): self._kernels(launch.function), (cublaslt.Plan, "run"): self._product(cublaslt.Plan.run)}

    def start(self) -> None:
        self.before = {place: getattr(*place) for place in self.places}
        for (owner, name), wrapped in self.places.items():
            setattr(owner, name, wrapped)
        self.began = self._event()

    def stop(self) -> None:
        self.ended = self._event()
        self.ended.synchronize()
        for (owner, name), original in self.before.items():
            setattr(owner, name, original)

    def shares(self) -> dict[str, float]:
        """Parts in the order of PARTS, those that were seen; the shares add up to 1."""
        total, spent = self._milliseconds(self.began, self.ended), Counter()
        for part, before, after in self.seen:
            spent[part] += self._milliseconds(before, after)
        spent[REST] = max(0.0, total - spent.total())
        return {part: spent[part] / spent.total() for part in (*PARTS, OTHER, REST) if spent[part]}

    def _kernels(self, function):
        """launch.function whose kernels are timed."""

        def find(xp, file, *arguments, **macros):
            kernel = function(xp, file, *arguments, **macros)
            return lambda *a, **options: self._timed(PART_OF_KERNEL.get(file, OTHER), kernel, *a, **options)

        return find

    def _product(self, run):
        return lambda plan, *arguments: self._timed(PRODUCTS, run, plan, *arguments)

    def _timed(self, part: str, work, *arguments, **options):
        before = self._event()
        result = work(*arguments, **options)
        self.seen.append((part, before, self._event()))
        return result

    def _event(self):
        event = self.cuda.Event()
        event.record()
        return event

    def _milliseconds(self, before, after) -> float:
        return self.cuda.get_elapsed_time(before, after)
