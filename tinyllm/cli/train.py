"""Learn a language model from text: by default, three minutes on the Python standard library's own sources."""
import argparse
import dataclasses
import functools
import json
import shlex
import shutil
import sys

from tinyllm.cli.arguments import add_config, config_from, given, program
from tinyllm.cli.sample import PICTURES
from tinyllm.config import option_name
from tinyllm.data import open_shard
from tinyllm.generate import SamplingConfig, complete
from tinyllm.nn import TransformerConfig
from tinyllm.nn.describe import describe
from tinyllm.tokenizer import load_tokenizer
from tinyllm.train.config import FREE_ON_RESUME, PARTS, DataConfig, RunConfig, TrainConfig, refuse_changes
from tinyllm.train.pretrain import resume, start
from tinyllm.train.progress import Progress, duration, loss_curve
from tinyllm.train.run import Run, new_run, read_log
from tinyllm.train.trainer import silent

say = functools.partial(print, flush=True)  # a pipe would hold the lines back


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the run goes, and every setting of text, model and training."""
    place = parser.add_argument_group("run")
    place.add_argument("--out", metavar="FOLDER", help="folder for the run (default: the next free runs/001, runs/002, …)")
    free = ", ".join(map(option_name, FREE_ON_RESUME))
    place.add_argument("--resume", metavar="RUN", help=f"continue the run in this folder, with its own settings; other values may be given for {free}")
    add_config(parser, DataConfig, "text and tokenizer")
    add_config(parser, TransformerConfig, "model")
    add_config(parser, TrainConfig, "training")


def run(args: argparse.Namespace) -> int:
    """Train, show it, say where everything lies. 0 when done, 130 when interrupted (and saved)."""
    if args.resume is not None:  # an empty one, of a shell variable that is not set, must not begin a new run
        place, config = Run(args.resume), _resumed_config(args)
        if place.summary.exists():
            say(f"{place.folder} is complete: nothing left to train")
            return 0
        say(f"resuming {place.folder}")
    else:
        config, place = _new_config(args), new_run(args.out)
    try:
        outcome = resume(place, config, _observers) if args.resume is not None else start(config, place, say, _observers)
    except BaseException:
        if sys.stdout.isatty():
            print()  # the message must not stand behind the progress line
        raise
    if outcome.interrupted:
        command = shlex.join([*program(), "train", "--resume", str(place.folder)])
        say(f"\nstopped after step {outcome.trainer.step}, everything is saved; go on with: {command}")
        return 130
    _report(place, config)
    return 0


def _new_config(args) -> RunConfig:
    config = RunConfig(**{name: config_from(args, kind) for name, kind in PARTS.items()})
    if config.train.steps is not None and config.train.minutes is not None:
        raise ValueError("--steps and --minutes are two answers to one question: give one of them")
    return config


def _resumed_config(args) -> RunConfig:
    if args.out is not None:
        raise ValueError("--out and --resume exclude each other: a resumed run stays in its folder")
    saved = RunConfig.load(Run(args.resume).config)
    options = {part: given(args, kind) for part, kind in PARTS.items()}
    for values in options.values():
        refuse_changes(saved, values)
    free = {part: {name: value for name, value in values.items() if name in FREE_ON_RESUME} for part, values in options.items()}
    return dataclasses.replace(saved, **{part: dataclasses.replace(getattr(saved, part), **values) for part, values in free.items()}).checked()


def _observers(model, tokenizer, steps) -> list[Progress]:
    """The display, with a short sample after each evaluation."""
    d = describe(model.config)
    say(f"model: {model.config.arch}, {d.parameters:,} parameters, {d.flops_per_token / 1e6:,.2f} MFLOP a token")
    settings = SamplingConfig(max_tokens=32, temperature=0.7, seed=0)
    prompt = "" if tokenizer.end_of_text is not None else tokenizer.decode([0])

    @silent
    def sample() -> str:
        return json.dumps(complete(model, tokenizer, prompt, settings).text, ensure_ascii=False).translate(PICTURES)

    return [Progress(steps, sample)]


def _report(place: Run, config: RunConfig) -> None:
    """The loss curve, the figures and the next thing to do."""
    records, summary = read_log(place.log), json.loads(place.summary.read_text())
    training = [(r["step"], r["loss"]) for r in records if r["event"] == "step" and r["loss"] is not None]
    validation = [(r["step"], r["val_loss"]) for r in records if r["event"] == "evaluation"]
    columns = shutil.get_terminal_size().columns
    print(f"\n{loss_curve(training, validation, width=max(24, min(72, columns - 12)))}\n")
    print(f"trained on {summary['tokens']:,} tokens in {duration(summary['seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s")
    if summary["val_loss"] is not None:
        print(f"validation loss {summary['val_loss']:.4f} nats per token, {summary['bits_per_byte']:.4f} bits per byte, over all of it")
    print(f"everything is in {place.folder}: config.json, tokenizer.json, checkpoints/, log.jsonl, summary.json")
    print("now try:", shlex.join([*program(), "sample", str(place.folder), "--prompt", _prompt(place) if config.data.data else "def "]))


def _prompt(place: Run) -> str:
    """How the text begins: something that a tokenizer of its characters can encode."""
    tokens = open_shard(place.data / "train.bin").tokens[:16].tolist()
    start = load_tokenizer(place.tokenizer).decode(tokens, "ignore")
    return start.strip().partition("\n")[0] or start[:1]
