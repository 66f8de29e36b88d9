"""Measure a trained model, and write a report card into its run folder: card.md, and card.html with curves."""
import argparse
import functools
import sys
from pathlib import Path

from tinyllm.backend import DEVICES
from tinyllm.cli.arguments import whole_number
from tinyllm.evaluate import Card, evaluate, paired, read_tasks, training_curve, write_card
from tinyllm.evaluate.card import number, with_error
from tinyllm.evaluate.styles import STYLES, style_of
from tinyllm.evaluate.suite import SPELLING
from tinyllm.nn.describe import describe
from tinyllm.stages import load_run
from tinyllm.train.config import WHERE
from tinyllm.train.run import Run

say = functools.partial(print, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on what, and where the card goes."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run whose model writes text")
    parser.add_argument("--tasks", nargs="+", action="extend", metavar="TASK", help=f"any of {SPELLING} (default: validation)")
    parser.add_argument("--compare", metavar="RUN2", help="measure this run, too, and compare the two item by item")
    parser.add_argument("--shots", type=whole_number, default=0, metavar="K", help="solved examples before each question (default: 0)")
    parser.add_argument("--limit", type=whole_number, metavar="N", help="at most N items of each task, evenly spread over it (default: all)")
    parser.add_argument("--style", choices=tuple(STYLES), metavar="|".join(STYLES),
                        help="questions as documents or as conversations (default: chat for a model that has learned it)")  # fmt: skip
    parser.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="which of the run's checkpoints (default: last)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", metavar="|".join(DEVICES), help=f"{WHERE} (default: %(default)s)")
    parser.add_argument("--out", metavar="FOLDER", help="where the card goes (default: RUN/evaluation)")


def run(args: argparse.Namespace) -> int:
    """Measure, print the figures, write the card."""
    for name, least in (("shots", 0), ("limit", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name} is {value}: it must be at least {least}")
    model, tokenizer, _ = load_run(args.run_folder, args.checkpoint, args.device)
    tasks = read_tasks(args.tasks or ["validation"], Run(args.run_folder), tokenizer, args.shots, args.limit)
    columns = [(args.run_folder, _measured(args, args.run_folder, model, tokenizer, tasks))]
    parameters = describe(model.config).parameters
    if args.compare:
        model, tokenizer, _ = load_run(args.compare, args.checkpoint, args.device)
        columns.append((args.compare, _measured(args, args.compare, model, tokenizer, tasks)))
    compared = [(args.run_folder, args.compare, paired(columns[0][1], columns[1][1]))] if args.compare else []
    facts = [("run", args.run_folder), ("checkpoint", args.checkpoint), ("parameters", f"{parameters:,}")]
    card = Card(f"Report card of {args.run_folder}", columns, facts, training_curve(Run(args.run_folder)), compared)
    paths = write_card(Path(args.out or Path(args.run_folder) / "evaluation"), card)
    say(f"the card: {paths[0]}, {paths[1]}")
    return 0


def _measured(args, label, model, tokenizer, tasks):
    style = STYLES[args.style](tokenizer) if args.style else style_of(tokenizer)
    results = []
    for task in tasks:
        results += evaluate(model, tokenizer, [task], style=style, progress=show_progress)
        for figure in results[-1].figures().values():
            say(f"{label}  {task.name}: {figure.metric.title} {with_error(figure)}  (chance {number(figure.chance, figure.metric)})")
    return results


def show_progress(task: str, done: int, total: int) -> None:
    """A line on a terminal that goes away when the task is done."""
    if sys.stderr.isatty():
        print(f"\r{task}: {done:,} of {total:,}\x1b[K" if done < total else "\r\x1b[K", end="", file=sys.stderr, flush=True)
