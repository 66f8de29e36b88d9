"""How fast is tinyllm on this machine, and beside PyTorch, transformers, tokenizers and tiktoken? Takes some minutes."""
import argparse
import functools

from tinyllm.backend import DEVICES
from tinyllm.bench import WORKS, Report, bench, cpu_name, gpu_facts, json_line
from tinyllm.bench.gpu_cases import BY_DEVICE
from tinyllm.bench.turns import ROUNDS
from tinyllm.cli.arguments import whole_number
from tinyllm.threads import available_cores

say = functools.partial(print, flush=True)  # a pipe would hold the lines back


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to time, beside whom, and how to print it."""
    parser.add_argument("work", choices=list(WORKS), metavar="train|decode|tokenizer|scaling",
                        help="a training step; greedy decoding; making a tokenizer and encoding with it; tiled attention as texts grow")
    usual, gpu_sizes = ("; ".join(f"{name}: {','.join(work.sizes)}" for name, work in BY_DEVICE[device].items()) for device in DEVICES)
    parser.add_argument("--sizes", metavar="S,M", help=f"which sizes (default: all; {usual}); tokenizer also takes a part of its text: 5MB")
    parser.add_argument("--device", choices=DEVICES, default="cpu", metavar="|".join(DEVICES), help="where to compute: cuda for train and decode, "
                        f"in bf16 ({gpu_sizes}) (default: %(default)s)")
    parser.add_argument("--peer", action="store_true", help="time PyTorch, transformers, or tokenizers and tiktoken as well, in turn with tinyllm")
    parser.add_argument("--json", action="store_true", help="print an object a line instead of a table")
    parser.add_argument("--threads", type=whole_number, metavar="N", help="threads of both sides (default: the cores this process may use)")
    parser.add_argument("--rounds", type=whole_number, default=ROUNDS, metavar="N", help="how often each side has its turn (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the results as they come."""
    threads = available_cores() if args.threads is None else args.threads
    sizes = None if args.sizes is None else args.sizes.split(",")
    results = []
    for result in bench(args.work, sizes=sizes, peer=args.peer, rounds=args.rounds, threads=threads, device=args.device):
        if not args.json and not results:  # only once there is something below it: what is refused prints no table
            where = str(gpu_facts()) if args.device == "cuda" else f"{threads} thread{'s' * (threads != 1)}, {cpu_name()}"
            report = Report(BY_DEVICE[args.device][args.work], result, args.peer, where)
            say(report.heading())
        results.append(result)
        say(json_line(result) if args.json else report.line(result))
    if not args.json:
        say(report.closing(results))
    return 0
