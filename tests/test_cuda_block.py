"""The block of 16-bit kernels is the block as nn/ writes it: same scores and gradients as float64 on the CPU, as far as 16 bits go."""
import inspect

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.nn.device_memory import fused
from tinyllm.nn.transformer import Block

KINDS = {
    "gpt2": dict(arch="gpt2", heads=2, width=64, bias=True),
    "gpt2 without biases": dict(arch="gpt2", heads=2, width=64, bias=False),
    "llama": dict(arch="llama", heads=4, kv_heads=2, width=128, mlp_width=72),
    "llama, one key head, window": dict(arch="llama", heads=2, kv_heads=1, width=128, window=5),
}
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8}  # the largest relative error of rounding to the format
IDS = np.random.default_rng(1).integers(0, 96, (3, 22))
DOCUMENTS = np.sort(np.random.default_rng(3).integers(0, 4, (3, 21)))


def model_of(xp, kind, precision="bf16", dtype=np.float32, **settings):
    """The same weights in every precision. Biases and gains are moved away from 0 and 1, where mistakes would hide."""
    config = TransformerConfig(vocab_size=96, layers=2, context=32, precision=precision, **(KINDS[kind] | settings))
    model = Transformer(config, np.random.default_rng(0), dtype)
    random = np.random.default_rng(2)
    for _, p in model.named_parameters():
        values = p.data + (0.1 if p.ndim == 1 else 0.02) * random.standard_normal(p.shape)
        p.data = xp.asarray(values.astype(dtype))
    return model


def loss_and_gradients(model, ids=IDS, scale=1.0, **around):
    """The loss, and {name: gradient} as NumPy arrays; those of a scaled loss, scaled back, as fp16 needs it."""
    loss = ops.linear_cross_entropy(model.hidden(ids[:, :-1], **around), model.output_weight, ids[:, 1:])
    loss.backward(scale)
    return loss.numpy().item(), {name: as_numpy(p.grad) / scale for name, p in model.named_parameters()}


def as_numpy(x):
    return np.asarray(x.get() if hasattr(x, "get") else x).astype(np.float64)


def op_by_op(monkeypatch):
    monkeypatch.setattr(Block, "forward", inspect.unwrap(Block.forward))


def errors(found, expected):
    """Without the keys' biases: they move all scores of a query alike, which softmax takes out, so that their gradient is 0."""
    return {name: np.linalg.norm(found[name] - g) / np.linalg.norm(g) for name, g in expected.items() if "key.bias" not in name}


@pytest.mark.parametrize("precision", UNIT)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one text a row", "documents"])
def test_equals_the_definition(world, kind, precision, documents, monkeypatch):
    """No parameter's gradient is further from float64 than a few roundings or, where they cancel, than that of the ops one by one."""
    true, expected = loss_and_gradients(model_of(np, kind, "fp32", np.float64), documents=documents)
    model = model_of(world.xp, kind, precision)
    found, gradients = loss_and_gradients(model, scale=1024.0, documents=documents)
    op_by_op(monkeypatch)
    plain, by_ops = loss_and_gradients(model_of(world.xp, kind, precision), scale=1024.0, documents=documents)
    assert abs(found - true) < 4 * UNIT[precision]
    ours, theirs = errors(gradients, expected), errors(by_ops, expected)
    for name, error in ours.items():
        assert error < max(4 * UNIT[precision], 1.2 * theirs[name]), name
    assert np.mean(list(ours.values())) < np.mean(list(theirs.values()))


def used(model, monkeypatch, **around):
    """How often the block's kernel was used in a forward."""
    from tinyllm.kernels.cuda import block

    calls, real = [], block.fused_block
    monkeypatch.setattr(block, "fused_block", lambda *arrays, **settings: (calls.append(1), real(*arrays, **settings))[1])
    model.hidden(IDS[:, :-1], **around)
    return len(calls)


def test_it_is_used_where_it_is_made_for(world, monkeypatch):
    model = model_of(world.xp, "llama")
    assert used(model, monkeypatch) == 2 and fused(model.config)


