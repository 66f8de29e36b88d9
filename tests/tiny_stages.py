"""Runs of every stage that take a fraction of a second: a base, examples of each kind, and the command lines."""
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from tiny_run import train

from tinyllm.cli.main import main

PACE = "--steps 8 --eval-every 5 --checkpoint-every 3 --keep 9 --seed 3 --lr 0.003".split()
ROLLOUTS = "--prompts 2 --answers 3 --max-tokens 4 --epochs 2 --minibatches 2".split()  # four updates to each: steps 3 and 6 lie within one
ANIMALS, PLACES = ("fox", "dog", "cat", "café"), ("over", "under", "beside")


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


EXAMPLES: dict[str, list[dict]] = {
    "talk": [{"messages": [user(f"where is the {a}?"), assistant(f"{b} the {c}"), *[user("and you?"), assistant("here")] * (a == b)]}
             for a in ANIMALS for b in PLACES for c in ANIMALS],
    "pairs": [{"prompt": f"where is the {a}?", "chosen": f"{b} it", "rejected": "naïve – Ωmega" if a < "d" else "no"} for a in ANIMALS for b in PLACES],
    "tasks": [{"prompt": [user(f"{a} and {b}?")], "answer": b} for a in ANIMALS for b in PLACES],
    "notes": [{"text": f"the {a} {b} it\n", "label": b} for b in PLACES for a in ANIMALS],
}  # fmt: skip

# name: (words of the command, examples, options besides PACE). So small a model is never right: without an entropy bonus GRPO had no gradient.
RUNS: dict[str, tuple[list[str], str, list[str]]] = {
    "instruct": (["finetune", "instruct"], "talk", ["--batch", "3"]),
    "instruct padded": (["finetune", "instruct"], "talk", ["--batch", "3", "--no-pack", "--accumulate", "2"]),
    "instruct lora": (["finetune", "instruct"], "talk", ["--batch", "3", "--rank", "2", "--adapter-dropout", "0.1"]),
    "instruct dora": (["finetune", "instruct"], "talk", ["--batch", "3", "--rank", "2", "--dora", "--targets", "query", "value"]),
    "classify": (["finetune", "classify"], "notes", ["--batch", "4"]),
    "classify top": (["finetune", "classify"], "notes", ["--batch", "4", "--learn-blocks", "0", "--pooling", "mean"]),
    "dpo": (["align", "dpo"], "pairs", ["--batch", "4"]),
    "dpo lora": (["align", "dpo"], "pairs", ["--batch", "4", "--rank", "2"]),
    "kto": (["align", "dpo"], "pairs", ["--batch", "4", "--loss", "kto"]),
    "simpo": (["align", "dpo"], "pairs", ["--batch", "4", "--loss", "simpo"]),
    "reward": (["align", "reward"], "pairs", ["--batch", "4"]),
    "grpo": (["align", "grpo"], "tasks", [*ROLLOUTS, "--entropy", "0.01"]),
    "grpo lora": (["align", "grpo"], "tasks", [*ROLLOUTS, "--rank", "2", "--kl-place", "reward", "--average", "token", "--entropy", "0.01", "--advantage", "rloo"]),
    "ppo": (["align", "ppo"], "tasks", [*ROLLOUTS, "--kl-target", "0.5", "--reward-model", "REWARD"]),
}


def write(path: Path, records: Iterable[object]) -> Path:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


class Life:
    """A pretrained run, its reward model, and examples, in a folder."""

    def __init__(self, folder: Path):
        self.folder, self.base = folder, folder / "base"
        train(folder, "--tokenizer", "bpe", "--vocab-size", 280, "--context", 64, "--dropout", 0.1, "--steps", 20, "--lr", 0.01, "--out", self.base)
        for name, records in EXAMPLES.items():
            write(folder / f"{name}.jsonl", records)
        assert main(self.command("reward", folder / "judge")) == 0

    def command(self, name: str, out: Path, *options: object) -> list[str]:
        """The command line of RUNS[name]; options come after its own, and win."""
        words, examples, own = RUNS[name]
        own = [str(self.folder / "judge") if word == "REWARD" else word for word in own]
        return [*words, str(self.base), "--data", str(self.folder / f"{examples}.jsonl"), "--out", str(out), *PACE, *own, *map(str, options)]

    def run(self, name: str, out: Path, *options: object) -> Path:
        assert main(self.command(name, out, *options)) == 0
        return out

    def copied(self, folder: Path) -> "Life":
        """The same in another folder, whose files a test may damage or delete."""
        copy = object.__new__(Life)
        copy.folder, copy.base = Path(shutil.copytree(self.folder, folder)), folder / "base"
        return copy
