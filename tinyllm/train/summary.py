"""How a run ended, in one small file: summary.json."""
import json
import math
import platform
import shlex
import sys

import numpy as np

import tinyllm
from tinyllm.data import PreparedData
from tinyllm.data.atomic import atomic_file
from tinyllm.nn.describe import describe
from tinyllm.train.config import RunConfig
from tinyllm.train.loop import Outcome
from tinyllm.train.run import Run


def write_summary(run: Run, config: RunConfig, outcome: Outcome, data: PreparedData, val_loss: float | None) -> dict:
    """Write RUN/summary.json and return its content.

    val_loss : mean loss in nats per token over the whole validation part, None without one.     best_val_loss : the lowest of all
    evaluations, this one included.     bits_per_byte = val_loss·tokens / (ln 2·bytes), which does not depend on the tokenizer.
    tokens_per_second : training tokens over all of the training's seconds.     peak_memory_mb : of the main process.     flops : of all training tokens, forward and backward.
    """
    description = describe(config.model, config.train.batch)
    known = [loss for loss in (outcome.best_val_loss, val_loss) if loss is not None]
    summary = dict(
        val_loss=val_loss,
        best_val_loss=min(known) if known else None,
        bits_per_byte=None if val_loss is None else val_loss * (len(data.val) - 1) / (math.log(2) * data.val.header.text_bytes),
        steps=outcome.trainer.step,
        tokens=outcome.tokens,
        seconds=round(outcome.seconds, 3),
        tokens_per_second=round(outcome.tokens / max(outcome.seconds, 1e-9), 1),
        peak_memory_mb=peak_memory_mb(),
        parameters=description.parameters,
        flops=description.flops_per_token * outcome.tokens,
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
