"""The attention layer: project, turn by position, attend, project back."""
from dataclasses import dataclass, field

import numpy as np

from tinyllm import ops
from tinyllm.nn.cache import KVCache
from tinyllm.nn.layers import Linear, RMSNorm, storage
from tinyllm.nn.module import Module
from tinyllm.tensor import Tensor

ATTENTIONS = {"naive": ops.attention, "tiled": ops.tiled_attention}


@dataclass(frozen=True)
class Surroundings:
    """What all blocks of one forward share besides x.

    rotation : RoPE's (cos, sin), or None.        cache : keys and values of earlier tokens, or None.
    documents : (B, T) document of each token, or None.        rng : generator for dropout; None outside training.
    causal : whether a token sees none of those after it.
    notes : what a kernel made of these for one block, for the next ones to find.
    """

    rotation: tuple | None = None
    cache: KVCache | None = None
    documents: np.ndarray | None = None
    rng: np.random.Generator | None = None
    causal: bool = True
    notes: dict = field(default_factory=dict)


class Attention(Module):
    """Self-attention with H query heads and G key/value heads.     (B, T, C) -> (B, T, C)

        q = x·Wq    k = x·Wk    v = x·Wv    split into heads of width D = C/H, normalised (qk_norm) and turned (RoPE)
        y = attention(q, k, v)·Wo
    """

    def __init__(self, config, *, rng, dtype=np.float32):
        C, D, G = config.width, config.head_width, config.kv_heads
        options = dict(rng=rng, bias=config.bias, precision=config.precision, dtype=dtype)
        self.query = Linear(C, C, std=config.init_std, **options)
        self.key = Linear(C, G * D, std=config.init_std, **options)
        self.value = Linear(C, G * D, std=config.init_std, **options)
        self.output = Linear(C, C, std=config.init_std / np.sqrt(2 * config.layers), **options)  # GPT-2's scaling of residual outputs
        norm = dict(eps=config.norm_eps, precision=config.precision, dtype=dtype)
        self.query_norm = RMSNorm(D, **norm) if config.qk_norm else None
        self.key_norm = RMSNorm(D, **norm) if config.qk_norm else None
        self.slopes = ops.alibi_slopes(config.heads) if config.positions == "alibi" else None
        self.attend = ATTENTIONS[config.attention]
        self.settings = dict(window=config.window, softcap=config.softcap)
        self.head_width = D
        self.stored = storage(config.precision)

    def forward(self, x: Tensor, around: Surroundings, layer: int) -> Tensor:
        B, T, C = x.shape
        q = self._turned(self._heads(self.query(x, around.rng)), self.query_norm, around)
        k = self._turned(self._heads(self.key(x, around.rng)), self.key_norm, around)
        v = self._heads(self.value(x, around.rng))
        offset, padding = 0, None
        if around.cache is not None:
            k, v, offset = around.cache.layers[layer].append(k, v)
            padding = around.cache.padding_mask(k.shape[2], T)
        seen = dict(causal=around.causal, offset=offset, **self.settings)
        y = self.stored(self.attend(q, k, v, padding, around.documents, self.slopes, **seen))
        return self.output(y.swapaxes(1, 2).reshape(B, T, C), around.rng)

    def _heads(self, x):
        """(B, T, heads·D) -> (B, heads, T, D)"""
        B, T, _ = x.shape
        return x.reshape(B, T, -1, self.head_width).swapaxes(1, 2)

    def _turned(self, x, norm, around):
        x = x if norm is None else norm(x)
        return x if around.rotation is None else self.stored(ops.rope(x, *around.rotation))
