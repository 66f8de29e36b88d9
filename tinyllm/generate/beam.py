"""Beam search: look for the likeliest continuation instead of drawing one."""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.backend import to_numpy
from tinyllm.generate.decode import check_scores, with_beginning
from tinyllm.generate.samplers import log_probabilities, ranked
from tinyllm.generate.settings import SamplingConfig
from tinyllm.generate.window import Window


@dataclass(frozen=True)
class Beam:
    """A candidate: its tokens, their log-probabilities, its score, and whether it came to its end of text."""

    ids: tuple[int, ...] = ()
    log_probabilities: tuple[float, ...] = ()
    score: float = 0.0
    ended: bool = False
    rolled: bool = False


def score(log_probability: float, length: int, length_penalty: float) -> float:
    """ln P / lp, with lp = ((5 + length)/(5 + 1))^α.

    P falls with every token, so α = 0 favours short texts; a higher α divides longer ones' ln P by more, and lifts it.
    Source: Wu et al. 2016 ("Google's Neural Machine Translation System"), eq. 14, without the coverage term.
    """
    return log_probability / ((5 + length) / 6) ** length_penalty


def beam_search(model, prompt: Sequence[int], config: SamplingConfig, *, end_of_text: int | None = None) -> list[Beam]:
    """The best continuations that were found, at most config.beams of them, best first.

    Each step extends every candidate by every token and keeps the config.beams best by score (equal ones: the earlier candidate, the
    lower id). A candidate that has ended keeps its place as long as its score does. One beam is greedy decoding; at least V^max_tokens
    beams are an exhaustive search. Ends when all candidates have, or after config.max_tokens.
    """
    window = Window(model, with_beginning([prompt], end_of_text))
    beams = [Beam()]
    for _ in range(config.max_tokens):
        growing = [beam for beam in beams if not beam.ended]
        candidates = [(beam, None) for beam in beams if beam.ended]
        log_ps = to_numpy(log_probabilities(window.logits()))
        check_scores(log_ps)
        for parent, (beam, log_p) in enumerate(zip(growing, log_ps, strict=True)):
            for token in ranked(-log_p, config.beams)[: config.beams].tolist():
                candidates.append((_extended(beam, token, float(log_p[token]), config, end_of_text, bool(window.rolled[parent])), parent))
        candidates = sorted(candidates, key=lambda candidate: -candidate[0].score)[: config.beams]
        beams = [beam for beam, _ in candidates]
        parents = [parent for beam, parent in candidates if not beam.ended]
        if not parents:
            break
        window.keep(np.array(parents))
        window.append([beam.ids[-1] for beam in beams if not beam.ended])
    return beams


def _extended(beam, token, log_p, config, end_of_text, rolled):
    log_ps = (*beam.log_probabilities, log_p)
    total = score(sum(log_ps), len(log_ps), config.length_penalty)
    return Beam((*beam.ids, token), log_ps, total, token == end_of_text, rolled)
