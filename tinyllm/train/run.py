"""A run folder: everything that belongs to one training run. It needs nothing outside of it, to be resumed or to be used.

    RUN/config.json        the whole configuration          RUN/checkpoints/step-…/   weights, optimizer, state (see checkpoint)
    RUN/tokenizer.json     text <-> ids                     RUN/log.jsonl             a record for each step and evaluation
    RUN/data/              what it learns from              RUN/summary.json          how it ended
    RUN/base/              the model that it began from, where there was one (see stages/base)

While the text is being prepared there is a file RUN/preparing and no config.json: nothing has been trained yet.
"""
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from tinyllm.data.atomic import atomic_file


class Run:
    """The paths in a run folder, and its beginning. made : whether the folder was made for this run, so that it may go with it."""

    def __init__(self, folder: str | os.PathLike, made: bool = False):
        self.folder, self.made = Path(folder), made
        self.config, self.tokenizer = self.folder / "config.json", self.folder / "tokenizer.json"
        self.data, self.checkpoints = self.folder / "data", self.folder / "checkpoints"
        self.base = self.folder / "base"
        self.log, self.summary = self.folder / "log.jsonl", self.folder / "summary.json"
        self.preparing = self.folder / "preparing"

    def begin(self) -> None:
        """Make the folder, and mark it as one in which nothing has been trained yet. Nothing of value is ever overwritten.

        Raises ValueError where the folder holds a run, or files by the names that a run needs; OSError where it cannot be made.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is a file: give a folder")
        if self.config.exists():
            raise ValueError(f"--out {self.folder} holds a run already: continue it with --resume {self.folder}, or give another folder")
        if self.preparing.exists():
            self.discard()  # what a run left that was killed here
        for path in (self.tokenizer, self.data, self.base, self.checkpoints, self.log, self.summary):
            if path.exists():
                raise ValueError(f"--out {self.folder} has a {path.name} in it that a run would overwrite: give another folder")
        try:
            self.made = self.made or not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            self.preparing.touch()
        except OSError as error:
            raise OSError(error.errno, f"cannot make --out {self.folder}: {os.strerror(error.errno)}; give another folder") from error

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the system takes the lock back when this one ends, however it ends.

        Raises ValueError where another has it. Systems without flock (Windows) have no such lock.
        """
        if fcntl is None:
            yield
            return
        with open(self.config) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"{self.folder} is being trained by another process: wait for its end, or stop it first") from error
            yield

    def discard(self) -> None:
        """Take back what was written since begin()."""
        for folder in (self.data, self.base):
            shutil.rmtree(folder, ignore_errors=True)
        for path in (self.config, self.tokenizer, self.preparing):
            path.unlink(missing_ok=True)
        if self.made and not any(self.folder.iterdir()):
            self.folder.rmdir()


def new_run(out: str | None, root: Path = Path("runs")) -> Run:
    """A run in the folder `out`, or in the next free runs/001, runs/002, …, which is made at once, so that nobody else takes it."""
    if out == "":  # of a shell variable that is not set
        raise ValueError("--out is empty: give a folder, or leave it out")
    if out is not None:
        return Run(out)
    while True:
        number = 1 + max((int(p.name) for p in root.glob("[0-9]*") if p.name.isdecimal()), default=0)
        try:
            (root / f"{number:03d}").mkdir(parents=True)
        except FileExistsError:  # another process was faster, or there is a file "runs"
            if root.is_dir():
                continue
            raise
        return Run(root / f"{number:03d}", made=True)


class Log:
    """log.jsonl: an observer of the loop that appends each record as a line.

    resumed_at : the step of the checkpoint from which the run goes on. Later records are dropped when the log is opened, with its first
    new record: the run that wrote them was killed before it could save those steps.
    """

    def __init__(self, path: Path, resumed_at: int = 0):
        self.path, self.file = path, None
        self.kept = [r for r in read_log(path) if r["step"] <= resumed_at] if resumed_at and path.exists() else []

    def open(self) -> None:
        """Begin to write, if that has not happened yet."""
        if self.file is None:
            with atomic_file(self.path) as file:
                file.writelines(_line(record) for record in self.kept)
            self.file = open(self.path, "ab", buffering=0)  # a buffer would try again, at close, to write what a full disk refused

    def __call__(self, record: dict) -> None:
        self.open()
        line = _line(record)
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            reason = f"cannot write {self.path}: {os.strerror(error.errno)}"
            raise OSError(error.errno, f"{reason}; free some space or mend the folder, then resume") from error

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _line(record: dict) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def read_log(path: Path) -> list[dict]:
    """The records of log.jsonl. A last line that a kill cut short is left out; a broken line before it is a ValueError."""
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is cut short, or empty
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not {"event", "step"} <= record.keys():
                raise ValueError('expected an object with "event" and "step"')
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a record of a run ({error}); delete the line") from error
        records.append(record)
    return records
