"""The plainest way to use a reward: draw n answers and keep the best. No training; what other methods have to beat."""
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.align.rollouts import Reward, sample
from tinyllm.nn import Transformer


@dataclass(frozen=True)
class Best:
    """The best of n answers: its ids, its reward, and the rewards of all n."""

    answer: list[int]
    reward: float
    rewards: tuple[float, ...]


def best_of_n(policy: Transformer, prompts: Sequence[Sequence[int]], n: int, reward: Reward, max_tokens: int, *, end: int | None,
              seed: int = 0) -> list[Best]:
    """Of n answers to each prompt the one with the highest reward, the first of several. ValueError for n below 1."""
    if n < 1 or not prompts:
        raise ValueError(f"best of n needs at least one prompt and n ≥ 1, got {len(prompts)} prompts and n = {n}")
    samples = sample(policy, prompts, np.repeat(np.arange(len(prompts)), n).tolist(), max_tokens, end=end, seed=seed)
    rewards = np.asarray(reward(samples), dtype=float).reshape(len(prompts), n)
    best = rewards.argmax(-1)
    return [Best(samples.answers[i * n + k], float(rewards[i, k]), tuple(rewards[i].tolist())) for i, k in enumerate(best.tolist())]


def best_of_n_kl(n: int) -> float:
    """KL(best of n ‖ policy) in nats, ln n - (n-1)/n: exact where no two answers have one reward, else an upper bound.

    The best of n has the density n·F^(n-1) times the policy's, F the share of answers that are worse, uniform on [0, 1] under the policy:
    the KL is ∫ n·u^(n-1)·ln(n·u^(n-1)) du.        Source: Stiennon et al. 2020, appendix G.3; Beirami et al. 2024 (bound).
    """
    return math.log(n) - (n - 1) / n
