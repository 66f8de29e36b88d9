"""Products of matrices through cuBLASLt: on tensor cores in fp16 and bf16 (sums in fp32), in plain fp32 otherwise.

What is decided here is what to ask for, so that nothing moves through memory that need not: transposed and strided views are read where
they lie, biases and GELU are applied while a product leaves the registers, and a weight's gradient is added to the one that is there
(beta = 1), in fp32 from 16-bit factors. In 16 bits that spares, counted, not yet measured:

    bias in the product's epilogue       4 bytes for each number of its result (not read and written once more)
    GELU and its derivative likewise     2 and 4 bytes
    dw added where it belongs            8 bytes for each weight and micro-batch

For GPT-2 124M the first two are 0.55 MB a token, predicted 0.13 µs of about 2 at 4.3 TB/s.
"""
from itertools import pairwise

import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module, is_half
from tinyllm.kernels import attach
from tinyllm.kernels.cuda import cublaslt
from tinyllm.kernels.cuda.activations import gelu_backward, gelu_forward
from tinyllm.kernels.cuda.sums import column_sums
from tinyllm.tensor import Into

# Compute capabilities where the library's product kernels have GELU in them: Hopper, and Blackwell in data centres. Elsewhere it runs a
# kernel of its own after the product, which others measured to be slower than one of theirs (github.com/karpathy/llm.c, pull requests
# 338, 591 and 653; github.com/sgl-project/sglang, 34350). Only in 16 bits: how exact its tanh is, is not documented.
FUSES_GELU = range(90, 120)


@attach(ops.linear, "cuda")
def linear(x, w, b=None):
    """`ops.linear`. fp32 weights for a 16-bit x are rounded once and kept so for the backward: the library multiplies only what is of one
    format, and reads half the bytes."""
    if not _are_ours(x, w, b):
        return NotImplemented
    rows, w = _of_one_format(x.reshape(-1, x.shape[-1]), w)
    y, shape = linear_forward(rows, w, b), x.shape

    def backward(dy):
        dy = dy.reshape(-1, dy.shape[-1])
        return (lambda: times(dy, w).reshape(shape)), weight_gradient(dy, rows), (lambda: column_sums(dy))

    return y.reshape(*shape[:-1], len(w)), backward


@attach(ops.matmul, "cuda")
def matmul(a, b):
    """`ops.matmul`."""
    if not _are_ours(a, b):
        return NotImplemented
    a2, b2 = _of_one_format(a[None, :] if a.ndim == 1 else a, b[:, None] if b.ndim == 1 else b)
    y2 = times(a2, b2)
    y = y2[..., 0, :] if a.ndim == 1 else y2
    y = y[..., 0] if b.ndim == 1 else y
    shape, is_vector = y2.shape, b.ndim == 1

    def backward(dy):
        dy = dy.reshape(shape)

        def db():
            db2 = _gradient(a2.swapaxes(-1, -2), dy, b2)
            return db2[..., 0] if is_vector else db2

        return lambda: _gradient(dy, b2.swapaxes(-1, -2), a2), db

    return y, backward


def _gradient(a, b, of):
    """a·b, the gradient of the factor `of`: in fp32 where that was broadcast, since the engine will sum over the copies."""
    return times(a, b, dtype=None if _batch(a, b) == of.shape[:-2] else np.float32)


def linear_forward(x, w, bias=None, out=None):
    """x·wᵀ + bias.     (N, K), (M, K), (M,) -> (N, M)          Formats as in `times`; the bias is rounded to the result's."""
    x, w = _of_one_format(x, w)
    out = _result(x, w.T, out)
    if bias is None:
        return times(x, w.T, out)
    bias = _rounded(bias, out.dtype)
    if not _with_epilogue(x, w.T, out, cublaslt.BIAS, bias):
        times(x, w.T, out)
        out += bias
    return out


def gelu_linear(x, w, bias=None):
    """gelu_tanh(x·wᵀ + bias), and what GELU was applied to.     (N, K), (F, K), (F,) -> (N, F) twice"""
    x, w = _of_one_format(x, w)
    pre = _result(x, w.T)
    if _fuses_gelu(x):
        active, bias = _result(x, w.T), None if bias is None else _rounded(bias, x.dtype)
        if _with_epilogue(x, w.T, active, cublaslt.GELU_AUX if bias is None else cublaslt.GELU_AUX_BIAS, bias, pre):
            return active, pre
    return gelu_forward(linear_forward(x, w, bias, pre)), pre


def gelu_backward_times(dy, w, pre):
    """(dy·w)·gelu_tanh'(pre): through the linear map of weights w back into GELU's input.     (N, C), (C, F), (N, F) -> (N, F)"""
    dy, w = _of_one_format(dy, w)
    d_pre = _result(dy, w)
    if not _fuses_gelu(dy) or not _with_epilogue(dy, w, d_pre, cublaslt.DGELU, aux=pre):
        d_pre = gelu_backward(pre, times(dy, w, d_pre))
    return d_pre


def weight_gradient(dy, x) -> Into:
    """dw = dyᵀ·x, for `linear` of x with w, written or added where it belongs.     (N, M), (N, K) -> (M, K)"""
    return Into(lambda out: times(dy.T, x, out), lambda out: times(dy.T, x, out, beta=1.0))


