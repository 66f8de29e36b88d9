"""Where the loop keeps its checkpoints: the newest few and the best, and how it comes back from one."""
from pathlib import Path
from typing import Protocol

import numpy as np

from tinyllm.train.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, prune, save_checkpoint, step_of
from tinyllm.train.config import RunConfig, refuse_edits


class Resumable(Protocol):
    """What has to go on where it stood."""

    def state(self) -> dict[str, np.ndarray]: ...

    def restore(self, state: dict[str, np.ndarray]) -> None: ...


class Store:
    """The checkpoints of one run.

    keep : how many of the newest stay; the one with the lowest validation loss stays too.
    config : goes into every checkpoint, and must be the same when one is read again; None: not looked at.
    rollouts : what makes batches from the model's own answers (align.Rollouts): its state() is saved and given back to restore().
    """

    def __init__(self, folder: Path, keep: int, config: RunConfig | None = None, rollouts: Resumable | None = None):
        self.folder, self.keep, self.config, self.rollouts = Path(folder), keep, config, rollouts

    def save(self, outcome) -> Path:
        """Write the whole state of training. The file is complete or absent; older ones are pruned only after it is there."""
        trainer = outcome.trainer
        evaluated = dict(outcome.evaluations)
        state = dict(
            trainer=trainer.state(),
            seconds=outcome.seconds,
            tokens=outcome.tokens,
            best_val_loss=outcome.best_val_loss,
            evaluations=outcome.evaluations,
            val_loss=evaluated.get(trainer.step),
            config=None if self.config is None else self.config.to_json(),
        )
        rollout = self.rollouts.state() if self.rollouts else None
        path = save_checkpoint(self.folder, trainer.step, trainer.model.state_dict(), trainer.optimizer.state_dict(), state, rollout)
        best = best_step(outcome.evaluations, [step_of(p) for p in list_checkpoints(self.folder)])
        prune(self.folder, self.keep, protect=() if best is None else (best,))
        return path

    def newest_step(self) -> int:
        """The step of the newest checkpoint; 0 where there is none."""
        return max((step_of(p) for p in list_checkpoints(self.folder)), default=0)

    def restore(self, outcome) -> None:
        """Continue from the newest checkpoint, where there is one."""
        checkpoints = list_checkpoints(self.folder)
        if not checkpoints:
            return
        try:
            found = load_checkpoint(checkpoints[-1])
        except ValueError as error:
            remedy = "" if len(checkpoints) == 1 else f": delete {checkpoints[-1]} and resume again"
            raise ValueError(f"{error}{remedy}") from error
        self._compare(found)
        outcome.trainer.restore(found.model, found.optimizer, found.state["trainer"])
        if self.rollouts:
            self.rollouts.restore(found.rollout)
        outcome.seconds, outcome.tokens = found.state["seconds"], found.state["tokens"]
        outcome.best_val_loss = found.state["best_val_loss"]
        outcome.evaluations = [(step, loss) for step, loss in found.state["evaluations"]]

    def load(self, which: str) -> Checkpoint:
        """The "last" checkpoint, the "best" by validation loss, or that of a step. Raises ValueError or FileNotFoundError."""
        checkpoints = {step_of(p): p for p in list_checkpoints(self.folder)}
        if not checkpoints:
            raise FileNotFoundError(f"{self.folder}: holds no complete checkpoint; train first")
        step = max(checkpoints)
        if which == "best":
            step = best_step(load_checkpoint(checkpoints[step]).state["evaluations"], checkpoints)
        elif which != "last":
            step = int(which) if which.isdecimal() else None
        if step not in checkpoints:
            steps = ", ".join(map(str, checkpoints))
            raise ValueError(f"{self.folder}: no checkpoint {which!r}; there are last, best (where there is validation) and step {steps}")
        found = load_checkpoint(checkpoints[step])
        self._compare(found)
        return found

    def _compare(self, found: Checkpoint) -> None:
        if self.config is not None and found.state["config"] is not None:
            refuse_edits(found.state["config"], self.config, found.path)


def best_step(evaluations, steps) -> int | None:
    """Which of `steps` was evaluated with the lowest loss; None where none was."""
    known = [(loss, step) for step, loss in evaluations if step in steps]
    return min(known)[1] if known else None
