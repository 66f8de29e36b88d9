"""FlashAttention: attention.cu (forward) and attention_backward.cu, launched, for 16-bit numbers and heads 32, 64, 96 or 128 wide.

Causal or not, with a window, with grouped heads, any number of queries and keys, any offset between them. Kept for the backward are q, k,
v, o and one number a query. Documents that share rows are seen if they lie on the host, where it costs no waiting to make sure that each
is in one piece. fp32, other widths, padding, other documents, ALiBi and the soft cap go to the op.

Arrays are (B, H, T, D) with any strides: the kernels need each row of D numbers in one piece at an address that 16 divides, and a copy is
made of an array that has them otherwise. Results lie in memory as (B, T, H, D), so that merging the heads afterwards copies nothing.
"""
import math
from typing import NamedTuple

import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module, deterministic, is_half
from tinyllm.kernels import attach, packed
from tinyllm.kernels.cuda.launch import format_of, launch

THREADS, QUERY_ROWS, STRIP = 128, 128, 32  # as in attention_tiles.cuh and attention_backward.cu
FAR = 2**30  # positions: a band without an edge
CACHED = 16 * 2**20  # bytes that blocks which run side by side may read again and again: a third of an H200's L2 cache, 40 % of an A100's


class Tiles(NamedTuple):
    """How the work is cut for one head width: as much as 255 registers a thread and two blocks a multiprocessor leave room for.

    key_tile : keys that a block of the forward visits at a time     own : 16-key tiles that a warp of the backward owns
    query_tile : queries that it visits at a time
    """

    key_tile: int
    own: int
    query_tile: int

    @property
    def key_rows(self) -> int:
        """Keys that a block of the backward owns."""
        return self.own * 16 * THREADS // 32

    def forward_shared(self, width: int) -> int:
        """Bytes of shared memory of attention_forward: q, two tiles of k and v."""
        return 2 * width * (QUERY_ROWS + 4 * self.key_tile)

    def keys_shared(self, width: int) -> int:
        """Of attention_backward_keys: k, v; two tiles of q and do; ds; two tiles of two fp32 numbers a query."""
        return 2 * width * (2 * self.key_rows + 4 * self.query_tile) + 2 * self.key_rows * self.query_tile + 16 * self.query_tile

    def queries_shared(self, width: int) -> int:
        """Of attention_backward_queries: q, do, two strips of k and v."""
        return 2 * width * (2 * QUERY_ROWS + 4 * STRIP)


# By head width. Registers a thread of the forward, the backward over keys, the one over queries (NVRTC 13.5, sm_90; none is spilled):
# 32: 172, 200, 152     64: 215, 255, 195     96: 254, 235, 234     128: 248, 242, 254          with documents
# 32: 197, 200, 152     64: 227, 255, 194     96: 216, 230, 230     128: 248, 244, 255
TILES = {32: Tiles(64, 2, 64), 64: Tiles(64, 2, 64), 96: Tiles(64, 1, 64), 128: Tiles(32, 1, 32)}
TILES_OF_DOCUMENTS = TILES | {96: TILES[96]._replace(key_tile=32)}  # 64 keys, and where documents begin, are eight registers too many


def macros(format: str, width: int, documents: bool = False) -> dict:  # noqa: A002
    """The macros with which the kernels are compiled for a format ("FP16" or "BF16") and a head width.

    documents : whether several may share a row.
    """
    key_tile, own, query_tile = (TILES_OF_DOCUMENTS if documents else TILES)[width]
    return dict(FORMAT=format, HEAD_WIDTH=width, DOCUMENTS=int(documents), KEY_TILE=key_tile, OWN=own, QUERY_TILE=query_tile)


@attach(ops.attention, "cuda")
def attention(q, k, v, padding=None, documents=None, slopes=None, *, causal=True, window=None, offset=0, softcap=None, scale=None):
    """`ops.attention` of 16-bit arrays without further masks."""
    plain = padding is None and slopes is None and softcap is None
    return _differentiable(q, k, v, documents, causal, window, offset, scale) if plain else NotImplemented


@attach(ops.tiled_attention, "cuda")
def tiled_attention(
    q, k, v, padding=None, documents=None, slopes=None, *, causal=True, window=None, offset=0, softcap=None, scale=None, block=128
):
    """`ops.tiled_attention`, likewise; `block` is the kernel's own."""
    return attention(q, k, v, padding, documents, slopes, causal=causal, window=window, offset=offset, softcap=softcap, scale=scale)


def _differentiable(q, k, v, documents, causal, window, offset, scale):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    same = q.dtype == k.dtype == v.dtype and q.shape[-1] == k.shape[-1] == v.shape[-1]
    if not (same and is_half(q) and q.shape[-1] in TILES and q.shape[1] % k.shape[1] == 0 and scale > 0):
        return NotImplemented
    if documents is not None:
        documents = edges(array_module(q), documents) if q.shape[2] == k.shape[2] and offset == 0 else None
        if documents is None:
            return NotImplemented
    settings = dict(documents=documents, causal=causal, window=window, offset=offset, scale=scale)
    o, lse = forward(q, k, v, **settings)
    return o, lambda do: (*backward(q, k, v, o, lse, do, deterministic=deterministic(), **settings), None, None, None)


