"""bf16 and fp16: which values lie on the 16-bit grid, which stay in float32, and that little is lost."""
import numpy as np
import pytest

from tinyllm import ops
from tinyllm.backend import round_to_grid
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.nn.attention import ATTENTIONS
from tinyllm.tensor import no_grad

V = 29
TINY = dict(vocab_size=V, layers=2, heads=4, width=16, mlp_width=24, context=12)
IDS, TARGETS = np.random.RandomState(0).randint(0, V, (2, 3, 12))
CHOICES = [
    dict(arch="gpt2"),
    dict(arch="llama", kv_heads=2, tie=False),
    dict(arch="llama", attention="tiled", qk_norm=True, norm_placement="post", positions="sinusoidal"),
    dict(arch="llama", positions="alibi", mlp="relu2", bias=True, softcap=4.0, recompute=True, dropout=0.2),
]


def model_of(**changes):
    model = Transformer(TransformerConfig(**(TINY | changes)), np.random.default_rng(0))
    rng = np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data += (0.2 * rng.standard_normal(p.shape)).astype(np.float32)
    return model


def loss_of(model):
    rng = np.random.default_rng(2) if model.config.dropout else None
    return ops.linear_cross_entropy(model.hidden(IDS, rng=rng), model.output_weight, TARGETS)


def on_grid(x, precision):
    return np.array_equal(round_to_grid(x, precision), x)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_all_that_would_be_stored_is_on_the_grid(monkeypatch, precision, choices):
    """Operands of every matrix product, of norms and of activations, and the upstream gradient of every product."""
    seen = []

    def spy(function, operands):
        def call(*inputs, **settings):
            y = function(*inputs, **settings)
            seen.extend((function.__name__, x.data) for x in inputs[:operands] if x is not None)
            if y.node and function.__name__ != "linear_cross_entropy":
                inner = y.node.backward
                y.node.backward = lambda dy: (seen.append((f"gradient of {function.__name__}", dy)), inner(dy))[1]
            return y

        return call

    operands = dict(linear=3, linear_cross_entropy=2, rmsnorm=1, layernorm=1, rope=1, cross_entropy=0)
    for name, count in operands.items():
        monkeypatch.setattr(ops, name, spy(getattr(ops, name), count))
    for name, function in list(ATTENTIONS.items()):
        monkeypatch.setitem(ATTENTIONS, name, spy(function, 3))
    model = model_of(precision=precision, **choices)
    for block in model.blocks:
        block.mlp.activation = spy(block.mlp.activation, 2)
    loss_of(model).backward()
    assert len(seen) > 50 and any(name.startswith("gradient of ") for name, _ in seen)
    for name, x in seen:
        assert x.dtype == np.float32 and on_grid(x, precision), name
    assert not on_grid(model.blocks[0].mlp.up.weight.data, precision)  # the master weights keep all their digits


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_are_rounded_before_they_are_added_up(precision):
    """Of one use of a matrix on the grid; those of several uses (a tied table) or batches add up in float32."""
    model = model_of(precision=precision, tie=False, bias=True)
    loss_of(model).backward()
    grads = {name: p.grad.copy() for name, p in model.named_parameters()}
    for name, grad in grads.items():
        if "norm" not in name and name != "embedding.weight":
            assert on_grid(grad, precision), name
    assert not on_grid(grads["norm.weight"], precision)  # a gain is applied in float32
    loss_of(model).backward(1 / 3)
    total, once = model.blocks[0].mlp.up.weight.grad, grads["blocks.0.mlp.up.weight"]
    assert not on_grid(total, precision)
    assert np.linalg.norm(total - once * 4 / 3) < 0.02 * np.linalg.norm(total)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.04), ("fp16", 0.005)])
def test_loss_and_gradients_are_near_those_of_float32(choices, precision, tolerance):
    exact, rounded = model_of(**choices), model_of(**choices, precision=precision)
    expected, found = loss_of(exact), loss_of(rounded)
    assert found.dtype == np.float32 and found.item() == pytest.approx(expected.item(), rel=tolerance)
    assert found.item() != expected.item()
    expected.backward()
    found.backward(1024.0)  # fp16 needs a loss scale, or small gradients fall off the grid
    a = np.concatenate([p.grad.reshape(-1) for _, p in exact.named_parameters()])
    b = np.concatenate([p.grad.reshape(-1) for _, p in rounded.named_parameters()]) / 1024
    assert np.linalg.norm(a - b) < 4 * tolerance * np.linalg.norm(a)


def test_fp32_rounds_nothing():
    model = model_of()
    with no_grad():
        assert model.output_weight is model.embedding.weight
        assert not on_grid(model.hidden(IDS).data, "bf16")


def test_fp16_overflow_reaches_the_gradient():
    """Too large a loss scale gives infinities, which the scaler looks for; nothing is clipped on the way."""
    model = model_of(precision="fp16")
    with np.errstate(all="ignore"):
        loss_of(model).backward(1e9)
    assert not all(np.isfinite(p.grad).all() for _, p in model.named_parameters())
