"""The decode loop: score the next token, adjust, draw, append, again.

`generate_naive` is the definition. `generate` gives the same tokens for many prompts at once, and reads each token only once.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.backend import array_module, random_stream, to_numpy
from tinyllm.generate.samplers import adjust, choose, draw, log_probability, penalises
from tinyllm.generate.settings import SamplingConfig
from tinyllm.generate.window import Window, context_of, kept_context
from tinyllm.tensor import no_grad


def generate_naive(model, prompt: Sequence[int], config: SamplingConfig, *, end_of_text: int | None = None, row: int = 0) -> list[int]:
    """The ids that continue one prompt, by running the model over the whole text for each of them."""
    stream, context = random_stream(config.seed, "sample", row), context_of(model)
    [prompt] = with_beginning([prompt], end_of_text)
    seen, continuation = prompt if context is None else prompt[-context:], []
    for _ in range(config.max_tokens):
        if context is not None and len(seen) > context:
            seen = seen[-kept_context(context) :]
        with no_grad():
            logits = model(np.array([seen])).data[:, -1].astype("float64")
        counts = count(np.array([[*prompt, *continuation]]), logits), count(np.array([continuation], dtype=int), logits)
        chosen = draw(adjust(logits, config, *counts), [stream.random()]).item()
        continuation.append(chosen)
        seen = [*seen, chosen]
        if chosen == end_of_text:
            break
    return continuation


def count(ids, logits):
    """How often each token occurs in each row, negative ids left out.     (B, T) int -> (B, V) int"""
    B, V = logits.shape
    rows, columns = np.nonzero(ids >= 0)
    counts = np.bincount(rows * V + ids[rows, columns], minlength=B * V).reshape(B, V)
    return array_module(logits).asarray(counts)


@dataclass(frozen=True)
class Step:
    """One more token for each text.     All (B,)

    ids : the token, or -1 for a text that had ended before.
    log_probabilities : its ln p under the model itself, before any sampler; 0 for a text that had ended before.
    finished : whether the text has ended, with this token or before.
    rolled : whether the text has outgrown the context, so that the model does not see its beginning any more.
    """

    ids: np.ndarray
    log_probabilities: np.ndarray
    finished: np.ndarray
    rolled: np.ndarray


class Decoding:
    """A batch of texts that grow by a token a step. `generate` is the loop around it; who wants to end a text early uses `end`.

    Row b draws from its own random stream, number first_row + b: a text comes out the same in any batch, however others end.
    """

    def __init__(self, model, prompts: Sequence[Sequence[int]], config: SamplingConfig, *, end_of_text=None, first_row: int = 0):
        prompts = with_beginning(prompts, end_of_text)
        self.config, self.end_of_text = config, end_of_text
        self.window = Window(model, prompts)
        self.streams = [random_stream(config.seed, "sample", first_row + row) for row in range(len(prompts))]
        self.live = np.arange(len(prompts))  # the rows that still grow, in the order of the window's
        self.finished = np.zeros(len(prompts), dtype=bool)
        self.rolled = self.finished.copy()
        self.prompts, self.counts, self.seen, self.drawn = prompts, penalises(config), None, None

    def step(self) -> Step:
        """Draw the next token of every text that has not ended; there must be one."""
        alive = np.flatnonzero(~self.finished[self.live])
        if len(alive) < len(self.live):
            self._keep(alive)
        ids, log_p = np.full(len(self.finished), -1), np.zeros(len(self.finished))
        ids[self.live], log_p[self.live] = self._draw()
        self.rolled[self.live] = self.window.rolled
        self.finished |= (ids >= 0) & (ids == self.end_of_text)
        return Step(ids, log_p, self.finished.copy(), self.rolled.copy())

    def end(self, row: int) -> None:
        """This text gets no more tokens."""
        self.finished[row] = True

    def _draw(self):
        logits = self.window.logits()
        if self.seen is None and self.counts:
            self.seen, self.drawn = count(_table(self.prompts), logits), array_module(logits).zeros(logits.shape, dtype=int)
        chosen = choose(logits, self.config, self.seen, self.drawn, [self.streams[row].random() for row in self.live])
        if self.counts:
            rows = array_module(logits).arange(len(logits))
            self.seen[rows, chosen] += 1
            self.drawn[rows, chosen] += 1
        ids, log_p = fetched(chosen, log_probability(logits, chosen))
        self.window.append(ids)
        return ids, log_p

    def _keep(self, rows):
        self.live = self.live[rows]
        self.window.keep(rows)
        if self.counts:
            self.seen, self.drawn = self.seen[rows], self.drawn[rows]


def generate(model, prompts: Sequence[Sequence[int]], config: SamplingConfig, *, end_of_text: int | None = None,
             first_row: int = 0) -> Iterator[Step]:
    """Continue each prompt, all at once, a token at a time, until end_of_text or config.max_tokens.

    prompts : ids, of any lengths; an empty one begins with end_of_text, as a document does.    first_row : see Decoding.
    config.stop and config.beams are about texts and searches: `complete` knows them.
    Past the context length the model goes on with a part of the text (see Window), and Step.rolled says so.
    Raises ValueError for an empty prompt without end_of_text.
    """
    decoding = Decoding(model, prompts, config, end_of_text=end_of_text, first_row=first_row)
    for _ in range(config.max_tokens):
        if decoding.finished.all():
            return
        yield decoding.step()


def with_beginning(prompts, end_of_text):
    """The prompts, an empty one replaced by [end_of_text]. ValueError where there is no such token."""
    for number, prompt in enumerate(prompts, 1):
        if not len(prompt) and end_of_text is None:
            raise ValueError(f"prompt {number} is empty, and this tokenizer has no end-of-text token to begin from: "
                             "give a prompt of at least one character")
    return [list(prompt) or [end_of_text] for prompt in prompts]


def fetched(ids, log_p):
    """Ids and their log-probabilities as NumPy arrays, in one go: on a GPU, every look waits for all that it has been given to do.

    ValueError as `check_scores` has it.     (B,) int, (B,) float64 -> (B,) int, (B,) float64
    """
    both = to_numpy(array_module(log_p).stack([ids.astype("float64"), log_p]))  # exact: ids are below 2⁵³
    check_scores(both[1])
    return both[0].astype(int), both[1]


def check_scores(log_p) -> None:
    """Raise ValueError where a log-probability is NaN, which all of a row are as soon as one of its scores is NaN or infinite.

    It is asked late, where the host looks at numbers in any case; what was chosen from such a row has gone nowhere yet.
    """
    if np.isnan(log_p).any():
        raise ValueError("the model's scores are not numbers (NaN): its weights are damaged; use an earlier checkpoint")


def _table(rows):
    """Rows of different lengths as one array, -1 where they have nothing."""
    table = np.full((len(rows), max(map(len, rows))), -1)
    for row, ids in zip(table, rows, strict=True):
        row[: len(ids)] = ids
    return table
