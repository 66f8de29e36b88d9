"""The command `tinyllm`: finds the subcommand, and turns errors into one line and an exit status.

0 done · 1 training diverged, a gradient is wrong, or a GPU failed · 2 something in what was given · 130 stopped by Ctrl-C · 141 nobody reads the output any more
"""
import importlib
import os
import sys

from tinyllm.cli.arguments import Parser
from tinyllm.config import suggestion

GPU_LIBRARIES = ("cupy", "cupy_backends")
COMMANDS = {
    "speedrun": "from raw text to an assistant in ten minutes",
    "train": "learn a language model from text",
    "finetune": "make a model answer, or tell texts apart",
    "align": "teach a model which answers are wanted",
    "sample": "continue a prompt with a trained model",
    "chat": "talk with a model that has learned to answer",
    "describe": "parameters, arithmetic and memory of a model, before it is run",
    "eval": "measure a trained model, and write its report card",
    "tokenizer": "train a tokenizer, encode, decode, show its work",
    "data": "clean text, find duplicates, look for a benchmark in it, see what a model gets",
    "gradcheck": "check every derivative in the package against finite differences",
    "bench": "how fast it is here, beside PyTorch and others",
    "doctor": "what this machine has and can do, and what to change",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line (without the program's name); the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets a ?
    return _guarded(_run, argv)


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        import tinyllm

        print(f"tinyllm {tinyllm.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        return _fail(f"unknown command {argv[0]!r}{suggestion(argv[0], COMMANDS)} (see tinyllm --help)")
    command = importlib.import_module(f"tinyllm.cli.{argv[0]}")  # only the one that is asked for: --help stays quick
    parser = Parser(prog=f"tinyllm {argv[0]}", description=command.__doc__)
    command.add_arguments(parser)
    return command.run(parser.parse_args(argv[1:]))


def _guarded(run, argv) -> int:
    try:
        try:
            return run(argv)
        finally:
            sys.stdout.flush()  # here, where it can still be caught that nobody reads it, rather than at exit
    except BrokenPipeError:  # nothing to say, and nobody to say it to; the status is the shell's for a process ended by SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MemoryError as error:
        from tinyllm.memory import NotEnoughMemory  # only now: --help stays quick

        if isinstance(error, NotEnoughMemory):
            return _fail(_one_line(error))
        return _fail(f"not enough memory ({_one_line(error)}): make the model, --batch or --context smaller; see tinyllm describe")
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except FloatingPointError as error:
        return _fail(str(error), 1)
    except (ValueError, OSError) as error:
        return _fail(_one_line(error))
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in GPU_LIBRARIES:
            raise  # a mistake of ours: its traceback says where
        return _fail(f"the GPU, or what drives it, failed: {_one_line(error)}; see tinyllm doctor and nvidia-smi, or use --device cpu", 1)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split("\n"))


def _fail(message: str, status: int = 2) -> int:
    print(f"tinyllm: error: {message}", file=sys.stderr)
    return status


def _overview() -> str:
    lines = [f"  {name:<12}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: tinyllm COMMAND [options]",
            "",
            "A large language model from the derivative up, in NumPy.",
            "",
            *lines,
            "",
            "tinyllm COMMAND --help explains a command; tinyllm --version prints the version.",
            "Start with: tinyllm train",
        ]
    )
