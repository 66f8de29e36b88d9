"""Teach a model which answers are wanted: by pairs (dpo), by a verifier (grpo), or by a reward model (reward, then ppo)."""
import argparse

from tinyllm.cli.run_stage import add_base, run_on_base
from tinyllm.stages import STAGES

ACTIONS = {
    "dpo": "prefer the chosen one of two answers (DPO, IPO, KTO, ORPO, SimPO)",
    "grpo": "get more answers right, by comparing its own (GRPO, RLOO)",
    "reward": "tell how good an answer is, from pairs of them: a reward model",
    "ppo": "write answers that a reward model likes (RLHF)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="|".join(ACTIONS))
    for name, text in ACTIONS.items():
        add_base(actions.add_parser(name, help=text, description=f"A tuned model learns to {text}."), STAGES[name])


def run(args: argparse.Namespace) -> int:
    """Train the stage that was asked for."""
    return run_on_base(args, STAGES[args.action])
