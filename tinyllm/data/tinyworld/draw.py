"""Chance, and what it costs: every choice that makes a text goes through one object, which adds up ln p.

A generator is a function of a Draw. It asks for choices and returns what they made:

    def text(draw):
        return f"{draw.one_of(['Anna', 'Ben'])} has a {draw.one_of(['cup', 'hat'])}."

Random choices make a random text, and draw.log_probability is then the ln p of this derivation: by the chain rule the sum of the ln p
of its choices, each given those before it. Where different derivations give different texts, it is the ln p of the text as well.
The same function, run with every sequence of choices in turn, lists all texts that there are (`derivations`), and with every sequence
of its branches only, gives the exact entropy (`exact_entropy`).
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import exp, log
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


class Draw:
    """Random choices, with the sum of their ln p so far in `log_probability`."""

    def __init__(self, random: np.random.Generator):
        self._random = random
        self.log_probability = 0.0

    def one_of(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely. Whichever it is, later choices must have equally many options: see exact_entropy."""
        self.log_probability -= log(len(options))
        return options[self._index(len(options))]

    def distinct(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options in random order: one of all, one of those that are left, …"""
        left, chosen = list(options), []
        for _ in range(count):
            chosen.append(self.one_of(left))
            left.remove(chosen[-1])
        return chosen

    def branch(self, probabilities: Mapping[T, float]) -> T:
        """One of the keys, as likely as its value says. What is drawn after it may differ from key to key."""
        key = self._key(probabilities)
        self.log_probability += log(probabilities[key])
        return key

    def _index(self, count: int) -> int:
        return int(self._random.random() * count)

    def _key(self, probabilities: Mapping[T, float]) -> T:
        left = self._random.random()
        for key, probability in probabilities.items():
            left -= probability
            if left < 0:
                return key
        return key  # rounding left a little over


class _Replay(Draw):
    """The choices of a given path, and the first option of every choice after it."""

    def __init__(self, path: Sequence[int], branches_only: bool):
        self.log_probability = 0.0
        self.branch_probability = 1.0
        self._path, self._branches_only = path, branches_only
        self.taken: list[int] = []
        self._counts: list[int] = []

    def _next(self, count: int) -> int:
        place = len(self.taken)
        self.taken.append(self._path[place] if place < len(self._path) else 0)
        self._counts.append(count)
        return self.taken[-1]

    def _index(self, count: int) -> int:
        return 0 if self._branches_only else self._next(count)

    def _key(self, probabilities: Mapping[T, float]) -> T:
        key = list(probabilities)[self._next(len(probabilities))]
        self.branch_probability *= probabilities[key]
        return key

    def next_path(self) -> list[int]:
        """The path after this one, in the order of an odometer whose wheels may change; empty behind the last."""
        path = list(self.taken)
        while path and path[-1] + 1 == self._counts[len(path) - 1]:
            path.pop()
        return [*path[:-1], path[-1] + 1] if path else []


def _paths(make: Callable[[Draw], Any], branches_only: bool) -> Iterator[tuple[Any, _Replay]]:
    path: list[int] = []
    while True:
        draw = _Replay(path, branches_only)
        yield make(draw), draw
        path = draw.next_path()
        if not path:
            return


def derivations(make: Callable[[Draw], T]) -> Iterator[tuple[T, float]]:
    """All that a generator can make, each with its probability; for one without an end, this has none either."""
    for made, draw in _paths(make, branches_only=False):
        yield made, exp(draw.log_probability)


def exact_entropy(make: Callable[[Draw], Any]) -> float:
    """The entropy of a generator's derivations in nats, in closed form.

        H = E[-ln p] = Σ_b p(b)·(-ln p(b) + Σ ln n)        b: the outcomes of all branches; n: the options of each one_of after them

    One derivation for each b is enough, because a one_of promises that its outcome changes no later number of options.
    """
    return sum(draw.branch_probability * -draw.log_probability for _, draw in _paths(make, branches_only=True))
