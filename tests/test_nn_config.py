"""TransformerConfig: what follows from what, and what is refused."""
import dataclasses

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.nn import ARCHITECTURES, GatedMLP, LayerNorm, RMSNorm, Transformer, TransformerConfig
from tinyllm.nn.config import GATED
from tinyllm.ops import RopeScaling


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_an_architecture_is_a_set_of_defaults(arch):
    config = TransformerConfig(arch=arch).resolved()
    assert {name: getattr(config, name) for name in ARCHITECTURES[arch]} == ARCHITECTURES[arch]
    assert not [f.name for f in dataclasses.fields(config) if getattr(config, f.name) is None and f.name not in ("window", "softcap", "rope_scaling")]
    assert config.resolved() == config


@pytest.mark.parametrize("change", [
    dict(norm="layernorm"), dict(positions="alibi"), dict(mlp="relu2"), dict(bias=True), dict(tie=False), dict(qk_norm=True)
], ids=str)  # fmt: skip
def test_every_choice_is_independent(change):
    """One choice changed on top of llama changes that one and no other, and the model runs."""
    config = TransformerConfig(vocab_size=9, layers=1, heads=2, width=8, context=4, **change).resolved()
    assert {name: getattr(config, name) for name in ARCHITECTURES["llama"]} == ARCHITECTURES["llama"] | change
    model = Transformer(config, np.random.default_rng(0))
    assert model(np.zeros((1, 4), int)).shape == (1, 4, 9)
    assert isinstance(model.norm, LayerNorm if config.norm == "layernorm" else RMSNorm)
    assert isinstance(model.blocks[0].mlp, GatedMLP) == (config.mlp in GATED)


@pytest.mark.parametrize("given, expected", [
    (dict(width=128, heads=4, mlp="swiglu"), 344),  # 341.3 rounded up to 8
    (dict(width=96, heads=4, mlp="geglu"), 256),  # 8/3·96 as it is
    (dict(width=4, heads=1, mlp="swiglu"), 16),
    (dict(width=128, heads=4, mlp="gelu"), 512),
    (dict(width=128, heads=4, mlp="swiglu", mlp_width=17), 17),
    (dict(width=128, heads=4, mlp="relu2", mlp_width=17), 17),
])  # fmt: skip
def test_mlp_width(given, expected):
    assert TransformerConfig(**given).resolved().mlp_width == expected


def test_the_small_llama_has_at_most_800_000_parameters():
    config = TransformerConfig(vocab_size=65, arch="llama", layers=4, heads=4, width=128, context=64)
    assert sum(p.size for _, p in Transformer(config, np.random.default_rng(0)).named_parameters()) == 800_000


@pytest.mark.parametrize("change, message", [
    (dict(heads=6), "--heads 6 does not divide --width 160: choose a multiple of the heads as width"),
    (dict(kv_heads=4), "--kv-heads 4 does not divide --heads 5: query heads must share evenly"),
    (dict(kv_heads=10), "--kv-heads 10 does not divide --heads 5: query heads must share evenly"),
    (dict(heads=32), "--positions rope turns pairs, but width / heads is 5: it must be even"),
    (dict(arch="gtp2"), "--arch is 'gtp2': it takes gpt2, llama, bert; did you mean gpt2?"),
    (dict(mlp="swigu"), "--mlp is 'swigu': it takes gelu, gelu_tanh, relu, relu2, silu, swiglu, geglu; did you mean swiglu?"),
    (dict(positions="rotary"), "--positions is 'rotary': it takes learned, sinusoidal, rope, alibi, none"),
    (dict(norm_placement="middle"), "--norm-placement is 'middle': it takes pre, post"),
    (dict(precision="fp8"), "--precision is 'fp8': it takes fp32, bf16, fp16"),
    (dict(layers=0), "--layers is 0: it must be at least 1"),
    (dict(context=0), "--context is 0: it must be at least 1"),
    (dict(window=0), "--window is 0: it must be at least 1"),
    (dict(softcap=0.0), "--softcap is 0.0: it must be at least 1e-06"),
    (dict(dropout=1.0), "--dropout is 1.0: it must be at most 0.99"),
    (dict(dropout=float("nan")), "--dropout is nan: it must be at least 0"),
    (dict(rope_scaling="linear"), "--rope-scaling linear has no effect without --positions rope and a --rope-factor above 1"),
    (dict(rope_scaling="yarn", rope_factor=2.0, arch="gpt2"), "--rope-scaling yarn has no effect without --positions rope and a --rope-factor above 1"),
    (dict(rope_factor=2.0), "--rope-factor 2.0 has no effect without --rope-scaling"),
], ids=str)  # fmt: skip
def test_refused(change, message):
    with pytest.raises(ValueError) as error:
        TransformerConfig(**change).resolved()
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    with pytest.raises(ValueError):
        Transformer(TransformerConfig(**change), np.random.default_rng(0))


@pytest.mark.parametrize("kind", ["linear", "ntk", "llama3", "yarn"])
def test_rope_scaling_and_theta_reach_the_model(kind):
    config = TransformerConfig(vocab_size=9, layers=1, heads=1, width=32, context=2048, rope_theta=500.0, rope_scaling=kind, rope_factor=4.0)
    frequencies, sharpness = Transformer(config, np.random.default_rng(0)).frequencies
    high = 32.0 if kind == "yarn" else 4.0
    expected = ops.rope_frequencies(32, 500.0, RopeScaling(kind, 4.0, original_context=512, high_frequency=high))
    assert np.array_equal(frequencies, expected[0]) and sharpness == expected[1]
    assert not np.array_equal(frequencies, ops.rope_frequencies(32, 500.0)[0])


def test_unlimited():
    """Only a window bounds what is seen, and only tables of positions end."""
    for positions, endless in dict(rope=True, alibi=True, none=True, learned=False, sinusoidal=False).items():
        assert TransformerConfig(positions=positions, window=3).resolved().unlimited is endless
        assert not TransformerConfig(positions=positions).resolved().unlimited
