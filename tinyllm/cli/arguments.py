"""Command-line options made from configuration classes, and a parser whose errors are one line that helps."""
import argparse
import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from tinyllm.config import option_name, suggestion, value_type


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and with one-line errors that suggest what may have been meant. Exit status 2."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        """Here, because an action's own parser is asked for no more than this: it knows best what may have been meant."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            options = [o for action in self._actions for o in action.option_strings]
            kind = "option" if word.startswith("-") else "argument"
            self.error(f"unknown {kind} {word}{suggestion(word, options)}")
        return found, unknown

    def _print_message(self, message, file=None):  # argparse's own keeps it to itself when nobody reads: `main` is to know
        if message:
            print(message, end="", file=file or sys.stderr)

    def error(self, message: str) -> NoReturn:
        print(f"tinyllm: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


class _Formatter(argparse.HelpFormatter):
    """Options in a column of their own, wide enough for the longest."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=116)


def program() -> list[str]:
    """The words that call this program again: tinyllm where a shell finds it, else as it was called."""
    called, found = sys.argv[0], shutil.which("tinyllm")
    if Path(called).name != "tinyllm":  # python -m tinyllm, or main() from a program
        return ["python", "-m", "tinyllm"]
    return ["tinyllm"] if found and Path(called).exists() and Path(called).samefile(found) else [called]


def add_config(parser: argparse.ArgumentParser, config_class: type, title: str) -> None:
    """One option for each field that is a `setting`. Options that are not given leave no trace, see `given`."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(config_class):
        if "help" not in field.metadata:
            continue
        kind = value_type(config_class, field)
        text = field.metadata["help"].replace("%", "%%")
        if "default:" not in text and field.default not in ((), ""):
            text += f" (default: {_shown(field.default)})"
        options: dict = dict(default=argparse.SUPPRESS, help=text)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options.update(type={int: whole_number, float: number}.get(kind, kind), metavar=_metavar(field, kind))
            if isinstance(field.default, tuple):
                options.update(dict(nargs="+", action="extend") if field.metadata["several"] else dict(action="append"))
        group.add_argument(option_name(field.name), **options)


def whole_number(text: str) -> int:
    """An integer of the command line."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """A finite number of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _metavar(field, kind) -> str:
    choices = field.metadata["choices"]
    if field.metadata["metavar"]:
        return field.metadata["metavar"]
    return "|".join(map(str, choices)) if choices else {int: "N", float: "X"}.get(kind, "TEXT")


def _shown(value) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else f"{value}"


def given(args: argparse.Namespace, config_class: type) -> dict:
    """The fields of a class that were given on the command line."""
    known = {f.name for f in dataclasses.fields(config_class) if "help" in f.metadata}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(args).items() if k in known}


def config_from(args: argparse.Namespace, config_class: type):
    """The class with what was given, and its defaults elsewhere."""
    return config_class(**given(args, config_class))
