"""One more token for each text: the whole model in six launches a block, captured once as a CUDA graph and replayed for every token.

What bounds a token. Its weights pass once through the chip: for GPT-2 124M in bf16 248 MB, 58 µs at 4.3 TB/s. Computed op by op there
are some 200 launches more, 5 to 8 µs of Python and driver each, so that the GPU waits for the host nearly all the time. Here a block is
six launches (see decode.cu), and a graph of them all needs one call from the host; from one of its kernels to the next 1 to 1.5 µs pass.
Predicted, not yet measured, for 12 blocks, batch 1, after 500 tokens:

                              launches    host           GPU
    by the ops' kernels           ~200    1.0 to 1.6 ms
    here                            74    ~30 µs         weights 60 to 85 µs, 74 starts 75 to 110 µs, attention 25 µs: 160 to 220 µs

The token is chosen by 15 to 80 small operations of the array library, which the host lines up while the graph runs; then it looks, once.

A graph repeats its launches to the letter, arguments included. So all arrays stay where they are for as long as it lives, and what
changes from token to token (ids, positions, which keys are seen, the angles of RoPE) goes up in one small copy before each replay. A graph
counts for one set of arrays of the key/value cache: when texts end, beams part or a window rolls, those are others. The first token with
new arrays is computed by launching one by one, which also compiles what is missing; the second one records the graph.

Products. For up to 8 texts a kernel of our own reads each weight once, whatever the library would make of a matrix with 1 to 8 rows, takes
norm and activation in, and can be captured, which CuPy's products cannot. More texts are taken in groups of 8, whose weights come from the
L2 cache from the second group on (of a head larger than that, from memory again); beyond ROWS tensor cores would be the faster.

Weights are put together (query, key and value; gate and up, row by row) and rounded to the format when a cache has its first token decoded,
and belong to it: who changes weights in the middle of a text begins that text anew in any case.

Not taken: merging the spans' records by the last block to arrive, which saves a launch a block (15 to 20 µs a token), for a protocol of
fences and counters that no test without a GPU could vouch for.
"""
import math
from weakref import WeakKeyDictionary

import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module, to_numpy
from tinyllm.kernels import attach_module
from tinyllm.kernels.cuda import halves
from tinyllm.kernels.cuda.launch import FORMATS, launch
from tinyllm.kernels.known import INPUTS, known_layers
from tinyllm.nn.cache import KVCache
from tinyllm.nn.layers import Embedding, LayerNorm, Linear, RMSNorm
from tinyllm.nn.transformer import Block, Transformer
from tinyllm.ops.embedding import check_ids
from tinyllm.tensor import Tensor, recording

ROWS = 64  # texts; with more, a product's weights are read too often
GROUP = 8  # texts that one product takes together
ROOM = 96 * 1024  # bytes of shared memory for their rows: two blocks to a processor of an H200, one of an A100
THREADS, WARPS = 128, 4  # of a block
BLOCKS = 528  # of a product: four to each processor of an H200, what it holds at once
BUSY = 4096  # rows of a matrix from which on a warp for each keeps the GPU busy
PIECE = 16  # bytes that a load moves
SPAN, SPANS = 64, 16  # keys that a block of attention takes at least; spans at most
SHARE = 4  # query heads that it serves at most
KINDS = {ops.gelu: 0, ops.gelu_tanh: 1, ops.relu: 2, ops.relu2: 3, ops.silu: 4, ops.geglu: 0, ops.swiglu: 4}  # as in decode.cu
_decoders: WeakKeyDictionary[KVCache, "_Decoder"] = WeakKeyDictionary()


