"""Learning from preferences directly: DPO and its relatives, each one line on the log-probabilities of answers.

    preferences = Preferences(pairs, batch=16, seed=0).with_reference(model)
    train(model, lambda n: [preferences.batch(n)], preference_loss(config), …)
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from tinyllm import ops
from tinyllm.align.logprobs import sequence_log_probabilities
from tinyllm.align.preferences import PreferenceBatch
from tinyllm.backend import array_module, to_numpy
from tinyllm.config import check, option_name, setting
from tinyllm.data import IGNORE
from tinyllm.tensor import Tensor, no_grad


@dataclass(frozen=True)
class PreferenceConfig:
    """Which loss of preferences, and how far the policy may go from its reference."""

    loss: str = setting("dpo", "what is minimised over pairs", choices=("dpo", "ipo", "kto", "orpo", "simpo"))
    beta: float = setting(0.1, "how much staying near the reference counts: the reward is beta x ln(policy/reference)", minimum=1e-6)
    label_smoothing: float = setting(0.0, "dpo: share of pairs that are taken to be labelled the wrong way round", minimum=0, maximum=0.5)
    gamma: float = setting(1.0, "simpo: margin by which the chosen answer is to lead", minimum=0)
    strength: float = setting(0.1, "orpo: weight of the preference beside learning the chosen answer", minimum=0)

    def __post_init__(self):
        check(self)
        for name, loss in dict(label_smoothing="dpo", gamma="simpo", strength="orpo").items():
            if self.loss != loss and getattr(self, name) != getattr(PreferenceConfig, name):
                raise ValueError(f"{option_name(name)} is a setting of --loss {loss}, which --loss {self.loss} does not look at: leave it out")

    @property
    def uses_reference(self) -> bool:
        """Whether Preferences need `with_reference`."""
        return self.loss in ("dpo", "ipo", "kto")


# (policy (B, K), reference (B, K), tokens (B, K), weights (B,) or None, config) -> loss
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": lambda p, ref, _, w, c: ops.dpo(p[:, 0], p[:, 1], ref[:, 0], ref[:, 1], w, beta=c.beta, label_smoothing=c.label_smoothing),
    "ipo": lambda p, ref, _, w, c: ops.ipo(p[:, 0], p[:, 1], ref[:, 0], ref[:, 1], w, beta=c.beta),
    "simpo": lambda p, _, n, w, c: ops.simpo(p[:, 0] / n[:, 0], p[:, 1] / n[:, 1], w, beta=c.beta, gamma=c.gamma),
    "orpo": lambda p, _, n, w, c: ops.orpo(p[:, 0] / n[:, 0], p[:, 1] / n[:, 1], w, strength=c.strength),
    "kto": lambda p, ref, _, w, c: _kto(p, ref, w, c),
}


def _kto(policy, reference, weights, config):
    """Both answers of a pair by themselves. The baseline is the mean log-ratio of answers to other prompts, which say nothing about these."""
    if policy.shape[1] < 3:
        raise ValueError("kto measures its baseline on mismatched answers: make Preferences(…, mismatched=True)")
    baseline = max(0.0, float((policy.data[:, 2] - reference[:, 2]).mean()))
    desirable = np.broadcast_to([True, False], (len(reference), 2))
    weights = None if weights is None else np.broadcast_to(weights[:, None], desirable.shape)
    return ops.kto(policy[:, :2], reference[:, :2], desirable, baseline, weights, beta=config.beta)


def preference_loss(config: PreferenceConfig) -> Callable[..., Tensor]:
    """loss_fn(model, batch, rng) for the training loop.

    Raises ValueError for batches without the reference's log-probabilities where the loss needs them.
    """

    def loss(model, batch: PreferenceBatch, rng) -> Tensor:
        policy = sequence_log_probabilities(model, batch.answers, rng).reshape(len(batch), -1)
        if config.uses_reference and batch.reference is None:
            raise ValueError(f"{config.loss} compares with a reference: call with_reference(model) on the Preferences before training")
        return LOSSES[config.loss](policy, _beside(policy, batch.reference), _beside(policy, _tokens(batch)), _beside(policy, batch.weights), config)

    return loss


def _beside(policy: Tensor, array):
    """A host's array on the policy's device, in its dtype."""
    return None if array is None else array_module(policy.data).asarray(array, dtype=policy.dtype)


def _tokens(batch: PreferenceBatch) -> np.ndarray:
    """How many tokens each answer has.     -> (B, K)"""
    return (batch.targets != IGNORE).sum(-1)


def preference_metrics(model, batches: Iterable[PreferenceBatch], config: PreferenceConfig) -> dict[str, float]:
    """Means over all pairs, by the field's names:

    accuracy : share of pairs whose chosen answer is likelier than the other.      logps_chosen, logps_rejected : ln π of whole answers.
    rewards_chosen, rewards_rejected : β·(ln π - ln ρ).         margins : their difference.     reward_accuracy : share where it is above 0.
    The rewards are there where the batches have a reference. An equal pair counts half.
    """
    policy, reference = [], []
    with no_grad():
        for batch in batches:
            policy.append(to_numpy(sequence_log_probabilities(model, batch.answers).data).reshape(len(batch), -1))
            reference.append(batch.reference)
    policy = np.concatenate(policy).astype(float)
    found = dict(accuracy=_won(policy), logps_chosen=policy[:, 0], logps_rejected=policy[:, 1])
    if reference[0] is not None:
        rewards = config.beta * (policy - np.concatenate(reference))
        found |= dict(rewards_chosen=rewards[:, 0], rewards_rejected=rewards[:, 1], margins=rewards[:, 0] - rewards[:, 1],
                      reward_accuracy=_won(rewards))  # fmt: skip
    return {name: float(values.mean()) for name, values in found.items()}


def _won(scores: np.ndarray) -> np.ndarray:
    """1 where the first score is the larger, ½ where both are equal.     (B, K) -> (B,)"""
    return ((scores[:, 0] > scores[:, 1]).astype(float) + (scores[:, 0] >= scores[:, 1])) / 2
