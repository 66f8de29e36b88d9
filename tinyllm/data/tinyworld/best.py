"""The best that any encoder could do on descriptions (kind "fact"), whose whole distribution is small enough to be listed."""
import itertools

import numpy as np

from tinyllm.data.batches import IGNORE
from tinyllm.data.masking import MASKED, RATE, SUBSTITUTED, MaskedBatch
from tinyllm.data.rows import padded
from tinyllm.data.tinyworld.world import World
from tinyllm.tokenizer import WordPieceTokenizer

PADDING = -1


def best_next_sentence_accuracy(world: World) -> float:
    """Of telling, in half of the cases each, the next sentence of a description from a random sentence of a random description.

    A is a sentence of an entity with n attributes, in two wordings. The true next sentence is about the same entity and another
    attribute: each of these has probability 1/(2(n-1)) given A, but only 1/(2nE) as a random sentence of E entities. So the best
    guess is "next" whenever B is about the same entity and another attribute, which is wrong for a random B that happens to be so:

        accuracy = 1 - ½ · (1/E) · (n-1)/n
    """
    entities, attributes = len(world.entities), len(next(iter(world.entities.values())))
    return 1 - (attributes - 1) / (2 * entities * attributes)


def best_masked_accuracy(texts: np.ndarray, probabilities: np.ndarray, ids: np.ndarray, targets: np.ndarray, *, mask_id: int,
                         vocab_size: int, rate: float = RATE) -> float:
    """The share of masked tokens that the best of all predictors gets right.     (D, T), (D,), (B, T), (B, T) -> number

    texts: all D texts there are, as ids, PADDING behind their ends; probabilities: theirs. ids: corrupted texts, targets: what stood
    in the chosen places, IGNORE elsewhere. Places are chosen with probability `rate`, and of these 80 % become mask_id, 10 % any of
    vocab_size tokens, 10 % stay (see `corrupt`). By Bayes' rule, for the place t that is asked for and with the noise p(x | d) of one place,

        p(d | x, t chosen) ∝ p(d) · p(x_t | d_t, chosen) · Π_{s≠t} p(x_s | d_s)        best guess: argmax_v Σ_{d: d_t=v} p(d | x, t chosen)
    """
    right = 0
    for x, target in zip(ids, targets, strict=True):
        kept = (1 - MASKED - SUBSTITUTED) * (x == texts)
        chosen = MASKED * (x == mask_id) + SUBSTITUTED / vocab_size + kept                  # (D, T): p(x_s | d_s, chosen)
        either = np.where(texts == PADDING, x == PADDING, rate * chosen + (1 - rate) * (x == texts))
        with np.errstate(divide="ignore"):
            log_either = np.log(either)
        log_text = np.log(probabilities) + log_either.sum(1)                                # (D,): ln p(d) p(x | d)
        for t in np.flatnonzero(target != IGNORE):
            posterior = np.exp(log_text - log_text.max()) * (chosen / np.where(either > 0, either, 1))[:, t]
            at_place = texts[:, t]
            scores = np.bincount(at_place[at_place != PADDING], posterior[at_place != PADDING], vocab_size)
            right += int(scores.argmax() == target[t])
    return right / np.count_nonzero(targets != IGNORE)


def best_masked_in_pairs(world: World, tokenizer: WordPieceTokenizer, batch: MaskedBatch) -> float:
    """`best_masked_accuracy` on a batch of pairs of sentences of descriptions, which are drawn as next-sentence prediction draws them."""
    texts, probabilities = all_pairs(world, tokenizer)
    ids = np.full((len(batch), texts.shape[1]), PADDING)
    targets = np.full_like(ids, IGNORE)
    width = min(batch.ids.shape[1], texts.shape[1])
    ids[:, :width] = np.where(batch.documents == 0, batch.ids, PADDING)[:, :width]
    targets[:, :width] = batch.targets[:, :width]
    ordinary = tokenizer.vocab_size - len(tokenizer.special_tokens)
    return best_masked_accuracy(texts, probabilities, ids, targets, mask_id=tokenizer.mask, vocab_size=ordinary)


def all_pairs(world, tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Every row that there is, without masks, and its probability.     -> (D, T) ids, (D,)"""
    sentences = {(entity, a, w): tokenizer.encode(fact.statement(w))
                 for entity, facts in world.entities.items() for a, fact in enumerate(facts) for w in (0, 1)}  # fmt: skip
    others = len(next(iter(world.entities.values()))) - 1  # facts that may follow one, each in two wordings
    rows, probabilities = [], []
    for (first, a), (second, b) in itertools.product(sentences.items(), repeat=2):
        follows = 0.5 / others if first[0] == second[0] and first[1] != second[1] else 0
        rows.append([tokenizer.cls, *a, tokenizer.sep, *b, tokenizer.sep])
        probabilities.append((0.5 * follows + 0.5 / len(sentences)) / len(sentences))
    return padded(rows, fill=PADDING), np.array(probabilities)
