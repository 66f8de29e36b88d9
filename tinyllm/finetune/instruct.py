"""Instruction tuning: conversations -> batches whose targets are the assistant's tokens alone.

    ids       <|user|>   Hello   <|end|>   <|assistant|>   Hi   .         of "… <|assistant|> Hi . <|end|>"
    targets      -         -        -           Hi         .    <|end|>   each input's target is the token after it, if that counts

The loss is that of pretraining, `next_token_loss`, which leaves out what does not count. Rows are padded, or several conversations share
one, each with a document number of its own, so that none sees another.
"""
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.data import IGNORE, Batch, Conversation
from tinyllm.data.rows import padded, shuffled
from tinyllm.tokenizer import Tokenizer, encode_chat, shortened


@dataclass(frozen=True)
class Example:
    """A conversation as inputs and targets (n,), IGNORE where the target does not count."""

    ids: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def encode_conversations(
    tokenizer: Tokenizer, conversations: Iterable[Conversation], context: int, on_cut: Callable[[str], None] = warnings.warn
) -> list[Example]:
    """The conversations as examples of at most `context` inputs.

    A longer one loses its oldest messages first (see `shortened`); of a last exchange that is too long by itself the end is cut off. Where
    no target is left then, the conversation is left out. on_cut gets one line that says how often each was done.
    Raises ValueError where none is left.
    """
    examples, total, short, cut = [], 0, 0, 0
    for conversation in conversations:
        kept = shortened(tokenizer, conversation.messages, context + 1)
        ids, learned = map(np.array, encode_chat(tokenizer, kept))
        total, short, cut = total + 1, short + (len(kept) < len(conversation.messages)), cut + (len(ids) > context + 1)
        ids, learned = ids[: context + 1], learned[: context + 1]
        if learned[1:].any():
            examples.append(Example(ids[:-1], np.where(learned, ids, IGNORE)[1:]))
    if short or cut:
        lost = total - len(examples)
        on_cut(f"of {total} conversations, {short} lost their oldest messages and {cut} their end to fit into a context of {context} tokens; "
               f"{lost} had no answer left in it and {'is' if lost == 1 else 'are'} left out")  # fmt: skip
    if not examples:
        raise ValueError(f"none of {total} conversations has an answer within the context of {context} tokens: take a longer --context")
    return examples


class InstructionBatches:
    """Batches of examples, in random order without repetition.

    rows : which examples share a row, by number (see `data.pack`); by default each has its own. Shared rows carry document numbers.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int, rows: Sequence[Sequence[int]] | None = None):
        if not examples or batch < 1:
            raise ValueError(f"{len(examples)} examples in batches of {batch}: at least one each is needed")
        self.examples, self.size, self.seed = examples, batch, seed
        self.rows = [[i] for i in range(len(examples))] if rows is None else rows
        self.packed = rows is not None

    def batch(self, step: int) -> Batch:
        """The batch of a step (see `shuffled`)."""
        return self._of(shuffled(step, self.size, len(self.rows), self.seed))

    def in_order(self, every: int = 1) -> Iterator[Batch]:
        """Each row once; or of the batches each `every`-th. The last one may be smaller."""
        for start in range(0, len(self.rows), self.size * every):
            yield self._of(range(start, min(start + self.size, len(self.rows))))

    def _of(self, numbers: Iterable[int]) -> Batch:
        rows = [[self.examples[i] for i in self.rows[number]] for number in numbers]
        ids = padded([np.concatenate([example.ids for example in row]) for row in rows], fill=0)
        targets = padded([np.concatenate([example.targets for example in row]) for row in rows], fill=IGNORE)
        documents = [np.repeat(np.arange(len(row)), [len(example) for example in row]) for row in rows]
        return Batch(ids, targets, padded(documents, fill=IGNORE) if self.packed else None)
