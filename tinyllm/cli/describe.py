"""Parameters, arithmetic and memory of a model, part by part, before it is run."""
import argparse
import dataclasses

from tinyllm.backend import DEVICES
from tinyllm.cli.arguments import add_config, config_from, given, whole_number
from tinyllm.nn import TransformerConfig
from tinyllm.nn.describe import Description, describe
from tinyllm.nn.device_memory import device_memory
from tinyllm.stages import stage_config
from tinyllm.stages.pretrain import VOCAB_SIZE
from tinyllm.train.config import TrainConfig
from tinyllm.train.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A run, or the settings of a model."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run folder; or leave it out and give the settings below")
    parser.add_argument("--vocab-size", type=whole_number, metavar="N", help=f"entries of the tokenizer (default: {VOCAB_SIZE})")
    parser.add_argument("--device", choices=DEVICES, default="cpu", metavar="|".join(DEVICES), help="whose memory (default: %(default)s)")
    parser.add_argument("--batch", type=whole_number, metavar="N", help=f"windows per micro-batch, for the memory (default: {TrainConfig.batch})")
    add_config(parser, TransformerConfig, "model")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    for name in ("batch", "vocab_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    config, batch = config_from(args, TransformerConfig), args.batch or TrainConfig.batch
    if args.run is not None:
        if options := [*given(args, TransformerConfig), *(["vocab_size"] if args.vocab_size else [])]:
            raise ValueError(f"describe takes a run or settings, not both: leave out --{options[0].replace('_', '-')} or {args.run}")
        saved = stage_config(Run(args.run))
        config, batch = saved.model, args.batch or saved.train.batch
        if saved.stage != "pretrain":
            print(f"{args.run} is a run of {saved.stage}: what follows is its language model, and what it would take to pretrain that\n")
    else:
        config = dataclasses.replace(config, vocab_size=args.vocab_size or VOCAB_SIZE)
    print(table(describe(config, batch), args.device))
    return 0


def table(d: Description, device: str = "cpu") -> str:
    """The parts, their totals, and what a training step takes."""
    rows = [f"{'part':<20}{'weights':>18}{'x':>5}{'parameters':>14}{'FLOP/token':>14}{'kept/token':>12}"]
    for p in d.parts:
        flops = f"{p.flops * p.count:,.0f}"
        rows.append(f"{p.name:<20}{p.shape:>18}{p.count:>5}{p.parameters * p.count:>14,}{flops:>14}{p.activations * p.count:>12,.0f}")
    forward = sum(p.flops * p.count for p in d.parts)
    kept = sum(p.activations * p.count for p in d.parts)
    rows.append(f"{'total':<20}{'':>18}{'':>5}{d.parameters:>14,}{forward:>14,.0f}{kept:>12,.0f}")
    tokens, memory = d.batch * d.config.context, d if device == "cpu" else device_memory(d)
    return "\n".join(
        [
            *rows,
            "",
            "FLOP: forward, a multiplication and an addition are two. Kept: numbers that wait for the backward.",
            "The backward is twice the forward; scores that are not kept (the head's) are computed once more on top of that.",
            f"training: {d.flops_per_token / 1e6:,.2f} MFLOP a token, {d.flops_per_token * tokens / 1e9:,.2f} GFLOP for {tokens:,} tokens",
            f"          ({d.batch} windows of {d.config.context})",
            f"memory of a training step, arrays only, in MB: {memory.peak_bytes / 1e6:,.1f} at the peak, of which",
            f"          {memory.state_bytes / 1e6:,.1f} weights, gradients and AdamW's two moments",
            f"          {memory.activation_bytes / 1e6:,.1f} activations",
            f"          {memory.transient_bytes / 1e6:,.1f} temporaries",
        ]
    )
