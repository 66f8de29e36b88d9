"""Learn a language model from text: by default, three minutes on the Python standard library's own sources."""
import argparse
import dataclasses
from dataclasses import dataclass

from tinyllm.cli.arguments import add_config, given
from tinyllm.cli.run_stage import add_stage, run_stage
from tinyllm.config import check, option_name, setting
from tinyllm.stages import STAGES, Stage, stage_config
from tinyllm.train.encoder import OBJECTIVES
from tinyllm.train.run import Run

NEXT_TOKEN = "next-token"


@dataclass(frozen=True)
class ObjectiveConfig:
    """What text is learned by, which decides what kind of model is trained."""

    objective: str = setting(
        NEXT_TOKEN, "next-token trains a decoder; mlm (masked tokens) and mlm+nsp (and next sentences) an encoder, by default --arch bert "
        "with --tokenizer wordpiece in batches of 32 rows", choices=(NEXT_TOKEN, *OBJECTIVES),
    )  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run goes, and every setting of text, model and training."""
    add_config(parser, ObjectiveConfig, "objective")
    add_stage(parser, STAGES["pretrain"])


def run(args: argparse.Namespace) -> int:
    """Train, show it, say where everything lies. 0 when done, 130 when interrupted (and saved)."""
    chosen = ObjectiveConfig(**given(args, ObjectiveConfig))
    check(chosen)
    resumes_encoder = args.resume is not None and stage_config(Run(args.resume)).stage == "encoder"
    stage = STAGES["encoder" if resumes_encoder or chosen.objective != NEXT_TOKEN else "pretrain"]
    _refuse_others(args, stage)
    return run_stage(args, stage)


def _refuse_others(args: argparse.Namespace, stage: Stage) -> None:
    """Raise ValueError for an option that the stage has not: only a decoder's next tokens know it."""
    known = {field.name for kind in stage.Config.kinds().values() for field in dataclasses.fields(kind) if "help" in field.metadata}
    for kind in STAGES["pretrain"].Config.kinds().values():
        for name in given(args, kind).keys() - known:
            raise ValueError(f"{option_name(name)} goes with --objective {NEXT_TOKEN} alone: leave it out")
