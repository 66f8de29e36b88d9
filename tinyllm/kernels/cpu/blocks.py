"""Going through rows block by block, on all cores, with temporaries that are reused and stay in the cache."""
import math
import threading
from collections.abc import Callable

import numpy as np

from tinyllm.threads import parallel

CACHE = 2**18  # elements of all arrays of a block together: 1 MB in float32, as large as a usual second-level cache; half of it is 1 % slower
SHARE = 2**18  # elements that a core must get for waking it to pay
_scratch = threading.local()


def scratch(name: str, shape: tuple, dtype) -> np.ndarray:
    """An array of this shape that belongs to this thread and name, with whatever its last use left in it."""
    buffers = _scratch.__dict__
    size = math.prod(shape)
    key = (name, dtype)
    buffer = buffers.get(key)
    if buffer is None or buffer.size < size:
        buffer = buffers[key] = np.empty(size, dtype)
    return buffer[:size].reshape(shape)


def over_rows(work: Callable[[slice, int], None], rows: int, width: int, arrays: int) -> None:
    """work(block, number) for all blocks of rows, the rows shared out over the cores; number : of the core's share.

    width : elements of a row.     arrays : how many arrays of that width the work touches, temporaries included.
    """
    step = max(8, CACHE // (width * arrays))

    def blocks(part, number):
        for start in range(part.start, part.stop, step):
            work(slice(start, min(start + step, part.stop)), number)

    parallel(blocks, rows, at_least=max(1, SHARE // width))
