"""The training loop. Every stage of a model's life goes through it; stages differ in their batches and their loss."""
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tinyllm.nn import Module
from tinyllm.tensor import no_grad
from tinyllm.train.config import TrainConfig
from tinyllm.train.interrupt import StopRequest
from tinyllm.train.parallel import DataParallel, Team
from tinyllm.train.store import Store
from tinyllm.train.trainer import Diverged, LossFunction, Trainer, silent, unread

Observer = Callable[[dict], None]


@dataclass
class Outcome:
    """How a run ended: the trainer as it stands, seconds spent training in all, and whether it was asked to stop early."""

    trainer: Trainer
    seconds: float
    interrupted: bool
    best_val_loss: float | None = None
    tokens: int = 0
    evaluations: list[tuple[int, float]] = field(default_factory=list)


def train(
    model: Module,
    batches: Callable[[int], Sequence],
    loss_fn: LossFunction,
    config: TrainConfig,
    *,
    validation: Callable[[], Iterable] | None = None,
    measure: Callable[[], dict[str, float]] | None = None,
    store: Store | None = None,
    observers: Sequence[Observer] = (),
    stop: StopRequest | None = None,
    precision: str = "fp32",
) -> Outcome:
    """Train `model` for config.steps updates.

    batches(n) : the micro-batches of step n, each with a `weight` (targets that count); a pure function of n, so that a resumed run
        gets the same ones.
    loss_fn(model, batch, rng) : mean loss of a batch; rng is None in evaluation.
    validation() : the batches of an evaluation.      measure() : further figures for its record.      store : where checkpoints go and where the newest is resumed from.
    observers : called with each record (a dict with an "event": step, evaluation, checkpoint), for logs and displays. There is one of
        every config.log_every-th step, and of those with an evaluation or a checkpoint.
    stop : when requested, the loop saves and returns after the current step.

    Raises Diverged when a loss or gradient is no longer finite, at the next record; the last checkpoint stays as it was.
    """
    trainer = Trainer(model, loss_fn, config, precision)
    outcome = Outcome(trainer, 0.0, False)
    if store is not None:
        store.restore(outcome)
    if trainer.step == config.steps:  # restored after the last step: no batch to ask for, no process to start
        return outcome

    def validation_loss():
        return mean_loss(model, loss_fn, validation(), trainer.team)

    with DataParallel(trainer, batches, validation_loss if validation else None) as parallel:
        _go_through(outcome, parallel, measure, store, observers, stop)
    return outcome


def _go_through(outcome, parallel, measure, store, observers, stop) -> None:
    trainer = outcome.trainer
    config = trainer.config
    evaluates = parallel.evaluation is not None or measure is not None
    every = [trainer.log_every, *([config.eval_every] if evaluates else []), *([config.checkpoint_every] if store else [])]
    started = time.perf_counter() - outcome.seconds
    tell = _teller(observers, lambda: time.perf_counter() - started)
    if trainer.step == 0 and evaluates:
        _evaluate(outcome, parallel, measure, tell)
    begin, unlogged = time.perf_counter(), 0
    while trainer.step < config.steps:
        unlogged += parallel.update()
        last = trainer.step == config.steps
        if not (last or stop or any(trainer.step % n == 0 for n in every)):
            continue  # on a GPU nothing has been waited for
        record = parallel.look()
        speed = unlogged / (time.perf_counter() - begin)
        outcome.tokens += unlogged
        tell(record | dict(tokens=outcome.tokens, tokens_per_second=speed))
        improved = False
        if evaluates and (last or trainer.step % config.eval_every == 0):
            improved = _evaluate(outcome, parallel, measure, tell)
        outcome.seconds = time.perf_counter() - started
        outcome.interrupted = stop is not None and bool(stop) and not last
        if store is not None and (last or improved or outcome.interrupted or trainer.step % config.checkpoint_every == 0):
            tell(dict(event="checkpoint", step=trainer.step, path=str(store.save(outcome))))
        if outcome.interrupted:
            break
        begin, unlogged = time.perf_counter(), 0
    outcome.seconds = time.perf_counter() - started


@silent
def mean_loss(model: Module, loss_fn: LossFunction, batches: Iterable, team: Team | None = None) -> float:
    """The loss averaged over all targets of the batches, without recording gradients. Raises Diverged where it is not finite.

    team : who share the batches; each of them calls this and gets the same. A device is waited for once, at the end.
    """
    total = weight = 0
    with no_grad():
        for batch in batches if team is None else team.share(batches):
            total += unread(loss_fn(model, batch, None)) * batch.weight
            weight += batch.weight
    if team is not None:
        total, weight = team.sum(total, weight)
    total = float(total)
    if not math.isfinite(total):
        raise Diverged(f"training diverged: the loss of an evaluation is {total / weight:.4g}. Try a lower --lr, or a longer --warmup")
    return total / max(weight, 1)


def _evaluate(outcome: Outcome, parallel: DataParallel, measure, tell: Observer) -> bool:
    """Whether the loss is the best so far; there may be none, where a stage has nothing but figures to measure."""
    step, figures = outcome.trainer.step, {} if measure is None else measure()
    if parallel.evaluation is None:
        tell(dict(event="evaluation", step=step, val_loss=None) | figures)
        return False
    loss = parallel.evaluate()
    improved = outcome.best_val_loss is None or loss < outcome.best_val_loss
    if improved:
        outcome.best_val_loss = loss
    outcome.evaluations.append((step, loss))
    tell(dict(event="evaluation", step=step, val_loss=loss) | figures)
    return improved and step > 0


def _teller(observers, clock) -> Observer:
    def tell(record):
        record = record | dict(seconds=round(clock(), 3))
        for observer in observers:
            observer(record)

    return tell
