"""A stage of a model's life: what it learns, from what, in a run folder of its own. All go through the same `start` and `resume`.

    prepare(config, run)         reads what was given, and writes all that is needed into the folder: tokenizer, data, the model begun from
    seal, verify                 note what was written, and find what has become of it when the run is resumed
    module(config, base)         the model as it begins
    open(config, run, …) -> Work batches, loss and validation, from the folder alone: so a run that is resumed learns what it would have
                                 learned, whatever has become of the files that it was started with
"""
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tinyllm.backend import device_module
from tinyllm.nn import Module, Transformer
from tinyllm.threads import available_cores, threads
from tinyllm.tokenizer import Tokenizer, load_tokenizer
from tinyllm.train.config import RunConfig, TrainConfig, load_config
from tinyllm.train.interrupt import stop_on_signal
from tinyllm.train.loop import Outcome, mean_loss, train
from tinyllm.train.parallel import DataParallel
from tinyllm.train.run import Log, Run
from tinyllm.train.safetensors import load
from tinyllm.train.shortage import shortage_explained
from tinyllm.train.store import Store
from tinyllm.train.summary import write_summary
from tinyllm.train.trainer import Diverged, LossFunction, Trainer

Announce = Callable[[str], None]
Observers = Callable[..., Sequence]  # observers(model, tokenizer, steps) gives the loop's observers besides the log
BASE_WEIGHTS = "model.safetensors"  # in RUN/base


