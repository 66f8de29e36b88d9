"""Whole models against transformers' own, in float64: the loss, the scores, and the gradient of every parameter.

The default test compares with numbers that golden/make_model.py recorded, the `peers` test with transformers as it is installed.
"""
import zlib
from pathlib import Path

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.nn import Transformer, TransformerConfig

GOLDEN = Path(__file__).parent / "golden"
TINY = dict(vocab_size=13, layers=2, heads=2, width=8, mlp_width=12, context=8)
MODELS = {  # as transformers calls them, and how each is spelled here
    "gpt2": dict(arch="gpt2"),
    "gpt1 (post-norm)": dict(arch="gpt2", norm_placement="post", layers=1, mlp_width=32),
    "mpt (ALiBi)": dict(arch="gpt2", positions="alibi", mlp="gelu", bias=False, layers=1, mlp_width=32),
    "llama (grouped heads, tied)": dict(arch="llama", heads=4, kv_heads=2, width=16, mlp_width=8),
    "llama (untied)": dict(arch="llama", kv_heads=1, tie=False, norm_eps=0.01),
    "llama (llama3 scaling)": dict(arch="llama", rope_scaling="llama3", rope_factor=4.0, context=32, layers=1),
    "llama (yarn scaling)": dict(arch="llama", rope_scaling="yarn", rope_factor=4.0, context=32, layers=1),
    "qwen3 (query and key norm)": dict(arch="llama", qk_norm=True, rope_theta=500.0),
    "mistral (sliding window)": dict(arch="llama", window=3, kv_heads=1),
}


def config_of(name) -> TransformerConfig:
    return TransformerConfig(**(TINY | MODELS[name])).resolved()


def inputs(name):
    """Weights by our names, ids and targets: drawn, large enough that attention is far from uniform.     -> dict, (2, 7), (2, 7)"""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    weights = {}
    for parameter, p in Transformer(config_of(name), np.random.default_rng(0), np.float64).named_parameters():
        gain = parameter.endswith("norm.weight")
        weights[parameter] = gain + (0.3 if p.data.ndim == 1 else 0.7) * random.standard_normal(p.shape)
    return weights, *random.randint(0, TINY["vocab_size"], (2, 2, 7))


def ours(name, **changes):
    """By tinyllm: the loss, the last position's scores, and each parameter's gradient."""
    config = TransformerConfig(**(TINY | MODELS[name] | changes))
    weights, ids, targets = inputs(name)
    model = Transformer(config, np.random.default_rng(0), np.float64)
    model.load_state_dict(weights)
    scores = model(ids)
    loss = ops.cross_entropy(scores, targets)
    loss.backward()
    return [loss.data, scores.data[:, -1], *(p.grad for _, p in model.named_parameters())]


def compare(found, expected):
    """Each array to 1e-9 of its largest element; what is zero by nature (a key's bias shifts all scores alike) to 1e-14."""
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=max(1e-14, 1e-9 * np.abs(b).max()))


@pytest.fixture(scope="module")
def recorded():
    """name -> what make_model.py recorded, in the order of `ours`."""
    arrays = dict(np.load(GOLDEN / "model.npz"))

    def of(name):
        shapes = [w.shape for w in inputs(name)[0].values()]
        parts = np.split(arrays[f"{name}: gradients"], np.cumsum([np.prod(shape, dtype=int) for shape in shapes])[:-1])
        gradients = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return [arrays[f"{name}: loss"], arrays[f"{name}: scores"], *gradients]

    return of


@pytest.mark.parametrize("changes", [{}, dict(attention="tiled"), dict(recompute=True)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_scores_and_gradients_are_those_of_transformers(name, changes, recorded):
    compare(ours(name, **changes), recorded(name))


def test_a_wrong_setting_is_noticed(recorded):
    for name, changes in {
        "gpt2": dict(mlp="gelu"), "llama (untied)": dict(norm_eps=0.0101), "mistral (sliding window)": dict(window=4),
        "llama (llama3 scaling)": dict(rope_factor=3.9), "qwen3 (query and key norm)": dict(rope_theta=501.0),
    }.items():  # fmt: skip
        with pytest.raises(AssertionError):
            compare(ours(name, **changes), recorded(name))


@pytest.mark.peers
@pytest.mark.parametrize("name", MODELS)
def test_live(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(GOLDEN))
    import make_model as peers

    compare(ours(name), peers.theirs(name))


@pytest.mark.peers
def test_soft_cap_as_in_gemma2(monkeypatch):
    """Gemma 2's blocks differ in other ways too, so this is its attention layer alone."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(GOLDEN))
    import make_model as peers

    from tinyllm.nn.attention import Attention, Surroundings
    from tinyllm.tensor import Tensor

    random = np.random.RandomState(0)
    x, dy = random.standard_normal((2, 2, 7, 16))
    config = TransformerConfig(layers=1, heads=4, kv_heads=2, width=16, positions="none", softcap=1.5).resolved()
    layer = Attention(config, rng=np.random.default_rng(0), dtype=np.float64)
    for _, p in layer.named_parameters():
        p.data[...] = random.standard_normal(p.shape)
    x = Tensor(x, requires_grad=True)
    y = layer(x, Surroundings(), 0)
    y.backward(dy)
    expected = peers.gemma2_attention(x.data, dy, {name: p.data for name, p in layer.named_parameters()}, softcap=1.5)
    compare([y.data, x.grad, *(p.grad for _, p in layer.named_parameters())], expected)


