"""How well a model predicts texts: perplexity, and bits per byte, which do not depend on how the text was cut into tokens.

For a text of N predicted tokens that spell B bytes

    nats per token = -1/N Σ ln p(x_t | x_<t)        perplexity = e^(nats per token)        bits per byte = -1/B Σ log₂ p(x_t | x_<t)

A text that is longer than the model's context is read in windows that overlap: each token is predicted once, and sees at least
`context - stride` tokens before it where there are as many. A short stride is exact and dear, stride = context cheap, and too
pessimistic about the tokens at a window's beginning.
A text begins after the end-of-text token, which is also predicted at its end: so all of the text is counted, and that it ends. Where a
tokenizer has none, the first token is given, and neither it nor its bytes are counted.
"""
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tinyllm.data.shards import Shard
from tinyllm.evaluate.likelihood import Request, log_likelihoods
from tinyllm.evaluate.statistics import Metric, Scores
from tinyllm.evaluate.tasks import Passage, Task
from tinyllm.generate.window import context_of
from tinyllm.tokenizer import Tokenizer

BITS_PER_BYTE = Metric("bits_per_byte", "bits per byte", better="lower", percent=False)
NATS_PER_TOKEN = Metric("nats_per_token", "nats per token", better="lower", percent=False)
PERPLEXITY = Metric("perplexity", "perplexity per token", better="lower", percent=False, exponential=True)
LONGEST_PASSAGE = 8192  # characters: longer texts are cut, so that there are several to resample


def windows(ids: Sequence[int], size: int | None, stride: int | None = None) -> Iterator[Request]:
    """Requests that predict every id but the first once, in order.

    size : the most tokens that the model sees, None where any number will do.     stride : new tokens in each window but the first
    (default: half of size).     ValueError for a stride that is not between 1 and size.
    """
    size = max(1, len(ids) - 1) if size is None else size
    stride = max(1, size // 2) if stride is None else stride
    if not 1 <= stride <= size:
        raise ValueError(f"the stride is {stride}: it must be at least 1, and at most the model's context of {size}")
    done, end = 1, min(len(ids), 1 + size)
    while done < len(ids):
        yield Request(ids[max(0, end - 1 - size) : done], ids[done:end])
        done, end = end, min(len(ids), end + stride)


def token_log_probabilities(model, ids: Sequence[int], stride: int | None = None) -> np.ndarray:
    """ln p of every id but the first, given those before it.     (n,) -> (n-1,) float64"""
    answers = log_likelihoods(model, list(windows(ids, context_of(model), stride)))
    return np.concatenate([a.log_probabilities for a in answers]) if answers else np.empty(0)


def measure(model, tokenizer: Tokenizer, task: Task, style, progress, stride: int | None = None):
    """Bits per byte, nats per token and perplexity over the passages of a task.     -> {name: Scores}, a record each, 0

    style : unused, a text is a text.     Chance is all tokens alike, ln V each; best, -ln p under the process that wrote the texts.
    Raises ValueError for a passage with nothing to predict in it.
    """
    requests, owners, sizes = [], [], []
    for number, passage in enumerate(task.items):
        ids, size = _encoded(tokenizer, passage, f"{task.name}, passage {number + 1}")
        new = list(windows(ids, context_of(model), stride))
        requests += new
        owners += [number] * len(new)
        sizes.append((len(ids) - 1, size))
    tokens, sizes = np.array(sizes, dtype=np.float64).T
    answers = log_likelihoods(model, requests, progress=progress)
    nats = np.bincount(owners, [-answer.total for answer in answers], minlength=len(task.items))
    chance, best = tokens * math.log(tokenizer.vocab_size), None
    if all(passage.log_probability is not None for passage in task.items):
        best = np.array([-passage.log_probability for passage in task.items])
    bits = [None if x is None else x / math.log(2) for x in (nats, chance, best)]
    scores = [
        Scores(BITS_PER_BYTE, bits[0], sizes, bits[1], bits[2]),
        Scores(NATS_PER_TOKEN, nats, tokens, chance, best),
        Scores(PERPLEXITY, nats, tokens, chance, best),
    ]
    records = [dict(text=p.text, nats=float(x), tokens=int(t), bytes=int(b)) for p, x, t, b in zip(task.items, nats, tokens, sizes, strict=True)]
    return {s.metric.name: s for s in scores}, records, 0


def _encoded(tokenizer, passage, where):
    """The ids of a passage, and the bytes that all but the first of them spell."""
    ids, end = tokenizer.encode_ordinary(passage.text), tokenizer.end_of_text
    if not passage.text or end is None and len(ids) < 2:
        raise ValueError(f"{where}: there is nothing in it to predict; leave it out")
    if end is not None:
        return [end, *ids, end], len(passage.text.encode())
    return ids, len(passage.text.encode()) - len(tokenizer.token_bytes(ids[0]))


def passages(texts: Iterable[str], subject: str = "", longest: int = LONGEST_PASSAGE) -> tuple[Passage, ...]:
    """Texts as passages, long ones cut into as equal parts as can be; empty ones hold nothing."""
    found = []
    for text in texts:
        parts = -(-len(text) // longest)
        cuts = [len(text) * n // parts for n in range(parts + 1)] if parts else []
        found += [Passage(text[a:b], subject) for a, b in zip(cuts, cuts[1:], strict=False)]
    return tuple(found)


def shard_texts(shard: Shard, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts in a shard of tokens: its documents, or all of it where there is no end-of-text token in it."""
    ids = np.asarray(shard.tokens)
    ends = np.flatnonzero(ids == tokenizer.end_of_text) if tokenizer.end_of_text is not None else []
    for part in np.split(ids, ends):
        text = tokenizer.decode((i for i in part.tolist() if i != tokenizer.end_of_text), "ignore")  # a cut may have gone through a character
        if text:
            yield text
