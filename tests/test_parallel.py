"""Training on several processes is the same training: losses, skips, errors, resumption; and nothing of it is left behind."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from family import alive, children, wait_until
from tiny_run import ENVIRONMENT, ROOT, arguments, final_bytes, history, nervous

from tinyllm.backend import random_stream
from tinyllm.cli.main import main
from tinyllm.data import IGNORE, Batch
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.optim import LossScaler, flat
from tinyllm.processes import ProcessGroup, available, shared
from tinyllm.tensor import no_grad
from tinyllm.threads import _blas, threads
from tinyllm.train import parallel
from tinyllm.train.config import TrainConfig
from tinyllm.train.loop import train
from tinyllm.train.next_token import next_token_loss
from tinyllm.train.parallel import DataParallel, Team
from tinyllm.train.store import Store
from tinyllm.train.trainer import Diverged, Trainer

pytestmark = pytest.mark.skipif(not available, reason="no fork that is safe on this system")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    """Small blocks, so that a tiny model has some for everybody; and whatever a test does, the process is afterwards as before."""
    monkeypatch.setattr(flat, "block_length", lambda xp: 100)
    count, blas, others = threads(), _blas().get(), children()
    threads(2)
    yield
    threads(count)
    assert children() == others and _blas().get() == blas


def model(dtype=np.float64, **changes):
    settings = dict(vocab_size=11, layers=1, heads=2, width=8, context=6) | changes
    return Transformer(TransformerConfig(**settings), random_stream(1, "weights"), dtype)


def batch(rows, seed=0, ignored=0.4):
    """Random tokens and documents; `ignored` of the targets do not count."""
    random = random_stream(seed, "tokens")
    ids = random.integers(11, size=(rows, 7))
    targets = np.where(random.random((rows, 6)) < ignored, IGNORE, ids[:, 1:])
    return Batch(ids[:, :-1], targets, np.cumsum(ids[:, :-1] == 0, axis=1))


def uneven(n):
    """Micro-batches of unlike sizes and weights: one whose first half has no target at all, one that has not a row for everybody."""
    first, second, third = batch(6, 10 * n), batch(5, 10 * n + 1), batch(6 if n == 0 else 1, 10 * n + 2)
    second.targets[:3] = IGNORE
    return [first, second, third]


def trained(processes, steps=5, batches=uneven, m=None, observers=(), store=None, validation=None, **settings):
    """(outcome, the records of its steps)"""
    threads(processes)
    records, m = [], m or model()
    config = TrainConfig(**dict(lr=1e-2, warmup=2, eval_every=2) | settings).planned(steps)
    outcome = train(
        m, batches, next_token_loss(config), config, observers=[records.append, *observers], store=store, validation=validation,
        precision=m.config.precision,
    )  # fmt: skip
    assert threads() == processes
    leave_out = ("event", "seconds", "tokens_per_second")
    return outcome, [{k: v for k, v in r.items() if k not in leave_out} for r in records if r["event"] == "step"]


def weights(outcome):
    return outcome.trainer.optimizer.flat.data


def moments(outcome):
    return [array.tobytes() for array in outcome.trainer.optimizer.state.values()]


# The same training.

@pytest.mark.parametrize("settings", [{}, dict(clip=0.05, label_smoothing=0.1, z_loss=1e-3, weight_decay=0.5)])
def test_any_number_of_processes_trains_alike(settings):
    runs = [trained(n, validation=lambda: (batch(3, 90 + i) for i in range(4)), **settings) for n in (1, 2, 3)]
    (alone, expected), others = runs[0], runs[1:]
    assert len({r["tokens"] for r in expected}) > 1
    for outcome, records in others:
        for record, wanted in zip(records, expected, strict=True):
            assert record == pytest.approx(wanted, rel=1e-10)
        np.testing.assert_allclose(weights(outcome), weights(alone), rtol=1e-10, atol=1e-13)
        for name, array in outcome.trainer.optimizer.state.items():
            np.testing.assert_allclose(array, alone.trainer.optimizer.state[name], rtol=1e-9, atol=1e-15)
        assert [step for step, _ in outcome.evaluations] == [0, 2, 4, 5]
        assert [loss for _, loss in outcome.evaluations] == pytest.approx([loss for _, loss in alone.evaluations], rel=1e-10)


def test_a_process_without_any_target_adds_nothing(monkeypatch):
    """What its gradients held before must be gone when the others add them up, however late it is in clearing them."""
    parent, grad = os.getpid(), flat.FlatParameters.grad

    def late(self):
        if os.getpid() != parent:
            time.sleep(0.005)
        return grad.fget(self)

    def batches(n):
        b = batch(4, n)
        b.targets[2:] = IGNORE if n % 2 else b.targets[2:]
        return [b]

    monkeypatch.setattr(flat.FlatParameters, "grad", property(late))
    (alone, expected), (outcome, records) = (trained(n, batches=batches) for n in (1, 2))
    assert [r["grad_norm"] for r in records] == pytest.approx([r["grad_norm"] for r in expected], rel=1e-10)
    np.testing.assert_allclose(weights(outcome), weights(alone), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_same_number_gives_the_same_bits(processes):
    one, again = (trained(processes, m=model(np.float32, dropout=0.2)) for _ in range(2))
    assert one[1] == again[1] and weights(one[0]).tobytes() == weights(again[0]).tobytes() and moments(one[0]) == moments(again[0])


def together(processes, work, batches=uneven, **settings):
    """What each rank's work(trainer, rank, rows, rng) says of the micro-batches that it sees in two steps, as lists by rank."""
    threads(processes)
    config = TrainConfig(**settings).planned(2)
    seen, counts = shared(np.zeros((processes, 50))), shared(np.zeros(processes, np.int64))
    loss_fn = next_token_loss(config)

    def watched(m, rows, rng):
        rank = trainer.team.group.rank
        seen[rank, counts[rank]] = work(trainer, rank, rows, rng)
        counts[rank] += 1
        return loss_fn(m, rows, rng)

    trainer = Trainer(model(), watched, config)
    with DataParallel(trainer, batches) as together:
        together.update()
        together.update()
    return [row[:count].tolist() for row, count in zip(seen, counts, strict=True)]


