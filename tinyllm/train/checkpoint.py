"""Checkpoints on disk: a folder for each step that is there whole or not at all, and is checked before it is believed.

    FOLDER/step-000200/model.safetensors        weights
                       optimizer.safetensors    what the optimizer remembers
                       rollout.safetensors      where there is one: the answers that updates are being made from (see align/)
                       state.json               everything else, and the SHA-256 of all others

A save writes into step-000200.tmp, makes every byte durable, then renames the folder, which is one step for everybody else. So a
process killed at any moment leaves either no step-000200 or a complete one. A step that is saved again is first renamed to
step-000200.replaced, which counts as the checkpoint until the new one has its name.
"""
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyllm.data.atomic import atomic_file, sync_folder
from tinyllm.train import safetensors

MODEL, OPTIMIZER, ROLLOUT, STATE = "model.safetensors", "optimizer.safetensors", "rollout.safetensors", "state.json"
VISIBLE = re.compile(r"step-(\d{6,})(\.replaced)?")
UNFINISHED, REPLACED = ".tmp", ".replaced"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and verified. The arrays are read-only and memory-mapped; state is as JSON gives it."""

    path: Path
    step: int
    model: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    rollout: dict[str, np.ndarray]
    state: dict[str, Any]


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    model: dict[str, np.ndarray],
    optimizer: dict[str, np.ndarray],
    state: dict[str, Any],
    rollout: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a checkpoint and return its path. One process at a time may save into a folder.

    state must be what JSON can hold; tuples come back as lists and number keys as strings. Errors: ValueError for a state or an array
    that cannot be stored; OSError, in one line, where the disk is full. Either way the earlier checkpoints are untouched.
    """
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    unfinished = final.with_name(final.name + UNFINISHED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        unfinished.mkdir()
        _write_files(unfinished, step, {MODEL: model, OPTIMIZER: optimizer} | ({ROLLOUT: rollout} if rollout else {}), state)
        _give_name(unfinished, final)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            remedy = "earlier checkpoints are untouched; free some space or mend the folder, then resume"
            raise OSError(error.errno, f"cannot save the checkpoint {final}: {reason}; {remedy}") from error
        raise
    return final


def _write_files(folder: Path, step: int, files: dict[str, dict], state: dict) -> None:
    for name, arrays in files.items():
        safetensors.save(folder / name, arrays)
    content = {"step": step, "sha256": {name: sha256_of(folder / name) for name in files}, "state": state}
    try:
        content["checksum"] = _checksum(content)
    except TypeError as error:
        raise ValueError(f"the state of a checkpoint must be what JSON can hold: {error}") from error
    with atomic_file(folder / STATE) as file:
        file.write(json.dumps(content, indent=1).encode())


def _give_name(unfinished: Path, final: Path) -> None:
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        os.rename(final, replaced)
    os.rename(unfinished, final)
    sync_folder(final.parent)
    if replaced.exists():
        _remove(replaced)


def _tidy(folder: Path) -> None:
    """Clear away what a killed process left: unfinished folders, and replaced ones unless their successor is missing."""
    for path in folder.glob(f"step-*{UNFINISHED}"):
        shutil.rmtree(path)
    for path in folder.glob(f"step-*{REPLACED}"):
        final = path.with_name(path.name.removesuffix(REPLACED))
        if final.exists():
            _remove(path)
        else:
            os.rename(path, final)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that nobody finds it half deleted."""
    doomed = checkpoint.with_name(checkpoint.name + UNFINISHED)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)


def list_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The complete checkpoints in a folder, by step, oldest first; an empty list where there is no such folder."""
    found = {}
    for path in sorted(Path(folder).glob("step-*")):  # "step-1" before "step-1.replaced", which counts only where the former is missing
        if VISIBLE.fullmatch(path.name):
            found.setdefault(step_of(path), path)
    return [found[step] for step in sorted(found)]


def step_of(checkpoint: str | os.PathLike) -> int:
    """The step in a checkpoint's name. Raises ValueError for a name that is none."""
    match = VISIBLE.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ValueError(f"{checkpoint}: not a checkpoint: expected a folder named like step-000200")
    return int(match[1])


def prune(folder: str | os.PathLike, keep: int, protect: Collection[int] = ()) -> None:
    """Delete all but the newest `keep` checkpoints and those of the steps in `protect`."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1 checkpoint, found {keep}")
    for path in list_checkpoints(folder)[:-keep]:
        if step_of(path) not in protect:
            _remove(path)


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint after verifying every byte of it.

    Errors: FileNotFoundError where there is none. ValueError, in one line, that names the damaged file and the newest checkpoint
    beside it that is intact, if there is one.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        return _load(path)
    except ValueError as error:
        others = [other for other in reversed(list_checkpoints(path.parent)) if other.name != path.name]
        intact = next((other for other in others if _is_intact(other)), None)
        remedy = f"{intact} is intact, use that" if intact else "no other checkpoint beside it is intact; start a new run"
        raise ValueError(f"{error}; {remedy}") from error


def _load(path: Path) -> Checkpoint:
    content = _verify(path)
    model, optimizer, rollout = (safetensors.load(path / name) if name in content["sha256"] else {} for name in (MODEL, OPTIMIZER, ROLLOUT))
    return Checkpoint(path, content["step"], model, optimizer, rollout, content["state"])


def _verify(path: Path) -> dict[str, Any]:
    """The content of state.json, once all files are found to be as they were written."""
    if not (path / STATE).is_file():
        raise ValueError(f"{path / STATE} is missing")
    try:
        content = json.loads((path / STATE).read_bytes())
        sound = content.pop("checksum") == _checksum(content)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):  # all that a damaged file can do to these two lines
        sound = False
    if not sound:
        raise ValueError(f"{path / STATE} is damaged: its checksum does not match")
    for name, sha256 in content["sha256"].items():
        if not (path / name).is_file():
            raise ValueError(f"{path / name} is missing")
        if sha256_of(path / name) != sha256:
            raise ValueError(f"{path / name} is damaged: its SHA-256 is not the one in {STATE}")
    return content


def _is_intact(path: Path) -> bool:
    try:
        _verify(path)
    except ValueError:
        return False
    return True


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a JSON value without regard to white space. Keys keep their order, as a state may mean something by it."""
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
