"""The stack: token vectors go up through blocks of attention and MLP. The decoder: they come out as scores for the next token."""
import numpy as np

from tinyllm import ops
from tinyllm.backend import array_module
from tinyllm.nn.attention import Attention, Surroundings
from tinyllm.nn.cache import KVCache
from tinyllm.nn.config import TransformerConfig
from tinyllm.nn.layers import NORMS, Embedding, Linear, storage
from tinyllm.nn.mlp import MLPS
from tinyllm.nn.module import Module
from tinyllm.recompute import checkpoint
from tinyllm.tensor import Tensor


class Block(Module):
    """One layer of the stack, adding to the residual stream twice.     (B, T, C) -> (B, T, C)

        pre    x ← x + attention(norm(x))        x ← x + mlp(norm(x))          gradients pass the sums unhindered: trains stably
        post   x ← norm(x + attention(x))        x ← norm(x + mlp(x))          the first transformer's and BERT's order
    """

    def __init__(self, config: TransformerConfig, *, rng, dtype=np.float32):
        self.attention_norm = NORMS[config.norm](config, dtype)
        self.attention = Attention(config, rng=rng, dtype=dtype)
        self.mlp_norm = NORMS[config.norm](config, dtype)
        self.mlp = MLPS[config.mlp](config, rng=rng, dtype=dtype)
        self.dropout = config.dropout
        self.order = {"pre": Block._pre, "post": Block._post}[config.norm_placement]  # not self._pre: a cycle would keep the weights alive
        self.stored = storage(config.precision)

    def forward(self, x: Tensor, around: Surroundings, layer: int) -> Tensor:
        return self.order(self, x, around, layer)

    def _pre(self, x: Tensor, around: Surroundings, layer: int) -> Tensor:
        x = self.stored(x + drop(self.attention(self.attention_norm(x), around, layer), self.dropout, around.rng))
        return self.stored(x + drop(self.mlp(self.mlp_norm(x), around.rng), self.dropout, around.rng))

    def _post(self, x: Tensor, around: Surroundings, layer: int) -> Tensor:
        x = self.attention_norm(self.stored(x + drop(self.attention(x, around, layer), self.dropout, around.rng)))
        return self.mlp_norm(self.stored(x + drop(self.mlp(x, around.rng), self.dropout, around.rng)))


def drop(x: Tensor, rate: float, rng: np.random.Generator | None) -> Tensor:
    """Dropout in training, which is where a generator is given; x itself otherwise."""
    return ops.dropout(x, rate=rate, rng=rng) if rate and rng is not None else x


class Stack(Module):
    """What decoder and encoder share: vectors of tokens and their places, the blocks, and the norm above them.

    config : see TransformerConfig.   dtype : of the parameters.     rng : draws the first weights: N(0, s²), s = init_std; and s/√(2L) for
    the two maps of each block that add to the residual stream, so that its variance does not grow with depth (Radford et al. 2019).

    s = 0.02 suits widths about 1000. In a narrow model it makes everything that attention adds so faint that copying from the context,
    which takes several maps in a row, hardly begins to be learned: with C = 128 its loss stood still for 500,000 tokens. s = 1/√C keeps
    the size of what goes through a map, and with token vectors of embedding_std ≈ ½ the plateau was gone.
    """

    causal = True  # whether a token sees none of those after it

    def __init__(self, config: TransformerConfig, rng: np.random.Generator, dtype=np.float32):
        self.config = config = config.resolved()
        options = dict(rng=rng, precision=config.precision, dtype=dtype)
        self.embedding = Embedding(config.vocab_size, config.width, std=config.embedding_std, **options)
        self.position_embedding = Embedding(config.context, config.width, std=config.init_std, **options) if config.positions == "learned" else None
        self.blocks = [Block(config, rng=rng, dtype=dtype) for _ in range(config.layers)]
        self.norm = NORMS[config.norm](config, dtype) if config.norm_placement == "pre" else None
        self.stored = storage(config.precision)
        self.sinusoids = ops.sinusoidal_positions(config.context, config.width) if config.positions == "sinusoidal" else None
        self.frequencies = ops.rope_frequencies(config.head_width, config.rope_theta, config.scaling) if config.positions == "rope" else None

    def stack(self, x: Tensor, around: Surroundings) -> Tensor:
        """All blocks and the last norm.     (B, T, C) -> (B, T, C)"""
        for i, block in enumerate(self.blocks):
            if self.config.recompute:
                x = checkpoint(lambda x, block=block, i=i: block(x, around, i), x, rng=around.rng)
            else:
                x = block(x, around, i)
        return x if self.norm is None else self.norm(x)

    def _positions(self, new, cache=None):
        """Each token's position: counted from the row's first real token.     -> (T,), or (B, T) where rows are padded"""
        start = 0 if cache is None else cache.length
        if start + new > self.config.context and not self.config.unlimited:
            raise ValueError(f"{start + new} positions are more than the model's context of {self.config.context}")
        positions = start + np.arange(new)
        if cache is None or cache.left_padding is None:
            return positions
        return np.maximum(positions[None, :] - cache.left_padding[:, None], 0)

    def _embedded(self, ids, positions):
        x = self.embedding(ids)
        if self.position_embedding is not None:
            return x + self.position_embedding(positions)
        if self.sinusoids is not None:
            return x + array_module(x.data).asarray(self.sinusoids[positions], dtype=self.embedding.weight.dtype)
        return x

    def _rotation(self, positions, xp):
        """cos and sin for RoPE, as exact as the weights and ready to broadcast over (B, H, T, D/2); None for other kinds of positions."""
        if self.frequencies is None:
            return None
        angles = ops.rope_table(positions if positions.ndim == 1 else positions[:, None, :], *self.frequencies)
        return tuple(xp.asarray(table, dtype=self.embedding.weight.dtype) for table in angles)


