"""Everything that decides what a training run does. The command line is generated from these classes (see tinyllm.config)."""
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from tinyllm.backend import DEVICES
from tinyllm.config import check, from_dict, option_name, setting, value_type
from tinyllm.data.atomic import atomic_file
from tinyllm.nn import TransformerConfig
from tinyllm.optim import SCHEDULES
from tinyllm.threads import available_cores

WHERE = "where to compute: cuda is an NVIDIA GPU, through CuPy"  # help of --device
VOCAB_SIZE = 2048  # of a bpe tokenizer, where nothing else is asked for and the text is not small


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how it becomes tokens."""

    data: tuple[str, ...] = setting(
        (), "text, .jsonl with a text field, or folders of them (default: the Python standard library's sources)",
        metavar="FILE_OR_FOLDER", several=True,
    )  # fmt: skip
    tokenizer: str = setting(
        "bpe", "bpe or char, trained on the text, or a tokenizer file or run folder to take it from", metavar="bpe|char|PATH"
    )
    vocab_size: int | None = setting(
        None, f"entries of a bpe tokenizer (default: {VOCAB_SIZE}; for short texts 257 + one for each 250 characters)", minimum=257
    )
    val_fraction: float | None = setting(
        None, "share of the text that is set aside for validation (default: 0.1; of the standard library 0.02)", minimum=0, maximum=0.9
    )
    epochs: bool = setting(False, "go through the text without repetition, instead of drawing windows at random")
    document_mask: bool = setting(False, "a token sees its own document only, not those before it in the window")

    def resolved(self) -> "DataConfig":
        """The same config with val_fraction filled in."""
        fraction = (0.1 if self.data else 0.02) if self.val_fraction is None else self.val_fraction
        return dataclasses.replace(self, val_fraction=fraction)


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
    """The whole of a run: what config.json holds."""

    data: DataConfig = field(default_factory=DataConfig)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def checked(self) -> "RunConfig":
        """Itself, with data and model resolved. Raises ValueError for the first setting that makes no sense."""
        check(self.data)
        check(self.train)
        if self.train.min_lr is not None and self.train.min_lr > self.train.lr:
            raise ValueError(f"--min-lr {self.train.min_lr} is above --lr {self.train.lr}, the highest learning rate")
        if self.data.vocab_size is not None and self.data.tokenizer != "bpe":
            raise ValueError(f"--vocab-size goes with --tokenizer bpe alone, {self.data.tokenizer} has a size of its own: leave it out")
        if self.data.document_mask and self.data.tokenizer == "char":
            raise ValueError("--document-mask needs a tokenizer with <|endoftext|>, which char has not: use --tokenizer bpe")
        return dataclasses.replace(self, data=self.data.resolved(), model=self.model.resolved())

    def save(self, path: Path) -> None:
        with atomic_file(path) as file:
            file.write((json.dumps(self.to_json(), indent=1) + "\n").encode())

    def to_json(self) -> dict:
        """Plain dictionaries and lists, as JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @staticmethod
    def load(path: Path) -> "RunConfig":
        """Read config.json. Raises FileNotFoundError or ValueError, naming the file and what is wrong in it."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not found, so {path.parent} is not a run folder of tinyllm train")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in PARTS):
                raise ValueError(f"it must be an object with {', '.join(PARTS)}")
            config = RunConfig(**{name: from_dict(kind, content[name], str(path)) for name, kind in PARTS.items()})
            for name in PARTS:
                _check_types(getattr(config, name))
            return config.checked()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}; put back what it was, or start a new run") from error


PARTS = {"data": DataConfig, "model": TransformerConfig, "train": TrainConfig}
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
    known = {name: value for part in (saved.data, saved.model, saved.train) for name, value in dataclasses.asdict(part).items()}
    for name, value in given.items():
        if name in known and name not in FREE_ON_RESUME and value != known[name]:
            raise ValueError(
                f"cannot resume with {_spelled(name, value)}: the run was started {_spelled(name, known[name], 'with ', 'without ')}; "
                "leave the option out, or start a new run with another --out"
            )


def refuse_edits(trained: dict, config: RunConfig, checkpoint: Path) -> None:
    """Raise ValueError where config.json no longer says what a checkpoint was trained with (its `trained`, as to_json() gave it)."""
    for part, values in config.to_json().items():
        for name, value in values.items():
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
