"""LoRA and DoRA: by their formulas, merged and unmerged bitwise, frozen weights without cost, with kernels and checkpoints."""
import numpy as np
import pytest

from tinyllm import ops
from tinyllm.backend import random_stream
from tinyllm.data import Batch, RandomWindows
from tinyllm.kernels import plain_ops
from tinyllm.kernels.cpu import block as block_kernel
from tinyllm.kernels.known import known_layers
from tinyllm.nn import Linear, LoRA, LoRAConfig, LoRALinear, Transformer, TransformerConfig, freeze, grow_vocabulary, unfreeze
from tinyllm.optim import AdamW
from tinyllm.tensor import Tensor, no_grad
from tinyllm.train import TrainConfig, next_token_loss, train
from tinyllm.train.store import Store

IDS = np.random.default_rng(2).integers(0, 50, (3, 40))
KINDS = {"lora": {}, "dora": dict(dora=True)}


def model_of(dtype=np.float32, **choices):
    config = TransformerConfig(**(dict(vocab_size=50, layers=2, heads=4, width=32, context=70) | choices))
    model = Transformer(config, np.random.default_rng(0), dtype)
    random = np.random.default_rng(1)
    for _, p in model.named_parameters():
        p.data = (p.data + 0.2 * random.standard_normal(p.shape)).astype(dtype)
    return model


def adapted(model, seed=3, **choices):
    """An adapter that has learned something."""
    adapter = LoRA(model, LoRAConfig(**choices), np.random.default_rng(seed))
    rng = np.random.default_rng(4)
    for name, p in adapter.named_parameters():
        p.data = (p.data * rng.uniform(0.5, 2, p.shape) if "magnitude" in name else 0.2 * rng.standard_normal(p.shape)).astype(p.dtype)
    return adapter


def scores(model, **around):
    with no_grad():
        return model(IDS, **around).numpy()