def edges(xp, documents):
    """`packed.edges` of documents on the host, for the kernels; None where there are none.     (B, T) int -> (B, padded, 2) int32"""
    found = packed.edges(documents) if isinstance(documents, np.ndarray) else None
    if found is None:
        return None
    B, T = documents.shape
    padded = np.full((B, _count(T, QUERY_ROWS) * QUERY_ROWS, 2), T, np.int32)
    padded[:, :T] = np.stack(found, -1)
    return xp.asarray(padded)


def forward(q, k, v, *, causal, window, scale, offset=0, documents=None):
    """o and the natural log of each query's sum of exponentials.     (B, H, T, D), (B, G, S, D) twice -> (B, H, T, D), (B, H, T) fp32

    causal, window, offset : as in ops.attention     scale : above 0     documents : their `edges`, for as many queries as keys and no offset
    """
    q, k, v = map(reachable, (q, k, v))
    (B, H, T, D), (_, G, S, _) = q.shape, k.shape
    o, lse = like_heads(q), array_module(q).empty((B, H, T), np.float32)
    tiles = (TILES if documents is None else TILES_OF_DOCUMENTS)[D]
    _launch(
        "attention", "attention_forward", B * H, _count(T, QUERY_ROWS), q, k, v, o, lse, H, G, T, S, *_band(causal, window, offset),
        documents, float(scale), _together(B * H, 4 * S * D * G // H), shared=tiles.forward_shared(D), several=documents is not None,
    )  # fmt: skip
    return o, lse


def backward(q, k, v, o, lse, do, *, causal, window, scale, deterministic, offset=0, documents=None, out=None):
    """dq, dk and dv, in the inputs' format.     o, lse : as `forward` returned them     do : like o

    deterministic : bitwise the same in every run, at the price of two more products on five
    out : arrays for dq, dk and dv, such as parts of one array for a joint product. ValueError where they are not `reachable`
    """
    q, k, v, o, do = map(reachable, (q, k, v, o, do))
    dq, dk, dv = out or map(like_heads, (q, k, v))
    if not all(map(is_reachable, (dq, dk, dv))):
        raise ValueError("attention.backward: rows of the arrays in `out` must lie in one piece, at addresses that 16 divides: pass others")
    xp, (B, H, T, D), (_, G, S, _), tiles = array_module(q), q.shape, k.shape, TILES[q.shape[3]]
    padded = _count(T, QUERY_ROWS) * QUERY_ROWS
    statistics = xp.empty((B, H, 2, padded), np.float32)
    _launch("attention_backward", "attention_statistics", B * H, padded * 8 // THREADS, o, do, lse, statistics, H, T, padded)

    common = (H, G, T, S, padded, *_band(causal, window, offset), documents, float(scale))
    sums = None if deterministic else xp.zeros((B, H, padded, D), np.float32)
    _launch(
        "attention_backward", "attention_backward_keys", B * G, _count(S, tiles.key_rows), q, k, v, do, dk, dv, statistics, sums,
        *common, _together(B * G, 8 * T * D * H // G), shared=tiles.keys_shared(D), several=documents is not None,
    )  # fmt: skip
    if deterministic:
        _launch(
            "attention_backward", "attention_backward_queries", B * H, _count(T, QUERY_ROWS), q, k, v, do, dq, statistics,
            *common, _together(B * H, 4 * S * D * G // H), shared=tiles.queries_shared(D), several=documents is not None,
        )  # fmt: skip
    else:
        _launch("attention_backward", "attention_convert", B * H, padded * D // 8 // THREADS, sums, dq, H, T, padded, float(scale))
    return dq, dk, dv


def reachable(x):
    """x, or a copy of it whose rows the kernels can read 16 bytes at a time."""
    return x if is_reachable(x) else x.copy()


def is_reachable(x) -> bool:
    """Whether each of x's rows of D numbers lies in one piece at an address that 16 divides."""
    steps = [stride for n, stride in zip(x.shape, x.strides, strict=True) if n > 1]
    return x.size == 0 or (x.strides[-1] == x.itemsize and all(step % 16 == 0 for step in steps[:-1]) and x.data.ptr % 16 == 0)


def like_heads(x):
    """An empty (B, H, T, D) array whose memory lies as (B, T, H, D)."""
    B, H, T, D = x.shape
    return array_module(x).empty((B, T, H, D), x.dtype).swapaxes(1, 2)


def _launch(file, name, heads, blocks, *arguments, shared=0, several=False):
    """Start `blocks` blocks for each head. Arrays of rows, 16-bit ones, are passed with their strides of batch, head and position.

    several : whether documents share rows.
    """
    if heads * blocks == 0:
        return
    rows = next(x for x in arguments if _is_rows(x))
    flat = (y for x in arguments for y in ((x, *(np.int64(s // 2) for s in x.strides[:3])) if _is_rows(x) else (x,)))
    launch(array_module(rows), file, name, (heads * blocks,), THREADS, *flat, shared=shared, **macros(format_of(rows), rows.shape[-1], several))


def _is_rows(x) -> bool:
    return getattr(x, "ndim", 0) == 4 and x.dtype.itemsize == 2


def _band(causal, window, offset) -> tuple[int, int, int]:
    """offset, and how far a query sees back and ahead."""
    reach = FAR if window is None else window - 1
    return offset, reach, 0 if causal else reach


def _together(heads, size) -> int:
    """How many heads' blocks shall run side by side: as many as have what they read again and again, `size` bytes each, in the cache."""
    return max(1, min(heads, CACHED // max(size, 1)))


def _count(length, tile) -> int:
    return -(-length // tile)
