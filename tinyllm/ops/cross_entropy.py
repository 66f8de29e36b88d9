"""Cross-entropy of the next token: the loss that language models are trained with.

For one row of scores z over the vocabulary and the true token t, with lse = ln Σ eᶻ,

    -ln p(t) = lse - z_t

and, with label smoothing ε (the target is 1-ε on t plus ε spread over all V) and the z-loss ζ (keeps lse near 0):

    l = lse - (1-ε)·z_t - ε·mean(z) + ζ·lse²

Backward.  ∂lse/∂z = p, so      dl/dz = (1 + 2ζ·lse)·p - (1-ε)·[t] - ε/V             [t] is 1 at the true token
The loss is the weighted mean over rows, Σ wᵢlᵢ / Σ wᵢ. A row whose target is `ignore_index` has weight 0. Where every row does, the
loss and its gradient are 0, and a RuntimeWarning says so.
Sources: Szegedy et al. 2016 (label smoothing); de Brébisson & Vincent 2016 and Chowdhery et al. 2022 (z-loss).
"""
import sys
import warnings

from tinyllm.backend import array_module, on_host
from tinyllm.ops.embedding import check_ids
from tinyllm.tensor import op


@op
def cross_entropy(logits, targets, weights=None, *, ignore_index=-1, label_smoothing=0.0, z_loss=0.0):
    """Mean cross-entropy of scores against token ids.     (..., V), (...) int, (...) float or None -> ()"""
    z = logits.reshape(-1, logits.shape[-1])
    t, share = targets_and_shares(targets, weights, ignore_index, z, z.shape[1])
    losses, top, total = _row_losses(z, t, label_smoothing, z_loss)

    def backward(dy):
        return _row_gradient(z, t, top, total, share * dy, label_smoothing, z_loss).reshape(logits.shape), None, None

    return _total(losses, share), backward