def times(a, b, out=None, *, dtype=None, alpha: float = 1.0, beta: float = 0.0):
    """alpha·a·b + beta·out, over the last two axes as in `a @ b`, leading axes broadcast.     (..., n, k), (..., k, m) -> (..., n, m)

    a, b : at least 2-D, fp32, fp16 or bf16, with any strides. An fp32 one beside one of 16 bits is rounded to the other's format.
    out : where to put it, in the operands' format or fp32; by default a new array of `dtype`, by default in the operands' format.

    Sums are in fp32 throughout. Operands are copied only where no leading dimension tells how they lie: neither rows nor columns
    contiguous, or leading axes that are not evenly apart (heads between positions, say).
    Raises ValueError where shapes do not fit, TypeError for other formats.
    """
    a, b = _of_one_format(a, b)
    out = _result(a, b, out, dtype)
    if not out.size:
        return out
    if not a.shape[-1]:  # a sum of nothing
        out[...] = out * beta if beta else 0
        return out
    a2, b2, out2 = _as_stacks(a, b, out)
    target = cublaslt.matrix(out2)
    if target is None or out2.data.ptr != out.data.ptr:  # no leading dimension tells how out lies
        xp = array_module(out)
        out[...] = times(a, b, xp.ascontiguousarray(out) if beta else xp.empty(out.shape, dtype=out.dtype), alpha=alpha, beta=beta)
        return out
    if target.transposed:  # outᵀ = bᵀ·aᵀ
        a2, b2, out2 = (x.swapaxes(-1, -2) for x in (b2, a2, out2))
    if not cublaslt.matmul(a2, b2, out2, alpha=alpha, beta=beta):
        raise cublaslt.CublasLtError(f"cuBLASLt has no algorithm for the product of {a.shape} and {b.shape} in {a.dtype}")
    return out


def _with_epilogue(a, b, out, epilogue, bias=None, aux=None) -> bool:
    """out = epilogue(a·b) for matrices; False, with nothing done, where the library cannot: it wants out by rows, aux in rows that are
    a multiple of 8 numbers apart, and may lack an algorithm."""
    target = cublaslt.matrix(out) if out.size and a.shape[-1] else None
    if target is None or target.transposed or (aux is not None and (aux.strides[1] != aux.itemsize or aux.strides[0] % (8 * aux.itemsize))):
        return False
    return cublaslt.matmul(a, b, out, epilogue=epilogue, bias=bias, aux=aux)


def _fuses_gelu(x) -> bool:
    return is_half(x) and int(array_module(x).cuda.Device().compute_capability) in FUSES_GELU


def _are_ours(*arrays) -> bool:
    return all(x is None or (x.ndim and x.dtype.name in cublaslt.FORMATS) for x in arrays)


def _of_one_format(a, b):
    """a and b in the format of the first of them that has 16 bits; as they are where that is one already."""
    if a.dtype == b.dtype:
        return a, b
    if not _are_ours(a, b):
        raise TypeError(f"a product of {a.dtype} and {b.dtype}: use fp32, fp16 or bf16")
    dtype = b.dtype if is_half(b) and not is_half(a) else a.dtype
    return _rounded(a, dtype), _rounded(b, dtype)


def _rounded(x, dtype):
    return x if x.dtype == dtype else x.astype(dtype)


def _result(a, b, out=None, dtype=None):
    """Where a·b goes: out, or a new array. Raises ValueError and TypeError, as `times` says."""
    shape = (*_batch(a, b), a.shape[-2], b.shape[-1])
    if a.shape[-1] != b.shape[-2] or (out is not None and out.shape != shape):
        into = "" if out is None else f" into {out.shape}"
        raise ValueError(f"a product of {a.shape} and {b.shape}{into}: the first's columns must be the second's rows, the rest alike")
    out = array_module(a).empty(shape, dtype=dtype or a.dtype) if out is None else out
    if not _are_ours(a) or out.dtype not in (a.dtype, np.float32):
        raise TypeError(f"a product of {a.dtype} into {out.dtype}: use fp32, fp16 or bf16, and for the result the same or fp32")
    return out


def _batch(a, b) -> tuple[int, ...]:
    """The leading axes of a·b."""
    return () if a.ndim == b.ndim == 2 else np.broadcast_shapes(a.shape[:-2], b.shape[:-2])


def _as_stacks(a, b, out):
    """The same product as one of matrices (2-D) or of equally many (3-D), which is what the library knows. Out's may be a copy."""
    if out.ndim == 2:
        return a, b, out
    if b.ndim == 2 and _is_one_axis(a) and _is_one_axis(out):  # one product of many rows
        return a.reshape(-1, a.shape[-1]), b, out.reshape(-1, out.shape[-1])
    xp, batch = array_module(a), out.shape[:-2]
    return tuple(xp.broadcast_to(x, (*batch, *x.shape[-2:])).reshape(-1, *x.shape[-2:]) for x in (a, b, out))


def _is_one_axis(x) -> bool:
    """Whether all axes but the last, walked in order, step through memory evenly, and so can be one axis."""
    steps = [(n, step) for n, step in zip(x.shape[:-1], x.strides[:-1], strict=True) if n != 1]
    return all(outer == n * inner for (_, outer), (n, inner) in pairwise(steps))
