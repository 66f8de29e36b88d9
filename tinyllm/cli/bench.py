"""How fast is tinyllm on this machine, and beside PyTorch, transformers, tokenizers and tiktoken? Takes some minutes."""
import argparse
import functools

from tinyllm.bench import WORKS, Report, bench, cpu_name, json_line
from tinyllm.bench.turns import ROUNDS
from tinyllm.cli.arguments import whole_number
from tinyllm.threads import available_cores

say = functools.partial(print, flush=True)  # a pipe would hold the lines back


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to time, beside whom, and how to print it."""
    parser.add_argument("work", choices=list(WORKS), metavar="train|decode|tokenizer|scaling",
                        help="a training step; greedy decoding; making a tokenizer and encoding with it; tiled attention as texts grow")
    usual = "; ".join(f"{name}: {','.join(work.sizes)}" for name, work in WORKS.items())
    parser.add_argument("--sizes", metavar="S,M", help=f"which sizes (default: all; {usual}); tokenizer also takes a part of its text: 5MB")
    parser.add_argument("--peer", action="store_true", help="time PyTorch, transformers, or tokenizers and tiktoken as well, in turn with tinyllm")
    parser.add_argument("--json", action="store_true", help="print an object a line instead of a table")
    parser.add_argument("--threads", type=whole_number, metavar="N", help="threads of both sides (default: the cores this process may use)")
    parser.add_argument("--rounds", type=whole_number, default=ROUNDS, metavar="N", help="how often each side has its turn (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the results as they come."""
    threads = available_cores() if args.threads is None else args.threads
    sizes = None if args.sizes is None else args.sizes.split(",")
    report, results = Report(args.work, args.peer, threads, cpu_name()), []
    for result in bench(args.work, sizes=sizes, peer=args.peer, rounds=args.rounds, threads=threads):
        if not args.json and not results:
            say(report.heading())  # only once there is something below it: what is refused prints no table
        results.append(result)
        say(json_line(result) if args.json else report.line(result))
    if not args.json:
        say(report.closing(results))
    return 0
