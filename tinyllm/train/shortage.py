"""Out of memory in one line: how much a step takes, how much there is, and what to lower."""
from collections.abc import Iterator
from contextlib import contextmanager

from tinyllm.backend import device_module
from tinyllm.memory import NotEnoughMemory
from tinyllm.nn.describe import describe
from tinyllm.nn.device_memory import device_memory
from tinyllm.train.config import RunConfig


@contextmanager
def shortage_explained(config: RunConfig) -> Iterator[None]:
    """Inside this block a MemoryError, CuPy's for a GPU too, becomes a NotEnoughMemory that says all of it."""
    try:
        yield
    except NotEnoughMemory:
        raise
    except MemoryError as error:
        where = " on the GPU" if config.train.device == "cuda" else ""
        said = f"not enough memory{where}: {_needed(config)}{_present(config.train.device)}; {_remedy(config)} ({str(error).rstrip('.')})"
        raise NotEnoughMemory(said) from error


def _needed(config: RunConfig) -> str:
    d = describe(config.model, config.train.batch)
    memory = d if config.train.device == "cpu" else device_memory(d)
    return (
        f"a step on {d.batch} windows of {d.config.context} tokens takes about {_size(memory.peak_bytes)} "
        f"({_size(memory.state_bytes)} weights, gradients and AdamW, {_size(memory.activation_bytes)} activations, "
        f"{_size(memory.transient_bytes)} temporaries)"
    )


def _present(device: str) -> str:
    """What the GPU has, and what other programs hold of it."""
    if device == "cpu":
        return ""
    xp = device_module(device)
    free, total = xp.cuda.runtime.memGetInfo()
    others = total - free - xp.get_default_memory_pool().total_bytes()
    return f", and there are {_size(total)}" + (f", {_size(others)} of it taken by other programs" if others > total / 100 else "")


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _remedy(config: RunConfig) -> str:
    """The options that would help, the cheapest first."""
    options = []
    if config.train.batch > 1:
        options.append("a smaller --batch (with as much more --accumulate, the same updates)")
    if config.train.device != "cpu" and config.model.precision == "fp32":
        options.append("--precision bf16")
    if not config.model.recompute:
        options.append("--recompute")
    if config.model.attention == "naive" and (config.train.device == "cpu" or config.model.precision == "fp32"):
        options.append("--attention tiled")
    return f"try {', '.join([*options, 'a smaller --context'])}, or a smaller model; see tinyllm describe"
