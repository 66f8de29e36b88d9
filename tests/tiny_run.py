"""Training runs that take a fraction of a second, for the tests; and, as a program, one that dies at a chosen moment.

    python tests/tiny_run.py MOMENT N [--nervous] ARGUMENTS OF tinyllm …

MOMENT is update, fsync, rename or rmtree: SIGKILL at the N-th call of it (those outside of training count only for "prepare", which
is the N-th fsync at all); or disk: no file can grow beyond N bytes once training has begun.
"""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from tinyllm.backend import random_stream
from tinyllm.cli.main import main
from tinyllm.optim import LossScaler, OutlierDetector
from tinyllm.train.checkpoint import list_checkpoints
from tinyllm.train.run import read_log

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # output to a pipe waits, as it does for users
MODEL = "--layers 1 --heads 2 --width 16 --context 16 --batch 4".split()
WORDS = "the quick brown fox jumps over lazy dogs and cats; naïve café – Ωmega!".split()


def text(words: int = 1500) -> str:
    """Some kilobytes of words, the same every time, not all of them ASCII."""
    drawn = random_stream(5, "text").integers(len(WORDS), size=words)
    return "".join(WORDS[i] + (" " if n % 9 else "\n") for n, i in enumerate(drawn.tolist(), 1))


def arguments(folder: Path, *options: object) -> list[str]:
    """The command line of a tiny run on `text()`, in folder/run unless options say otherwise."""
    data = folder / "text.txt"
    if not data.exists():
        data.write_text(text(), encoding="utf-8")
    given = [str(option) for option in options]
    place = [] if "--out" in given else ["--out", str(folder / "run")]
    kind = [] if "--tokenizer" in given else ["--tokenizer", "char"]
    source = [] if "--data" in given else ["--data", str(data)]
    pace = [] if "--eval-every" in given else ["--eval-every", "50"]  # a sample follows each evaluation, which takes longer than a step
    return ["train", *source, *kind, *MODEL, *place, *pace, *given]


def train(folder: Path, *options: object) -> Path:
    """A tiny run in this process; its folder."""
    assert main(arguments(folder, *options)) == 0
    return folder / "run"


def program(*words: object) -> list[str]:
    """The command that runs this file."""
    return [sys.executable, str(Path(__file__).resolve()), *map(str, words)]


def call(command: list[str], **options) -> subprocess.CompletedProcess:
    options = dict(env=ENVIRONMENT) | options
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=120, **options)


def final_bytes(run: Path) -> list[bytes]:
    """The weights and the optimizer's state of the newest checkpoint, bit by bit."""
    newest = list_checkpoints(run / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())["state"]
    return [(newest / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")] + [json.dumps(state["trainer"]).encode()]


def history(run: Path) -> list[dict]:
    """The log without what depends on the clock, and without checkpoints: an interrupted run saves some more."""
    records = [r for r in read_log(run / "log.jsonl") if r["event"] != "checkpoint"]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in records]


def back_to(run: Path, step: int) -> None:
    """As if the run had been killed right after its checkpoint of that step."""
    (run / "summary.json").unlink()
    for place in list_checkpoints(run / "checkpoints"):
        if int(place.name.rpartition("-")[2]) > step:
            shutil.rmtree(place)


def nervous(setattr=setattr) -> None:
    """Make fp16's loss scale and the outliers do within some steps what otherwise takes hundreds."""
    from tinyllm.train import trainer

    def for_precision(precision):
        return LossScaler(2.0**30, growth_interval=3) if precision == "fp16" else LossScaler(1.0, None)

    setattr(LossScaler, "for_precision", staticmethod(for_precision))
    setattr(trainer, "OutlierDetector", functools.partial(OutlierDetector, window=4))


def _die_at(moment: str, n: int) -> None:
    from tinyllm.train.trainer import Trainer

    calls, training = [0], [moment == "prepare"]
    owner, name = dict(update=(Trainer, "update"), rename=(os, "rename"), rmtree=(shutil, "rmtree")).get(moment, (os, "fsync"))
    update, target = Trainer.update, getattr(owner, name)

    def begun(self, batches):
        training[0] = True
        if moment == "disk":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return target(self, batches) if moment == "update" else update(self, batches)

    def deadly(*args, **kwargs):
        calls[0] += training[0]
        if calls[0] == n and moment != "disk":
            os.kill(os.getpid(), signal.SIGKILL)
        return begun(*args) if moment == "update" else target(*args, **kwargs)

    Trainer.update = begun
    training[0] = training[0] or moment == "update"
    setattr(owner, name, deadly)


def logits_loss(model, ids: np.ndarray, targets: np.ndarray) -> float:
    """Σ -log p(target) from the model's full logits, in float64: the definition that the fused loss must meet."""
    from tinyllm.tensor import no_grad

    with no_grad():
        scores = model(ids).numpy().astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
    return float(-np.take_along_axis(log_p, targets[..., None], -1).sum())


if __name__ == "__main__":
    moment, n, *rest = sys.argv[1:]
    if rest[0] == "--nervous":
        nervous()
        rest = rest[1:]
    _die_at(moment, int(n))
    sys.exit(main(rest))
