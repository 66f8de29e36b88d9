"""GRPO and RLOO: several answers to each prompt, and what each is worth is how it compares with the others. No critic.

    rollouts = GRPO(model, reference, prompts, reward, GRPOConfig(…), end=…, seed=0)
    train(model, rollouts.batches, grpo_loss(config), …)

The loss prints about 0 all the time: where the policy is the one that drew, every ratio is 1, and advantages have mean 0. What learns is
its gradient, -mean A·∇ln π, which is not 0 (see `ops.policy`). Look at `reward` instead.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyllm import ops
from tinyllm.align.logprobs import token_log_probabilities
from tinyllm.align.rollouts import Experience, RolloutConfig, Rollouts
from tinyllm.backend import array_module
from tinyllm.config import setting
from tinyllm.data import IGNORE, Batch
from tinyllm.tensor import Tensor


@dataclass(frozen=True)
class GRPOConfig(RolloutConfig):
    """How answers of a group are compared."""

    advantage: str = setting(
        "grpo", "reward minus the group's mean, divided by its standard deviation (grpo) or not (centred), or minus the others' mean (rloo)",
        choices=("grpo", "centred", "rloo"),
    )  # fmt: skip
    average: str = setting("answer", "what counts alike in the mean: each answer, whatever its length, or each token", choices=("answer", "token"))
    kl_place: str = setting(
        "loss", "where the distance to the reference counts: differentiated in the loss, or taken from the reward", choices=("loss", "reward")
    )
    kl_estimator: str = setting("k3", "how the loss estimates it (k2's gradient is the KL's; k3 is what GRPO was published with)", choices=ops.KL_ESTIMATORS)

    def __post_init__(self):
        super().__post_init__()
        if self.answers < 2:
            raise ValueError(f"--answers {self.answers}: answers are compared within a group, so it takes at least 2")


def group_advantages(rewards: np.ndarray, kind: str) -> np.ndarray:
    """How much better each answer is than its group.     (P, G) -> (P, G)

        centred   r - mean r                                  sums to 0 in each group (Liu et al. 2025, "Dr. GRPO")
        grpo      (r - mean r)/(std r + 10⁻⁴)                 (Shao et al. 2024); groups whose answers are all alike teach nothing
        rloo      rᵢ - mean of the others = G/(G-1)·centred   unbiased: the baseline does not depend on the answer (Ahmadian et al. 2024)
    """
    centred = rewards - rewards.mean(-1, keepdims=True)
    if kind == "grpo":
        return centred / (rewards.std(-1, keepdims=True) + 1e-4)
    return centred * (rewards.shape[-1] / (rewards.shape[-1] - 1)) if kind == "rloo" else centred


class GRPO(Rollouts):
    """Rollouts whose answers' advantages come from their groups."""

    config: GRPOConfig

    def experience(self, batch: Batch, old_log_p, reference_log_p, rewards) -> Experience:
        c, answered = self.config, batch.targets != IGNORE
        if c.kl_place == "reward":  # the whole answer's: k1, whose mean is the KL itself
            rewards = rewards - c.kl * (old_log_p - reference_log_p).sum(-1)
        advantages = group_advantages(rewards.reshape(-1, c.answers), c.advantage).reshape(-1, 1) * answered
        weights = answered / answered.sum(-1, keepdims=True) if c.average == "answer" else answered.astype(float)
        nothing = np.zeros_like(old_log_p)
        return Experience(batch.ids, batch.targets, old_log_p, reference_log_p, advantages, weights, nothing, nothing)


def grpo_loss(config: GRPOConfig) -> Callable[..., Tensor]:
    """loss_fn(model, experience, rng): clipped policy loss + kl·KL(π ‖ ρ) - entropy bonus, over the answers' tokens."""

    def loss(model, batch: Experience, rng) -> Tensor:
        log_p = token_log_probabilities(model, batch.batch, rng)
        total = ops.clipped_policy_loss(log_p, batch.old_log_p, batch.advantages, batch.weights, low=config.clip_low, high=config.clip_high)
        if config.kl and config.kl_place == "loss":
            reference = array_module(log_p.data).asarray(batch.reference_log_p)
            total = total + config.kl * ops.kl_estimate(log_p, reference, batch.weights, estimator=config.kl_estimator)
        if config.entropy:
            total = total - config.entropy * mean_entropy(model, batch)
        return total

    return loss


def mean_entropy(policy, batch: Experience) -> Tensor:
    """Entropy of the next token where the answer's tokens were drawn, in nats, averaged by the batch's weights.     -> ()"""
    rows = np.nonzero(batch.answered)
    hidden = policy.hidden(batch.ids)
    xp = array_module(hidden.data)
    each = ops.entropy(ops.linear(hidden[tuple(map(xp.asarray, rows))], policy.output_weight))
    return (each * xp.asarray(batch.weights[rows] / batch.weight, dtype=each.dtype)).sum()
