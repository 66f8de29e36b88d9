"""Stages that begin from a run: its model and tokenizer are copied into the new folder, and so are the examples.

    RUN/base/model.safetensors   the weights that were begun with: where there is a reference, it is these
    RUN/data/train.jsonl         examples to learn from, a record a line
    RUN/data/val.jsonl           examples that are only measured
"""
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from tinyllm.backend import array_module, random_stream
from tinyllm.config import again, setting
from tinyllm.data.records import json_records, write_records
from tinyllm.nn import LoRA, LoRAConfig, Module, Transformer, grow_vocabulary, merge_adapters, unfreeze
from tinyllm.stages.stage import BASE_WEIGHTS, Announce, Stage, Validation, load_run
from tinyllm.tokenizer import Tokenizer, add_special_tokens
from tinyllm.train.checkpoint import sha256_of
from tinyllm.train.config import RunConfig, TrainConfig
from tinyllm.train.run import Run
from tinyllm.train.safetensors import load, save


@dataclass(frozen=True)
class BaseConfig:
    """What a stage begins from. Three of these are no options:

    run : its folder, which the command is given first.     new_tokens : how many the chat template added to its vocabulary.
    copied : of each file that was written into the new folder to begin with, its SHA-256 and its path there, as sha256sum prints them.
    """

    run: str = ""
    new_tokens: int = 0
    copied: tuple[str, ...] = ()
    checkpoint: str = setting("last", "which of the base's checkpoints to begin from", metavar="last|best|STEP")


@dataclass(frozen=True)
class ExamplesConfig:
    """Which examples, how many of them are set aside, and how often the others are learned."""

    data: tuple[str, ...] = setting((), "examples", metavar="FILE", several=True)
    val_data: tuple[str, ...] = setting((), "examples to measure on, instead of setting aside some of --data", metavar="FILE", several=True)
    val_fraction: float = setting(0.1, "share of the examples that is set aside for validation", minimum=0, maximum=0.9)
    epochs: float = setting(3.0, "times through the examples, where neither --steps nor --minutes is given", minimum=1e-6)

    def steps(self, rows: int, train: TrainConfig) -> int:
        """Updates that go `epochs` times through so many rows."""
        return max(1, round(self.epochs * rows / (train.batch * train.accumulate)))


@dataclass(frozen=True)
class TuneTrainConfig(TrainConfig):
    """The same loop, with rates for weights that know something already."""

    batch: int = again(TrainConfig, "batch", 16, "examples, or rows of them, per micro-batch")
    steps: int | None = again(TrainConfig, "steps", None, "updates to make (default: --epochs through the examples)")
    minutes: float | None = again(TrainConfig, "minutes", None, "time to train for, evaluations included (default: --epochs through the examples)")
    lr: float = again(TrainConfig, "lr", 3e-4)
    weight_decay: float = again(TrainConfig, "weight_decay", 0.01)


