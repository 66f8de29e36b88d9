"""`tinyllm sample RUN`: continue prompts with a trained model, showing the text as it comes."""
import argparse
import sys
import time
from collections import Counter
from pathlib import Path

from tinyllm.backend import DEVICES
from tinyllm.cli.arguments import add_config, config_from
from tinyllm.generate import Completion, SamplingConfig, stream
from tinyllm.stages import load_run
from tinyllm.train.config import WHERE

AT_ONCE = 16  # prompts that share a batch
# What a model writes must not command the terminal: control characters are shown as the pictures that Unicode has for them.
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to sample from, the prompts, and how."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run whose model writes text")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times (default: a new text)")
    parser.add_argument("--file", metavar="FILE", help="more prompts: each line of this UTF-8 file that is not empty")
    parser.add_argument("--logprobs", action="store_true", help="after each text, list its tokens with their log-probabilities")
    parser.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="which of the run's checkpoints (default: last)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", metavar="|".join(DEVICES), help=f"{WHERE} (default: %(default)s)")
    add_config(parser, SamplingConfig, "sampling")


def run(args: argparse.Namespace) -> int:
    """Print each prompt and its continuation to standard output, a summary to standard error; 130 when interrupted."""
    config = config_from(args, SamplingConfig)
    prompts = list(args.prompt or []) + (read_prompts(args.file) if args.file else [])
    model, tokenizer, _ = load_run(args.run_folder, args.checkpoint, args.device)
    printer, start = Printer(prompts or [""], tokenizer, args.logprobs), time.perf_counter()
    try:
        for first in range(0, len(printer.prompts), AT_ONCE):
            for piece in stream(model, tokenizer, printer.prompts[first : first + AT_ONCE], config, first_row=first):
                printer.show(first + piece.row, piece)
        status = 0
    except KeyboardInterrupt:
        print(flush=True)
        status = 130
    print(printer.summary(time.perf_counter() - start), file=sys.stderr)
    return status


def read_prompts(path: str) -> list[str]:
    """The lines of a file that are not empty. FileNotFoundError or ValueError where there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path} to read prompts from") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, at byte {error.start}: prompts are read one a line") from None
    if not any(lines):
        raise ValueError(f"{path} has no prompt in it: write one a line")
    return [line for line in lines if line]


class Printer:
    """Texts in the order of their prompts: the first unfinished one as it grows, later ones when their turn comes."""

    def __init__(self, prompts: list[str], tokenizer, logprobs: bool):
        self.prompts, self.tokenizer, self.logprobs = prompts, tokenizer, logprobs
        self.pictures = PICTURES if sys.stdout.isatty() else {}
        self.turn, self.waiting = 0, [*prompts]  # what is still to be printed of each text, its prompt first
        self.completions: list[Completion | None] = [None] * len(prompts)
        self.tokens, self.rolled = 0, False
        self._print_waiting()

    def show(self, row: int, piece) -> None:
        """Take in a piece, and print what can be."""
        self.tokens, self.rolled = self.tokens + 1, self.rolled or piece.rolled
        self.waiting[row] += piece.text
        self.completions[row] = piece.completion
        if row == self.turn:
            self._print_waiting()

    def _print_waiting(self):
        while self.turn < len(self.prompts):
            print(self.waiting[self.turn].translate(self.pictures), end="", flush=True)
            self.waiting[self.turn] = ""
            completion = self.completions[self.turn]
            if completion is None:
                return
            print()
            if self.logprobs:
                self._print_log_probabilities(completion)
            self.turn += 1
            if self.turn < len(self.prompts):
                print("-" * 8)

    def _print_log_probabilities(self, completion):
        print(f"{'ln p':>10}  {'id':>6}  token")
        for token, log_p in zip(completion.ids, completion.log_probabilities, strict=True):
            shown = self.tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")
            print(f"{log_p:10.4f}  {token:6d}  {shown!r}")
        print(f"{sum(completion.log_probabilities):10.4f}  in all")

    def summary(self, seconds: float) -> str:
        """One line on speed and how the texts ended, and one more if the context was outgrown."""
        reasons = Counter(completion.reason if completion else "Ctrl-C" for completion in self.completions)
        ends = ", ".join(f"{reason} ({n})" for reason, n in sorted(reasons.items()))
        line = f"{self.tokens} tokens in {seconds:.2f} s ({self.tokens / max(seconds, 1e-9):.0f} tokens/s); ended by {ends}"
        if self.rolled:
            line += "\nnote: a text outgrew the model's context, so the model went on seeing its newest part only"
        return line
