"""Everything that decides what a training run does. The command line is generated from these classes (see tinyllm.config)."""
import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from tinyllm.backend import DEVICES
from tinyllm.config import check, from_dict, option_name, setting, value_type
from tinyllm.data.atomic import atomic_file
from tinyllm.nn import TransformerConfig
from tinyllm.optim import SCHEDULES
from tinyllm.threads import available_cores

WHERE = "where to compute: cuda is an NVIDIA GPU, through CuPy"  # help of --device


@dataclass(frozen=True)
class TrainConfig:
    """How long, how fast, how often: what the one training loop needs."""

    batch: int = setting(8, "windows per micro-batch", minimum=1)
    accumulate: int = setting(1, "micro-batches per update; their gradients are averaged by tokens", minimum=1)
    steps: int | None = setting(None, "updates to make (default: as many as fit into --minutes)", minimum=1)
    minutes: float | None = setting(None, "time to train for, evaluations included; the speed is measured first (default: 3, if --steps is not given)", minimum=0.01, maximum=1e6)
    lr: float = setting(2e-3, "highest learning rate", minimum=0)
    min_lr: float | None = setting(None, "learning rate at the end of the schedule (default: a tenth of --lr)", minimum=0)
    warmup: int | None = setting(None, "updates in which the learning rate rises (default: 100, at most a tenth of all)", minimum=0)
    schedule: str = setting("cosine", "course of the learning rate after the warm-up; wsd: constant, then down", choices=SCHEDULES)
    beta1: float = setting(0.9, "AdamW: how much of the gradient's running mean stays", minimum=0, maximum=0.9999999)
    beta2: float = setting(0.95, "AdamW: how much of the squared gradient's running mean stays", minimum=0, maximum=0.9999999)
    weight_decay: float = setting(0.1, "AdamW: decay of matrices, times the learning rate", minimum=0)
    clip: float = setting(1.0, "largest norm of the gradient; 0 switches clipping off", minimum=0)
    label_smoothing: float = setting(0.0, "share of the target that is spread over all tokens", minimum=0, maximum=0.99)
    z_loss: float = setting(0.0, "weight of the squared log-sum-exp in the loss, which keeps scores bounded", minimum=0)
    skip_outliers: float | None = setting(
        None, "leave out updates whose loss or gradient norm is this many standard deviations off (default: off)", minimum=1
    )
    eval_every: int | None = setting(None, "updates between evaluations (default: a tenth of all; more where that would take much of --minutes)", minimum=1)
    eval_batches: int = setting(8, "validation batches per evaluation; the last one takes the whole validation part", minimum=1)
    checkpoint_every: int | None = setting(None, "updates between checkpoints (default: at every evaluation)", minimum=1)
    log_every: int | None = setting(None, "updates between lines of the log and the display (default: 1; on a GPU, which stops for each, 10)", minimum=1)
    keep: int = setting(2, "newest checkpoints to keep, besides the best", minimum=1)
    seed: int = setting(0, "seed of weights, batches and dropout", minimum=0)
    device: str = setting("cpu", WHERE, choices=DEVICES)
    deterministic: bool = setting(False, "on a GPU: the same bits in every run, a little slower; on the CPU it is always so")
    threads: int | None = setting(None, "threads to compute with on the CPU (default: the cores this process may use)", minimum=1, maximum=1024)

    def planned(self, steps: int) -> "TrainConfig":
        """The same config with the number of updates fixed, and all that follows from it filled in."""
        warmup = min(100, steps // 10) if self.warmup is None else self.warmup
        min_lr = self.lr / 10 if self.min_lr is None else self.min_lr
        every = self.eval_every or max(1, -(-steps // 10))
        return dataclasses.replace(
            self, steps=steps, warmup=warmup, min_lr=min_lr, eval_every=every, checkpoint_every=self.checkpoint_every or every,
            threads=self.threads or available_cores(),
        )


@dataclass(frozen=True)
class RunConfig:
    """The whole of a run: what config.json holds. Each stage has a subclass, with parts of its own beside these two (see stages/)."""

    stage: ClassVar[str]
    model: TransformerConfig = field(default_factory=TransformerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @classmethod
    def kinds(cls) -> dict[str, type]:
        """The parts: {name: its class}. No two of them have a setting of the same name."""
        hints = typing.get_type_hints(cls)
        return {field_.name: hints[field_.name] for field_ in dataclasses.fields(cls)}

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.kinds()}

    def checked(self) -> Self:
        """Itself, with the model resolved. Raises ValueError for the first setting that makes no sense."""
        for name, part in self.parts().items():
            if name != "model":  # whose limits resolved() looks at, with more
                check(part)
        if self.train.min_lr is not None and self.train.min_lr > self.train.lr:
            raise ValueError(f"--min-lr {self.train.min_lr} is above --lr {self.train.lr}, the highest learning rate")
        return dataclasses.replace(self, model=self.model.resolved())

    def save(self, path: Path) -> None:
        with atomic_file(path) as file:
            file.write((json.dumps(self.to_json(), indent=1) + "\n").encode())

    def to_json(self) -> dict:
        """Plain dictionaries and lists, as JSON gives them back."""
        return {"stage": self.stage} | json.loads(json.dumps(dataclasses.asdict(self)))


def load_config(path: Path, kinds: Mapping[str, type[RunConfig]]) -> RunConfig:
    """Read config.json as the class of the stage that it names. Raises FileNotFoundError or ValueError, naming the file and what is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found, so {path.parent} is not a run folder of tinyllm train")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kind = _kind(content, kinds)
        parts = kind.kinds()
        if not all(isinstance(content.get(name), dict) for name in parts):
            raise ValueError(f"it must be an object with {', '.join(parts)}")
        config = kind(**{name: from_dict(part, content[name], str(path)) for name, part in parts.items()})
        for part in config.parts().values():
            _check_types(part)
        return config.checked()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; put back what it was, or start a new run") from error


def _kind(content, kinds):
    if not isinstance(content, dict):
        raise ValueError(f"it must be an object with stage, {', '.join(next(iter(kinds.values())).kinds())}")
    stage = content.get("stage", "pretrain")  # the only one there was when folders did not name theirs
    if stage not in kinds:
        raise ValueError(f"stage {stage!r} is unknown: it is one of {', '.join(kinds)}")
    return kinds[stage]


FREE_ON_RESUME = ("device", "precision", "deterministic", "log_every", "keep", "checkpoint_every")  # the last bits may differ, the task not


def _check_types(config) -> None:
    """Raise ValueError for the first value that is not of its field's type. The command line cannot give one, a file can."""
    for field_ in dataclasses.fields(config):
        value, kind = getattr(config, field_.name), value_type(type(config), field_)
        if value is None and field_.default is None:
            continue
        for item in value if isinstance(value, tuple) and field_.default == () else [value]:
            if not isinstance(item, (int, float) if kind is float else kind) or (isinstance(item, bool) and kind is not bool):
                raise ValueError(f"{field_.name} is {item!r}, which is not of type {kind.__name__}")


def refuse_changes(saved: RunConfig, given: dict[str, object]) -> None:
    """Raise ValueError for the first explicitly given option that differs from the run that is to be resumed."""
    options = ((part, option) for part in saved.parts().values() for option in dataclasses.fields(part) if "help" in option.metadata)
    known = {option.name: getattr(part, option.name) for part, option in options}
    for name, value in given.items():
        if name in known and name not in FREE_ON_RESUME and value != known[name]:
            raise ValueError(
                f"cannot resume with {_spelled(name, value)}: the run was started {_spelled(name, known[name], 'with ', 'without ')}; "
                "leave the option out, or start a new run with another --out"
            )


def refuse_edits(trained: dict, config: RunConfig, checkpoint: Path) -> None:
    """Raise ValueError where config.json no longer says what a checkpoint was trained with (its `trained`, as to_json() gave it)."""
    now = config.to_json()
    for part in config.kinds():
        for name, value in now[part].items():
            before = trained[part].get(name, value)  # a setting that is newer than the checkpoint had its default
            if name not in FREE_ON_RESUME and value != before:
                where = checkpoint.parent.parent / "config.json"
                raise ValueError(f"{where} has {part}.{name} {value!r}, but {checkpoint} was trained with {before!r}: put that back")


def _spelled(name: str, value, with_: str = "", without: str = "without ") -> str:
    """A setting as it is written on the command line."""
    option = option_name(name)
    if value is None:
        return without + option
    if isinstance(value, bool):
        return with_ + (option if value else "--no-" + option[2:])
    return with_ + " ".join([option, *map(str, value if isinstance(value, tuple) else [value])])