@op
def linear_cross_entropy(x, w, targets, weights=None, *, ignore_index=-1, label_smoothing=0.0, z_loss=0.0, rows=None):
    """cross_entropy(x·wᵀ, targets), without ever holding all scores.     (..., C), (V, C), (...) int, (...) or None -> ()

    At V = 50,000 the scores of a batch are far larger than all else in the model together. Here they exist for `rows` rows at a time
    (by default about 4 million scores), once in the forward, which keeps two numbers a row, and once more in the backward.

    Backward.  With dz as in cross_entropy, slice by slice:      dx = dz·w      dw = Σ dzᵀ·x
    """
    xp = array_module(x)
    flat = x.reshape(-1, x.shape[-1])
    t, share = targets_and_shares(targets, weights, ignore_index, flat, w.shape[0])
    step = rows or max(1, 2**22 // w.shape[0])
    slices = [slice(i, i + step) for i in range(0, len(flat), step)]
    parts = [_row_losses(flat[s] @ w.T, t[s], label_smoothing, z_loss) for s in slices]
    kept = [part[1:] for part in parts]
    loss = _total(xp.concatenate([part[0] for part in parts]), share) if parts else share.sum()

    def backward(dy):
        dx, dw = xp.empty_like(flat), xp.zeros_like(w)
        for s, (top, total) in zip(slices, kept, strict=True):
            dz = _row_gradient(flat[s] @ w.T, t[s], top, total, share[s] * dy, label_smoothing, z_loss)
            dx[s] = dz @ w
            dw += dz.T @ flat[s]
            del dz  # before the next slice's scores are made
        return dx.reshape(x.shape), dw, None, None

    return loss, backward


@op
def linear_log_probabilities(x, w, targets, *, ignore_index=-1, rows=None):
    """ln p(t) of each token by itself, from hidden vectors; 0 where the target is ignored.     (..., C), (V, C), (...) int -> (...)

    Minus the row losses of `linear_cross_entropy`, before they are averaged: what is learnt from answers needs each one's. Only rows whose
    target counts are scored; in a batch of prompts with short answers these are few.
    """
    xp = array_module(x)
    flat, t = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    counted = array_module(t).flatnonzero(t != ignore_index)
    t = t[counted]
    check_ids(t, w.shape[0], f"log-probabilities (ignored targets are {ignore_index})")
    counted, t = xp.asarray(counted), xp.asarray(t)
    kept, step = flat[counted], rows or max(1, 2**22 // w.shape[0])
    slices = [slice(i, i + step) for i in range(0, len(kept), step)]
    parts = [_row_losses(kept[s] @ w.T, t[s], 0.0, 0.0) for s in slices]
    y = xp.zeros(flat.shape[0], dtype=x.dtype)
    for s, (losses, _, _) in zip(slices, parts, strict=True):
        y[counted[s]] = -losses

    def backward(dy):
        dx, dw = xp.zeros_like(flat), xp.zeros_like(w)
        weights = -dy.reshape(-1)[counted]
        for s, (_, top, total) in zip(slices, parts, strict=True):
            dz = _row_gradient(kept[s] @ w.T, t[s], top, total, weights[s], 0.0, 0.0)
            dx[counted[s]] = dz @ w
            dw += dz.T @ kept[s]
        return dx.reshape(x.shape), dw, None

    return y.reshape(targets.shape), backward


def targets_and_shares(targets, weights, ignore_index, like, vocabulary):
    """Targets as a flat array with 0 in place of ignored ones, and each row's share of the mean (0 where ignored), beside `like`.

    Targets on a GPU make the host wait, which checks them; from the host they are checked there and moved. Weights on a GPU are not
    looked at: nobody warns where they are all 0.
    """
    xp = array_module(like)
    targets = targets.reshape(-1)
    counted = targets != ignore_index
    share = counted.astype(like.dtype)
    if weights is not None:
        weights = weights.reshape(-1)
        if array_module(weights) is not array_module(share):
            share, weights = xp.asarray(share), xp.asarray(weights)
        share *= weights
    targets = array_module(targets).where(counted, targets, 0)
    check_ids(targets, vocabulary, f"cross-entropy (ignored targets are {ignore_index})")
    total = share.sum()
    if not on_host(total):
        return xp.asarray(targets), share / xp.where(total == 0, 1, total)
    if total == 0:
        warnings.warn("cross-entropy: every target is ignored or has weight 0, so loss and gradient are 0", RuntimeWarning, _outside())
        return xp.asarray(targets), xp.asarray(share)
    return xp.asarray(targets), xp.asarray(share / total)


def _outside() -> int:
    """The stack level at which a warning of the caller's names who called this package."""
    level = 1
    while sys._getframe(level).f_globals["__name__"].startswith("tinyllm."):
        level += 1
    return level


def _total(losses, share):
    """Σ share·loss, where what counts nothing may be anything: an ignored row's loss can be infinite, and 0·inf is NaN."""
    return (array_module(losses).where(share == 0, 0, losses) * share).sum()


def _row_losses(z, t, label_smoothing, z_loss):
    """The loss of each row, and what its lse is made of: max z and Σ e^(z - max z).     (N, V), (N,) -> (N,), (N,), (N,)

    All is counted from the maximum: then e^z cannot overflow, and where scores are large no digits are lost in lse - z_t.
    """
    xp = array_module(z)
    top = z.max(-1)
    total = xp.exp(z - top[:, None]).sum(-1)
    losses = xp.log(total) - (1 - label_smoothing) * (z[xp.arange(len(t)), t] - top)
    if label_smoothing:
        losses -= label_smoothing * (z.mean(-1) - top)
    if z_loss:
        losses += z_loss * (top + xp.log(total)) ** 2
    return losses, top, total


def _row_gradient(z, t, top, total, weight, label_smoothing, z_loss):
    """weight·dl/dz of each row.     (N, V), (N,) ×4 -> (N, V)"""
    xp = array_module(z)
    scale = weight / total
    if z_loss:
        scale = scale * (1 + 2 * z_loss * (top + xp.log(total)))
    dz = xp.exp(z - top[:, None])
    dz *= scale[:, None]
    dz[xp.arange(len(t)), t] -= (1 - label_smoothing) * weight
    if label_smoothing:
        dz -= (label_smoothing / z.shape[1] * weight)[:, None]
    return dz
