"""The math: every op with its formula, its derivative and its code side by side. Reading order:

elementwise, erf     one number at a time          reduce      sums, means, maxima           shape     moving numbers
linear               matrix products               activations GELU, SwiGLU, …               norm      LayerNorm, RMSNorm
softmax              scores to probabilities       cross_entropy, losses                     embedding, positions
attention            by definition                 tiled_attention  with memory linear in T  dropout, cast
preference           an answer preferred to another          policy      tokens that earned a reward
cases                the table of arguments with which every op is checked

Importing this package gives Tensor its operators and methods.
"""
from tinyllm.ops.activations import geglu, gelu, gelu_tanh, relu, relu2, silu, swiglu
from tinyllm.ops.attention import attention, visible
from tinyllm.ops.cast import cast
from tinyllm.ops.cross_entropy import cross_entropy, linear_cross_entropy, linear_log_probabilities
from tinyllm.ops.dropout import dropout
from tinyllm.ops.elementwise import (
    abs,
    add,
    clip,
    div,
    exp,
    log,
    masked_fill,
    maximum,
    minimum,
    mul,
    neg,
    pow,
    sigmoid,
    sqrt,
    sub,
    tanh,
    where,
)
from tinyllm.ops.embedding import embedding
from tinyllm.ops.erf import erf
from tinyllm.ops.linear import einsum, linear, matmul
from tinyllm.ops.losses import binary_cross_entropy, kl_divergence, mse
from tinyllm.ops.norm import layernorm, rmsnorm
from tinyllm.ops.policy import KL_ESTIMATORS, clipped_policy_loss, clipped_value_loss, entropy, kl_estimate, policy_gradient
from tinyllm.ops.positions import (
    RopeScaling,
    alibi_slopes,
    rope,
    rope_frequencies,
    rope_table,
    sinusoidal_positions,
)
from tinyllm.ops.preference import bradley_terry, dpo, ipo, kto, orpo, simpo
from tinyllm.ops.reduce import logsumexp, max, mean, min, sum, var
from tinyllm.ops.shape import concatenate, expand, gather, getitem, pad, reshape, split, stack, swapaxes, transpose
from tinyllm.ops.softmax import log_softmax, softmax
from tinyllm.ops.tiled_attention import tiled_attention
from tinyllm.tensor import Tensor

Tensor.__add__, Tensor.__radd__ = add, lambda a, b: add(b, a)
Tensor.__sub__, Tensor.__rsub__ = sub, lambda a, b: sub(b, a)
Tensor.__mul__, Tensor.__rmul__ = mul, lambda a, b: mul(b, a)
Tensor.__truediv__, Tensor.__rtruediv__ = div, lambda a, b: div(b, a)
Tensor.__matmul__, Tensor.__rmatmul__ = matmul, lambda a, b: matmul(b, a)
Tensor.__neg__ = neg
Tensor.__pow__ = lambda x, exponent: pow(x, exponent=exponent)
Tensor.__getitem__ = lambda x, index: getitem(x, index=index)
Tensor.T = property(transpose)
Tensor.reshape = lambda x, *shape: reshape(x, shape=shape[0] if isinstance(shape[0], tuple) else shape)
Tensor.transpose = lambda x, *axes: transpose(x, axes=axes or None)
Tensor.swapaxes = lambda x, first, second: swapaxes(x, first=first, second=second)
Tensor.sum = lambda x, axis=None, keepdims=False: sum(x, axis=axis, keepdims=keepdims)
Tensor.mean = lambda x, axis=None, keepdims=False: mean(x, axis=axis, keepdims=keepdims)
Tensor.max = lambda x, axis=None, keepdims=False: max(x, axis=axis, keepdims=keepdims)
Tensor.min = lambda x, axis=None, keepdims=False: min(x, axis=axis, keepdims=keepdims)
Tensor.var = lambda x, axis=None, keepdims=False: var(x, axis=axis, keepdims=keepdims)
for method in (exp, log, sqrt, tanh, sigmoid, abs):
    setattr(Tensor, method.__name__, method)
