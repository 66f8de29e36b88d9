"""What an update did to the policy, measured on the answers that it learned from. (What a rollout was worth: `rollout_metrics`.)"""
import numpy as np

from tinyllm.align.grpo import mean_entropy
from tinyllm.align.logprobs import token_log_probabilities
from tinyllm.align.rollouts import Experience, RolloutConfig
from tinyllm.backend import to_numpy
from tinyllm.nn import Transformer
from tinyllm.ops import KL_ESTIMATORS
from tinyllm.ops.policy import kl_estimate
from tinyllm.tensor import no_grad


def policy_metrics(policy: Transformer, batch: Experience, config: RolloutConfig) -> dict[str, float]:
    """By the field's names, in nats per token, averaged by the batch's weights:

    clip_fraction : share of tokens whose ratio π/π_old has left [1 - clip_low, 1 + clip_high].     ratio : its mean.
    approx_kl : KL(π_old ‖ π), how far the updates since the rollout went (Schulman's k3).          entropy : of the next token.
    kl_k1, kl_k2, kl_k3 : KL(π ‖ ρ) by each estimator, on answers that π_old drew.
    """
    with no_grad():
        log_p = to_numpy(token_log_probabilities(policy, batch.batch).data).astype(float)
        entropy = mean_entropy(policy, batch).item()
    ratio = np.exp(log_p - batch.old_log_p)
    share = batch.weights / batch.weight
    outside = (ratio < 1 - config.clip_low) | (ratio > 1 + config.clip_high)
    found = dict(
        clip_fraction=float((outside * share).sum()), ratio=float((ratio * share).sum()), entropy=entropy,
        approx_kl=float(kl_estimate.array(batch.old_log_p, log_p, batch.weights)[0]),
    )  # fmt: skip
    return found | {f"kl_{e}": float(kl_estimate.array(log_p, batch.reference_log_p, batch.weights, estimator=e)[0]) for e in KL_ESTIMATORS}