@attach_module(Transformer, "next_scores", "cuda")
def next_scores(model, ids, cache):
    """`Transformer.next_scores` for one more token a text, no graph of derivatives.     (B, 1) int -> (B, V) fp32

    ids on the host cost nothing; those on the GPU make the host wait for it.
    """
    xp = array_module(model.embedding.weight.data)
    if xp is np or recording() or cache is None or ids.ndim != 2 or ids.shape[1] != 1 or not 1 <= len(ids) <= ROWS:
        return NotImplemented
    decoder = _decoders.get(cache)
    if decoder is None or decoder.model is not model:
        if not _fits(model, cache):
            return NotImplemented
        decoder = _decoders[cache] = _Decoder(model, xp)
    return Tensor(decoder(to_numpy(ids)[:, 0], cache))


def _fits(model, cache) -> bool:
    """Whether the model normalises first and is made of known layers, all blocks alike, and the cache has the format of its weights."""
    c, blocks = model.config, model.blocks
    tables = [model.embedding, *([] if model.position_embedding is None else [model.position_embedding])]
    dtype = cache.layers[0].keys.dtype
    return (
        type(model) is Transformer
        and all(type(table) is Embedding for table in tables)
        and type(model.norm) in (LayerNorm, RMSNorm)
        and (model.head is None or type(model.head) is Linear)
        and all(type(block) is Block and block.order is Block._pre and known_layers(block) for block in blocks)
        and all(block.attention.settings == blocks[0].attention.settings for block in blocks)
        and all(len({linear.bias is None for linear in linears}) == 1 for block in blocks for linears in _joined(block))
        and dtype.name in FORMATS
        and dtype == _dtype(model)
        and model.embedding.weight.dtype.name == "float32"
        and max(c.width, c.mlp_width) * dtype.itemsize <= ROOM
    )


def _dtype(model):
    """The format in which the model's weights take part."""
    return model.stored(Tensor(model.embedding.weight.data[:0])).dtype


def _joined(block):
    """The linear maps of a block that become one product."""
    a = block.attention
    return (a.query, a.key, a.value), INPUTS[type(block.mlp)](block.mlp)


