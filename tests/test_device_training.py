"""Training on a device is the same training: losses, overflow, divergence, checkpoints, resumption; and nothing waits inside a step."""
import io
import json
import math

import numpy as np
import pytest
from tiny_run import arguments, final_bytes, history, nervous

from tinyllm.backend import array_module, deterministic, random_stream, to_numpy
from tinyllm.cli.main import main
from tinyllm.data import IGNORE, Batch
from tinyllm.kernels import plain_ops
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.optim import Control, LossScaler
from tinyllm.threads import threads
from tinyllm.train import Progress, next_token_loss, train
from tinyllm.train import trainer as trainer_module
from tinyllm.train.checkpoint import list_checkpoints, load_checkpoint
from tinyllm.train.config import TrainConfig
from tinyllm.train.loop import mean_loss
from tinyllm.train.store import Store
from tinyllm.train.trainer import LOG_EVERY, Diverged, Trainer

pytest.importorskip("ml_dtypes")  # makes NumPy know bf16

SMALL = dict(vocab_size=19, layers=1, heads=2, width=16, context=8)
LARGE = dict(vocab_size=1031, layers=3, heads=4, width=128, context=96)


@pytest.fixture(autouse=True)
def one_process():
    """On the CPU, too: several draw dropout each for its own rows. What a run has set for the process is undone."""
    before = threads()
    threads(1)
    yield
    threads(before)
    deterministic(False)


def model(xp, size=SMALL, **changes):
    """The same weights on any device."""
    m = Transformer(TransformerConfig(**size | changes), random_stream(1, "weights"))
    for _, p in m.named_parameters():
        p.data = xp.asarray(p.data)
    return m


def batches(size=SMALL, rows=3, micro=2):
    """Step -> micro-batches of unlike weights, and what follows what can be learned."""

    def of_step(n):
        ids = random_stream(0, "tokens", n).integers(5, size=(micro * rows, size["context"] + 1)).cumsum(1) % size["vocab_size"]
        targets = np.where(random_stream(0, "ignored", n).random((micro * rows, size["context"])) < 0.2, IGNORE, ids[:, 1:])
        return [Batch(ids[i::micro, :-1], targets[i::micro]) for i in range(micro)]

    return of_step


def trained(xp, steps=8, *, m=None, size=SMALL, precision="fp32", arch="gpt2", observers=(), of_step=None, store=None, validation=None, **settings):
    """(outcome, records of its steps)"""
    config = TrainConfig(**dict(lr=1e-2, warmup=2, log_every=1) | settings).planned(steps)
    records, m = [], m or model(xp, size, precision=precision, arch=arch)
    outcome = train(
        m, of_step or batches(size), next_token_loss(config), config, observers=[records.append, *observers], store=store,
        validation=validation, precision=precision,
    )  # fmt: skip
    return outcome, [r for r in records if r["event"] == "step"]


def weights(outcome):
    return to_numpy(outcome.trainer.optimizer.flat.data)


def everything(outcome):
    """All that is learned, bit by bit."""
    opt = outcome.trainer.optimizer
    return [to_numpy(x).tobytes() for x in (opt.flat.data, *opt.state.values())] + [json.dumps(outcome.trainer.state()), opt.steps]


# The same training

@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_losses_are_those_of_the_cpu(world, precision, arch):
    size, steps = world.size((SMALL, 8), (LARGE, 60))
    tolerance = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}[precision]
    (host, expected), (device, ours) = (
        trained(xp, steps, size=size, precision=precision, arch=arch, clip=0.5, weight_decay=0.3) for xp in (np, world.xp)
    )
    assert array_module(device.trainer.optimizer.flat.data) is world.xp
    for name in ("step", "lr", "tokens"):
        assert [r[name] for r in ours] == [r[name] for r in expected]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in expected], rel=tolerance)
    assert [r["grad_norm"] for r in ours] == pytest.approx([r["grad_norm"] for r in expected], rel=20 * tolerance)
    assert expected[-1]["loss"] < expected[0]["loss"]


def test_label_smoothing_z_loss_and_dropout(world):
    settings = dict(label_smoothing=0.1, z_loss=1e-3)
    (_, expected), (_, ours) = (trained(xp, m=model(xp, dropout=0.2), **settings) for xp in (np, world.xp))
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in expected], rel=1e-5)


def test_without_kernels_it_is_the_same_training(world):
    """plain_ops stands for a package without kernels: every step is then decided on the host."""
    (_, expected), (_, ours) = trained(world.xp, 4), (None, None)
    with plain_ops():
        outcome, ours = trained(world.xp, 4)
        assert type(outcome.trainer.control) is Control
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in expected], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_bits_in_every_run(world, precision):
    (one, a), (two, b) = (trained(world.xp, 6, precision=precision, deterministic=True) for _ in range(2))
    assert everything(one) == everything(two) and [r["loss"] for r in a] == [r["loss"] for r in b]


# Nothing waits

