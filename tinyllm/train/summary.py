"""How a run ended, in one small file: summary.json."""
import json
import platform
import shlex
import sys

import numpy as np

import tinyllm
from tinyllm.data.atomic import atomic_file
from tinyllm.train.loop import Outcome
from tinyllm.train.run import Run


def write_summary(run: Run, outcome: Outcome, val_loss: float | None, figures: dict) -> dict:
    """Write RUN/summary.json and return its content.

    val_loss : mean loss over the whole validation part (in pretraining in nats per token), None without one.     best_val_loss : the
    lowest of all evaluations, this one included.     figures : what else the stage knows of itself.     tokens : what was learned from, in
    the stage's unit: targets that counted, or texts, pairs, rows.     tokens_per_second : over all of the training's seconds.     peak_memory_mb : of the main process.     parameters : those learned.
    """
    known = [loss for loss in (outcome.best_val_loss, val_loss) if loss is not None]
    summary = dict(
        val_loss=val_loss,
        best_val_loss=min(known) if known else None,
        **figures,
        steps=outcome.trainer.step,
        tokens=outcome.tokens,
        seconds=round(outcome.seconds, 3),
        tokens_per_second=round(outcome.tokens / max(outcome.seconds, 1e-9), 1),
        peak_memory_mb=peak_memory_mb(),
        parameters=sum(p.size for _, p in outcome.trainer.model.named_parameters() if p.requires_grad),
        versions=dict(tinyllm=tinyllm.__version__, python=platform.python_version(), numpy=np.__version__),
        platform=platform.platform(),
        command=shlex.join(["tinyllm", *sys.argv[1:]]),
    )
    with atomic_file(run.summary) as file:
        file.write((json.dumps(summary, indent=1) + "\n").encode())
    return summary


def peak_memory_mb() -> float | None:
    """The most memory that this process has taken so far, in megabytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)