class _Decoder:
    """A model's weights as the kernels read them, and the launches for the arrays of one cache."""

    def __init__(self, model, xp):
        self.model, self.xp, self.weights, self.sequence = model, xp, _Weights(model, xp), None

    def __call__(self, ids, cache):
        """(B,) int -> (B, V)"""
        check_ids(ids, self.model.config.vocab_size, "embedding")
        cache.check_room(len(ids), 1)
        position = self.model._positions(1, cache).reshape(-1)  # (1,), or (B,) where rows are padded
        [place] = {layer.reserve(1) for layer in cache.layers}  # all blocks have seen the same
        arrays = [array for layer in cache.layers for array in (layer.keys, layer.values)]
        if self.sequence is None or not self.sequence.is_for(arrays):
            self.sequence = _Sequence(self.weights, arrays, self.xp)
        scores = self.sequence(self._step(ids, position, place, cache))
        cache.length += 1
        return scores

    def _step(self, ids, position, place, cache):
        """What differs from token to token, a row for each text, as decode.cu has it.     -> (B, 4 + D) int32"""
        D, window = self.model.config.head_width, self.weights.window
        first = np.zeros(1, int) if cache.left_padding is None else cache.left_padding - (cache.length - place)
        if window is not None:
            first = np.maximum(first, place + 1 - window)
        step = np.zeros((len(ids), 4 + D), np.int32)
        step[:, 0], step[:, 1], step[:, 2], step[:, 3] = ids, position, np.clip(first, 0, place), place  # padding itself sees itself
        if self.model.frequencies is not None:
            angles = ops.rope_table(position, *self.model.frequencies)
            step[:, 4 : 4 + D // 2 * 2] = np.concatenate(angles, -1).astype(np.float32).view(np.int32)
        return step


class _Weights:
    """All matrices in the format, those of one product put together; gains, shifts and tables of positions in fp32."""

    def __init__(self, model, xp):
        self.xp, self.dtype, attention = xp, _dtype(model), model.blocks[0].attention
        self.config, self.rotary = model.config, model.frequencies is not None
        self.window, self.softcap = attention.settings["window"], attention.settings["softcap"]
        self.slopes = None if attention.slopes is None else xp.asarray(attention.slopes.astype(np.float32))
        self.embedding = self._matrix(model.embedding.weight)
        self.head = self.embedding if model.head is None else self._matrix(model.head.weight)
        self.places = None
        if model.sinusoids is not None:
            self.places = xp.asarray(model.sinusoids.astype(np.float32))
        elif model.position_embedding is not None:
            self.places = halves.of(model.position_embedding.weight, self.dtype).astype(np.float32)
        self.blocks = [self._block(block) for block in model.blocks]
        self.norm = _norm(model.norm)
        c = model.config
        aligned = all(n * self.dtype.itemsize % PIECE == 0 for n in (c.width, c.mlp_width, c.head_width))
        self.wide = PIECE // self.dtype.itemsize if aligned else 1  # numbers that a load moves

    def _block(self, block):
        """A block's arrays by name; each product's weights and bias."""
        a, mlp = block.attention, block.mlp
        gained = a.query_norm is not None
        return {
            "first": _norm(block.attention_norm), "second": _norm(block.mlp_norm),
            "qkv": self._joined(a.query, a.key, a.value), "output": self._joined(a.output),
            "up": self._joined(*INPUTS[type(mlp)](mlp), in_turn=True), "down": self._joined(mlp.down),
            "gains": (a.query_norm.weight.data, a.key_norm.weight.data, a.query_norm.eps) if gained else (None, None, 0.0),
            "kind": KINDS[mlp.activation],
        }  # fmt: skip

    def _matrix(self, parameter):
        """A parameter in the format, where 16-byte loads can read it."""
        copy = halves.of(parameter, self.dtype)
        return copy if copy.flags.c_contiguous and copy.data.ptr % PIECE == 0 else copy.copy()

    def _joined(self, *linears, in_turn=False):
        """Linear maps of the same inputs as one, below each other, or a row of each in turn: what an activation takes is computed together.

        -> weights (M, K), bias (M,) or None
        """
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        return self._put(weights, in_turn), None if biases[0] is None else self._put(biases, in_turn)

    def _put(self, parameters, in_turn):
        if len(parameters) == 1:
            return self._matrix(parameters[0])
        ends = np.cumsum([0, *(len(p.data) for p in parameters)]).tolist()
        joined = self.xp.empty((ends[-1], *parameters[0].shape[1:]), self.dtype)
        for i, p in enumerate(parameters):
            joined[slice(i, None, len(parameters)) if in_turn else slice(ends[i], ends[i + 1])] = p.data
        return joined


def _norm(norm):
    """A norm as the kernels take it: gain, shift, eps, whether it takes the mean away."""
    centre = type(norm) is LayerNorm
    return norm.weight.data, norm.bias.data if centre and norm.bias is not None else None, norm.eps, centre


class _Sequence:
    """The launches of one token, over one set of arrays: one by one at first, then as a graph."""

    def __init__(self, weights, arrays, xp):
        self.xp, self.w, self.arrays, self.graph, self.launched = xp, weights, arrays, None, False
        c, dtype = weights.config, weights.dtype
        self.B, self.capacity = arrays[0].shape[0], arrays[0].shape[2]
        H, G, D = c.heads, c.kv_heads, c.head_width
        self.span = max(SPAN, math.ceil(self.capacity / SPANS))
        self.share = max(n for n in range(1, SHARE + 1) if H // G % n == 0)
        spans = math.ceil(self.capacity / self.span)
        self.steps = xp.zeros((self.B, 4 + D), np.int32)
        self.x, self.qkv = xp.empty((self.B, c.width), np.float32), xp.empty((self.B, (H + 2 * G) * D), np.float32)
        self.mean, self.active = xp.empty((self.B, H * D), dtype), xp.empty((self.B, c.mlp_width), dtype)
        self.records = xp.empty((self.B, H, spans, D + 2), np.float32)
        self.scores = xp.empty((self.B, c.vocab_size), np.float32)
        self.batch = _batch(self.B, max(c.width, c.mlp_width) * dtype.itemsize)
        macros = {"FORMAT": FORMATS[dtype.name], "WIDE": weights.wide, "HEAD_WIDTH": D}
        self.macros = {"decode": macros | {"BATCH": self.batch}, "decode_attention": macros | {"SHARE": self.share}}
        self.launches = list(self._launches(spans))

    def is_for(self, arrays) -> bool:
        return all(a is b for a, b in zip(self.arrays, arrays, strict=True))

    def __call__(self, step):
        """(B, 4 + D) int32 -> (B, V)"""
        self.steps[...] = self.xp.asarray(step)
        if self.graph is None and self.launched:
            self._capture()
        if self.graph is not None:
            self.graph.launch()
        else:
            self._launch()
        return self.scores.copy()  # the next token's will come into the same array

    def _capture(self):
        """Record the launches. A stream of its own records; the graph then runs in whichever stream it is launched."""
        stream = self.xp.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            try:
                self._launch()
            finally:
                graph = stream.end_capture()  # also after an error: a stream left capturing is lost to everybody
        self.graph = graph

    def _launch(self):
        for name, grid, arguments, shared in self.launches:
            file = "decode_attention" if name in ("attend", "merge") else "decode"
            launch(self.xp, file, name, grid, THREADS, *arguments, shared=shared, **self.macros[file])
        self.launched = True

    def _launches(self, spans):
        """(kernel, grid, arguments, bytes of shared memory) of each launch, in order."""
        w, c = self.w, self.w.config
        H, G = c.heads, c.kv_heads
        yield "embed", (math.ceil(c.width / THREADS), self.B), (self.steps, w.embedding, w.places, self.x, c.width), 0
        for block, keys, values in zip(w.blocks, self.arrays[::2], self.arrays[1::2], strict=True):
            gated = len(block["up"][0]) != c.mlp_width
            yield self._product("normed_products", (self.x, *block["first"]), *block["qkv"], (self.qkv,))
            yield "attend", (spans, H // self.share, self.B), (
                self.qkv, keys, values, self.steps, *block["gains"], w.slopes, c.head_width**-0.5, float(w.softcap or 0), w.rotary,
                H, G, self.capacity, self.span, self.records, self.mean,
            ), 0  # fmt: skip
            if spans > 1:
                yield "merge", (H, self.B), (self.records, self.steps, self.mean, spans, self.span), 0
            yield self._product("added_products", (self.mean,), *block["output"], (self.x,))
            yield self._product("active_products", (self.x, *block["second"]), *block["up"], (self.active, block["kind"], gated))
            yield self._product("added_products", (self.active,), *block["down"], (self.x,))
        yield self._product("normed_products", (self.x, *w.norm), w.head, None, (self.scores,))

    def _product(self, name, before, w, bias, after):
        """One launch of a product with w: its arguments in decode.cu's order, and its shape."""
        M, K = w.shape
        split = _split(M, math.ceil(K / (32 * self.w.wide)))
        rows = WARPS // split * (2 if self.batch < 4 else 4)
        grid = min(math.ceil(M / rows), BLOCKS), math.ceil(self.B / self.batch)
        return name, grid, (*before, w, bias, *after, self.B, K, M, split), self.batch * K * self.w.dtype.itemsize


def _batch(texts, row):
    """How many texts a product takes together: 1, 2, 4 or 8, as far as rows of this many bytes have room."""
    batch = 1
    while batch < min(texts, GROUP) and 2 * batch * row <= ROOM:
        batch *= 2
    return batch


def _split(rows, pieces):
    """How many warps share a row of so many pieces a lane: one, but for long rows of which there are few."""
    split = 1
    while split < WARPS and pieces > 4 * split and rows * split < BUSY:
        split *= 2
    return split