@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_step_never_waits_and_a_look_does_so_once(world, precision, arch, monkeypatch):
    if world.name == "gpu":
        pytest.skip("the fake device counts")
    xp, update = world.xp, Trainer.update

    def forbidding(self, batches):
        with xp.forbidden("inside a step"):
            return update(self, batches)

    monkeypatch.setattr(Trainer, "update", forbidding)
    seen = []
    before = len(xp.synchronisations)
    _, records = trained(xp, 8, precision=precision, arch=arch, log_every=4, observers=[lambda r: seen.append(len(xp.synchronisations))])
    assert [r["step"] for r in records] == [4, 8] and seen == [before + 1, before + 2]


def test_an_evaluation_waits_once(world):
    if world.name == "gpu":
        pytest.skip("the fake device counts")
    m, before = model(world.xp), len(world.xp.synchronisations)
    expected = mean_loss(model(np), next_token_loss(TrainConfig()), (b for n in range(3) for b in batches()(n)))
    assert mean_loss(m, next_token_loss(TrainConfig()), (b for n in range(3) for b in batches()(n))) == pytest.approx(expected, rel=1e-5)
    assert len(world.xp.synchronisations) == before + 1


def test_outliers_are_looked_for_in_every_step(world):
    (_, expected), (outcome, ours) = (trained(xp, 6, skip_outliers=1.0) for xp in (np, world.xp))
    assert type(outcome.trainer.control) is Control
    assert [r.get("skipped") for r in ours] == [r.get("skipped") for r in expected]


# The log

def test_a_line_in_ten_steps_and_where_something_else_happens(world, tmp_path):
    """The last step, evaluations and checkpoints are looked at in any case; figures are those of the time between looks."""
    lines = io.StringIO()
    settings = dict(log_every=None, eval_every=4, checkpoint_every=7, observers=[Progress(26, stream=lines)], validation=lambda: batches()(99))
    outcome, records = trained(world.xp, 26, store=Store(tmp_path / "device", keep=1), **settings)
    assert [r["step"] for r in records] == [4, 7, 8, LOG_EVERY, 12, 14, 16, 2 * LOG_EVERY, 21, 24, 26]
    everyone, every = trained(np, 26)
    assert [r["tokens"] for r in records] == [every[r["step"] - 1]["tokens"] for r in records] and outcome.tokens == everyone.tokens
    assert [r["loss"] for r in records] == pytest.approx([every[r["step"] - 1]["loss"] for r in records], rel=1e-4)
    assert all(math.isfinite(r["tokens_per_second"]) and r["tokens_per_second"] > 0 for r in records)
    assert all(line.rstrip().endswith(" left") for line in lines.getvalue().splitlines()[1:])
    assert lines.getvalue().count("\n") == 1 + 7


# Overflow and divergence

def test_an_overflow_in_fp16_is_survived(world, monkeypatch):
    monkeypatch.setattr(LossScaler, "for_precision", lambda precision: LossScaler(2.0**28, growth_interval=3))
    outcome, records = trained(world.xp, 26, precision="fp16")
    skipped = [r for r in records if "skipped" in r]
    assert 3 < len(skipped) < 25 and all(r["skipped"] == "overflow" and r["grad_norm"] is None for r in skipped)
    scales = [r["loss_scale"] for r in records]
    assert any(b == 2 * a for a, b in zip(scales, scales[1:], strict=False)) and any(a == 2 * b for a, b in zip(scales, scales[1:], strict=False))
    assert outcome.trainer.optimizer.steps == 26 - len(skipped) and records[-1]["loss"] < records[0]["loss"]
    json.dumps(records, allow_nan=False)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log_every", [1, 5])
def test_divergence_is_found_at_the_next_look_with_the_weights_that_it_came_from(world, log_every, monkeypatch):
    """The learning rate explodes in step 7, so step 8's loss is not finite; until the look after it nothing is changed any more."""
    rate, trainers = trainer_module.learning_rate, []
    monkeypatch.setattr(trainer_module, "learning_rate", lambda step, **rest: 1e36 if step == 6 else rate(step, **rest))
    loss_fn = next_token_loss(TrainConfig())

    def watched(m, batch, rng):
        return loss_fn(m, batch, rng)

    def run(steps, looks):
        config = TrainConfig(lr=1e-2, warmup=2, log_every=looks).planned(20)
        t = Trainer(model(world.xp), watched, config)
        trainers.append(t)
        for n in range(steps):
            t.update(batches()(n))
            if (n + 1) % looks == 0:
                t.look(batches())
        return t

    after_seven = run(7, 7)
    with pytest.raises(Diverged, match=r"diverged at step 8: loss .*made NaN or infinity: .*Try a lower --lr") as caught:
        run(20, log_every)
    t = trainers[-1]
    assert "\n" not in str(caught.value) and t.step == 7
    assert to_numpy(t.optimizer.flat.data).tobytes() == to_numpy(after_seven.optimizer.flat.data).tobytes()
    assert t.optimizer.steps == 7 and t.state() == after_seven.state()