class Transformer(Stack):
    """A decoder-only language model, GPT-2 or Llama style.     config, rng, dtype : see Stack."""

    def __init__(self, config: TransformerConfig, rng: np.random.Generator, dtype=np.float32):
        super().__init__(config, rng, dtype)
        config = self.config
        options = dict(std=config.init_std, bias=False, rng=rng, precision=config.precision, dtype=dtype)
        self.head = None if config.tie else Linear(config.width, config.vocab_size, **options)

    def forward(self, ids, **around) -> Tensor:
        """Scores of every possible next token, after each position.     (B, T) int -> (B, T, V)"""
        return ops.linear(self.hidden(ids, **around), self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """(V, C): one row per token; hidden·weightᵀ gives the scores. For `linear_cross_entropy`, which never holds them all."""
        return self.stored(self.embedding.weight if self.head is None else self.head.weight)

    def hidden(self, ids, *, cache: KVCache | None = None, documents=None, rng: np.random.Generator | None = None) -> Tensor:
        """The last layer's vectors, normalised, from which scores are read.     (B, T) int -> (B, T, C)

        cache : continues after the positions in it, and adds these; for generation, under no_grad().
        documents : (B, T) int; a token sees only its own document. Positions count on through the row: with RoPE, ALiBi or none, which
        know distances alone, a document comes out as it does by itself; with learned or sinusoidal ones as it does at that place.
        rng : given in training, draws dropout.
        ids and documents may be NumPy arrays where the model is on a GPU: they are checked on the host, which then does not wait.
        Raises ValueError where the shapes do not match, or the positions do not fit the context (or the cache).
        """
        check_shapes(ids, documents, cache)
        xp = array_module(self.embedding.weight.data)
        positions = self._positions(ids.shape[1], cache)
        x = self.stored(drop(self._embedded(ids, positions), self.config.dropout, rng))
        around = Surroundings(self._rotation(positions, xp), cache, documents, rng, self.causal)
        x = self.stack(x, around)
        if cache is not None:
            cache.length += ids.shape[1]
        return x

    def next_scores(self, ids, cache: KVCache) -> Tensor:
        """Scores of the token after the last of these: what generation asks for, a token at a time.     (B, T) int -> (B, V)

        ids and cache : as `hidden` takes them.
        """
        return ops.linear(self.hidden(ids, cache=cache)[:, -1], self.output_weight)

    def new_cache(self, batch: int, capacity: int | None = None, left_padding=None) -> KVCache:
        """An empty cache for `batch` rows and up to `capacity` positions (by default the context)."""
        c, weight = self.config, self.embedding.weight
        window = c.window if c.unlimited else None
        capacity = (2 * c.window if c.unlimited else c.context) if capacity is None else capacity
        dtype = self.stored(Tensor(weight.data[:0])).dtype  # in which keys and values come
        return KVCache(array_module(weight.data), c.layers, batch, c.kv_heads, c.head_width, capacity, window, dtype, left_padding)


def check_shapes(ids, documents, cache=None) -> None:
    """Raise ValueError unless ids are (B, T), with documents of the same shape or room in the cache."""
    if ids.ndim != 2 or not ids.shape[1]:
        raise ValueError(f"the model takes ids of shape (B, T), T at least 1, got {ids.shape}")
    if documents is not None and cache is not None:
        raise ValueError("documents and a cache exclude each other: what is cached is one text a row")
    if documents is not None and documents.shape != ids.shape:
        raise ValueError(f"documents have the shape {documents.shape}, ids {ids.shape}: each token needs its document")
    if cache is not None:
        cache.check_room(*ids.shape)
