"""Losses of policies that learn from rewards: actions are tokens, a policy is a model's distribution of the next one.

What one wants is the gradient of an expectation over the policy's own samples, E_π[A]. Since ∇π = π·∇ln π,

    ∇E_π[A] = E_π[A·∇ln π(a)]            (REINFORCE; any baseline b may be taken from A, as E_π[∇ln π] = ∇Σπ = 0)

so each loss here is one whose *gradient* is minus that, on samples. Its value says little: with advantages of mean 0 it is 0 where
sampling and learning policy agree, while its gradient is not.

All take arrays of one shape, a number for each token, and `weights`, which say how much each counts in the mean (0: not at all).
Old log-probabilities, advantages and returns were measured: no gradient goes there.
"""
from tinyllm.backend import array_module
from tinyllm.ops.preference import shares
from tinyllm.tensor import op

KL_ESTIMATORS = ("k1", "k2", "k3")


@op
def policy_gradient(log_p, advantages, weights=None):
    """-mean A·ln π(a).     (...), (...) -> ()        Backward.  d ln π = -A/n.        Source: Williams 1992 (REINFORCE)."""
    share = shares(log_p, weights)
    advantages = array_module(log_p).asarray(advantages, dtype=log_p.dtype)
    return -(advantages * log_p * share).sum(), lambda dy: (advantages * share * -dy, None, None)


@op
def clipped_policy_loss(log_p, old_log_p, advantages, weights=None, *, low=0.2, high=0.2):
    """-mean min(R·A, clip(R, 1 - low, 1 + high)·A),   R = π/π_old = e^(ln π - ln π_old).     (...) ×3 -> ()

    R makes samples of π_old count as if they were π's. min takes the more pessimistic of both: a token that has become likelier by
    more than `high`, and should, gets no further push, nor one that has become less likely by more than `low`, and should; one that
    went the wrong way is always brought back.
    Backward.  d ln π = -R·A/n where R·A is the smaller, else 0; at R = 1 that is REINFORCE's.
    Source: Schulman et al. 2017, eq. 7; different bounds: Yu et al. 2025 ("clip higher").
    """
    xp = array_module(log_p)
    old_log_p, advantages = xp.asarray(old_log_p, dtype=log_p.dtype), xp.asarray(advantages, dtype=log_p.dtype)
    ratio = xp.exp(log_p - old_log_p)
    plain, clipped = ratio * advantages, xp.clip(ratio, 1 - low, 1 + high) * advantages
    share = shares(log_p, weights)
    return -(xp.minimum(plain, clipped) * share).sum(), lambda dy: (plain * (plain <= clipped) * share * -dy, None, None, None)


@op
def clipped_value_loss(values, old_values, returns, weights=None, *, clip=0.2):
    """½·mean max((v - G)², (v̄ - G)²),   v̄ = v held within old ± clip, G the returns.     (...) ×3 -> ()

    Backward.  dv = (v - G)/n where v's error is the larger, else 0: v̄ does not move with v once it is held.
    Source: Schulman et al.'s code of PPO; Ouyang et al. 2022 train language models with it.
    """
    xp = array_module(values)
    old_values, returns = xp.asarray(old_values, dtype=values.dtype), xp.asarray(returns, dtype=values.dtype)
    off, held = values - returns, xp.clip(values, old_values - clip, old_values + clip) - returns
    share = shares(values, weights)
    y = (xp.maximum(off * off, held * held) * share).sum() * 0.5
    return y, lambda dy: (off * (off * off >= held * held) * share * dy, None, None, None)


@op
def kl_estimate(log_p, reference_log_p, weights=None, *, estimator="k3"):
    """The mean of an estimate of KL(π ‖ ρ) = E_π[ln π - ln ρ], from tokens that π drew. With d = ln π - ln ρ:     (...), (...) -> ()

                               mean over π's samples   is never < 0   backward d ln π   whose mean over π's samples is the gradient of
        k1 = d                 the KL                  no             1                 nothing: 0, as E_π[∇ln π] = 0
        k2 = d²/2              nearly, for small d     yes            d                 KL(π ‖ ρ), exactly
        k3 = e⁻ᵈ - 1 + d       the KL                  yes            1 - e⁻ᵈ           KL(ρ ‖ π): 1 - ρ/π, weighted by π

    So as a number to look at k3 is best (little variance), as a penalty to differentiate k2 is; k1 belongs into the reward.
    d ln ρ = -d ln π. All are divided by n, as a mean's.        Source: Schulman 2020, "Approximating KL divergence".
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator {estimator!r} is unknown: use one of {', '.join(KL_ESTIMATORS)}")
    xp = array_module(log_p)
    d = log_p - xp.asarray(reference_log_p, dtype=log_p.dtype)
    if estimator == "k1":
        values, slopes = d, xp.ones_like(d)
    elif estimator == "k2":
        values, slopes = d * d * 0.5, d
    else:
        values, slopes = xp.expm1(-d) + d, -xp.expm1(-d)
    share = shares(d, weights)
    return (values * share).sum(), lambda dy: (lambda: slopes * share * dy, lambda: slopes * share * -dy, None)


@op
def entropy(logits):
    """H = -Σ p·ln p of each row of scores, p = softmax: how undecided a policy is, in nats.     (..., V) -> (...)

    With z counted from the row's maximum, H = ln Σeᶻ - Σ p·z.
    Backward.  ∂H/∂z = -p·(ln p + H):   likely scores go down, unlikely ones up.
    """
    xp = array_module(logits)
    z = logits - logits.max(-1, keepdims=True)
    log_p = z - xp.log(xp.exp(z).sum(-1, keepdims=True))
    p = xp.exp(log_p)
    surprise = xp.where(p > 0, log_p, 0)  # a score of -inf: 0·ln 0 is 0, its limit
    y = -(p * surprise).sum(-1)
    return y, lambda dy: p * (surprise + y[..., None]) * -dy[..., None]