@dataclass(frozen=True)
class Validation:
    """The part that is only measured.     count : its batches.     every(n) : each n-th of them, from the first.

    loss : whether a mean loss says something of it (of answers that the model has yet to write it does not).
    """

    count: int
    every: Callable[[int], Iterable]
    loss: bool = True

    def all(self) -> Iterable:
        return self.every(1)

    def some(self, most: int) -> Iterable:
        """About so many batches, evenly spread."""
        return self.every(max(1, -(-self.count // most)))


@dataclass(frozen=True)
class Work:
    """What there is to do in a stage: see `train` for batches and loss_fn.

    measure(batches) : figures of validation batches besides their loss, for evaluations and the summary.
    rollouts : makes batches from the model's own answers; must be saved with it, and reports each rollout to its `observe`.
    steps : updates where neither --steps nor --minutes is given; None: as many as fit into three minutes.
    closing(outcome, val_loss) : what else goes into summary.json.
    """

    batches: Callable[[int], Sequence]
    loss_fn: LossFunction
    validation: Validation | None = None
    measure: Callable[[Iterable], dict[str, float]] | None = None
    rollouts: Any = None
    steps: int | None = None
    closing: Callable[[Outcome, float | None], dict] = lambda outcome, val_loss: {}


class Stage(ABC):
    """One kind of run.

    name : in config.json.     Config : its settings.     options : which parts of it are options of the command line, and their headings.
    command : the words that begin it.     unit : what it counts when it says how much was learned.
    continues : whether the model goes on with any text while it learns, so that a sample shows how far it is.
    """

    name: ClassVar[str]
    Config: ClassVar[type[RunConfig]]
    options: ClassVar[dict[str, str]]
    command: ClassVar[tuple[str, ...]]
    unit: ClassVar[str] = "tokens"
    continues: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, config: RunConfig, run: Run, announce: Announce) -> RunConfig:
        """Fill a new folder. Returns the config with what followed from text and base. ValueError or FileNotFoundError for bad input."""

    def seal(self, config: RunConfig, run: Run) -> RunConfig:
        """The config with what verify() needs to know of the files that prepare() wrote. Token shards need nothing: they carry checksums of their own."""
        return config

    def verify(self, config: RunConfig, run: Run) -> None:
        """Raises FileNotFoundError or ValueError where one of them is missing or is no longer what it was."""
        return None

    @abstractmethod
    def module(self, config: RunConfig, base: Mapping[str, np.ndarray] | None) -> Module:
        """The model on the CPU. base : the weights that it begins with; None where there are none, or where a checkpoint's follow."""

    @abstractmethod
    def open(self, config: RunConfig, run: Run, tokenizer: Tokenizer, model: Module) -> Work:
        """What there is to do. model : as module() made it, on its device."""

    @abstractmethod
    def next_command(self, run: Run) -> list[str]:
        """The words of a command to try when a run is complete."""

    def language_model(self, model: Module) -> Transformer:
        """What came of it as a model that writes text. ValueError where it does something else."""
        return model


STAGES: dict[str, Stage] = {}  # by name; filled by tinyllm.stages


def stage_config(run: Run) -> RunConfig:
    """The configuration in a run folder. Raises FileNotFoundError or ValueError, in one line, where it is missing or damaged."""
    return load_config(run.config, {name: stage.Config for name, stage in STAGES.items()})


def start(config: RunConfig, run: Run, announce: Announce, observers: Observers = lambda *_: ()) -> Outcome:
    """A new run in a folder that holds none."""
    stage = STAGES[config.stage]
    run.begin()
    try:
        config = config.checked()
        xp = _settle(config.train)
        config = stage.seal(stage.prepare(config, run, announce), run)
        tokenizer = load_tokenizer(run.tokenizer)
        with shortage_explained(config):
            model = stage.module(config, _base(run)).to(xp)
            work = stage.open(config, run, tokenizer, model)
            plan = planned(model, work, config)
        config = dataclasses.replace(config, train=plan)
        config.save(run.config)
    except BaseException:  # Ctrl-C too: a folder in which nothing was trained shall not stand in the way of the next try
        run.discard()
        raise
    run.preparing.unlink()
    return _go_on(config, run, model, work, observers(model, tokenizer, config.train.steps))


def resume(run: Run, config: RunConfig, observers: Observers = lambda *_: ()) -> Outcome:
    """Continue the run in a folder from its newest checkpoint (or its beginning, where it was killed before the first)."""
    stage = STAGES[config.stage]
    xp = _settle(config.train)
    try:
        stage.verify(config, run)
        tokenizer = load_tokenizer(run.tokenizer)
        with shortage_explained(config):
            model = stage.module(config, _base(run)).to(xp)
            work = stage.open(config, run, tokenizer, model)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"cannot resume {run.folder}: {error}. Put the file back from a copy, or start a new run") from error
    run.preparing.unlink(missing_ok=True)
    return _go_on(config, run, model, work, observers(model, tokenizer, config.train.steps))


def load_module(folder: str | Path, checkpoint: str = "last") -> tuple[Module, Tokenizer, RunConfig]:
    """What a run trained, on the CPU, with its tokenizer and configuration, from its "last" or "best" checkpoint or that of a step ("200").

    Raises FileNotFoundError or ValueError, in one line, where something is missing or damaged.
    """
    run = Run(folder)
    if not run.folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder; tinyllm train makes one")
    config = stage_config(run)
    tokenizer = load_tokenizer(run.tokenizer)
    model = STAGES[config.stage].module(config, None)
    model.load_state_dict(Store(run.checkpoints, config.train.keep, config).load(checkpoint).model)
    return model, tokenizer, config


def load_run(folder: str | Path, checkpoint: str = "last", device: str = "cpu") -> tuple[Transformer, Tokenizer, RunConfig]:
    """The language model of a run, on a device, with its tokenizer and configuration. Errors: those of load_module; see language_model."""
    xp = device_module(device)
    model, tokenizer, config = load_module(folder, checkpoint)
    try:
        return STAGES[config.stage].language_model(model).to(xp), tokenizer, config
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _settle(config: TrainConfig):
    """Set what is one setting of the process; the array library of the device."""
    threads(config.threads or available_cores())  # a resumed run keeps its number, on which the last bits of sums depend
    return device_module(config.device)


def _base(run: Run) -> Mapping[str, np.ndarray] | None:
    return load(run.base / BASE_WEIGHTS) if run.base.exists() else None


def planned(model: Module, work: Work, config: RunConfig) -> TrainConfig:
    """config.train with its number of updates fixed: the plan is made once, before the first update, so that everything after it is a
    pure function of the step number."""
    c = config.train
    if c.steps:
        return c.planned(c.steps)
    if c.minutes is None and work.steps is not None:
        return c.planned(work.steps)
    if work.rollouts is not None:
        raise ValueError("--minutes: how long answers take changes as they are learned, so there is nothing to plan by: give --steps")
    plan = timed(model, work, c, seconds=60 * (c.minutes or 3))
    return plan.planned(plan.steps)


def timed(model: Module, work: Work, c: TrainConfig, seconds: float) -> TrainConfig:
    """The settings with as many updates as fit into this many seconds, judged by a few gradients that are thrown away.

    Evaluations are part of the time. Where --eval-every leaves it open, there are ten, or as many as a tenth of the time allows.
    """
    began, times = time.perf_counter(), []
    with DataParallel(Trainer(model, work.loss_fn, c), work.batches) as trial:
        while len(times) < 3 or (time.perf_counter() - began < seconds / 30 and len(times) < 20):
            start = time.perf_counter()
            _, square = trial.gradients()
            float(square)  # waits until a device has done all that
            times.append(time.perf_counter() - start)
    step = sorted(times)[len(times) // 2] * 1.05  # the update itself, and the log, come on top
    forward = step / (3 * c.accumulate)  # a third of a micro-batch's step
    whole = work.validation.count * forward if work.validation else 0.0  # the evaluation at the very end
    partial = min(whole, c.eval_batches * forward)
    left = seconds - (time.perf_counter() - began) - whole - partial
    if c.eval_every:
        return dataclasses.replace(c, steps=max(1, int(left / (step + partial / c.eval_every))))
    evaluations = max(1, min(10, int(0.1 * left / partial))) if partial else 10
    steps = max(1, int((left - evaluations * partial) / step))
    return dataclasses.replace(c, steps=steps, eval_every=-(-steps // evaluations))


def _go_on(config, run, model, work, observers) -> Outcome:
    store = Store(run.checkpoints, config.train.keep, config, work.rollouts)
    log = Log(run.log, store.newest_step())
    watching = [log, *observers]
    if work.rollouts is not None:
        work.rollouts.observe = lambda record: [watch(record) for watch in watching]
    try:
        with run.lock(), stop_on_signal() as stop, shortage_explained(config):
            outcome = _trained(config, model, work, store, watching, stop)
            log.open()  # where no step was left to do, nothing has opened it
            if not outcome.interrupted:  # still in the block: a signal that comes now finds the run all but done
                _conclude(run, model, work, outcome)
    except Diverged as error:
        newest = store.newest_step()
        raise Diverged(f"{error}. {f'The newest checkpoint is of step {newest}' if newest else 'There is no checkpoint yet'}") from error
    finally:
        log.close()
    return outcome


def _trained(config, model, work, store, watching, stop) -> Outcome:
    validation, most = work.validation, config.train.eval_batches
    return train(
        model, work.batches, work.loss_fn, config.train, store=store, observers=watching, stop=stop, precision=config.model.precision,
        validation=(lambda: validation.some(most)) if validation and validation.loss else None,
        measure=(lambda: work.measure(validation.some(most))) if validation and work.measure else None,
    )  # fmt: skip


def _conclude(run, model, work, outcome) -> None:
    """The whole validation part, and the summary: with it a run is complete."""
    validation = work.validation
    val_loss = mean_loss(model, work.loss_fn, validation.all()) if validation and validation.loss else None
    figures = work.measure(validation.all()) if validation and work.measure else {}
    write_summary(run, outcome, val_loss, dict(figures=figures) | work.closing(outcome, val_loss))