@dataclass(frozen=True)
class AnswerTrainConfig(TuneTrainConfig):
    """The same for stages that learn something else than each next token: what smooths that loss is no option."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0


@dataclass(frozen=True)
class AdapterConfig(LoRAConfig):
    """An adapter, or none."""

    rank: int | None = again(LoRAConfig, "rank", None, "LoRA: learn an adapter with so many directions, and leave the weights (default: learn the weights)")

    def __post_init__(self):
        super().__post_init__()
        for option in dataclasses.fields(self):
            if self.rank is None and getattr(self, option.name) != option.default:
                raise ValueError(f"--{option.name.replace('_', '-')} is a setting of an adapter: give it a --rank, too")


@dataclass(frozen=True)
class TuneConfig(RunConfig):
    """A run that begins from another."""

    base: BaseConfig = field(default_factory=BaseConfig)
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    train: TuneTrainConfig = field(default_factory=TuneTrainConfig)

    def checked(self) -> "TuneConfig":
        if not self.base.run:
            raise ValueError("a run to begin from is missing: give its folder first")
        if not self.data.data:
            raise ValueError("--data is missing: give the file with the examples")
        if self.data.val_data and self.data.val_fraction != ExamplesConfig.val_fraction:
            raise ValueError("--val-data and --val-fraction are two answers to one question: give one of them")
        return super().checked()


class Tune(Stage):
    """A stage that begins from a run. chat : whether it works on conversations, for which the tokenizer needs the template's tokens."""

    options = {"data": "examples", "train": "training", "base": "base"}
    chat: ClassVar[bool] = True

    @abstractmethod
    def read(self, paths: Iterable[str | Path]) -> list[dict]:
        """The examples of files as records, each with the "source" (file:line) that errors name. A .jsonl file of them can be read, too.

        Raises FileNotFoundError, or ValueError with file, line and field, for bad ones.
        """

    def complete(self, config: TuneConfig, parts: dict[str, list[dict]], tokenizer: Tokenizer, announce: Announce) -> TuneConfig:
        """The config with what follows from the examples. Raises ValueError where nothing can be learned from them."""
        return config

    def prepare(self, config: TuneConfig, run: Run, announce: Announce) -> TuneConfig:
        parts = self._parts(config)  # before the model is read: what is wrong in a file should be known at once
        model, tokenizer, _ = load_run(config.base.run, config.base.checkpoint)
        if self.chat:
            tokenizer = add_special_tokens(tokenizer)
        new = tokenizer.vocab_size - model.config.vocab_size
        grow_vocabulary(model, tokenizer.vocab_size, random_stream(config.train.seed, "rows"))
        config = dataclasses.replace(config, model=model.config, base=dataclasses.replace(config.base, new_tokens=new))
        config = self.complete(config, parts, tokenizer, announce)
        tokenizer.save(run.tokenizer)
        save_weights(run.base, model)
        run.data.mkdir(exist_ok=True)
        for part, records in parts.items():
            write_records(run.data / f"{part}.jsonl", records)
        announce(f"base: {config.base.run}, {sum(p.size for _, p in model.named_parameters()):,} parameters")
        announce(f"examples: {len(parts['train']):,} for training, {len(parts['val']):,} for validation")
        return config

    def seal(self, config: TuneConfig, run: Run) -> TuneConfig:
        paths = [run.tokenizer, *sorted(path for folder in (run.data, run.base) for path in folder.rglob("*") if path.is_file())]
        copied = tuple(f"{sha256_of(path)}  {path.relative_to(run.folder).as_posix()}" for path in paths)
        return dataclasses.replace(config, base=dataclasses.replace(config.base, copied=copied))

    def verify(self, config: TuneConfig, run: Run) -> None:
        for line in config.base.copied:
            sha256, _, name = line.partition("  ")
            if not (path := run.folder / name).is_file():
                raise FileNotFoundError(f"{path}: no such file")
            if sha256_of(path) != sha256:
                raise ValueError(f"{path} is damaged: its SHA-256 is not the one in config.json")

    def _parts(self, config: TuneConfig) -> dict[str, list[dict]]:
        c, records = config.data, self.read(config.data.data)
        if c.val_data:
            return dict(train=records, val=self.read(c.val_data))
        aside = set_aside(len(records), c.val_fraction, config.train.seed)
        return dict(train=[r for i, r in enumerate(records) if i not in aside], val=[records[i] for i in sorted(aside)])

    def kept(self, run: Run) -> tuple[list[dict], list[dict]]:
        """The examples in a run folder: (train, val)."""
        train, val = ([record for _, _, record in json_records(run.data / f"{part}.jsonl", {"": ""})] for part in ("train", "val"))
        return train, val


def transformer(config: TuneConfig, base: Mapping[str, np.ndarray] | None) -> Transformer:
    """The base's model, with its weights where they are given."""
    model = Transformer(config.model, random_stream(config.train.seed, "weights"))
    if base is not None:
        model.load_state_dict(base)
    return model


def reference(config: TuneConfig, run: Run, model: Module) -> Transformer:
    """The model that was begun with, beside the one that learns, on its device."""
    xp = array_module(next(p for _, p in model.named_parameters()).data)
    return transformer(config, load(run.base / BASE_WEIGHTS)).to(xp)


class TuneText(Tune):
    """A stage whose model goes on writing text: all of its weights learn, or an adapter, which is merged when the model is used."""

    options = Tune.options | {"adapter": "adapter"}

    def module(self, config: TuneConfig, base: Mapping[str, np.ndarray] | None) -> Transformer:
        model = transformer(config, base)
        if config.adapter.rank is not None:
            LoRA(model, config.adapter, random_stream(config.train.seed, "adapter"))
            if config.base.new_tokens:  # the base has never seen them: their rows must be learned
                unfreeze(model, "embedding", *(["head"] if model.head is not None else []))
        return model

    def language_model(self, model: Transformer) -> Transformer:
        merge_adapters(model)
        return model


def save_weights(folder: Path, model: Module) -> None:
    """As RUN/base holds them."""
    folder.mkdir()
    save(folder / BASE_WEIGHTS, model.state_dict())


def set_aside(count: int, fraction: float, seed: int) -> set[int]:
    """The numbers of the examples for validation: their share, at least one; of a single example, or with 0, none."""
    if not fraction or count < 2:
        return set()
    return set(random_stream(seed, "split").permutation(count)[: min(count - 1, max(1, round(fraction * count)))].tolist())


def taken(micro_batch: Callable[[int], object], accumulate: int) -> Callable[[int], list]:
    """step -> its micro-batches, from a function of a micro-batch's number."""
    return lambda step: [micro_batch(step * accumulate + i) for i in range(accumulate)]


def each(items: Sequence, size: int, make: Callable[[Sequence], object]) -> Validation:
    """Validation batches of so many items, the last one perhaps smaller."""
    starts = range(0, len(items), size)
    return Validation(len(starts), lambda every: (make(items[start : start + size]) for start in starts[::every]))
