"""The one loop and its update: accumulation, precision, overflow, divergence, outliers, evaluation."""
import functools
import io
import json
import math

import numpy as np
import pytest
from tiny_run import arguments, final_bytes, history, nervous, train

from tinyllm.backend import random_stream
from tinyllm.cli.main import main
from tinyllm.data import IGNORE, Batch
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.optim import LossScaler, OutlierDetector
from tinyllm.stages import load_run
from tinyllm.train import trainer as trainer_module
from tinyllm.train.checkpoint import list_checkpoints, load_checkpoint
from tinyllm.train.config import TrainConfig
from tinyllm.train.loop import mean_loss
from tinyllm.train.loop import train as loop
from tinyllm.train.next_token import next_token_loss
from tinyllm.train.progress import Progress
from tinyllm.train.trainer import Diverged, Trainer

CONFIG = TransformerConfig(vocab_size=11, layers=1, heads=2, width=8, context=6)


def model(dtype=np.float32, **changes):
    return Transformer(TransformerConfig(**{**vars(CONFIG), **changes}), random_stream(1, "weights"), dtype)


def trainer(dtype=np.float32, precision="fp32", **settings):
    config = TrainConfig(**{"lr": 1e-2, **settings}).planned(50)
    return Trainer(model(dtype, precision=precision), next_token_loss(config), config, precision)


def batch(rows, seed=0, ignored=0.0):
    """Random tokens; `ignored` of the targets do not count."""
    random = random_stream(seed, "tokens")
    ids = random.integers(11, size=(rows, 7))
    targets = np.where(random.random((rows, 6)) < ignored, IGNORE, ids[:, 1:])
    return Batch(ids[:, :-1], targets)


def pieces(whole, sizes):
    ends = np.cumsum(sizes)
    return [Batch(whole.ids[e - n : e], whole.targets[e - n : e]) for n, e in zip(sizes, ends, strict=True)]


def update(t, batches):
    """One update, and its record."""
    t.update(batches)
    return t.look(lambda step: batches)


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-6)])
@pytest.mark.parametrize("settings", [{}, dict(label_smoothing=0.1, z_loss=1e-3)])
def test_micro_batches_with_unequal_targets_equal_one_big_batch(dtype, tolerance, settings):
    t, whole = trainer(dtype, **settings), batch(8, ignored=0.5)
    whole.targets[2:4] = IGNORE
    whole.targets[2, 0] = 3
    micro = pieces(whole, [2, 2, 1, 3])
    assert len({b.weight for b in micro}) > 2
    loss, square = t.gradients([whole])
    expected = t.optimizer.flat.grad.copy()
    assert t.gradients(micro) == (pytest.approx(loss, rel=tolerance), pytest.approx(square, rel=2 * tolerance))
    assert np.abs(t.optimizer.flat.grad - expected).max() <= tolerance * np.abs(expected).max()


def test_a_micro_batch_without_targets_counts_nothing():
    t, whole = trainer(np.float64), batch(4)
    loss, _ = t.gradients(pieces(whole, [2, 2]))
    expected = t.optimizer.flat.grad.copy()
    empty = Batch(whole.ids, np.full_like(whole.targets, IGNORE))
    with pytest.warns(RuntimeWarning, match="every target is ignored"):
        assert t.gradients([*pieces(whole, [2]), empty, *[Batch(whole.ids[2:], whole.targets[2:])]])[0] == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(t.optimizer.flat.grad, expected, rtol=1e-12, atol=1e-15)