def test_an_evaluation_that_is_not_finite_is_divergence_too(world, monkeypatch):
    rate = trainer_module.learning_rate
    monkeypatch.setattr(trainer_module, "learning_rate", lambda step, **rest: 1e39 if step == 5 else rate(step, **rest))
    with pytest.raises(Diverged, match="the loss of an evaluation is nan"):
        trained(world.xp, 6, validation=lambda: batches()(99))


# Checkpoints

@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_checkpoints_move_between_devices_and_back(world, tmp_path, precision, monkeypatch):
    """What was saved on one is restored on the other bit by bit, whichever way; a run that moves ends near one that stays."""
    nervous(monkeypatch.setattr)
    stays, _ = trained(np, 9, precision=precision)
    saved, store = [], Store(tmp_path, keep=10)
    for xp, until in ((np, 3), (world.xp, 6), (np, 9)):
        moving = trained_until(xp, until, store, precision)
        saved.append(everything(moving))
        assert moving.trainer.step == until
        other = Trainer(model(np if xp is world.xp else world.xp, precision=precision, arch="gpt2"), None, TrainConfig().planned(9), precision)
        found = load_checkpoint(list_checkpoints(tmp_path)[-1])
        other.restore(found.model, found.optimizer, found.state["trainer"])
        moving.trainer = other
        assert everything(moving) == saved[-1]
    np.testing.assert_allclose(weights(moving), weights(stays), rtol=0, atol=2e-4 if precision == "fp32" else 2e-2)


class Until:
    """Asks to stop after a step."""

    def __init__(self, step):
        self.step, self.seen = step, 0

    def __call__(self, record):
        self.seen = record["step"]

    def __bool__(self):
        return self.seen >= self.step


def trained_until(xp, step, store, precision="fp32", **settings):
    config = TrainConfig(lr=1e-2, warmup=2, **settings).planned(9)
    until = Until(step)
    return train(
        model(xp, precision=precision, arch="gpt2"), batches(), next_token_loss(config), config, store=store, observers=[until], stop=until,
        precision=precision,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_resumed_run_ends_bitwise_as_one_that_was_not_interrupted(world, tmp_path, precision, monkeypatch):
    nervous(monkeypatch.setattr)
    settings = dict(log_every=3, deterministic=True)
    whole = trained_until(world.xp, 9, Store(tmp_path / "whole", keep=1), precision, **settings)
    for step in (3, 6):
        parts = trained_until(world.xp, step, Store(tmp_path / "parts", keep=1), precision, **settings)
        assert parts.interrupted and parts.trainer.step == step
    parts = trained_until(world.xp, 9, Store(tmp_path / "parts", keep=1), precision, **settings)
    assert everything(parts) == everything(whole) and parts.tokens == whole.tokens


@pytest.mark.parametrize("before, after", [("fp32", "fp16"), ("fp16", "bf16"), ("fp16", "fp32")])
def test_another_precision_begins_with_its_own_loss_scale(world, before, after):
    """That of fp16 is of no use elsewhere, and fp16 would hardly find its own from 1."""
    old = trained(world.xp, 3, precision=before)[0].trainer
    new = Trainer(model(world.xp, precision=after, arch="gpt2"), next_token_loss(old.config), old.config, after)
    fresh = new.scaler.scale
    new.restore(old.model.state_dict(), old.optimizer.state_dict(), json.loads(json.dumps(old.state())))
    assert fresh == new.scaler.scale == float(new.control.scale) == (2.0**16 if after == "fp16" else 1.0)
    assert (new.scaler.good_steps, new.step, new.optimizer.steps) == (0, 3, 3)
    new.update(batches()(3))
    assert math.isfinite(new.look(batches())["grad_norm"])


def test_the_command_line_from_text_to_a_run_that_changes_device_and_precision(world, tmp_path, monkeypatch, capsys):
    """Begun on the device in bf16, stopped by a fault after step 10, gone on with on the CPU in fp32."""
    rate = trainer_module.learning_rate

    def failing(step, **rest):
        if step == 12:
            raise ValueError("planted")
        return rate(step, **rest)

    monkeypatch.setattr(trainer_module, "learning_rate", failing)
    options = ("--device", "cuda", "--precision", "bf16", "--deterministic", "--steps", 20, "--eval-every", 5)
    assert main(arguments(tmp_path, *options)) == 2 and "planted" in capsys.readouterr().err
    assert deterministic()
    monkeypatch.undo()
    run = tmp_path / "run"
    assert [r["step"] for r in history(run) if r["event"] == "step"] == [5, 10]
    assert main(["train", "--resume", str(run), "--device", "cpu", "--precision", "fp32", "--log-every", "2"]) == 0
    steps = [r for r in history(run) if r["event"] == "step"]
    assert [r["step"] for r in steps] == [5, 10, 12, 14, 15, 16, 18, 20] and steps[-1]["loss"] < steps[0]["loss"]
    assert len(final_bytes(run)) == 3 and main(["sample", str(run), "--prompt", "the", "--max-tokens", "3"]) == 0
