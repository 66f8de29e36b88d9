"""Pairs of answers, one preferred to the other: from .jsonl to batches. The batch of step n depends on (seed, n) alone."""
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tinyllm.align.logprobs import padded, sequence_log_probabilities
from tinyllm.align.prompts import messages_of, records_with
from tinyllm.backend import random_stream, to_numpy
from tinyllm.data import Batch
from tinyllm.data.records import string_field
from tinyllm.tensor import no_grad
from tinyllm.tokenizer.chat import Message

FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, which is a list of messages, and where they came from (file:line)."""

    prompt: list[Message]
    chosen: str
    rejected: str
    source: str = ""


def read_pairs(paths: Iterable[str | os.PathLike]) -> Iterator[Pair]:
    """Read .jsonl files of objects with the fields prompt (a text or messages), chosen and rejected (texts); others are left alone.

    Errors: FileNotFoundError or ValueError, in one line with the file, the line, the field and what to do; a file without any pair is one.
    """
    for source, where, record in records_with(paths, FIELDS, "pairs"):
        prompt = messages_of(record, where)
        for name in FIELDS[1:]:
            if not string_field(record, name, where).strip():
                raise ValueError(f"{where}: the field {name!r} is empty: an answer must say something; correct or remove the record")
        if record["chosen"] == record["rejected"]:
            raise ValueError(f"{where}: the fields 'chosen' and 'rejected' are equal: nothing is preferred here; remove the record")
        yield Pair(prompt, record["chosen"], record["rejected"], source)


@dataclass(frozen=True)
class TokenPair:
    """A Pair as ids; the answers end with the token that ends an answer."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


def tokenize_pairs(pairs: Iterable[Pair], prompt_ids: Callable[[list[Message]], list[int]], answer_ids: Callable[[str], list[int]],
                   context: int) -> list[TokenPair]:
    """Pairs as ids, by the chat template's functions. ValueError, naming the source, where an answer does not fit the context."""
    found = []
    for pair in pairs:
        tokens = TokenPair(prompt_ids(pair.prompt), answer_ids(pair.chosen), answer_ids(pair.rejected))
        longest = len(tokens.prompt) + max(len(tokens.chosen), len(tokens.rejected))
        if longest > context:
            raise ValueError(f"{pair.source}: prompt and answer are {longest} tokens, the model's context is {context}: shorten or remove them")
        found.append(tokens)
    return found


@dataclass(frozen=True)
class PreferenceBatch:
    """Answers to B prompts, K to each: [:, 0] chosen, [:, 1] rejected and, where K = 3, [:, 2] the chosen answer to another prompt.

    ids, targets : (B, K, T), see `padded`.     reference : (B, K), ln ρ of each answer, or None.     weights : (B,), how much a pair counts.
    """

    ids: np.ndarray
    targets: np.ndarray
    reference: np.ndarray | None = None
    weights: np.ndarray | None = None

    @property
    def weight(self) -> int | float:
        return len(self.ids) if self.weights is None else float(self.weights.sum())

    def __len__(self) -> int:
        return len(self.ids)

    def part(self, number: int, count: int) -> "PreferenceBatch":
        """The pairs that are left to one of `count` workers."""
        rows = slice(len(self) * number // count, len(self) * (number + 1) // count)
        return PreferenceBatch(*(None if array is None else array[rows] for array in (self.ids, self.targets, self.reference, self.weights)))

    @property
    def answers(self) -> Batch:
        """All answers as rows, those of a pair next to each other.     (B·K, T)"""
        return Batch(self.ids.reshape(-1, self.ids.shape[-1]), self.targets.reshape(-1, self.ids.shape[-1]))


class Preferences:
    """Pairs as batches: `batch(n)` in random order, each pair once an epoch, or `in_order(size)`, once through.

    mismatched : each prompt gets a third answer, the one chosen for the next prompt: KTO's baseline is measured on those.
    weights : (N,), how much each pair counts.
    """

    def __init__(self, pairs: Sequence[TokenPair], batch: int, seed: int, *, mismatched: bool = False, weights=None):
        if not pairs or batch < 1:
            raise ValueError(f"preferences need at least one pair and a batch of at least 1, got {len(pairs)} pairs and batch {batch}")
        self.pairs, self.batch_size, self.seed = list(pairs), batch, seed
        self.weights, self.reference = weights, None
        self.answers = [[pair.chosen, pair.rejected] for pair in self.pairs]
        if mismatched:
            self.answers = [[*own, following.chosen] for own, following in zip(self.answers, self.pairs[1:] + self.pairs[:1], strict=True)]

    def batch(self, n: int) -> PreferenceBatch:
        """The batch of step n. It may begin in one epoch and end in the next."""
        places = range(n * self.batch_size, (n + 1) * self.batch_size)
        return self._batch([int(_order(self.seed, p // len(self.pairs), len(self.pairs))[p % len(self.pairs)]) for p in places])

    def in_order(self, size: int, every: int = 1) -> Iterator[PreferenceBatch]:
        """Once through all pairs, `size` at a time; or of these batches each `every`-th."""
        for first in range(0, len(self.pairs), size * every):
            yield self._batch(list(range(first, min(first + size, len(self.pairs)))))

    def with_reference(self, model, batch: int = 32) -> "Preferences":
        """The same with ln ρ of every answer, measured once by the model as it is now: it need not be kept beside the one that learns."""
        with no_grad():
            found = [to_numpy(sequence_log_probabilities(model, b.answers).data) for b in self.in_order(batch)]
        self.reference = np.concatenate(found).reshape(len(self.pairs), -1)
        return self

    def _batch(self, numbers: list[int]) -> PreferenceBatch:
        rows = [[*self.pairs[i].prompt, *answer] for i in numbers for answer in self.answers[i]]
        flat = padded(rows, [len(answer) for i in numbers for answer in self.answers[i]])
        shape = (len(numbers), -1, flat.ids.shape[1])
        chosen = [None if x is None else np.asarray(x)[numbers] for x in (self.reference, self.weights)]
        return PreferenceBatch(flat.ids.reshape(shape), flat.targets.reshape(shape), *chosen)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return random_stream(seed, "pairs", epoch).permutation(count)
