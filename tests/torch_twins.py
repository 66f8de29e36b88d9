"""Every op of the table, once more in PyTorch: the second witness for forward and backward.

A twin takes a case's arguments (floating-point ones as float64 torch tensors) and settings, and returns one torch tensor. It leans on
PyTorch's own function wherever there is one; attention's masks are written out position by position, straight from the definition.
"""
import numpy as np
import torch
import torch.nn.functional as F

from tinyllm.tensor import Tensor


def attention(q, k, v, padding=None, documents=None, slopes=None, *, causal=True, window=None, offset=0, softcap=None, scale=None, block=None):
    bias = torch.tensor(_attention_bias(q.shape, k.shape, padding, documents, slopes, causal, window, offset))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.softmax(softcap * torch.tanh(scores / softcap) + bias, -1) @ v


def _attention_bias(q_shape, k_shape, padding, documents, slopes, causal, window, offset):
    """What is added to the score of each (batch, head, query, key): one at a time."""
    B, H, T, _ = q_shape
    S = k_shape[2]
    bias = np.zeros((B, H, T, S))
    for b, h, t, s in np.ndindex(B, H, T, S):
        position = t + offset
        hidden = (causal and s > position) or (window is not None and abs(position - s) >= window)
        hidden = hidden or (padding is not None and not padding[b, s])
        hidden = hidden or (documents is not None and documents[b, position] != documents[b, s])
        bias[b, h, t, s] = -np.inf if hidden else 0.0 if slopes is None else -float(slopes[h]) * abs(position - s)
    return bias


def cross_entropy(logits, targets, weights=None, *, label_smoothing=0.0, z_loss=0.0):
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).long()
    weights = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights.reshape(-1)
    weights = weights * (targets != -1)
    rows = F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=label_smoothing, reduction="none")
    rows = rows + z_loss * torch.logsumexp(logits, -1) ** 2
    return (rows * weights).sum() / weights.sum()


def linear_cross_entropy(x, w, targets, weights=None, *, rows=None, **settings):
    return cross_entropy(x @ w.T, targets, weights, **settings)


def layernorm(x, w=None, b=None, *, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], w, b, eps)


def rmsnorm(x, w=None, *, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], w, eps)


def rope(x, cos, sin, *, interleaved=False):
    """Each pair as one complex number, turned by multiplying with cos + i·sin."""
    pairs = x.reshape(*x.shape[:-1], -1, 2) if interleaved else torch.stack(x.chunk(2, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    return turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)


def dropout(x, *, rate, rng):
    return x * torch.tensor(rng.random(tuple(x.shape), dtype="float32") >= rate) / (1 - rate)


def _over_axis(function):
    return lambda x, *, axis=None, keepdims=False: function(x, tuple(range(x.ndim)) if axis is None else axis, keepdims)


def _var(x, *, axis=None, keepdims=False, correction=0):
    return torch.var(x, axis, correction=correction, keepdim=keepdims)


def _pad(x, *, widths, value=0.0):
    return F.pad(x, [n for pair in reversed(widths) for n in pair], value=value)


def _number(a, b, function):
    """torch's maximum takes no Python number."""
    return function(a, b if isinstance(b, torch.Tensor) else torch.tensor(b, dtype=a.dtype))


def linear_log_probabilities(x, w, targets, *, rows=None):
    log_p = torch.log_softmax(x @ w.T, -1).gather(-1, targets.long().clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == -1, 0.0, log_p)


def _mean(losses, weights=None):
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()


def dpo(chosen, rejected, reference_chosen, reference_rejected, weights=None, *, beta=0.1, label_smoothing=0.0):
    """As the authors' code has it."""
    logits = (chosen - rejected) - (reference_chosen - reference_rejected)
    losses = -F.logsigmoid(beta * logits) * (1 - label_smoothing) - F.logsigmoid(-beta * logits) * label_smoothing
    return _mean(losses, weights)


def ipo(chosen, rejected, reference_chosen, reference_rejected, weights=None, *, beta=0.1):
    return _mean(((chosen - rejected) - (reference_chosen - reference_rejected) - 1 / (2 * beta)) ** 2, weights)


def orpo(chosen, rejected, weights=None, *, strength=0.1):
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return _mean(-chosen - strength * F.logsigmoid(odds), weights)


def kto(log_p, reference_log_p, desirable, baseline, weights=None, *, beta=0.1):
    gain = log_p - reference_log_p - baseline
    return _mean(torch.where(torch.as_tensor(desirable), 1 - torch.sigmoid(beta * gain), 1 - torch.sigmoid(-beta * gain)), weights)


def clipped_policy_loss(log_p, old_log_p, advantages, weights=None, *, low=0.2, high=0.2):
    ratio = torch.exp(log_p - old_log_p)
    return _mean(torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - low, 1 + high)), weights)


