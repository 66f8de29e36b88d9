"""A run of any stage that is killed or interrupted at any moment, and resumed from its folder alone, ends with the same bits as one that was left alone."""
import os
import shutil
import signal

import pytest
from tiny_run import call, final_bytes, history, program
from tiny_stages import RUNS, Life

from tinyllm.cli.main import main
from tinyllm.train.checkpoint import ROLLOUT, list_checkpoints, load_checkpoint
from tinyllm.train.run import Run
from tinyllm.train.trainer import Trainer

UPDATES = 8
QUICK = ("instruct lora", "classify", "kto", "grpo", "ppo")
SOME = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RUNS]


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    return Life(tmp_path_factory.mktemp("life"))


@pytest.fixture(scope="module")
def whole(life, tmp_path_factory):
    """The runs without interruption, by name."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def run(name):
        if name not in made:
            made[name] = life.run(name, folder / name)
        return made[name]

    return run


class Killed(BaseException):
    """What nothing in the program catches."""


def die_at(monkeypatch, n: int) -> None:
    """The n-th update from now on does not happen, and the process does nothing more."""
    update, calls = Trainer.update, [0]

    def deadly(self, batches):
        calls[0] += 1
        if calls[0] == n:
            raise Killed
        return update(self, batches)

    monkeypatch.setattr(Trainer, "update", deadly)


def killed(monkeypatch, words: list[str], n: int) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, n)
        with pytest.raises(Killed):
            main(words)


def resumed(run) -> list[str]:
    return [*RUNS[run.name][0], "--resume", str(run)]


def assert_same(run, other) -> None:
    assert final_bytes(run) == final_bytes(other)
    assert history(run) == history(other)


def kill_twice(life, folder, monkeypatch, name, n, *options):
    """Before update n, and again two updates after it went on. Everything that the run was made from is gone by then."""
    mine, run = life.copied(folder / f"life {n}"), folder / f"{n}" / name
    killed(monkeypatch, mine.command(name, run, *options), n)
    shutil.rmtree(mine.folder)
    done = max((load_checkpoint(place).step for place in list_checkpoints(run / "checkpoints")), default=0)
    assert done == (n - 1) // 3 * 3 or done == 5 <= n - 1  # also where an evaluation found the lowest loss
    if done < UPDATES - 2:
        killed(monkeypatch, resumed(run), 2)
    assert main(resumed(run)) == 0
    return run


@pytest.mark.parametrize("name", SOME)
def test_killed_twice_and_resumed_from_the_folder_alone(life, whole, tmp_path, monkeypatch, name):
    assert_same(kill_twice(life, tmp_path, monkeypatch, name, 5), whole(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_killed_in_any_update_and_resumed_from_the_folder_alone(life, whole, tmp_path, monkeypatch, name):
    for n in range(1, UPDATES + 1):
        assert_same(kill_twice(life, tmp_path, monkeypatch, name, n), whole(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["instruct lora", "kto", "grpo", "ppo"])
def test_killed_as_several_processes(life, tmp_path, monkeypatch, name):
    expected = life.run(name, tmp_path / "whole" / name, "--threads", 2)
    assert_same(kill_twice(life, tmp_path, monkeypatch, name, 5, "--threads", 2), expected)


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_kill_falls_within_a_rollout(whole, name):
    """So that what is restored has something to say: checkpoints hold a rollout whose updates are not all made."""
    places = list_checkpoints(whole(name) / "checkpoints")
    assert [load_checkpoint(place).step for place in places] == [3, 6, 8] and all((place / ROLLOUT).exists() for place in places)
    rollouts = [(r["step"], r["iteration"]) for r in history(whole(name)) if r["event"] == "rollout"]
    assert rollouts == [(1, 0), (5, 1)]
    if name == "ppo":
        kept = [float(load_checkpoint(place).rollout["kl"]) for place in places]
        assert len({*kept, 0.05}) == 3  # beta was adapted after each rollout


@pytest.mark.parametrize("name", [pytest.param("instruct lora", marks=pytest.mark.slow), "grpo"])
def test_a_rollout_or_an_adapter_that_was_not_restored_would_be_noticed(life, whole, tmp_path, monkeypatch, name):
    """The comparison can fail: another seed, and a rollout made anew from the weights in its midst, end elsewhere."""
    other = life.run(name, tmp_path / "seed" / name, "--seed", 4)
    assert final_bytes(other) != final_bytes(whole(name))
    if name == "grpo":
        run = tmp_path / name
        killed(monkeypatch, life.command(name, run), 5)
        with monkeypatch.context() as patch:
            patch.setattr("tinyllm.align.rollouts.Rollouts.restore", lambda self, state: None)
            assert main(resumed(run)) == 0
        assert final_bytes(run) != final_bytes(whole(name))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("name", ["ppo"])
def test_sigkill_while_saving(life, whole, tmp_path, name):
    survive(life, tmp_path / name, name, [("update", 5), ("fsync", 4)])
    assert_same(tmp_path / name, whole(name))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("name", RUNS)
def test_sigkill_at_every_fsync(life, whole, tmp_path, name):
    survive(life, tmp_path / name, name, [("update", 5), *(("fsync", n) for n in range(1, 10)), ("rename", 1), ("rename", 2)])
    assert_same(tmp_path / name, whole(name))


def survive(life, run, name, moments) -> None:
    """Start a run, kill it at each of the moments in turn, resuming in between, and let it end."""
    words = life.command(name, run)
    for moment, n in moments:
        died = call(program(moment, n, *words))
        assert died.returncode == -signal.SIGKILL, died.stderr
        words = resumed(run)
    done = call(program("update", 10**9, *words))
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("name", [pytest.param("instruct", marks=pytest.mark.slow), pytest.param("reward", marks=pytest.mark.slow), "grpo"])
def test_ctrl_c_saves_and_says_how_to_go_on(life, whole, tmp_path, monkeypatch, capsys, name):
    """While the fourth update of eight is made, as everywhere else what was begun is finished."""
    run, update = tmp_path / name, Trainer.update

    def interrupted(self, batches):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        assert main(life.command(name, run)) == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("stopped after step 4, everything is saved; go on with: ") and last.endswith(" ".join(resumed(run)))
    assert main(resumed(run)) == 0
    assert_same(run, whole(name))


@pytest.mark.parametrize("name", ["ppo"])
def test_killed_during_preparation_does_not_block_a_new_start(life, tmp_path, monkeypatch, name, whole):
    run = tmp_path / name
    with monkeypatch.context() as patch:
        patch.setattr(Run, "discard", lambda self: None)  # as if the process were gone
        patch.setattr("tinyllm.stages.stage.planned", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main(life.command(name, run))
    assert (run / "preparing").exists() and (run / "base").exists() and not (run / "config.json").exists()
    assert main(resumed(run)) == 2
    assert main(life.command(name, run)) == 0
    assert_same(run, whole(name))


def test_ctrl_c_during_preparation_leaves_nothing(life, tmp_path, monkeypatch, capfd):
    for place in ("load_run", "save_weights", "write_records"):
        with monkeypatch.context() as patch:
            patch.setattr(f"tinyllm.stages.base.{place}", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert main(life.command("instruct", tmp_path / "run")) == 130
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["ppo"])
def test_resuming_a_complete_run_changes_nothing(whole, capsys, name):
    run = whole(name)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(resumed(run)) == 0
    assert capsys.readouterr() == (f"{run} is complete: nothing left to train\n", "")
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
