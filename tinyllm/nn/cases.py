"""The table of layers with which gradients are checked: each layer in float64, its input's gradient and that of every parameter."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinyllm import ops
from tinyllm.gradcheck import Report, gradcheck
from tinyllm.nn.attention import Attention, Surroundings
from tinyllm.nn.classifier import Classifier
from tinyllm.nn.config import TransformerConfig
from tinyllm.nn.encoder import Encoder, MaskedLanguageModel
from tinyllm.nn.layers import Embedding, LayerNorm, Linear, RMSNorm
from tinyllm.nn.lora import LoRAConfig, LoRALinear
from tinyllm.nn.mlp import MLP, GatedMLP
from tinyllm.nn.module import Module
from tinyllm.nn.transformer import Block, Stack, Transformer

TINY = dict(vocab_size=7, layers=2, heads=4, width=8, mlp_width=5, context=6)


@dataclass(frozen=True)
class LayerCase:
    """A layer, how it is made from a generator, and the function of float arrays that is checked."""

    layer: type[Module]
    label: str
    make: Callable[[np.random.Generator], Module]
    inputs: tuple[tuple[int, ...], ...]
    call: Callable = lambda layer, *inputs: layer(*inputs)

    def check(self, **options) -> Report:
        """Compare with finite differences. Weights are made larger than at the start of training, so that no gradient is tiny."""
        rng = np.random.default_rng(0)
        layer = self.make(rng)
        for _, p in layer.named_parameters():
            p.data = p.data + 0.3 * rng.standard_normal(p.shape)
        arrays = [rng.standard_normal(shape) for shape in self.inputs]
        return gradcheck(lambda *xs: self.call(layer, *xs), *arrays, parameters=dict(layer.named_parameters()), **options)


def _config(**changes) -> TransformerConfig:
    return TransformerConfig(**(TINY | changes)).resolved()


def _attention(label, **changes):
    config = _config(**changes)
    tables = ops.rope_table(np.arange(5), ops.rope_frequencies(config.head_width)[0])
    around = Surroundings(tables if config.positions == "rope" else None)
    return LayerCase(
        Attention, label, lambda rng: Attention(config, rng=rng, dtype=np.float64), ((2, 5, 8),), lambda layer, x: layer(x, around, 0)
    )


def _block(label, **changes):
    config = _config(**changes)
    return LayerCase(
        Block, label, lambda rng: Block(config, rng=rng, dtype=np.float64), ((2, 3, 8),), lambda layer, x: layer(x, Surroundings(), 0)
    )


def _transformer(label, **changes):
    ids, targets = np.random.RandomState(0).randint(0, TINY["vocab_size"], (2, 2, 5))

    def loss(model):
        rng = np.random.default_rng(7) if model.config.dropout else None
        return ops.linear_cross_entropy(model.hidden(ids, rng=rng), model.output_weight, targets, rows=6)

    return LayerCase(Transformer, label, lambda rng: Transformer(_config(**changes), rng, np.float64), (), loss)


def _stack(label, **changes):
    return LayerCase(
        Stack, label, lambda rng: Stack(_config(layers=1, **changes), rng, np.float64), ((2, 3, 8),),
        lambda stack, x: stack.stack(x, Surroundings(causal=False)),
    )  # fmt: skip


def _encoded():
    """ids, segments and documents: two sentences, and in the second row one place of padding."""
    ids = np.random.RandomState(0).randint(0, TINY["vocab_size"], (2, 5))
    return ids, dict(segments=np.array([[0, 0, 0, 1, 1], [0, 0, 1, 1, 0]]), documents=np.array([[0, 0, 0, 0, 0], [0, 0, 0, 0, -1]]))


def _encoder(label, **changes):
    ids, around = _encoded()
    config = _config(arch="bert", heads=2, width=4, **changes)
    return LayerCase(Encoder, label, lambda rng: Encoder(config, rng, np.float64), (), lambda model: model.hidden(ids, **around))


def _masked(label, **changes):
    ids, around = _encoded()
    config = _config(arch="bert", layers=1, heads=2, width=4, **changes)

    def scores(model):
        return ops.concatenate(*(scores.reshape(-1) for scores in model(ids, **around)))

    return LayerCase(MaskedLanguageModel, label, lambda rng: MaskedLanguageModel(config, rng, np.float64), (), scores)


def _lora(label, **choices):
    """With everything learned, the weight that LoRA freezes too, and the same dropout in every call."""
    config = LoRAConfig(**(dict(rank=2, alpha=3.0) | choices))
    bias = "no bias" not in label
    return LayerCase(
        LoRALinear, label, lambda rng: LoRALinear(Linear(4, 3, rng=rng, bias=bias, dtype=np.float64), config, rng=rng), ((2, 5, 4),),
        lambda layer, x: layer(x, np.random.default_rng(7)),
    )  # fmt: skip


def _classifier(pooling):
    ids, lengths = np.random.RandomState(0).randint(0, TINY["vocab_size"], (3, 5)), np.array([5, 1, 3])
    config = _config(layers=1, heads=2, width=4)
    return LayerCase(
        Classifier, pooling, lambda rng: Classifier(Transformer(config, rng, np.float64), 3, pooling=pooling), (),
        lambda layer: layer(ids, lengths),
    )  # fmt: skip


LAYERS: tuple[LayerCase, ...] = (
    LayerCase(Linear, "bias", lambda rng: Linear(4, 3, rng=rng, dtype=np.float64), ((2, 5, 4),)),
    LayerCase(Linear, "no bias", lambda rng: Linear(4, 3, rng=rng, bias=False, dtype=np.float64), ((5, 4),)),
    LayerCase(
        Embedding, "repeated ids", lambda rng: Embedding(6, 3, rng=rng, dtype=np.float64), (), lambda layer: layer(np.array([[1, 5, 1]]))
    ),
    LayerCase(LayerNorm, "bias", lambda rng: LayerNorm(5, dtype=np.float64), ((2, 3, 5),)),
    LayerCase(LayerNorm, "no bias", lambda rng: LayerNorm(5, bias=False, dtype=np.float64), ((3, 5),)),
    LayerCase(RMSNorm, "plain", lambda rng: RMSNorm(5, dtype=np.float64), ((2, 3, 5),)),
    LayerCase(MLP, "gelu_tanh", lambda rng: MLP(_config(mlp="gelu_tanh", bias=True), rng=rng, dtype=np.float64), ((2, 3, 8),)),
    LayerCase(MLP, "silu", lambda rng: MLP(_config(mlp="silu"), rng=rng, dtype=np.float64), ((2, 3, 8),)),
    LayerCase(GatedMLP, "swiglu", lambda rng: GatedMLP(_config(mlp="swiglu"), rng=rng, dtype=np.float64), ((2, 3, 8),)),
    LayerCase(GatedMLP, "geglu", lambda rng: GatedMLP(_config(mlp="geglu"), rng=rng, dtype=np.float64), ((2, 3, 8),)),
    _attention("multi-head", positions="none"),
    _attention("grouped, RoPE", kv_heads=2),
    _attention("multi-query, QK norm", kv_heads=1, qk_norm=True),
    _attention("window, soft cap, ALiBi", positions="alibi", window=2, softcap=2.0),
    _attention("tiled", attention="tiled", kv_heads=2),
    _block("pre-norm, gpt2", arch="gpt2", positions="none"),
    _block("post-norm, llama", norm_placement="post", positions="none"),
    _lora("plain"),
    _lora("no bias, dropout", adapter_dropout=0.3),
    _lora("DoRA, dropout", adapter_dropout=0.3, dora=True),
    *(_classifier(pooling) for pooling in ("last", "first", "mean")),
    _stack("pre-norm, both ways", arch="gpt2", positions="none"),
    _encoder("post-norm"),
    _encoder("pre-norm, RoPE", norm_placement="pre", positions="rope"),
    _masked("tied"),
    _masked("untied", tie=False),
    _transformer("gpt2", arch="gpt2", heads=2, width=4),
    _transformer("llama", heads=2, kv_heads=1, width=4),
    _transformer("llama, untied, QK norm", tie=False, qk_norm=True),
    _transformer("post-norm, sinusoidal, recomputed, dropout", norm_placement="post", positions="sinusoidal", recompute=True, dropout=0.2),
)
