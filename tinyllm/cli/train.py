"""Learn a language model from text: by default, three minutes on the Python standard library's own sources."""
import argparse

from tinyllm.cli.run_stage import add_stage, run_stage
from tinyllm.stages import STAGES

STAGE = STAGES["pretrain"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run goes, and every setting of text, model and training."""
    add_stage(parser, STAGE)


def run(args: argparse.Namespace) -> int:
    """Train, show it, say where everything lies. 0 when done, 130 when interrupted (and saved)."""
    return run_stage(args, STAGE)
