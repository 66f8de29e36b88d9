"""A run that is killed or interrupted at any moment, and resumed, ends with the same bits as one that was left alone."""
import functools
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import ENVIRONMENT, ROOT, arguments, back_to, call, final_bytes, history, nervous, program, train

from tinyllm.cli.main import main
from tinyllm.stages import load_run
from tinyllm.train.checkpoint import list_checkpoints, load_checkpoint
from tinyllm.train.run import read_log

pytestmark = pytest.mark.skipif(os.name == "nt", reason="sends signals")

PLAIN = "--steps 24 --eval-every 6 --checkpoint-every 4 --accumulate 2 --dropout 0.1 --keep 2 --seed 3".split()
NERVOUS = [*PLAIN, "--precision", "fp16", "--skip-outliers", "1", "--schedule", "wsd", "--lr", "0.01"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The runs without interruption, by their options."""
    folder, made = tmp_path_factory.mktemp("reference"), {}

    def make(options, plant):
        key = " ".join(options)
        if key not in made:
            with pytest.MonkeyPatch.context() as patch:
                if plant:
                    nervous(patch.setattr)
                made[key] = train(folder, *options, "--out", folder / f"run-{len(made)}").with_name(f"run-{len(made)}")
        return made[key]

    return make


def assert_same(run, other):
    assert final_bytes(run) == final_bytes(other)
    assert history(run) == history(other)


def survive(folder, options, moments, plant=()):
    """Start a run, kill it at each of the moments in turn, resuming in between, and let it end."""
    command = arguments(folder, *options)
    for moment, n in moments:
        died = call(program(moment, n, *plant, *command))
        assert died.returncode == -signal.SIGKILL, died.stderr
        for checkpoint in list_checkpoints(folder / "run" / "checkpoints"):
            load_checkpoint(checkpoint)
        command = ["train", "--resume", str(folder / "run")]
    done = call(program("update", 10**9, *plant, *command))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder / "run"


def test_sigkill_between_steps_and_while_saving(tmp_path, reference):
    """Before the first checkpoint, in the middle of writing one, before it gets its name, while an old one is deleted, between steps."""
    moments = [("update", 3), ("fsync", 4), ("rename", 2), ("rmtree", 3), ("update", 6)]
    assert_same(survive(tmp_path, PLAIN, moments), reference(PLAIN, False))


def test_sigkill_with_loss_scale_and_outlier_statistics(tmp_path, reference):
    expected = reference(NERVOUS, True)
    skips = [record.get("skipped") for record in history(expected)]
    assert {"overflow", "outlier"} <= set(skips)  # so that what is restored has something to say
    assert_same(survive(tmp_path, NERVOUS, [("update", 9), ("fsync", 9)], ["--nervous"]), expected)


@pytest.mark.slow
@pytest.mark.parametrize("plant", [False, True])
def test_sigkill_at_every_step_and_every_fsync_of_a_checkpoint(tmp_path, reference, plant):
    options, flag = (NERVOUS, ["--nervous"]) if plant else (PLAIN, [])
    options = [*options, "--steps", "72"]
    moments = [("update", n) for n in range(1, 9)] + [("fsync", n) for n in range(1, 12)]
    assert_same(survive(tmp_path, options, moments, flag), reference(options, plant))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_save_and_say_how_to_go_on(tmp_path, reference, kind):
    options = "--steps 300 --eval-every 150 --seed 2".split()
    command = [sys.executable, "-m", "tinyllm", *arguments(tmp_path, *options)]
    heard = functools.partial(signal.signal, kind, signal.SIG_DFL)  # the tests themselves may run where it is ignored
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    log, run = tmp_path / "run" / "log.jsonl", tmp_path / "run"
    while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 10):
        time.sleep(0.002)
    process.send_signal(kind)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    step = load_checkpoint(list_checkpoints(run / "checkpoints")[-1]).step
    assert 8 <= step < 300
    assert out.splitlines()[-1] == f"stopped after step {step}, everything is saved; go on with: python -m tinyllm train --resume {run}"
    assert main(["train", "--resume", str(run)]) == 0
    assert_same(run, reference(options, False))


def test_same_seed_same_bits_and_another_seed_others(tmp_path):
    runs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path, "--steps", 8, "--dropout", 0.1, "--seed", seed, "--out", tmp_path / name)
        runs.append(tmp_path / name)
    assert_same(runs[0], runs[1])
    assert final_bytes(runs[0])[0] != final_bytes(runs[2])[0]
    losses = [[r["loss"] for r in history(run) if r["event"] == "step"] for run in runs]
    assert losses[0] == losses[1] and all(a != c for a, c in zip(losses[0], losses[2], strict=True))


def test_torn_log_line_and_unsaved_steps_are_dropped(tmp_path):
    run = train(tmp_path, "--steps", 12, "--checkpoint-every", 4, "--eval-every", 6, "--keep", 9)
    expected, weights = history(run), final_bytes(run)
    for torn in (b"", b'{"event": "st', b'{"event": "step", "step": 9}'):
        back_to(run, 4)
        with open(run / "log.jsonl", "ab") as file:
            file.write(torn)
        assert [r["step"] for r in read_log(run / "log.jsonl")][-1] == 12
        assert main(["train", "--resume", str(run)]) == 0
        assert history(run) == expected and final_bytes(run) == weights


def test_killed_between_the_last_checkpoint_and_the_summary(tmp_path):
    run = train(tmp_path, "--steps", 6)
    before = (run / "summary.json").read_text()
    (run / "summary.json").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    after = (run / "summary.json").read_text()
    assert [line for line in before.splitlines() if "loss" in line] == [line for line in after.splitlines() if "loss" in line]


def test_what_changes_nothing_may_change_on_resume(tmp_path, capsys):
    run = train(tmp_path, "--steps", 12, "--checkpoint-every", 4, "--eval-every", 12, "--keep", 9)
    weights = final_bytes(run)
    back_to(run, 4)
    same = ["--lr", "0.002", "--steps", "12", "--tokenizer", "char", "--no-bias"]  # said again, but not changed
    assert main(["train", "--resume", str(run), "--keep", "1", "--checkpoint-every", "3", "--device", "cpu", *same]) == 0
    assert final_bytes(run) == weights
    assert [p.name for p in list_checkpoints(run / "checkpoints")] == ["step-000012"]


def test_resuming_a_complete_run_says_so(tmp_path, capsys):
    run = train(tmp_path, "--steps", 3)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 0
    assert capsys.readouterr() == (f"{run} is complete: nothing left to train\n", "")
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_resume_needs_neither_the_text_nor_the_tokenizer_it_came_from(tmp_path):
    run = train(tmp_path, "--steps", 8, "--checkpoint-every", 4, "--keep", 9)
    weights = final_bytes(run)
    back_to(run, 4)
    (tmp_path / "text.txt").unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert final_bytes(run) == weights
    assert load_run(run)[2].train.steps == 8
