"""Losses of preferences: an answer that was chosen and one that was rejected. One family: mean f(h) over pairs, h how far they are apart.

                    h                                                            f(h)
    bradley_terry   r_w - r_l - m                                                -ln σ(h)              r: rewards
    dpo             β·((ln π_w - ln ρ_w) - (ln π_l - ln ρ_l))                    -(1-ε)·ln σ(h) - ε·ln σ(-h)
    ipo                 (ln π_w - ln ρ_w) - (ln π_l - ln ρ_l)                    (h - 1/2β)²
    simpo           β·(ln π_w - ln π_l) - γ                    means per token   -ln σ(h)
    orpo            logit π_w - logit π_l                      means per token   -λ·ln σ(h) - ln π_w
    kto             ±β·(ln π - ln ρ - z)                       single answers    1 - σ(h)

w is chosen ("won"), l rejected ("lost"); π is the policy that learns, ρ the reference that it started from. All are arrays (B,), whole
answers' log-probabilities where nothing else is said. `weights` (B,) says how much each pair counts; without it all do alike.

Why DPO needs no reward model.  The policy that is best for E[r] - β·KL(π ‖ ρ) is π* = ρ·e^(r/β)/Z, so r = β·ln(π*/ρ) + β·ln Z: any
policy is the best one for some reward, known up to Z, which the difference of two answers to one prompt does not see. Bradley and
Terry's loss of that implicit reward is DPO's.
"""
from tinyllm.backend import array_module
from tinyllm.tensor import op


def _logistic(h):
    """-ln σ(h) = ln(1 + e⁻ʰ), with no exponent above 0, and its slope -σ(-h)."""
    xp = array_module(h)
    return xp.maximum(-h, 0) + xp.log1p(xp.exp(-xp.abs(h))), (xp.tanh(h * 0.5) - 1) * 0.5


def shares(like, weights=None):
    """How much each element counts in the mean: wᵢ/Σw, 1/n where no weights are given, and 0 where all are 0.     (...) -> (...)"""
    xp = array_module(like)
    weights = xp.ones_like(like) if weights is None else xp.asarray(weights, dtype=like.dtype)
    total = weights.sum()
    return weights / xp.where(total == 0, 1, total)


def _of_difference(losses, slopes, share, scale=1.0):
    """Σ share·f(h) for h = scale·(chosen - rejected) + …, and the backward for those two: the slope, and its opposite."""
    return (losses * share).sum(), lambda dy: ((g := slopes * share * (dy * scale)), -g)


@op
def bradley_terry(chosen, rejected, weights=None, *, margin=0.0):
    """-mean ln σ(r_w - r_l - margin): the chance that the answer of reward r_w is preferred is σ(r_w - r_l).     (B,), (B,) -> ()

    Backward.  dr_w = -σ(-h)/B      dr_l = -dr_w:      pairs that are ranked right by far pull no more
    Source: Bradley & Terry 1952; as a language model's reward, Ouyang et al. 2022, eq. 1.
    """
    y, backward = _of_difference(*_logistic(chosen - rejected - margin), shares(chosen, weights))
    return y, lambda dy: (*backward(dy), None)


@op
def dpo(chosen, rejected, reference_chosen, reference_rejected, weights=None, *, beta=0.1, label_smoothing=0.0):
    """-mean[(1-ε)·ln σ(h) + ε·ln σ(-h)],   h = β·((ln π_w - ln ρ_w) - (ln π_l - ln ρ_l)).     (B,) ×4 -> ()

    label_smoothing ε is the share of pairs that are taken to be labelled the wrong way round ("conservative DPO").
    Backward.  d ln π_w = β·f'(h)/B,   f'(h) = -(1-ε)·σ(-h) + ε·σ(h);   the others have it with the signs -, -, +.
    Source: Rafailov et al. 2023, eq. 7.
    """
    h = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    (right, slope), (wrong, other) = _logistic(h), _logistic(-h)
    losses, slopes = (1 - label_smoothing) * right + label_smoothing * wrong, (1 - label_smoothing) * slope - label_smoothing * other
    y, backward = _of_difference(losses, slopes, shares(chosen, weights), beta)
    return y, lambda dy: (*(pair := backward(dy)), *pair[::-1], None)