def bits(model):
    return {name: array.copy() for name, array in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("dora", [False, True])
def test_layer_is_its_formula(dora):
    rng = np.random.default_rng(0)
    x, W, b, A, B, m = (rng.standard_normal(shape) for shape in ((2, 5, 4), (3, 4), 3, (2, 4), (3, 2), 3))
    linear = Linear(4, 3, rng=rng, dtype=np.float64)
    layer = LoRALinear(linear, LoRAConfig(rank=2, alpha=6.0, dora=dora), rng=rng)
    layer.weight.data, layer.bias.data, layer.lora_a.data, layer.lora_b.data = W, b, A, B
    V = W + 6.0 / 2 * B @ A
    if dora:
        layer.magnitude.data = m
        V = np.stack([m[i] * V[i] / np.linalg.norm(V[i]) for i in range(3)])
    np.testing.assert_allclose(layer(Tensor(x)).numpy(), x @ V.T + b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(layer.merged().numpy(), V, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_at_first_nothing_changes(kind, arch):
    model = model_of(arch=arch)
    with plain_ops():
        before = scores(model)
        LoRA(model, LoRAConfig(**KINDS[kind]), np.random.default_rng(0))
        np.testing.assert_array_equal(scores(model), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_merged_gives_the_same_and_unmerged_the_same_bits(kind, arch):
    model = model_of(np.float64, arch=arch)
    plain, plain_scores = bits(model), scores(model)
    adapter = adapted(model, **KINDS[kind])
    with_adapter, expected = bits(model), scores(model)
    assert np.abs(expected - plain_scores).max() > 0.1
    adapter.merge()
    np.testing.assert_allclose(scores(model), expected, rtol=1e-9, atol=1e-9)
    assert model.state_dict().keys() == plain.keys() and all(type(block.attention.query) is Linear for block in model.blocks)
    fresh = Transformer(model.config, np.random.default_rng(9), np.float64)
    fresh.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(scores(fresh), scores(model))
    adapter.unmerge()
    assert_equal(bits(model), with_adapter)
    np.testing.assert_array_equal(scores(model), expected)
    adapter.remove()
    assert_equal(bits(model), plain)
    np.testing.assert_array_equal(scores(model), plain_scores)


def test_names_and_targets():
    model = model_of(arch="gpt2", layers=1)
    adapter = LoRA(model, LoRAConfig(targets=("query", "up"), dora=True), np.random.default_rng(0))
    names = [f"blocks.0.{path}.{part}" for path in ("attention.query", "mlp.up") for part in ("lora_a", "lora_b", "magnitude")]
    assert list(adapter.state_dict()) == names == [name for name, p in model.named_parameters() if p.requires_grad]
    assert "blocks.0.attention.query.weight" in model.state_dict()
    with pytest.raises(ValueError, match="no linear map of the blocks is called 'gate'.*query, key, value, output, up, down"):
        LoRA(model_of(arch="gpt2"), LoRAConfig(targets=("gate",)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="'qeury'; did you mean query"):
        LoRA(model_of(), LoRAConfig(targets=("qeury",)), np.random.default_rng(0))
    for wrong in (dict(rank=0), dict(alpha=0.0), dict(adapter_dropout=1.0)):
        with pytest.raises(ValueError, match="it must be at"):
            LoRAConfig(**wrong)
    with pytest.raises(ValueError, match="no Linear"):
        model = model_of()
        [LoRA(model, LoRAConfig(), np.random.default_rng(0)) for _ in range(2)]
    model = model_of()
    model.blocks[0].mlp.up.weight.data[3] = 0
    before = model.blocks[0].mlp.up
    with pytest.raises(ValueError, match="blocks.0.mlp.up.weight is all zeros"):
        LoRA(model, LoRAConfig(dora=True), np.random.default_rng(0))
    assert model.blocks[0].mlp.up is before and before.weight.requires_grad


def test_an_adapter_alone_is_saved_and_loaded():
    model = model_of()
    saved = {name: array.copy() for name, array in adapted(model).state_dict().items()}
    other = model_of()
    adapter = LoRA(other, LoRAConfig(), np.random.default_rng(8))
    adapter.load_state_dict(saved)
    np.testing.assert_array_equal(scores(other), scores(model))
    with pytest.raises(ValueError, match="blocks.0.attention.query.lora_a"):
        LoRA(model_of(), LoRAConfig(rank=2), np.random.default_rng(0)).load_state_dict(saved)
    with pytest.raises(ValueError, match="lack"):
        adapter.load_state_dict({})


def test_frozen_weights_cost_no_gradient_and_no_memory(monkeypatch):
    model = model_of()
    adapter = adapted(model)
    asked, linear = [], ops.linear.run

    def spy(x, w, b=None):
        y, backward = linear(x, w, b)

        def watched(dy):
            return tuple((lambda g=g, i=i, shape=w.shape: asked.append((i, shape)) or (g() if callable(g) else g)) for i, g in enumerate(backward(dy)))

        return y, watched

    monkeypatch.setattr(ops.linear, "run", spy)
    ops.linear_cross_entropy(model.hidden(IDS[:, :-1]), model.output_weight, IDS[:, 1:]).backward()
    assert {shape for i, shape in asked if i == 1} == {p.shape for _, p in adapter.named_parameters()}  # no dW but the adapter's
    learned = sum(p.size for _, p in adapter.named_parameters())
    assert all((p.grad is None) == (not p.requires_grad) for _, p in model.named_parameters())
    optimizer = AdamW(model.named_parameters())
    assert optimizer.flat.data.size == learned == sum(p.size for _, p in model.named_parameters() if p.requires_grad)
    assert all(array.size == learned for array in optimizer.state.values())


def test_whole_block_kernels_decline_an_adapter_and_take_what_is_merged(monkeypatch):
    runs, run = [], block_kernel.fused_block.run
    monkeypatch.setattr(block_kernel.fused_block, "run", lambda *arrays, **settings: runs.append(1) or run(*arrays, **settings))
    model, ids = model_of(context=128), np.random.default_rng(0).integers(0, 50, (2, 128))
    adapter = adapted(model)
    with no_grad():
        expected = model(ids).numpy()
        assert not runs and not known_layers(model.blocks[0])
        with plain_ops():
            np.testing.assert_allclose(model(ids).numpy(), expected, atol=1e-4)
        adapter.merge()
        np.testing.assert_allclose(model(ids).numpy(), expected, atol=1e-4)
        assert runs


@pytest.mark.parametrize("merged", [False, True])
def test_decoding_with_a_cache_sees_the_adapter(merged):
    model = model_of(np.float64)
    adapter = adapted(model)
    expected = scores(model)[:, -1]
    if merged:
        adapter.merge()
    with no_grad():
        cache = model.new_cache(len(IDS))
        model.next_scores(IDS[:, :-1], cache)
        np.testing.assert_allclose(model.next_scores(IDS[:, -1:], cache).numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_falls_on_the_adapter_alone_and_is_the_callers(recompute):
    model = model_of(np.float64, recompute=recompute)
    adapted(model, adapter_dropout=0.5)

    def gradients(rng):
        for _, p in model.named_parameters():
            p.grad = None
        loss = ops.linear_cross_entropy(model.hidden(IDS[:, :-1], rng=rng), model.output_weight, IDS[:, 1:])
        loss.backward()
        return loss.item(), np.concatenate([p.grad.ravel() for _, p in model.named_parameters() if p.requires_grad])

    plain, first, again, other = (gradients(rng and np.random.default_rng(rng)) for rng in (None, 1, 1, 2))
    assert first[0] == again[0] and first[0] not in (plain[0], other[0])
    np.testing.assert_array_equal(first[1], again[1])
    if recompute:
        model.config = model_of(recompute=False).config
        np.testing.assert_array_equal(gradients(np.random.default_rng(1))[1], first[1])


def test_dropout_keeps_the_mean():
    layer = LoRALinear(Linear(8, 3, rng=np.random.default_rng(0), dtype=np.float64), LoRAConfig(adapter_dropout=0.5), rng=np.random.default_rng(1))
    layer.lora_b.data[...] = np.random.default_rng(2).standard_normal(layer.lora_b.shape)
    x, rng = Tensor(np.random.default_rng(3).standard_normal((1, 8))), np.random.default_rng(4)
    drawn = np.concatenate([layer(x, rng).numpy() for _ in range(4000)])
    np.testing.assert_allclose(drawn.mean(0), layer(x).numpy()[0], atol=4 * drawn.std(0).max() / 4000**0.5)


def small_run(folder, steps, plan=12, stop_at=None, precision="fp32"):
    """A LoRA run with checkpoints. Returns the model."""
    model = model_of(layers=1, precision=precision)
    LoRA(model, LoRAConfig(rank=2, adapter_dropout=0.1), random_stream(0, "adapter"))
    unfreeze(model, "norm")
    windows = RandomWindows(np.arange(500) * 7 % 50, 16, 4, seed=0)
    settings = TrainConfig(lr=1e-2, checkpoint_every=4, threads=1, eval_every=100).planned(plan)
    loss = next_token_loss(settings)

    def dying(model, batch, rng):
        if stop_at is not None and stop_at == dying.calls:
            raise KeyboardInterrupt
        dying.calls += 1
        return loss(model, batch, rng)

    dying.calls = 0
    train(model, lambda n: [windows.batch(n)], dying, settings, store=Store(folder, keep=2), precision=precision)
    return model


def test_a_killed_run_resumes_bitwise(tmp_path):
    whole = bits(small_run(tmp_path / "whole", 12))
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "killed", 12, stop_at=10)
    assert_equal(bits(small_run(tmp_path / "killed", 12)), whole)
    start = bits(model_of(layers=1))
    changed = {name for name in whole if name not in start or (whole[name] != start[name]).any()}
    assert changed == {name for name in whole if "lora" in name} | {"norm.weight"}


def test_an_adapter_trains_in_16_bits(tmp_path):
    model = small_run(tmp_path, 12, precision="bf16")
    assert all(np.isfinite(array).all() for array in model.state_dict().values()) and model.blocks[0].mlp.up.lora_b.data.any()


# ---- freezing ----


def test_freeze_by_name():
    model = model_of()
    freeze(model, "embedding", "blocks.0", "blocks.1.mlp.up.weight")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name in model.state_dict() if name.startswith(("embedding.", "blocks.0."))} | {"blocks.1.mlp.up.weight"}
    unfreeze(model, "blocks.0.attention")
    assert model.blocks[0].attention.key.weight.requires_grad and not model.blocks[0].mlp.up.weight.requires_grad
    unfreeze(model)
    assert all(p.requires_grad for _, p in model.named_parameters())
    for wrong, message in {"block.0": "did you mean blocks", "blocks.7": "no part 'blocks.7'", "": "no part ''"}.items():
        with pytest.raises(ValueError, match=message):
            freeze(model, wrong)
    assert all(p.requires_grad for _, p in model.named_parameters())
    with pytest.raises(ValueError, match="whole model frozen"):
        freeze(model)
        AdamW(model.named_parameters())


# ---- more tokens ----


@pytest.mark.parametrize("tie", [True, False])
def test_new_rows_hardly_change_what_the_model_says(tie):
    model = model_of(np.float64, tie=tie)
    model.embedding.weight.data += 1.0  # a mean that is not near 0, as trained rows have
    old, before = model.embedding.weight.data, scores(model)
    grow_vocabulary(model, 54, np.random.default_rng(0))
    after = scores(model)
    assert model.config.vocab_size == 54 == model.output_weight.shape[0] == len(model.embedding.weight)
    np.testing.assert_array_equal(after[..., :50], before)
    mean = before.mean(-1, keepdims=True)
    assert np.abs(after[..., 50:] - mean).max() < 1.5 * before.std(-1).max()
    p = np.exp(before) / np.exp(before).sum(-1, keepdims=True)
    grown = np.exp(after) / np.exp(after).sum(-1, keepdims=True)
    assert np.median(grown[..., :50] / p) > 0.9
    rows = model.embedding.weight.data[50:]
    assert len(np.unique(rows, axis=0)) == 4 and (np.abs(rows - old.mean(0)) < 0.5 * old.std(0)).all()
    AdamW(model.named_parameters())
    with pytest.raises(ValueError, match="54 tokens, which cannot grow to 20"):
        grow_vocabulary(model, 20, np.random.default_rng(0))


def test_growing_by_nothing_changes_nothing():
    model = model_of()
    before = bits(model)
    grow_vocabulary(model, 50, np.random.default_rng(0))
    assert_equal(bits(model), before)


def test_an_optimizer_from_before_notices():
    model = model_of()
    optimizer = AdamW(model.named_parameters())
    grow_vocabulary(model, 51, np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="make the optimizer afterwards"):
        optimizer.zero_grad()


def test_the_adapter_learns_one_batch():
    model = model_of()
    LoRA(model, LoRAConfig(rank=8), np.random.default_rng(0))
    unfreeze(model, "norm")  # whose gain bounds how sure the model can be
    batch = Batch(IDS[:, :12], IDS[:, 1:13])
    optimizer, loss_fn, losses = AdamW(model.named_parameters(), weight_decay=0.0), next_token_loss(TrainConfig()), []
    for _ in range(200):
        optimizer.zero_grad()
        loss = loss_fn(model, batch, None)
        loss.backward()
        optimizer.step(1e-2)
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.05
