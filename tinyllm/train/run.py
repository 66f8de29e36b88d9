"""A run folder: everything that belongs to one training run, and how to get the model back from it.

    RUN/config.json        the whole configuration          RUN/checkpoints/step-…/   weights, optimizer, state (see checkpoint)
    RUN/tokenizer.json     text <-> ids                     RUN/log.jsonl             a record for each step and evaluation
    RUN/data/              token shards                     RUN/summary.json          how it ended
"""
import json
import os
from pathlib import Path

from tinyllm.backend import random_stream
from tinyllm.data.atomic import atomic_file
from tinyllm.nn import Transformer
from tinyllm.tokenizer import Tokenizer, load_tokenizer
from tinyllm.train.config import RunConfig
from tinyllm.train.store import Store


class Run:
    """The paths in a run folder."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.config, self.tokenizer = self.folder / "config.json", self.folder / "tokenizer.json"
        self.data, self.checkpoints = self.folder / "data", self.folder / "checkpoints"
        self.log, self.summary = self.folder / "log.jsonl", self.folder / "summary.json"


def new_run(out: str | None, root: Path = Path("runs")) -> Run:
    """A run in the folder `out`, or in the next free runs/001, runs/002, …

    Raises ValueError where `out` holds a run already: nothing is ever overwritten.
    """
    if out is None:
        number = 1 + max((int(p.name) for p in root.glob("[0-9]*") if p.name.isdecimal()), default=0)
        return Run(root / f"{number:03d}")
    run = Run(out)
    if run.folder.exists() and not run.folder.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if run.config.exists():
        raise ValueError(f"--out {out} holds a run already: continue it with --resume {out}, or give another folder")
    return run


def load_run(folder: str | os.PathLike, checkpoint: str = "last") -> tuple[Transformer, Tokenizer, RunConfig]:
    """The model, tokenizer and configuration of a run, from its "last" or "best" checkpoint or that of a step ("200").

    Raises FileNotFoundError or ValueError, in one line, where something is missing or damaged.
    """
    run = Run(folder)
    if not run.folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such run folder; tinyllm train makes one")
    config = RunConfig.load(run.config)
    tokenizer = load_tokenizer(run.tokenizer)
    model = Transformer(config.model, random_stream(config.train.seed, "weights"))
    model.load_state_dict(Store(run.checkpoints, config.train.keep).load(checkpoint).model)
    return model, tokenizer, config


class Log:
    """log.jsonl: an observer of the loop that appends each record as a line."""

    def __init__(self, path: Path, resumed_at: int = 0):
        """Records after step `resumed_at` are dropped: the run that wrote them was killed before it could save those steps."""
        kept = [r for r in read_log(path) if r["step"] <= resumed_at] if resumed_at and path.exists() else []
        with atomic_file(path) as file:
            file.writelines(_line(record) for record in kept)
        self.file = open(path, "ab")

    def __call__(self, record: dict) -> None:
        self.file.write(_line(record))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _line(record: dict) -> bytes:
    return (json.dumps(record) + "\n").encode()


def read_log(path: Path) -> list[dict]:
    """The records of log.jsonl. A last line that a kill cut short is left out; a broken line before it is a ValueError."""
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is cut short, or empty
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a JSON record ({error})") from error
    return records
