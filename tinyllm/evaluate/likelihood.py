"""ln p of given tokens after given tokens, for thousands of texts at once: what multiple choice and perplexity are both made of.

    ln p(continuation | context) = Σ_t ln p(c_t | context, c_1 … c_{t-1})

`log_likelihood_naive` is the definition. `log_likelihoods` gives the same numbers faster, by three facts about a causal model:
 - what stands right of a token does not change its scores, so texts of different lengths may share a batch, padded on the right;
 - an input that begins another input has been read when that one is: four choices of one token each cost one pass, not four;
 - scores over the vocabulary are needed where a continuation is predicted only, not over its context.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.backend import array_module, to_numpy
from tinyllm.generate.decode import check_scores
from tinyllm.generate.samplers import log_probability
from tinyllm.generate.window import context_of
from tinyllm.tensor import no_grad

TOKENS_AT_ONCE = 4096  # of a batch, padding included
SCORES_AT_ONCE = 2**22  # of (rows, V), as in ops.linear_cross_entropy


@dataclass(frozen=True)
class Request:
    """Ids that are given, at least one, and ids after them, at least one, whose probability is asked for."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """The answer to a Request of m continuation tokens.

    log_probabilities : (m,) float64, ln p of each.     greedy : whether each was the likeliest token at its place.
    truncated : whether the beginning of the context was cut off, so that all fits the model.
    """

    log_probabilities: np.ndarray
    greedy: bool
    truncated: bool

    @property
    def total(self) -> float:
        """ln p of the whole continuation."""
        return float(self.log_probabilities.sum())


def log_likelihood_naive(model, request: Request) -> Likelihood:
    """One text at a time, all of the vocabulary's probabilities in float64."""
    ids, first, truncated = _fitted(request, context_of(model))
    with no_grad():
        z = to_numpy(model(np.array([ids[:-1]])).data)[0, first - 1 :].astype(np.float64)
    z -= z.max(-1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
    wanted = ids[first:]
    return Likelihood(log_p[np.arange(len(wanted)), wanted], bool((z.argmax(-1) == wanted).all()), truncated)


def log_likelihoods(model, requests: Sequence[Request], *, tokens_at_once: int = TOKENS_AT_ONCE,
                    progress: Callable[[int, int], None] = lambda done, total: None) -> list[Likelihood]:
    """The Likelihood of each request, in their order. The same requests give the same bits again.

    tokens_at_once : a batch has at most this many, or one row.     progress(done, total) : called after each batch, in requests.
    Raises ValueError for an empty context or continuation, for a continuation that does not fit the model's context, and for scores
    that are not numbers.
    """
    size = context_of(model)
    texts = [_fitted(request, size) for request in requests]
    found: list[Likelihood | None] = [None] * len(texts)
    done = 0
    for batch in _batches(_shared_inputs([ids[:-1] for ids, _, _ in texts]), tokens_at_once):
        members = [(row, n) for row, (_, numbers) in enumerate(batch) for n in numbers]
        places = [(row, np.arange(texts[n][1], len(texts[n][0])) - 1) for row, n in members]  # where each continuation is predicted from
        wanted = [np.array(texts[n][0][texts[n][1] :]) for _, n in members]
        log_p, greedy = _scored(model, [ids for ids, _ in batch], places, np.concatenate(wanted))
        ends = np.cumsum([len(w) for w in wanted])
        for (_, n), part in zip(members, zip(np.split(log_p, ends[:-1]), np.split(greedy, ends[:-1]), strict=True), strict=True):
            found[n] = Likelihood(part[0], bool(part[1].all()), texts[n][2])
        done += len(members)
        progress(done, len(texts))
    return found


def _fitted(request: Request, size: int | None) -> tuple[list[int], int, bool]:
    """All ids, as many of the last as the model can take; where the continuation begins in them; whether some were cut off."""
    context, continuation = list(request.context), list(request.continuation)
    if not context:
        raise ValueError("there is nothing before the text whose probability is asked for, and this tokenizer has no end-of-text token to begin from")
    if not continuation:
        raise ValueError("there is no text whose probability could be asked for: a choice has no tokens")
    if size is not None and len(continuation) > size:
        raise ValueError(f"an answer of {len(continuation)} tokens does not fit the model's context of {size}: leave it out, or take another model")
    ids = context + continuation
    cut = 0 if size is None else max(0, len(ids) - 1 - size)  # the last token is predicted, not read
    return ids[cut:], len(context) - cut, cut > 0


def _shared_inputs(inputs: list[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Inputs that begin no other input, longest first, each with the numbers of those that it covers.

    In alphabetical order a text stands before those that it begins, with nothing else in between: looking at the neighbour is enough.
    """
    spelled = [np.array(ids, dtype=np.uint32).tobytes() for ids in inputs]  # four bytes an id: one text begins another as its bytes do
    order = sorted(range(len(inputs)), key=spelled.__getitem__)
    carriers: list[tuple[list[int], list[int]]] = []
    after = b""  # the text behind in the alphabet
    for number in reversed(order):
        if carriers and after.startswith(spelled[number]):
            carriers[-1][1].append(number)
        else:
            carriers.append((inputs[number], [number]))
        after = spelled[number]
    return sorted(carriers, key=lambda carrier: -len(carrier[0]))  # sorted() keeps ties in order: always the same batches


def _batches(carriers, tokens_at_once):
    """Neighbours in length, whose padded batch has no more than this many tokens."""
    first = 0
    while first < len(carriers):
        rows = max(1, tokens_at_once // len(carriers[first][0]))
        yield carriers[first : first + rows]
        first += rows


def _scored(model, inputs, places, wanted):
    """ln p of the wanted ids at the places (row, positions), and whether they were the likeliest.     -> (n,) float64, (n,) bool"""
    ids = np.zeros((len(inputs), max(map(len, inputs))), dtype=np.int64)
    for row, given in zip(ids, inputs, strict=True):
        row[: len(given)] = given
    rows = np.concatenate([np.full(len(positions), row) for row, positions in places])
    columns = np.concatenate([positions for _, positions in places])
    with no_grad():
        hidden, weight = model.hidden(ids).data[rows, columns], model.output_weight.data  # (n, C), (V, C)
    xp, step = array_module(hidden), max(1, SCORES_AT_ONCE // len(weight))
    log_p, greedy = [], []
    for s in (slice(i, i + step) for i in range(0, len(wanted), step)):
        scores, ids = hidden[s] @ weight.T, xp.asarray(wanted[s])
        log_p.append(to_numpy(log_probability(scores, ids)))
        greedy.append(to_numpy(scores.argmax(-1) == ids))
    check_scores(np.concatenate(log_p))
    return np.concatenate(log_p), np.concatenate(greedy)
