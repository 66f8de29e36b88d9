"""Examples as rows of a batch: in which order they come, and how short ones are filled up."""
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tinyllm.backend import random_stream


def shuffled(step: int, batch: int, count: int, seed: int) -> list[int]:
    """Which of `count` examples make up the batch of a step: epoch after epoch, each in an order of its own.

    A pure function of (seed, step), so that a resumed run gets the same. A batch may begin in one epoch and end in the next.
    """
    places = range(step * batch, (step + 1) * batch)
    return [int(_order(seed, place // count, count)[place % count]) for place in places]


@lru_cache(maxsize=4)  # a batch needs one or two epochs
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return random_stream(seed, "examples", epoch).permutation(count)


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Rows of different lengths as one array, filled up on the right.     -> (B, longest) int64"""
    table = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = row
    return table
