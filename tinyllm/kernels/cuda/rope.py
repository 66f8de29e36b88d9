"""RoPE on the GPU, for heads that lie anywhere in memory; see rope.cu."""
import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module
from tinyllm.kernels import attach
from tinyllm.kernels.cuda.launch import FORMATS, format_of, launch
from tinyllm.kernels.cuda.vectors import widest

THREADS = 256  # at most in a block


@attach(ops.rope, "cuda")
def rope(x, cos, sin, *, interleaved=False):
    """`ops.rope`; cos and sin in fp32."""
    if x.dtype.name not in FORMATS or not 2 <= x.ndim <= 4 or cos.dtype.name != "float32" or sin.dtype.name != "float32":
        return NotImplemented
    if 2 * cos.shape[-1] != x.shape[-1] or cos.ndim > x.ndim:
        return NotImplemented

    def turned(x, direction):
        return turn(x[(None,) * (4 - x.ndim)], cos, sin, direction, interleaved).reshape(x.shape)

    return turned(x, 1), lambda dy: (turned(dy, -1), None, None)


def turn(x, cos, sin, direction=1, interleaved=False, out=None):
    """Each pair of components turned by its angle, with direction -1 turned back; written to `out`, which may be x.

    x (B, H, T, D), of any strides but along D; cos, sin (T, D/2) or what broadcasts to (B, H, T, D/2), fp32 -> (B, H, T, D) lying as x
    """
    xp, (rows, heads, positions, width) = array_module(x), x.shape
    if x.strides[-1] != x.itemsize or 0 in x.strides:  # the latter: a gradient spread over an axis, which empty_like might put innermost
        x = xp.ascontiguousarray(x)
    out = xp.empty_like(x) if out is None else out
    if out.strides[-1] != out.itemsize:
        raise ValueError(f"rope.turn writes heads whose components lie side by side; out has the strides {out.strides}")
    if not x.size:
        return out
    cos, sin = (xp.broadcast_to(xp.ascontiguousarray(angles), (*x.shape[:3], width // 2)) for angles in (cos, sin))
    vec = widest(width // 2, x, out, cos, sin)
    strides = [np.int64(step // a.itemsize) for a in (x, out, cos) for step in (a.strides[0], a.strides[1], a.strides[2])]
    threads = min(THREADS, -(-heads * (width // 2 // vec) // 32) * 32)
    launch(
        xp, "rope", "turn", (rows * positions,), threads, None if x is out else x, out, cos, sin, heads, positions, float(direction), *strides,
        FORMAT=format_of(x), WIDTH=width, VEC=vec, INTERLEAVED=int(interleaved),
    )  # fmt: skip
    return out
