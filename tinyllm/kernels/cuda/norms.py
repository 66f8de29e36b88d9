"""LayerNorm and RMSNorm on the GPU: a row is read once, and normalised in registers; see norms.cu."""
from tinyllm import ops
from tinyllm.backend import array_module
from tinyllm.kernels import attach
from tinyllm.kernels.cuda.launch import FORMATS, format_of, launch
from tinyllm.kernels.cuda.sums import add_parts
from tinyllm.kernels.cuda.vectors import widest

NARROW = 1024  # numbers in a row that one warp keeps in registers, with as many sums for dw and db
WIDEST = 8192  # in a row that a block keeps
BLOCKS = 396  # of the backward, see norms.cu


@attach(ops.layernorm, "cuda")
def layernorm(x, w=None, b=None, *, eps=1e-5):
    """`ops.layernorm`."""
    return _norm(x, w, b, eps, centre=True)


@attach(ops.rmsnorm, "cuda")
def rmsnorm(x, w=None, *, eps=1e-6):
    """`ops.rmsnorm`."""
    result = _norm(x, w, None, eps, centre=False)
    return result if result is NotImplemented else (result[0], lambda dy: result[1](dy)[:2])


def _norm(x, w, b, eps, centre):
    if x.dtype.name not in FORMATS or not 0 < x.shape[-1] <= WIDEST or any(p is not None and p.dtype.name != "float32" for p in (w, b)):
        return NotImplemented
    xp, shape = array_module(x), x.shape
    rows = xp.ascontiguousarray(x).reshape(-1, shape[-1])
    y, statistics = forward(rows, w, b, eps, centre)

    def gradient(dy):
        dx, dw, db = backward(xp.ascontiguousarray(dy).reshape(rows.shape), rows, statistics, w, centre)
        return dx.reshape(shape), dw, db

    return y.reshape(shape), gradient


def forward(x, w, b, eps, centre, plus=None):
    """y = norm(x), and (mean, r) of each row; with `plus`, y = norm(s) and s = x + plus as well.

    (N, C), (C,) or None, (C,) or None -> (N, C), (N, 2) fp32[, (N, C)]          centre : LayerNorm; RMSNorm does not take the mean off
    """
    xp, rows = array_module(x), len(x)
    y, statistics, s = xp.empty_like(x), xp.empty((rows, 2), xp.float32), None if plus is None else xp.empty_like(x)
    macros = _macros(x, centre, y, w, b, plus, s)
    teams, threads = _block(macros)
    if rows:
        launch(xp, "norms", "norm_forward", (-(-rows // teams),), threads, x, plus, w, b, s, y, statistics, rows, float(eps), **macros)
    return (y, statistics) if plus is None else (y, statistics, s)


def backward(dy, x, statistics, w, centre, plus=None):
    """dx, plus an array of its shape where one is given, dw (None without w), db (None without `centre`).

    (N, C), (N, C), (N, 2), (C,) or None -> (N, C), (C,) fp32, (C,) fp32
    """
    xp, (rows, width) = array_module(x), x.shape
    dx = xp.empty_like(x)
    macros = _macros(x, centre, dy, w, plus, dx)
    teams, threads = _block(macros)
    parts = xp.empty((min(BLOCKS, -(-rows // teams)), 1 + centre, width), xp.float32)
    if rows:
        launch(xp, "norms", "norm_backward", (len(parts),), threads, dy, x, statistics, w, plus, dx, parts, rows, **macros)
    sums = add_parts(parts)
    return dx, None if w is None else sums[0], sums[1] if centre else None


def _macros(x, centre, *others) -> dict:
    width = x.shape[1]
    vec = widest(width, x, *others)
    while vec > 1 and width // vec < 32:  # a narrow row: rather shorter vectors than threads without any
        vec //= 2
    warps = 1 if width <= NARROW else min(32, -(-width // (32 * vec)))
    return dict(WIDTH=width, VEC=vec, WARPS=warps, CENTRE=int(centre), FORMAT=format_of(x))


def _block(macros) -> tuple[int, int]:
    """Rows that a block works on at a time, and its threads."""
    teams = 4 if macros["WARPS"] == 1 else 1
    return teams, 32 * macros["WARPS"] * teams
