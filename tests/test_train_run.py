"""The main job and what it leaves behind: run folder, log, summary, checkpoints that stay, every setting."""
import dataclasses
import json
import math
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_run import ROOT, arguments, call, final_bytes, history, logits_loss, program, text, train

from tinyllm.cli.main import main
from tinyllm.data import open_shard
from tinyllm.nn import Transformer
from tinyllm.nn.describe import describe
from tinyllm.processes import ProcessGroup
from tinyllm.stages import STAGES, DataConfig, PretrainConfig, Validation, Work, load_run, stage, stage_config
from tinyllm.threads import available_cores
from tinyllm.train.checkpoint import list_checkpoints, load_checkpoint, step_of
from tinyllm.train.config import TrainConfig
from tinyllm.train.run import Log, Run, new_run, read_log
from tinyllm.train.store import Store, best_step

SUMMARY = {
    "val_loss", "best_val_loss", "bits_per_byte", "tokens_per_second", "peak_memory_mb", "seconds", "parameters", "flops", "versions", "command"
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run whose evaluations see a part of the validation text only."""
    folder = tmp_path_factory.mktemp("run")
    options = "--steps 30 --eval-every 4 --eval-batches 3 --checkpoint-every 5 --keep 3 --lr 0.03 --warmup 2".split()
    return train(folder, *options)


def test_folder_holds_everything_and_nothing_else(done):
    assert sorted(p.name for p in done.iterdir()) == ["checkpoints", "config.json", "data", "log.jsonl", "summary.json", "tokenizer.json"]
    assert sorted(p.name for p in (done / "data").iterdir()) == ["train.bin", "val.bin"]
    for checkpoint in list_checkpoints(done / "checkpoints"):
        assert sorted(p.name for p in checkpoint.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_config_is_whole_and_every_none_is_filled_in(done):
    config = stage_config(Run(done))
    assert config.checked() == config
    assert (config.train.steps, config.train.warmup, config.train.min_lr) == (30, 2, 0.003)
    assert (config.data.tokenizer, config.data.val_fraction, config.model.vocab_size) == ("char", 0.1, len(set(text())))
    assert load_checkpoint(list_checkpoints(done / "checkpoints")[-1]).state["config"] == config.to_json()


def test_log_has_a_record_for_each_step_evaluation_and_checkpoint(done):
    records = read_log(done / "log.jsonl")
    steps = [r for r in records if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 31))
    for r in steps:
        assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_second", "seconds"} <= r.keys() and r["tokens"] == 64 * r["step"]
    assert [r["step"] for r in records if r["event"] == "evaluation"] == [*range(0, 30, 4), 30]
    assert {5, 10, 15, 20, 25, 30} <= {r["step"] for r in records if r["event"] == "checkpoint"}
    assert abs(steps[0]["loss"] - math.log(len(set(text())))) < 0.2
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)


def test_summary_by_hand(done):
    """val_loss and bits_per_byte from their definitions: every token of the last tenth but its first, from whole logits."""
    summary = json.loads((done / "summary.json").read_text())
    assert SUMMARY <= summary.keys()
    model, tokenizer, config = load_run(done)
    ids = np.array(tokenizer.encode(text()[int(len(text()) * 0.9) :]))
    assert open_shard(done / "data" / "val.bin").tokens.tolist() == ids.tolist()
    total = 0.0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        total += logits_loss(model, window[None, :-1], window[None, 1:])
    val_loss = total / (len(ids) - 1)
    assert summary["val_loss"] == pytest.approx(val_loss, rel=1e-6)
    validation_bytes = len(text()[int(len(text()) * 0.9) :].encode("utf-8"))
    assert validation_bytes > len(ids)
    assert summary["bits_per_byte"] == pytest.approx(total / math.log(2) / validation_bytes, rel=1e-6)
    evaluations = [r["val_loss"] for r in history(done) if r["event"] == "evaluation"]
    assert summary["best_val_loss"] == min([*evaluations, summary["val_loss"]])
    assert evaluations[-1] != pytest.approx(val_loss, rel=1e-6)  # the evaluations on the way took 3 of the 12 batches
    assert (summary["steps"], summary["tokens"], summary["parameters"]) == (30, 1920, sum(p.size for _, p in model.named_parameters()))
    assert summary["flops"] == describe(config.model).flops_per_token * 1920
    assert summary["tokens_per_second"] == pytest.approx(1920 / summary["seconds"], rel=0.05)
    assert 10 < summary["peak_memory_mb"] < 10_000
    assert {"python", "numpy", "tinyllm"} <= summary["versions"].keys()


def test_command_can_be_pasted(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    command = arguments(folder, "--steps", 2)
    assert call(program("update", 99, *command)).returncode == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["command"].startswith("tinyllm ") and f"--out '{folder / 'run'}'" in summary["command"]


# Checkpoints that stay, and getting a model back

def test_the_newest_and_the_best_stay_and_can_be_loaded(done):
    kept = {step_of(p): p for p in list_checkpoints(done / "checkpoints")}
    evaluated = [(r["val_loss"], r["step"]) for r in history(done) if r["event"] == "evaluation" and r["step"]]
    saved = [r["step"] for r in read_log(done / "log.jsonl") if r["event"] == "checkpoint"]
    best = min(evaluated)[1]
    assert set(kept) == {best, *sorted(saved)[-3:]}
    for which, step in (("last", 30), ("best", best), (str(min(kept)), min(kept))):
        model, _, _ = load_run(done, which)
        saved = load_checkpoint(kept[step]).model
        assert all((p.data == saved[name]).all() for name, p in model.named_parameters())
    for which in ("7", "newest", "-1", ""):
        with pytest.raises(ValueError, match=f"no checkpoint '{which}'; there are last, best .* and step"):
            load_run(done, which)


def test_best_outlives_newer_ones(tmp_path):
    trainer = SimpleNamespace(
        step=0, state=dict, model=SimpleNamespace(state_dict=lambda: {"w": np.zeros(2)}), optimizer=SimpleNamespace(state_dict=dict)
    )
    outcome = SimpleNamespace(trainer=trainer, seconds=1.5, tokens=7, best_val_loss=0.5, evaluations=[(0, 0.5)])
    store = Store(tmp_path, keep=2)
    for step, loss in enumerate([3.0, 1.0, 2.0, None, 1.0, 4.0], start=1):
        trainer.step = step
        if loss is not None:
            outcome.evaluations.append((step, loss))
        store.save(outcome)
        assert store.newest_step() == step
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [2, 5, 6]
    assert store.load("best").step == 2 and store.load("last").step == 6
    trainer.restore = lambda *parts: None
    fresh = SimpleNamespace(trainer=trainer)
    store.restore(fresh)
    for name in ("seconds", "tokens", "best_val_loss", "evaluations"):
        assert getattr(fresh, name) == getattr(outcome, name)
    assert best_step([], [1, 2]) is None and best_step([(0, 0.1), (2, 0.5)], [1, 2]) == 2


def test_a_damaged_newest_checkpoint_does_not_hide_the_others(done, tmp_path):
    run = shutil.copytree(done, tmp_path / "run")
    newest = list_checkpoints(run / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_run(run)
    assert load_run(run, str(step_of(list_checkpoints(run / "checkpoints")[0])))


# Settings

def test_epochs_visit_every_window_once(tmp_path):
    run = train(tmp_path, "--epochs", "--steps", 5, "--accumulate", 2)
    model, tokenizer, config = load_run(run)
    work = STAGES["pretrain"].open(config, Run(run), tokenizer, model)
    rows = [row.tobytes() for n in range(20) for micro in work.batches(n) for row in micro.ids]
    assert len(set(rows)) == len(rows) == 20 * 2 * 4


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"), "--steps", 6)


@pytest.mark.parametrize("options", [
    "--epochs", "--dropout 0.3", "--label-smoothing 0.2", "--z-loss 0.5", "--accumulate 2", "--schedule wsd --warmup 1", "--schedule linear",
    "--schedule constant", "--clip 0.01", "--beta1 0.5 --beta2 0.5", "--weight-decay 30", "--arch gpt2", "--no-tie", "--bias", "--kv-heads 1",
    "--window 4", "--qk-norm", "--norm-placement post", "--min-lr 0", "--mlp-width 24", "--softcap 1", "--precision bf16", "--val-fraction 0.3",
    "--seed 9", "--lr 0.003", "--positions alibi",
])  # fmt: skip
def test_every_setting_runs_and_changes_what_is_learned(plain, tmp_path, options):
    run = train(tmp_path, "--steps", 6, *options.split())
    assert final_bytes(run)[0] != final_bytes(plain)[0]
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["val_loss"] < 4
    if "smoothing" in options or "z-loss" in options:  # they belong to training: the untrained model's evaluation is the same
        assert history(run)[0] == history(plain)[0] and history(run)[1]["loss"] != history(plain)[1]["loss"]
    if "accumulate" in options:
        assert summary["tokens"] == 2 * 6 * 64


@pytest.mark.parametrize("options", ["--recompute", "--recompute --dropout 0.2", "--eval-every 2", "--checkpoint-every 1 --keep 9", "--eval-batches 1"])
def test_settings_that_must_not_change_what_is_learned(plain, tmp_path, options):
    if "dropout" in options:
        plain = train(tmp_path, "--steps", 6, "--dropout", 0.2, "--out", tmp_path / "plain").with_name("plain")
    assert final_bytes(train(tmp_path, "--steps", 6, *options.split())) == final_bytes(plain)


def test_tiled_attention_learns_the_same_up_to_rounding(plain, tmp_path):
    run = train(tmp_path, "--steps", 6, "--attention", "tiled")
    losses, expected = ([r["loss"] for r in history(x) if r["event"] == "step"] for x in (run, plain))
    assert losses == pytest.approx(expected, rel=1e-4)


def test_without_validation(tmp_path):
    run = train(tmp_path, "--steps", 6, "--val-fraction", 0, "--eval-every", 5)
    assert not (run / "data" / "val.bin").exists() and {r["event"] for r in history(run)} == {"step"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_loss"] is summary["best_val_loss"] is summary["bits_per_byte"] is None
    assert load_run(run) and [step_of(p) for p in list_checkpoints(run / "checkpoints")] == [5, 6]
    with pytest.raises(ValueError, match="no checkpoint 'best'"):
        load_run(run, "best")


def test_document_mask_needs_and_uses_documents(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02d}.md").write_text(f"Text {i}. " * 3)
    runs = [train(tmp_path, "--data", texts, "--tokenizer", "bpe", "--vocab-size", 257, "--steps", 6, "--out", tmp_path / f"run{len(mask)}",
                  *mask).with_name(f"run{len(mask)}") for mask in ([], ["--document-mask"])]  # fmt: skip
    losses = [[r["loss"] for r in history(run) if r["event"] == "step"] for run in runs]
    assert losses[0] != losses[1] == pytest.approx(losses[0], abs=0.1)


def test_learning_rate_follows_the_schedule(tmp_path):
    run = train(tmp_path, "--steps", 20, "--schedule", "wsd", "--warmup", 4, "--lr", 0.01, "--min-lr", 0)
    rates = [r["lr"] for r in history(run) if r["event"] == "step"]
    assert rates[:4] == pytest.approx([0.002, 0.004, 0.006, 0.008]) and set(rates[4:17]) == {0.01} and rates[-1] < 0.004


def test_tokenizer_from_a_file_or_a_run(tmp_path, plain):
    for i, source in enumerate((plain, plain / "tokenizer.json")):
        run = train(tmp_path, "--tokenizer", source, "--steps", 6, "--out", tmp_path / f"run{i}").with_name(f"run{i}")
        assert final_bytes(run) == final_bytes(plain)
        assert (run / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()


def test_defaults_are_three_minutes_on_the_standard_library():
    config = PretrainConfig().checked()
    assert config.data == DataConfig(val_fraction=0.02) and config.train.steps is None and config.train.minutes is None
    planned = TrainConfig().planned(1000)
    assert (planned.warmup, planned.min_lr, planned.eval_every, planned.checkpoint_every) == (100, 2e-4, 100, 100)
    assert TrainConfig().planned(1) == dataclasses.replace(TrainConfig(), steps=1, warmup=0, min_lr=2e-4, eval_every=1, checkpoint_every=1, threads=available_cores())


def test_runs_are_numbered_and_reserved_at_once(tmp_path):
    (tmp_path / "notes").mkdir()
    assert [new_run(None, tmp_path).folder.name for _ in range(3)] == ["001", "002", "003"]
    (tmp_path / "041").mkdir()
    assert new_run(None, tmp_path).folder.name == "042"
    assert new_run("x").folder.name == "x" and not (ROOT / "x").exists()


# Time

@pytest.mark.parametrize("settings", [{}, dict(eval_every=5), dict(accumulate=4), dict(eval_batches=3), dict(eval_batches=30), dict(val=False)])
@pytest.mark.parametrize("seconds", [20.0, 120.0])
def test_plan_for_a_given_time(monkeypatch, settings, seconds):
    """On a clock that a gradient moves by 0.2 s and an evaluation's batch by a third of a micro-batch's share, the plan fills the time."""
    clock, settings = [100.0], dict(settings)
    val = settings.pop("val", True)
    config = PretrainConfig(train=TrainConfig(batch=2, **settings), model=dataclasses.replace(PretrainConfig().model, context=10))
    work = Work(lambda n: [], None, Validation(30, None) if val else None)

    class Clockwork:
        step, team = 0, SimpleNamespace(size_for=lambda batches: 1, group=ProcessGroup())

        def __init__(self, *args): pass

        def gradients(self, batches):
            clock[0] += 0.2
            return 1.0, 1.0

    monkeypatch.setattr(stage, "Trainer", Clockwork)
    monkeypatch.setattr(stage, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    plan = stage.timed(None, work, config.train, seconds)
    partial = 0.2 / 3 / plan.accumulate * min(30, plan.eval_batches) if val else 0.0
    evaluations = -(-plan.steps // plan.planned(plan.steps).eval_every)
    used = (clock[0] - 100) + plan.steps * 0.2 + (1 + evaluations) * partial + (0.2 / 3 / plan.accumulate * 30 if val else 0)
    assert 0.85 * seconds < used <= seconds + 1
    if plan.eval_every != config.train.eval_every:
        assert 1 <= evaluations <= 10 and (evaluations == 1 or evaluations * partial <= 0.11 * seconds)
    assert stage.timed(None, work, config.train, seconds=0.5).steps == 1


def test_minutes_are_kept(tmp_path):
    (tmp_path / "text.txt").write_text(text(6000), encoding="utf-8")
    started = time.perf_counter()
    run = train(tmp_path, "--minutes", 0.02, "--eval-batches", 4)
    assert 0.3 * 1.2 < time.perf_counter() - started < 4 * 1.2
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == stage_config(Run(run)).train.steps > 20


# The log

def test_log_survives_a_full_disk(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log({"event": "step", "step": 1})
    log.close()
    log.file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError, match="cannot write .*log.jsonl: No space left on device; free some space or mend the folder, then resume"):
        log({"event": "step", "step": 2})
    log.close()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == [1]


@pytest.mark.parametrize("line", [b"{", b"3", b"{}", b'{"event": "step"}', b"\xff", b""])
def test_a_broken_log_line_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n' + line + b'\n{"event": "step", "step": 2}\n')
    with pytest.raises(ValueError, match="log.jsonl, line 2: not a record of a run .*; delete the line$"):
        read_log(path)


def test_library_use_without_a_command_line(tmp_path):
    """start() is the whole job for a program: lists of settings in, a trained model out."""
    (tmp_path / "a.txt").write_text(text(), encoding="utf-8")
    said = []
    config = PretrainConfig(
        data=DataConfig(data=(str(tmp_path / "a.txt"),), tokenizer="char"),
        model=dataclasses.replace(PretrainConfig().model, layers=1, heads=2, width=16, context=16),
        train=TrainConfig(steps=3, batch=2),
    )
    outcome = stage.start(config, Run(tmp_path / "new" / "run"), said.append)
    assert isinstance(outcome.trainer.model, Transformer) and outcome.trainer.step == 3 and said[0].startswith("text: 1 document, ")
    with pytest.raises(ValueError, match="holds a run already"):
        stage.start(config, Run(tmp_path / "new" / "run"), said.append)
    assert main(["sample", str(tmp_path / "new" / "run"), "--prompt", "the", "--max-tokens", "3"]) == 0


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    run = Run(tmp_path)
    run.config.write_text("{}")
    with run.lock():
        with pytest.raises(ValueError, match="is being trained by another process: wait for its end, or stop it first"):
            with Run(tmp_path).lock():
                pass
    with run.lock():
        pass
