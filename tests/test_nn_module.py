"""Module and its parameters: names, order, saving and loading, freezing, the first weights."""
import gc
import weakref

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.nn import Embedding, Linear, Module, Parameter, Transformer, TransformerConfig
from tinyllm.tensor import Tensor

TINY = dict(vocab_size=11, layers=2, heads=2, width=8, mlp_width=12, context=6)
IDS, TARGETS = np.random.RandomState(0).randint(0, 11, (2, 3, 5))


def model_of(dtype=np.float32, seed=0, **changes):
    return Transformer(TransformerConfig(**(TINY | changes)), np.random.default_rng(seed), dtype)


def loss_of(model):
    return ops.linear_cross_entropy(model.hidden(IDS), model.output_weight, TARGETS)


def test_a_model_is_freed_with_its_last_name():
    """Without waiting for the garbage collector: weights are large."""
    gc.collect()
    gc.disable()
    try:
        model = model_of()
        blocks = [weakref.ref(block) for block in model.blocks]
        del model
        assert not any(block() for block in blocks)
    finally:
        gc.enable()


def test_names_come_in_the_order_of_the_attributes():
    names = [name for name, _ in model_of(arch="gpt2", layers=1).named_parameters()]
    parts = ["attention_norm", "attention.query", "attention.key", "attention.value", "attention.output", "mlp_norm", "mlp.up", "mlp.down"]
    block = [f"blocks.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    assert names == ["embedding.weight", "position_embedding.weight", *block, "norm.weight", "norm.bias"]
    names = [name for name, _ in model_of(arch="llama", layers=1, tie=False, qk_norm=True).named_parameters()]
    assert names == [
        "embedding.weight", "blocks.0.attention_norm.weight", "blocks.0.attention.query.weight", "blocks.0.attention.key.weight",
        "blocks.0.attention.value.weight", "blocks.0.attention.output.weight", "blocks.0.attention.query_norm.weight",
        "blocks.0.attention.key_norm.weight", "blocks.0.mlp_norm.weight", "blocks.0.mlp.gate.weight", "blocks.0.mlp.up.weight",
        "blocks.0.mlp.down.weight", "norm.weight", "head.weight",
    ]  # fmt: skip


def test_shared_parameters_and_lists():
    class Pair(Module):
        def __init__(self):
            self.layers = [Linear(2, 2, rng=np.random.default_rng(0)), "no module", Linear(2, 2, rng=np.random.default_rng(1), bias=False)]
            self.again = self.layers[0]
            self.scale = Parameter(np.ones(1, np.float32))
            self.constant = Tensor(np.ones(1, np.float32))

    assert [name for name, _ in Pair().named_parameters()] == ["layers.0.weight", "layers.0.bias", "layers.2.weight", "scale"]
    assert [name for name, _ in Pair().named_parameters("pair.")][-1] == "pair.scale"


def test_a_tied_head_is_one_parameter_with_both_gradients():
    tied, untied = model_of(np.float64, tie=True), model_of(np.float64, tie=False)
    assert tied.head is None and not any("head" in name for name in tied.state_dict())
    untied.load_state_dict(tied.state_dict() | {"head.weight": tied.embedding.weight.data})
    loss_of(tied).backward()
    loss_of(untied).backward()
    both = untied.embedding.weight.grad + untied.head.weight.grad
    np.testing.assert_allclose(tied.embedding.weight.grad, both, rtol=1e-12, atol=1e-15)
    assert np.abs(untied.embedding.weight.grad).max() > 1e-4 and np.abs(untied.head.weight.grad).max() > 1e-4


def test_state_dict_round_trip():
    first, second = model_of(seed=0), model_of(seed=1)
    state = first.state_dict()
    assert all(value is p.data for value, (_, p) in zip(state.values(), first.named_parameters(), strict=True))  # memory is shared
    second.load_state_dict(state)
    assert all(np.array_equal(value, state[name]) for name, value in second.state_dict().items())
    second.embedding.weight.data[0] = 7
    assert not (first.embedding.weight.data[0] == 7).any()  # loading copies


def test_loading_takes_other_precisions_and_layouts():
    model = model_of()
    state = {name: np.asfortranarray(value.astype(np.float64)) for name, value in model_of(seed=1).state_dict().items()}
    model.load_state_dict(state)
    assert all(p.dtype == np.float32 and np.array_equal(p.data, state[name].astype(np.float32)) for name, p in model.named_parameters())


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("norm.weight"), "the saved weights lack 'norm.weight' (1 missing): they belong to another model"),
    (lambda s: s.update({"head.weight": s["embedding.weight"]}), "the saved weights hold 'head.weight' (1 unknown), which this model has not"),
    (lambda s: s.update({"norm.weight": np.ones(9)}), "the saved weights have norm.weight of shape (9,), this model (8,)"),
])  # fmt: skip
def test_loading_something_else_changes_nothing(change, message):
    model = model_of()
    before = {name: value.copy() for name, value in model.state_dict().items()}
    state = model_of(seed=1).state_dict()
    change(state)
    with pytest.raises(ValueError) as error:
        model.load_state_dict(state)
    assert str(error.value) == message
    assert all(np.array_equal(value, before[name]) for name, value in model.state_dict().items())