def test_an_update_is_adamw_on_the_clipped_gradient():
    """One step by hand: Adam's first step is lr·sign(g) wherever |g| ≫ ε, whatever clipping did; decay acts on matrices alone."""
    t = trainer(np.float64, clip=1e-3, weight_decay=0.5, warmup=0)
    before = {name: p.data.copy() for name, p in t.model.named_parameters()}
    record = update(t, [batch(4)])
    assert record["step"] == t.step == 1 and record["lr"] == pytest.approx(1e-2) and record["grad_norm"] > 1e-3
    factor = 1e-3 / (record["grad_norm"] + 1e-6)
    for name, p in t.model.named_parameters():
        g = p.grad * factor
        expected = before[name] * (1 - 1e-2 * 0.5 * (p.ndim >= 2)) - 1e-2 * g / (np.abs(g) + 1e-8)
        np.testing.assert_allclose(p.data, expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_one_batch_is_learned_by_heart():
    t, same = trainer(np.float32, weight_decay=0.0), [batch(2)]
    first = update(t, same)["loss"]
    assert abs(first - math.log(11)) < 0.2
    for _ in range(49):
        last = update(t, same)["loss"]
    assert last < 0.5 * first


def test_loop_without_store_or_validation_tells_its_observers():
    t = TrainConfig(lr=1e-2).planned(5)
    seen = []
    outcome = loop(model(), lambda n: [batch(2, n)], next_token_loss(t), t, observers=[seen.append])
    assert [r["step"] for r in seen] == [1, 2, 3, 4, 5] and {r["event"] for r in seen} == {"step"}
    assert (outcome.trainer.step, outcome.tokens, outcome.interrupted) == (5, 60, False)
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.filterwarnings("error")
def test_between_looks_nothing_is_lost(monkeypatch):
    """A log line in three steps has what a run with one in each has there; a divergence is found at the next one, the weights still good."""
    def run(steps, log_every):
        config, seen, m = TrainConfig(lr=1e-2, log_every=log_every).planned(steps), [], model()
        outcome = loop(m, lambda n: [batch(2, n)], next_token_loss(config), config, observers=[seen.append])
        return outcome, [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in seen]

    (dense, every), (sparse, some) = run(8, 1), run(8, 3)
    assert some == [every[i] for i in (2, 5, 7)] and dense.tokens == sparse.tokens
    assert (dense.trainer.optimizer.flat.data == sparse.trainer.optimizer.flat.data).all()
    rate = trainer_module.learning_rate
    monkeypatch.setattr(trainer_module, "learning_rate", lambda step, **rest: 1e36 if step == 3 else rate(step, **rest))
    t = trainer(log_every=5)
    for n in range(10):
        t.update([batch(2, n)])
        if n == 3:
            ruined = t.optimizer.flat.data.copy()
    with pytest.raises(Diverged, match="diverged at step 5: loss"):
        t.look(lambda n: [batch(2, n)])
    assert t.step == t.optimizer.steps == 4 and np.array_equal(t.optimizer.flat.data, ruined)


def test_the_display_follows_the_loss_as_fast_with_fewer_lines():
    dense, sparse = Progress(100, stream=io.StringIO()), Progress(100, stream=io.StringIO())
    for n in range(1, 101):
        record = dict(event="step", step=n, loss=5.0 if n < 60 else 3.0, tokens_per_second=1.0, seconds=n)
        dense(record)
        if n % 10 == 0:
            sparse(record)
    assert dense.smooth["loss"] == pytest.approx(3.0, abs=0.05) and sparse.smooth["loss"] == pytest.approx(3.0, abs=0.05)


# Precision

@pytest.fixture(scope="module")
def by_precision(tmp_path_factory):
    folder, losses = tmp_path_factory.mktemp("precision"), {}
    for precision in ("fp32", "bf16", "fp16"):
        run = train(folder, "--precision", precision, "--steps", 60, "--lr", 1e-2, "--out", folder / precision).with_name(precision)
        losses[precision] = [r["val_loss"] for r in history(run) if r["event"] == "evaluation"]
    return losses


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_well(by_precision, precision):
    plain, half = by_precision["fp32"], by_precision[precision]
    assert plain[-1] < plain[0] - 0.5
    assert half != plain and abs(half[-1] - plain[-1]) < 0.05


def test_overflow_in_fp16_halves_the_scale_and_leaves_the_update_out(monkeypatch):
    monkeypatch.setattr(LossScaler, "for_precision", lambda precision: LossScaler(2.0**40, growth_interval=4))
    t = trainer(precision="fp16")
    before, records = t.optimizer.flat.data.copy(), []
    while not records or "skipped" in records[-1]:
        records.append(update(t, [batch(4)]))
        assert (t.optimizer.flat.data == before).all() == ("skipped" in records[-1])
    assert len(records) > 5 and t.optimizer.steps == 1 and t.step == len(records)
    for i, record in enumerate(records[:-1]):
        assert (record["skipped"], record["grad_norm"], record["loss_scale"]) == ("overflow", None, 2.0 ** (40 - i))
        json.dumps(record, allow_nan=False)
    good = [update(t, [batch(4)]) for _ in range(20)]
    assert good[-1]["loss"] < records[-1]["loss"]
    scales = [r["loss_scale"] for r in good]
    assert any(b == 2 * a for a, b in zip(scales, scales[1:], strict=False))  # it grows again


def test_loss_scale_does_not_change_the_gradient(monkeypatch):
    seen = []
    for scale in (1.0, 2.0**10):
        monkeypatch.setattr(LossScaler, "for_precision", lambda precision, scale=scale: LossScaler(scale))
        t = trainer(np.float32)
        seen.append((update(t, [batch(4)])["grad_norm"], t.optimizer.state_dict()["exp_avg.embedding.weight"]))
    assert seen[0][0] == pytest.approx(seen[1][0], rel=1e-6)
    np.testing.assert_allclose(seen[0][1], seen[1][1], rtol=1e-5, atol=1e-12)


# Divergence

def test_nan_in_a_weight_is_named():
    t = trainer()
    update(t, [batch(2)])
    t.model.blocks[0].mlp_norm.weight.data[3] = np.nan
    before = t.optimizer.flat.data.copy()
    with pytest.raises(Diverged, match=r"diverged at step 2: loss nan.*the weights 'blocks\.0\.mlp_norm\.weight' hold NaN") as caught:
        update(t, [batch(2)])
    assert "\n" not in str(caught.value) and t.step == 1
    assert np.array_equal(t.optimizer.flat.data, before, equal_nan=True)


@pytest.mark.filterwarnings("error")  # the diagnosis says it all: no warning per array on the way there
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_first_op_that_overflows_is_named(precision):
    t = trainer(precision=precision)
    t.model.blocks[0].mlp_norm.weight.data[...] = 1e30 if precision != "fp16" else 6e4
    with pytest.raises(Diverged, match=r"(the op '\w+'|the backward of '\w+' for its input \d) made NaN or infinity: result float"):
        for _ in range(40):
            update(t, [batch(2)])


@pytest.mark.filterwarnings("error")
def test_divergence_stops_with_a_diagnosis_and_leaves_the_checkpoint(tmp_path, monkeypatch, capfd):
    """The learning rate explodes at step 8; the checkpoint of step 5 stays as it was, and can be used."""
    rate = trainer_module.learning_rate
    monkeypatch.setattr(trainer_module, "learning_rate", lambda step, **rest: 1e36 if step == 7 else rate(step, **rest))
    assert main(arguments(tmp_path, "--steps", 20, "--eval-every", 5)) == 1
    err = capfd.readouterr().err
    assert err.startswith("tinyllm: error: training diverged at step 9: loss ") and err.count("\n") == 1  # no warnings beside it
    assert " made NaN or infinity: " in err and "Try a lower --lr" in err and err.endswith("The newest checkpoint is of step 5\n")
    run = tmp_path / "run"
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert load_checkpoint(checkpoint).step == 5
    trained, tokenizer, _ = load_run(run)
    assert all(np.isfinite(p.data).all() for _, p in trained.named_parameters())
    assert not (run / "summary.json").exists()
    assert all(math.isfinite(r.get("loss", 0)) for r in history(run))
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0  # the explosion was planted: without it the run goes on


@pytest.mark.filterwarnings("error")
def test_a_last_update_that_ruins_the_model_is_not_called_a_success(tmp_path, monkeypatch, capsys):
    rate = trainer_module.learning_rate
    monkeypatch.setattr(trainer_module, "learning_rate", lambda step, **rest: 1e39 if step == 9 else rate(step, **rest))
    assert main(arguments(tmp_path, "--steps", 10, "--eval-every", 5)) == 1
    assert "the loss of an evaluation is nan" in capsys.readouterr().err
    assert [p.name for p in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000005"]


# Outliers

def test_an_update_from_garbage_is_left_out(monkeypatch):
    monkeypatch.setattr(trainer_module, "OutlierDetector", functools.partial(OutlierDetector, window=8))
    t, same = trainer(skip_outliers=4.0, lr=1e-3), batch(2)
    for n in range(10):
        assert "skipped" not in update(t, [same if n % 2 else batch(2, 1)])
    t.model.blocks[0].mlp.down.weight.data[...] *= 1  # nothing else changes the weights below
    before, taken = t.optimizer.flat.data.copy(), t.optimizer.steps
    garbage = Batch(np.zeros_like(same.ids), np.full_like(same.targets, 7))
    record = update(t, [garbage])
    assert record["skipped"] == "outlier" and record["grad_norm"] > 0
    assert (t.optimizer.flat.data == before).all() and (t.step, t.optimizer.steps) == (11, taken)
    assert "skipped" not in update(t, [same])


def test_outliers_are_in_the_log_and_count_as_steps(tmp_path, monkeypatch):
    nervous(monkeypatch.setattr)
    run = train(tmp_path, "--steps", 30, "--skip-outliers", 1)
    steps = [r for r in history(run) if r["event"] == "step"]
    skipped = [r["step"] for r in steps if "skipped" in r]
    assert [r["step"] for r in steps] == list(range(1, 31)) and 0 < len(skipped) < 20 and min(skipped) > 4
    optimizer = load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).optimizer
    assert int(optimizer["step"]) == 30 - len(skipped)
    plain = train(tmp_path, "--steps", 30, "--out", tmp_path / "plain").with_name("plain")
    assert final_bytes(run)[0] != final_bytes(plain)[0]


def test_a_restored_trainer_is_the_same_trainer(monkeypatch):
    nervous(monkeypatch.setattr)
    t = trainer(precision="fp16", skip_outliers=2.0)
    for n in range(24):
        update(t, [batch(2, n)])
    assert t.state()["scaler"]["scale"] < 2.0**30 and all(len(d["values"]) == 4 for d in t.state()["outliers"].values())
    other = trainer(precision="fp16", skip_outliers=2.0)
    other.restore(t.model.state_dict(), t.optimizer.state_dict(), json.loads(json.dumps(t.state())))
    assert other.state() == t.state() and (other.optimizer.flat.data == t.optimizer.flat.data).all()
    assert [update(t, [batch(2, n)]) for n in range(24, 40)] == [update(other, [batch(2, n)]) for n in range(24, 40)]


# Evaluation

def test_mean_loss_weighs_by_targets_and_keeps_no_graph():
    t, loss_fn = model(np.float64), next_token_loss(TrainConfig(label_smoothing=0.3, z_loss=0.1))
    whole = batch(6, ignored=0.4)
    plain = next_token_loss(TrainConfig())(t, whole, None).item()
    assert mean_loss(t, loss_fn, iter(pieces(whole, [1, 3, 2]))) == pytest.approx(plain, rel=1e-12)  # evaluation knows no smoothing
    assert all(p.grad is None for _, p in t.named_parameters())
    assert mean_loss(t, loss_fn, []) == 0.0