def test_each_process_sees_its_own_rows_and_computes_on_one_core():
    rows = together(2, lambda trainer, rank, rows, rng: len(rows))
    assert rows == [[3, 3, 3], [3, 3, 3, 3, 3, 1]]  # uneven's second micro-batch: rows 0 and 1 have no target, nobody computes them
    assert together(2, lambda *_: threads() + 10 * _blas().get()) == [[11.0] * len(r) for r in rows]
    assert together(2, lambda trainer, rank, rows, rng: trainer.team.group.rank == rank) == [[1.0] * len(r) for r in rows]


def test_dropout_draws_other_numbers_in_each_process_but_the_same_again():
    draws = together(3, lambda trainer, rank, rows, rng: rng.random())
    flat_draws = sum(draws, [])
    assert len(set(flat_draws)) == len(flat_draws) > 9
    assert draws == together(3, lambda trainer, rank, rows, rng: rng.random())


def test_a_list_of_work_is_shared_out_once():
    team = Team(Trainer(model(), None, TrainConfig().planned(1)).optimizer)
    for size in (1, 2, 3, 9):
        team.group, shares = ProcessGroup(size), []
        for team.group.rank in range(size):
            shares.append(list(team.share(iter(range(7)))))
        assert sorted(sum(shares, [])) == list(range(7)) and max(map(len, shares)) == -(-7 // size)


def test_an_evaluation_with_fewer_batches_than_processes():
    one, three = (trained(n, steps=1, validation=lambda: [batch(4, 1)])[0].evaluations for n in (1, 3))
    assert three == [(step, pytest.approx(loss, rel=1e-12)) for step, loss in one]


# How many processes.

@pytest.mark.parametrize("count, rows, size", [(1, [4, 4], 1), (2, [4], 2), (3, [9, 2], 2), (9, [5, 7], 5), (2, [1, 9], 1), (2, [0], 0), (3, [], 3)])
def test_at_most_one_a_thread_and_one_a_row(count, rows, size):
    threads(count)
    team = Team(Trainer(model(), None, TrainConfig().planned(1)).optimizer)
    assert team.size_for([batch(n) for n in rows]) == size


class Rows:
    """A batch of another kind, which says nothing about parts."""

    def __init__(self, inner):
        self.ids, self.targets, self.documents, self.weight = inner.ids, inner.targets, inner.documents, inner.weight

    def __len__(self):
        return len(self.ids)


def test_what_cannot_be_shared_out_stays_in_one_process(monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was started"))
    plain = trained(1)[1]
    for batches in (lambda n: [*uneven(n), Rows(batch(3))], lambda n: [batch(1, n)]):
        trained(2, steps=2, batches=batches)
    monkeypatch.setattr(parallel, "LARGEST", model().embedding.weight.size)
    assert [r["loss"] for r in trained(2)[1]] == pytest.approx([r["loss"] for r in plain], rel=1e-12)


def test_a_run_that_has_ended_asks_for_no_batch(tmp_path):
    first, _ = trained(2, steps=3, store=Store(tmp_path, keep=1))
    again, records = trained(2, steps=3, store=Store(tmp_path, keep=1), batches=[].__getitem__)
    assert records == [] and weights(again).tobytes() == weights(first).tobytes() and (again.trainer.step, again.interrupted) == (3, False)


# What can go wrong on the way.

def test_fp16_survives_overflow(monkeypatch):
    monkeypatch.setattr(LossScaler, "for_precision", lambda precision: LossScaler(2.0**30, growth_interval=4))
    runs = [trained(n, steps=24, m=model(np.float32, precision="fp16"))[1] for n in (1, 2, 2)]
    for records in runs:
        skipped = [r.get("skipped") for r in records]
        assert skipped[0] == skipped[5] == "overflow" and skipped.count(None) > 6  # and where the scale grows again, now and then
    assert runs[1] == runs[2] and runs[1][-1]["loss"] == pytest.approx(runs[0][-1]["loss"], rel=0.1)


def poisonous(where):
    """Batches without token 10, but for one in that row of step 2."""

    def batches(n):
        b = batch(4, n)
        b.ids[b.ids == 10] = 9
        if n == 2:
            b.ids[where, 2] = 10
        return [b]

    return batches


@pytest.mark.parametrize("where", [0, 3])
def test_overflow_in_one_processs_rows_is_an_overflow_for_all(monkeypatch, where):
    monkeypatch.setattr(LossScaler, "for_precision", lambda precision: LossScaler(16.0, growth_interval=100))
    runs = []
    for processes in (1, 2):
        m = model(np.float32, precision="fp16", tie=False)
        m.embedding.weight.data[10] = np.inf
        runs.append(trained(processes, m=m, batches=poisonous(where), clip=None))
        assert [r.get("skipped") for r in runs[-1][1]] == [None, None, "overflow", None, None]
        assert [r["loss_scale"] for r in runs[-1][1]] == [16, 16, 16, 8, 8]
    np.testing.assert_allclose(weights(runs[1][0]), weights(runs[0][0]), atol=2e-3)


def test_outliers_are_left_out_alike(monkeypatch):
    nervous(monkeypatch.setattr)
    runs = [trained(n, steps=24, skip_outliers=1.0) for n in (1, 2, 3)]
    skips = [[r.get("skipped") for r in records] for _, records in runs]
    assert skips[0] == skips[1] == skips[2] and 0 < skips[0].count("outlier") < 20
    np.testing.assert_allclose(weights(runs[1][0]), weights(runs[0][0]), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("where", [0, 3])
def test_divergence_names_the_op_in_whosever_rows_it_was(where):
    def explode(record):
        if record["step"] == 2:
            m.embedding.weight.data[10] = 3e38  # the sum over its row overflows

    config, m = TrainConfig(lr=1e-3).planned(5), model(np.float32, arch="gpt2", tie=False)
    with pytest.raises(Diverged, match=r"diverged at step 3: .*(the op|the backward of) '\w+'.* made NaN or infinity") as caught:
        train(m, poisonous(where), next_token_loss(config), config, observers=[explode])
    assert "\n" not in str(caught.value)


def test_an_evaluation_that_is_not_finite():
    def validation():
        m.blocks[0].mlp_norm.weight.data[...] = np.nan
        return [batch(2, 1), batch(2, 2), batch(2, 3)]

    config, m = TrainConfig().planned(2), model()
    with pytest.raises(Diverged, match="the loss of an evaluation is nan"):
        train(m, uneven, next_token_loss(config), config, validation=validation)


def test_an_error_in_another_processs_rows():
    parent = os.getpid()

    def broken(m, rows, rng):
        if os.getpid() != parent:
            raise KeyError("not in mine")
        return next_token_loss(config)(m, rows, rng)

    config = TrainConfig().planned(2)
    with pytest.raises(RuntimeError, match="^a process of this run failed: KeyError: 'not in mine'$"):
        train(model(), uneven, broken, config)


def test_an_error_in_this_processs_rows_and_ctrl_c_are_raised_as_they_are():
    parent, config = os.getpid(), TrainConfig().planned(2)
    for error in (KeyError("in mine"), KeyboardInterrupt()):

        def broken(m, rows, rng, error=error):
            if os.getpid() == parent:
                raise error
            return next_token_loss(config)(m, rows, rng)

        with pytest.raises(type(error)):
            train(model(), uneven, broken, config)


def test_a_process_that_is_killed_between_steps():
    def kill(record):
        if record["step"] == 2:
            os.kill(children()[-1], signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="a process of this run was killed"):
        trained(3, observers=[kill])


def test_memory_that_cannot_be_had_leaves_all_as_it_was(monkeypatch):
    def none_left(array):
        raise MemoryError("no room")

    monkeypatch.setattr(parallel, "shared", none_left)
    with pytest.raises(MemoryError, match="no room"):
        trained(2)


# Afterwards.

def test_the_trainer_is_whole_again_and_goes_on_alone():
    outcome, _ = trained(3)
    trainer = outcome.trainer
    f = trainer.optimizer.flat
    indices = np.concatenate([np.arange(f.data.size)[block] for block, _ in f.blocks])
    assert np.array_equal(indices, np.arange(f.data.size)) and trainer.team.alone
    assert all(array.shape == f.data.shape for array in trainer.optimizer.state.values())
    assert all(p.grad is None for p in f.tensors.values())  # half sums are of no use to anybody
    f.check_attached()
    longer, _ = trained(1)
    for t in (trainer, longer.trainer):
        for n in range(3):
            t.update(uneven(5 + n))
    np.testing.assert_allclose(f.data, weights(longer), rtol=1e-9, atol=1e-13)
    ids = batch(2).ids
    with no_grad():
        np.testing.assert_allclose(trainer.model(ids).data, longer.trainer.model(ids).data, rtol=1e-8)


def test_a_second_training_of_the_same_model():
    one, two = (trained(n, m=trained(n)[0].trainer.model) for n in (1, 2))
    assert one[1][0]["loss"] < trained(1)[1][0]["loss"]
    np.testing.assert_allclose(weights(two[0]), weights(one[0]), rtol=1e-9, atol=1e-13)


def test_weights_are_not_shared_with_later_forks():
    outcome, _ = trained(2)
    arrays = [weights(outcome), *outcome.trainer.optimizer.state.values()]
    before = [array.copy() for array in arrays]
    process = os.fork()
    if process == 0:
        for array in arrays:
            array[...] = 7
        os._exit(0)
    os.waitpid(process, 0)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, before, strict=True))


def test_checkpoints_hold_what_all_have_done(tmp_path):
    store = Store(tmp_path, keep=9)
    whole, records = trained(3, steps=6, store=store, checkpoint_every=2)
    shutil.rmtree(tmp_path / "step-000006")
    resumed, rest = trained(3, steps=6, store=store, checkpoint_every=2)
    assert rest == records[4:] and weights(resumed).tobytes() == weights(whole).tobytes() and moments(resumed) == moments(whole)


# From the command line.

def started(command, log, steps):
    """A run in a session of its own, in which SIGHUP is ignored as under nohup, once it has logged so many records more."""

    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = lines(log)
    process = subprocess.Popen(
        [sys.executable, "-m", "tinyllm", *command], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=prepare,
    )  # fmt: skip
    wait_until(lambda: process.poll() is not None or lines(log) >= before + steps, seconds=20)
    assert process.poll() is None, process.communicate()
    (member,) = children(process.pid)
    return process, member


def lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_killed_interrupted_and_hung_up_runs_go_on_bitwise(tmp_path, monkeypatch):
    """One run: rank 0 is killed, then the other, then comes Ctrl-C; a hang-up meanwhile is ignored."""
    monkeypatch.undo()  # blocks of the usual length, as in the processes that are started
    options = "--steps 110 --eval-every 60 --checkpoint-every 7 --accumulate 2 --dropout 0.1 --threads 2 --seed 4".split()
    assert main(arguments(tmp_path, *options, "--out", tmp_path / "reference")) == 0
    run = tmp_path / "run"
    log, resume = run / "log.jsonl", ["train", "--resume", str(run)]

    process, member = started(arguments(tmp_path, *options), log, 12)
    process.kill()
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGKILL
    wait_until(lambda: not alive(member), seconds=1)

    process, member = started(resume, log, 12)
    os.kill(member, signal.SIGKILL)
    assert process.communicate()[1] == "tinyllm: error: a process of this run was killed (by the system, for want of memory?)\n"
    assert process.returncode == 2

    process, member = started(resume, log, 5)
    os.killpg(process.pid, signal.SIGHUP)
    now = lines(log)
    wait_until(lambda: lines(log) > now + 5)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, err, alive(member)) == (130, "", False)
    assert out.count("resuming") == out.count("model:") == out.count("stopped after step") == 1

    assert main(resume) == 0
    assert final_bytes(run) == final_bytes(tmp_path / "reference") and history(run) == history(tmp_path / "reference")
