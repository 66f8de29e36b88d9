"""What commands that train have in common: options from a stage's configuration, a new run or a resumed one, what is shown and said."""
import argparse
import dataclasses
import functools
import json
import shlex
import shutil
import sys
from collections.abc import Callable

from tinyllm.cli.arguments import add_config, config_from, given, program
from tinyllm.cli.sample import PICTURES
from tinyllm.config import option_name
from tinyllm.generate import SamplingConfig, complete
from tinyllm.nn import Module
from tinyllm.nn.describe import describe
from tinyllm.stages import STAGES, Stage, resume, stage_config, start
from tinyllm.stages.base import TuneConfig
from tinyllm.tokenizer import Tokenizer
from tinyllm.train.config import FREE_ON_RESUME, RunConfig, refuse_changes
from tinyllm.train.progress import Progress, duration, figure, loss_curve
from tinyllm.train.run import Run, new_run, read_log
from tinyllm.train.trainer import silent

say = functools.partial(print, flush=True)  # a pipe would hold the lines back


def add_stage(parser: argparse.ArgumentParser, stage: Stage) -> None:
    """Where the run goes, and every setting of the stage. Parts of its configuration that a base decides are no options."""
    place = parser.add_argument_group("run")
    place.add_argument("--out", metavar="FOLDER", help="folder for the run (default: the next free runs/001, runs/002, …)")
    kinds = {name: stage.Config.kinds()[name] for name in stage.options}
    settings = {field.name for kind in kinds.values() for field in dataclasses.fields(kind) if "help" in field.metadata}
    free = ", ".join(option_name(name) for name in FREE_ON_RESUME if name in settings)
    place.add_argument("--resume", metavar="RUN", help=f"continue the run in this folder, with its own settings; other values may be given for {free}")
    for name, title in stage.options.items():
        add_config(parser, kinds[name], title)


def add_base(parser: argparse.ArgumentParser, stage: Stage) -> None:
    """The same for a stage that begins from a run."""
    parser.add_argument("base_run", nargs="?", metavar="RUN", help="folder of the run to begin from; not needed with --resume")
    add_stage(parser, stage)


def run_on_base(args: argparse.Namespace, stage: Stage) -> int:
    """`run_stage` of a stage that begins from a run."""
    if args.resume is not None and args.base_run is not None:
        raise ValueError(f"RUN and --resume exclude each other: {args.resume} has what it began from in it")

    def settle(config: TuneConfig) -> TuneConfig:
        return dataclasses.replace(config, base=dataclasses.replace(config.base, run=args.base_run or ""))

    return run_stage(args, stage, settle)


def run_stage(args: argparse.Namespace, stage: Stage, settle: Callable[[RunConfig], RunConfig] = lambda config: config) -> int:
    """Train, show it, say where everything lies. 0 when done, 130 when interrupted (and saved).

    settle : makes of what the options gave what a new run begins with.
    """
    if args.resume is not None:  # an empty one, of a shell variable that is not set, must not begin a new run
        place, config = Run(args.resume), _resumed_config(args, stage)
        if place.summary.exists():
            say(f"{place.folder} is complete: nothing left to train")
            return 0
        say(f"resuming {place.folder}")
    else:
        config, place = settle(_new_config(args, stage)), new_run(args.out)
    try:
        watch = functools.partial(observers, stage)
        outcome = resume(place, config, watch) if args.resume is not None else start(config, place, say, watch)
    except BaseException:
        if sys.stdout.isatty():
            print()  # the message must not stand behind the progress line
        raise
    if outcome.interrupted:
        command = shlex.join([*program(), *stage.command, "--resume", str(place.folder)])
        say(f"\nstopped after step {outcome.trainer.step}, everything is saved; go on with: {command}")
        return 130
    report(place, stage)
    return 0


def _new_config(args, stage: Stage) -> RunConfig:
    config = stage.Config(**{name: config_from(args, kind) for name, kind in stage.Config.kinds().items()})
    if config.train.steps is not None and config.train.minutes is not None:
        raise ValueError("--steps and --minutes are two answers to one question: give one of them")
    return config


def _resumed_config(args, stage: Stage) -> RunConfig:
    if args.out is not None:
        raise ValueError("--out and --resume exclude each other: a resumed run stays in its folder")
    saved = stage_config(Run(args.resume))
    if saved.stage != stage.name:
        right = shlex.join([*program(), *STAGES[saved.stage].command, "--resume", args.resume])
        raise ValueError(f"{args.resume} is a run of another stage, {saved.stage}: go on with {right}")
    options = {part: given(args, kind) for part, kind in saved.kinds().items()}
    for values in options.values():
        refuse_changes(saved, values)
    free = {part: {name: value for name, value in values.items() if name in FREE_ON_RESUME} for part, values in options.items()}
    return dataclasses.replace(saved, **{part: dataclasses.replace(getattr(saved, part), **values) for part, values in free.items()}).checked()


def observers(stage: Stage, model: Module, tokenizer: Tokenizer, steps: int) -> list[Progress]:
    """The display; of a stage whose model continues texts, with a short sample after each evaluation."""
    parameters = [p for _, p in model.named_parameters()]
    learned, total = sum(p.size for p in parameters if p.requires_grad), sum(p.size for p in parameters)
    if not stage.continues:
        say(f"model: {total:,} parameters, of which {learned:,} are learned")
        return [Progress(steps, unit=stage.unit)]
    d = describe(model.config)
    say(f"model: {model.config.arch}, {d.parameters:,} parameters, {d.flops_per_token / 1e6:,.2f} MFLOP a token")
    settings = SamplingConfig(max_tokens=32, temperature=0.7, seed=0)
    prompt = "" if tokenizer.end_of_text is not None else tokenizer.decode([0])

    @silent
    def sample() -> str:
        return json.dumps(complete(model, tokenizer, prompt, settings).text, ensure_ascii=False).translate(PICTURES)

    return [Progress(steps, sample)]


def report(place: Run, stage: Stage) -> None:
    """The loss curve, the figures and the next thing to do."""
    records, summary = read_log(place.log), json.loads(place.summary.read_text())
    training = [(r["step"], r["loss"]) for r in records if r["event"] == "step" and r["loss"] is not None]
    validation = [(r["step"], r["val_loss"]) for r in records if r["event"] == "evaluation" and r["val_loss"] is not None]
    columns = shutil.get_terminal_size().columns
    print(f"\n{loss_curve(training, validation, width=max(24, min(72, columns - 12)))}\n")
    print(f"trained on {summary['tokens']:,.0f} {stage.unit} in {duration(summary['seconds'])}, {summary['tokens_per_second']:,.0f} {stage.unit}/s")
    if summary["val_loss"] is not None:
        bits = f" nats per token, {summary['bits_per_byte']:.4f} bits per byte, over all of it" if "bits_per_byte" in summary else ""
        print(f"validation loss {summary['val_loss']:.4f}{bits}")
    if summary["figures"]:
        print(", ".join(f"{name} {figure(value)}" for name, value in summary["figures"].items()))
    print(f"everything is in {place.folder}: config.json, tokenizer.json, checkpoints/, log.jsonl, summary.json")
    print("now try:", shlex.join([*program(), *stage.next_command(place)]))
