"""From raw text to an assistant in about ten minutes: clean, pretrain, tune, align, and measure after each stage."""
import argparse
import functools
import shlex
from pathlib import Path

from tinyllm.cli.arguments import add_config, config_from, given, program
from tinyllm.cli.eval import show_progress
from tinyllm.cli.run_stage import observers, say
from tinyllm.config import option_name
from tinyllm.evaluate.card import Table, tables
from tinyllm.stages import STAGES
from tinyllm.stages.speedrun import Speedrun, SpeedrunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it goes, and what it is made of."""
    place = parser.add_argument_group("run")
    place.add_argument("--out", metavar="FOLDER", help="a new folder for all of it (default: runs/speedrun)")
    place.add_argument("--resume", metavar="FOLDER", help="go on in the folder of a speedrun that was interrupted; what is complete is not done again")
    add_config(parser, SpeedrunConfig, "what it is made of")


def run(args: argparse.Namespace) -> int:
    """All stages; 0 when done, 130 when interrupted (and saved)."""
    folder, config = _resumed(args) if args.resume is not None else _new(args)
    try:
        whole = Speedrun(folder, config, say, lambda name: functools.partial(observers, STAGES[name]), show_progress)
        paths = whole.run()
    except KeyboardInterrupt:  # between two stages
        paths = None
    if paths is None:
        say(f"\nstopped, everything is saved; go on with: {shlex.join([*program(), 'speedrun', '--resume', str(folder)])}")
        return 130
    last = folder / config.chain()[-1]
    say(f"\n{plain(tables(whole.card)[0])}")
    say(f"\nthe report card: {paths[0]}, {paths[1]}")
    talk = [*program(), "chat", str(last)] if len(config.chain()) > 1 else [*program(), "sample", str(last)]
    say(f"now talk to it: {shlex.join(talk)}")
    return 0


def plain(table: Table) -> str:
    """A table for a terminal."""
    lines = [list(table.header), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip() for line in lines)


def _new(args) -> tuple[Path, SpeedrunConfig]:
    folder, config = Path(args.out or "runs/speedrun"), config_from(args, SpeedrunConfig).checked()
    if (folder / "speedrun.json").exists():
        raise ValueError(f"{folder} holds a speedrun already: go on with --resume {folder}, or give another folder with --out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--out {folder} is not an empty folder: give another")
    config.read_files()
    folder.mkdir(parents=True, exist_ok=True)
    config.save(folder / "speedrun.json")
    return folder, config


def _resumed(args) -> tuple[Path, SpeedrunConfig]:
    if args.out is not None:
        raise ValueError("--out and --resume exclude each other: a speedrun stays in its folder")
    folder = Path(args.resume)
    config = SpeedrunConfig.load(folder / "speedrun.json")
    for name, value in given(args, SpeedrunConfig).items():
        if value != getattr(config, name):
            raise ValueError(f"{option_name(name)} is not what {folder} was begun with: leave it out, or begin anew in another folder")
    return folder, config
