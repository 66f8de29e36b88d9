"""Prompts in, text out: whole characters as they come, stop strings, and the reason why a text ended."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tinyllm.generate.beam import beam_search
from tinyllm.generate.decode import Decoding
from tinyllm.generate.settings import SamplingConfig
from tinyllm.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Completion:
    """A finished continuation.

    text : without the end-of-text token, and without the stop string and what its last token brought after it.
    ids, log_probabilities : every token that was chosen, those of the end included, and its ln p under the model itself.
    reason : "stop" (a stop string came), "end_of_text" (the model ended the document, or in a chat its answer), or "length" (max_tokens).
    """

    prompt: str
    text: str
    ids: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    reason: Literal["stop", "end_of_text", "length"]


@dataclass(frozen=True)
class Piece:
    """What one token adds to one text.

    text : what can be shown now; "" while a character is incomplete or a stop string may be coming.
    rolled : the text has outgrown the model's context.     completion : with the last piece of a text, all of it; None before.
    """

    row: int
    id: int
    log_probability: float
    text: str
    rolled: bool
    completion: Completion | None


class StopFilter:
    """Lets text pass until a stop string is complete, and holds back what may be the beginning of one.

    Of several stop strings the one that is complete first counts, of those that end together the longest: so it makes no difference
    in which pieces the text comes.
    """

    def __init__(self, stop: Sequence[str]):
        self.stop, self.held, self.stopped = stop, "", False

    def push(self, text: str) -> str:
        """The text that may be shown after this much more has come. After a stop, nothing."""
        if self.stopped:
            return ""
        text = self.held + text
        if found := [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stop if stop in text]:
            self.stopped, self.held = True, ""
            return text[: min(found)[1]]
        held = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        shown = len(text) - held
        self.held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """No more text comes: what was held back was no stop string."""
        held, self.held = self.held, ""
        return held


class Writer:
    """One text that grows by a token at a time."""

    def __init__(self, row: int, prompt: str, tokenizer: Tokenizer, config: SamplingConfig, end: int | None):
        self.row, self.prompt, self.config, self.end = row, prompt, config, end
        self.decoder, self.filter = StreamDecoder(tokenizer), StopFilter(config.stop)
        self.text, self.ids, self.log_probabilities = "", [], []
        self.completion: Completion | None = None

    def push(self, token: int, log_probability: float, rolled: bool) -> Piece:
        """What this token adds. Sets `completion` when the text ends with it."""
        self.ids.append(token)
        self.log_probabilities.append(log_probability)
        ended = token == self.end
        shown = "" if ended else self.filter.push(self.decoder.push(token))
        if ended or len(self.ids) == self.config.max_tokens:
            shown += self.filter.push(self.decoder.flush()) + self.filter.flush()
        self.text += shown
        reason = "stop" if self.filter.stopped else "end_of_text" if ended else "length"
        if self.filter.stopped or ended or len(self.ids) == self.config.max_tokens:
            self.completion = Completion(self.prompt, self.text, tuple(self.ids), tuple(self.log_probabilities), reason)
        return Piece(self.row, token, log_probability, shown, rolled, self.completion)


def stream(model, tokenizer: Tokenizer, prompts: Sequence[str], config: SamplingConfig, *, first_row: int = 0) -> Iterator[Piece]:
    """Continue each prompt; pieces as they come, those of a step by row. The last piece of each row carries its Completion.

    A special token that is written in a prompt is taken as the ordinary text it is made of. An empty prompt begins a new document.
    first_row : the number of the first prompt's random stream, where prompts come in several batches (see Decoding).
    Raises ValueError for a prompt that the tokenizer cannot encode, or an empty one where it has no end-of-text token.
    """
    encoded = [(prompt, tokenizer.encode_ordinary(prompt)) for prompt in prompts]
    return stream_encoded(model, tokenizer, encoded, config, end=tokenizer.end_of_text, first_row=first_row)


def stream_encoded(model, tokenizer: Tokenizer, prompts: Sequence[tuple[str, list[int]]], config: SamplingConfig, *, end: int | None,
                   first_row: int = 0) -> Iterator[Piece]:
    """`stream` for prompts that are encoded already, as (text, ids).     end : the token that ends a continuation, or None."""
    writers = [Writer(row, text, tokenizer, config, end) for row, (text, _) in enumerate(prompts)]
    return (_searched if config.beams > 1 else _drawn)(model, writers, [ids for _, ids in prompts], config, end, first_row)


def _drawn(model, writers, encoded, config, end_of_text, first_row):
    decoding = Decoding(model, encoded, config, end_of_text=end_of_text, first_row=first_row)
    while not decoding.finished.all():
        step = decoding.step()
        for row in np.flatnonzero(step.ids >= 0).tolist():
            piece = writers[row].push(int(step.ids[row]), float(step.log_probabilities[row]), bool(step.rolled[row]))
            if piece.completion:
                decoding.end(row)
            yield piece


def _searched(model, writers, encoded, config, end_of_text, _):
    for writer, prompt in zip(writers, encoded, strict=True):
        best = beam_search(model, prompt, config, end_of_text=end_of_text)[0]
        for token, log_p in zip(best.ids, best.log_probabilities, strict=True):
            yield (piece := writer.push(token, log_p, best.rolled))
            if piece.completion:
                break


def complete(model, tokenizer: Tokenizer, prompts: str | Sequence[str], config: SamplingConfig, *,
             first_row: int = 0) -> Completion | list[Completion]:
    """The Completion of a prompt; of a list of prompts, the list of theirs. See `stream`."""
    if isinstance(prompts, str):
        return complete(model, tokenizer, [prompts], config, first_row=first_row)[0]
    return completions(stream(model, tokenizer, prompts, config, first_row=first_row))


def completions(pieces: Iterable[Piece]) -> list[Completion]:
    """What a stream's texts are in the end, by row."""
    found = {piece.row: piece.completion for piece in pieces if piece.completion}
    return [found[row] for row in sorted(found)]