def clipped_value_loss(values, old_values, returns, weights=None, *, clip=0.2):
    held = torch.maximum(torch.minimum(values, old_values + clip), old_values - clip)
    return 0.5 * _mean(torch.maximum((values - returns) ** 2, (held - returns) ** 2), weights)


def kl_estimate(log_p, reference_log_p, weights=None, *, estimator="k3"):
    """Schulman's: with log r = ln ρ - ln π."""
    log_r = reference_log_p - log_p
    return _mean({"k1": -log_r, "k2": log_r**2 / 2, "k3": (torch.exp(log_r) - 1) - log_r}[estimator], weights)


TWINS = {
    "linear_log_probabilities": linear_log_probabilities,
    "bradley_terry": lambda chosen, rejected, weights=None, *, margin=0.0: _mean(-F.logsigmoid(chosen - rejected - margin), weights),
    "dpo": dpo,
    "ipo": ipo,
    "simpo": lambda chosen, rejected, weights=None, *, beta=2.0, gamma=1.0: _mean(-F.logsigmoid(beta * (chosen - rejected) - gamma), weights),
    "orpo": orpo,
    "kto": kto,
    "policy_gradient": lambda log_p, advantages, weights=None: -_mean(advantages * log_p, weights),
    "clipped_policy_loss": clipped_policy_loss,
    "clipped_value_loss": clipped_value_loss,
    "kl_estimate": kl_estimate,
    "entropy": lambda logits: torch.distributions.Categorical(logits=logits).entropy(),
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "pow": lambda x, *, exponent: torch.pow(x, exponent),
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "abs": torch.abs,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "erf": torch.erf,
    "maximum": lambda a, b: _number(a, b, torch.maximum),
    "minimum": lambda a, b: _number(a, b, torch.minimum),
    "where": torch.where,
    "clip": lambda x, *, low, high: torch.clamp(x, low, high),
    "masked_fill": lambda x, mask, *, value: x.masked_fill(mask, value),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "sum": _over_axis(torch.sum),
    "mean": _over_axis(torch.mean),
    "max": _over_axis(torch.amax),
    "min": _over_axis(torch.amin),
    "var": _var,
    "logsumexp": lambda x, *, axis=-1, keepdims=False: torch.logsumexp(x, axis, keepdims),
    "reshape": lambda x, *, shape: x.reshape(shape),
    "transpose": lambda x, *, axes=None: x.permute(axes or tuple(reversed(range(x.ndim)))),
    "swapaxes": lambda x, *, first, second: x.swapaxes(first, second),
    "expand": lambda x, *, shape: x.expand(shape),
    "concatenate": lambda *xs, axis=0: torch.cat(xs, axis),
    "stack": lambda *xs, axis=0: torch.stack(xs, axis),
    "getitem": lambda x, *, index: x[index],
    "gather": lambda x, index, *, axis=-1: torch.gather(x, axis, index.long()),
    "pad": _pad,
    "matmul": torch.matmul,
    "linear": F.linear,
    "einsum": lambda *xs, subscripts: torch.einsum(subscripts, *xs),
    "layernorm": layernorm,
    "rmsnorm": rmsnorm,
    "softmax": lambda x, *, axis=-1: torch.softmax(x, axis),
    "log_softmax": lambda x, *, axis=-1: torch.log_softmax(x, axis),
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
    "mse": F.mse_loss,
    "kl_divergence": lambda log_p, log_q: F.kl_div(log_q, log_p, log_target=True, reduction="sum") / (log_p.numel() // log_p.shape[-1]),
    "embedding": lambda w, ids: F.embedding(ids.long(), w),
    "rope": rope,
    "dropout": dropout,
    "cast": lambda x, *, precision: x.to({"fp32": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]).to(x.dtype),
    "attention": attention,
    "tiled_attention": attention,
}


def values_and_gradients(case) -> list[np.ndarray]:
    """[y, gradient of each differentiated argument …] of a case, by PyTorch in float64."""
    arguments = [_to_torch(x) for x in case.arrays()]
    settings = {name: value() if callable(value) else value for name, value in case.settings.items()}
    y = TWINS[case.op](*arguments, **settings)
    wanted = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    y.backward(torch.tensor(case.upstream(tuple(y.shape))))
    return [x.detach().numpy() for x in (y, *(x.grad for x in wanted))]


def _to_torch(x):
    """Arrays of a case are differentiated, its Tensors are constants, as gradcheck takes them."""
    if isinstance(x, Tensor):
        return torch.tensor(x.data)
    return torch.tensor(x, requires_grad=x.dtype.kind == "f") if isinstance(x, np.ndarray) else x