@pytest.mark.parametrize("settings", [
    dict(norm_placement="post"), dict(softcap=30.0), dict(qk_norm=True), dict(positions="alibi"), dict(mlp="gelu"), dict(precision="fp32"),
    dict(mlp_width=76), dict(heads=16, kv_heads=16),
], ids=str)  # fmt: skip
def test_it_leaves_other_blocks_alone(world, settings, monkeypatch):
    model = model_of(world.xp, "llama", **settings)
    assert used(model, monkeypatch) == 0 and not fused(model.config)


def test_it_leaves_dropout_and_documents_in_pieces_alone(world, monkeypatch):
    model = model_of(world.xp, "gpt2", dropout=0.1)
    assert used(model, monkeypatch, rng=np.random.default_rng(0)) == 0
    assert used(model, monkeypatch, documents=np.arange(63).reshape(3, 21) % 2) == 0
    assert used(model, monkeypatch, documents=world.xp.zeros((3, 21), int)) == 0  # nobody waits to see whether they are in one piece
    assert used(model, monkeypatch) == used(model, monkeypatch, documents=np.zeros((3, 21), int)) == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_nobody_waits_in_a_step(world, kind):
    model = model_of(world.xp, kind)
    if world.name == "gpu":
        pytest.skip("only the fake device counts")
    with world.xp.forbidden():
        loss = ops.linear_cross_entropy(model.hidden(IDS[:, :-1]), model.output_weight, IDS[:, 1:])
        loss.backward(world.xp.asarray(2.0, dtype="float32"))


def test_one_position(world):
    true, expected = loss_and_gradients(model_of(np, "llama", "fp32", np.float64), IDS[:, :2])
    found, gradients = loss_and_gradients(model_of(world.xp, "llama"), IDS[:, :2])
    assert abs(found - true) < 4 * UNIT["bf16"]
    del expected["blocks.0.attention.query.weight"], expected["blocks.0.attention.key.weight"]  # which see only themselves: 0
    del expected["blocks.1.attention.query.weight"], expected["blocks.1.attention.key.weight"]
    assert max(errors(gradients, expected).values()) < 8 * UNIT["bf16"]


def test_gradients_add_up_and_frozen_weights_get_none(world):
    model = model_of(world.xp, "gpt2")
    frozen = model.blocks[0].attention.key.weight
    _, once = loss_and_gradients(model_of(world.xp, "gpt2"))
    frozen.requires_grad = False
    for _ in range(2):
        ops.linear_cross_entropy(model.hidden(IDS[:, :-1]), model.output_weight, IDS[:, 1:]).backward()
    assert frozen.grad is None
    for name, p in model.named_parameters():
        if p is not frozen:
            assert np.allclose(as_numpy(p.grad), 2 * once[name], rtol=1e-5, atol=1e-7 * np.abs(once[name]).max()), name


def test_recomputing_changes_no_bit(world):
    loss, gradients = loss_and_gradients(model_of(world.xp, "llama"))
    again, same = loss_and_gradients(model_of(world.xp, "llama", recompute=True))
    assert loss == again and all(np.array_equal(g, same[name]) for name, g in gradients.items())


def test_copies_follow_the_weights(world):
    from tinyllm.kernels.cuda import halves
    from tinyllm.tensor import no_grad

    model = model_of(world.xp, "gpt2")
    weight = model.blocks[0].mlp.up.weight
    copy = halves.of(weight, np.dtype("float16"))
    assert halves.of(weight, np.dtype("float16")) is copy
    with no_grad():
        weight[0] = 3.0
    assert as_numpy(halves.of(weight, np.dtype("float16")))[0].tolist() == [3.0] * weight.shape[1]
    assert halves.of(weight, np.dtype("float32")) is weight.data
    weight.data = weight.data * 2
    assert as_numpy(halves.of(weight, np.dtype("float16")))[0, 0] == 6.0