def test_backward_after_loading_is_refused():
    model = model_of()
    loss = loss_of(model)
    model.load_state_dict(model_of(seed=1).state_dict())
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_frozen_parameters_are_saved_but_get_no_gradient():
    model, whole = model_of(np.float64), model_of(np.float64)
    for name, p in model.named_parameters():
        p.requires_grad = "mlp" in name
    assert list(model.state_dict()) == list(whole.state_dict())
    loss_of(model).backward()
    loss_of(whole).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert (p.grad is None) if "mlp" not in name else np.array_equal(p.grad, q.grad), name


@pytest.mark.parametrize("recompute", [False, True])
def test_all_frozen_but_the_last_block(recompute):
    """Recomputed blocks get an input that needs no gradient."""
    model, whole = model_of(np.float64, recompute=recompute), model_of(np.float64)
    for name, p in model.named_parameters():
        p.requires_grad = name.startswith("blocks.1.")
    loss_of(model).backward()
    loss_of(whole).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert np.array_equal(p.grad, q.grad) if name.startswith("blocks.1.") else p.grad is None, name


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_first_weights(arch):
    """Standard deviation 0.02, in the maps that add to the residual stream 0.02/√(2L); gains 1, biases 0; mean 0 throughout."""
    config = TransformerConfig(vocab_size=1000, arch=arch, layers=8, heads=4, width=128, context=200)
    for name, p in Transformer(config, np.random.default_rng(0)).named_parameters():
        assert p.dtype == np.float32
        if name.endswith("bias"):
            assert not p.data.any(), name
        elif "norm" in name:
            assert (p.data == 1).all(), name
        else:
            std = 0.02 / np.sqrt(2 * 8) if "output" in name or "down" in name else 0.02
            assert p.data.std() == pytest.approx(std, rel=0.02), name
            assert abs(p.data.mean()) < 4 * std / np.sqrt(p.size), name


def test_first_weights_of_another_scale():
    config = TransformerConfig(vocab_size=1000, layers=8, heads=4, width=128, context=200, init_std=0.1, embedding_std=0.5, tie=False)
    for name, p in Transformer(config, np.random.default_rng(0)).named_parameters():
        if "norm" not in name:
            std = 0.5 if "embedding" in name else 0.1 / np.sqrt(2 * 8) if "output" in name or "down" in name else 0.1
            assert p.data.std() == pytest.approx(std, rel=0.02), name


def test_first_weights_follow_from_the_generator():
    a, b, c = model_of(seed=0), model_of(seed=0), model_of(seed=1)
    assert all(np.array_equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not np.array_equal(a.embedding.weight.data, c.embedding.weight.data)
    wide = model_of(np.float64, seed=0)
    assert all(np.array_equal(x, y.astype(np.float32)) for x, y in zip(a.state_dict().values(), wide.state_dict().values(), strict=True))


def test_eps_reaches_every_norm():
    model = model_of(norm_eps=0.25, qk_norm=True)
    blocks = [(b.attention_norm, b.mlp_norm, b.attention.query_norm, b.attention.key_norm) for b in model.blocks]
    assert {norm.eps for norms in [*blocks, (model.norm,)] for norm in norms} == {0.25}


def test_layers_alone():
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    layer = Linear(4, 5, rng=np.random.default_rng(0), std=0.5)
    layer.bias.data += 1
    np.testing.assert_allclose(layer(Tensor(x)).data, x @ layer.weight.data.T + 1, rtol=1e-6)
    table = Embedding(6, 3, rng=np.random.default_rng(0))
    assert np.array_equal(table(np.array([[5, 0]])).data, table.weight.data[[[5, 0]]])
    with pytest.raises(ValueError, match="id 6 is outside the vocabulary of 6"):
        table(np.array([6]))