@op
def ipo(chosen, rejected, reference_chosen, reference_rejected, weights=None, *, beta=0.1):
    """mean (h - 1/2β)²,   h = (ln π_w - ln ρ_w) - (ln π_l - ln ρ_l).     (B,) ×4 -> ()

    DPO drives h to infinity where all agree on a pair; here it has a target, whatever the other pairs say.
    Backward.  d ln π_w = 2(h - 1/2β)/B, the others with the signs -, -, +.        Source: Azar et al. 2023, eq. 17 (β is its τ).
    """
    off = (chosen - reference_chosen) - (rejected - reference_rejected) - 1 / (2 * beta)
    y, backward = _of_difference(off * off, 2 * off, shares(chosen, weights))
    return y, lambda dy: (*(pair := backward(dy)), *pair[::-1], None)


@op
def simpo(chosen, rejected, weights=None, *, beta=2.0, gamma=1.0):
    """-mean ln σ(β·(ln π_w - ln π_l) - γ), of means per token: no reference, and no reward for length.     (B,), (B,) -> ()

    Backward.  d ln π_w = -β·σ(-h)/B = -d ln π_l.        Source: Meng et al. 2024, eq. 6.
    """
    y, backward = _of_difference(*_logistic(beta * (chosen - rejected) - gamma), shares(chosen, weights), beta)
    return y, lambda dy: (*backward(dy), None)


@op
def orpo(chosen, rejected, weights=None, *, strength=0.1):
    """mean[-ln π_w - λ·ln σ(logit π_w - logit π_l)], of means per token: instruction tuning and preference in one.     (B,), (B,) -> ()

    With p = e^x, logit p = ln(p/(1-p)) = x - ln(1 - eˣ), whose derivative in x is 1/(1 - eˣ).
    Backward.  dx_w = (-1 - λ·σ(-h)/(1 - p_w))/B      dx_l = λ·σ(-h)/(1 - p_l)/B        Source: Hong et al. 2024, eq. 6-7 (λ = strength).
    """
    xp = array_module(chosen)
    left_chosen, left_rejected = -xp.expm1(chosen), -xp.expm1(rejected)  # 1 - p, exact where p is near 1
    losses, slopes = _logistic((chosen - xp.log(left_chosen)) - (rejected - xp.log(left_rejected)))
    share = shares(chosen, weights)
    pull = strength * slopes * share
    y = ((strength * losses - chosen) * share).sum()
    return y, lambda dy: (lambda: (pull / left_chosen - share) * dy, lambda: pull / left_rejected * -dy, None)


@op
def kto(log_p, reference_log_p, desirable, baseline, weights=None, *, beta=0.1):
    """mean(1 - σ(s·β·(ln π - ln ρ - z))), s = 1 for a desirable answer and -1 for another: no pairs needed.     (B,) ×3, () -> ()

    desirable : (B,) bool.     baseline z ≥ 0 : KL(π ‖ ρ) at present, what an answer gains or loses against; no gradient goes there.
    weights take the place of the paper's λ_D and λ_U.
    Backward.  d ln π = -s·β·σ(h)·σ(-h)/B = -d ln ρ.        Source: Ethayarajh et al. 2024, eq. 8.
    """
    xp = array_module(log_p)
    signs = xp.where(xp.asarray(desirable, dtype=bool), 1.0, -1.0).astype(log_p.dtype)
    half = xp.tanh(signs * beta * (log_p - reference_log_p - baseline) * 0.5)  # σ = (1 + half)/2
    share = shares(log_p, weights)
    slopes = signs * (-beta / 4) * (1 - half * half) * share
    return ((1 - half) * 0.5 * share).sum(), lambda dy: (lambda: slopes * dy, lambda: slopes * -dy, None, None, None)
