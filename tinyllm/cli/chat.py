"""Talk with a model that has learned to answer: at a terminal, with one question, or with a question on each line of standard input."""
import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tinyllm.backend import DEVICES
from tinyllm.cli.arguments import add_config, config_from
from tinyllm.cli.sample import PICTURES
from tinyllm.config import suggestion
from tinyllm.data import append_conversation
from tinyllm.data.records import decode
from tinyllm.generate import Chat, SamplingConfig
from tinyllm.generate.window import context_of
from tinyllm.nn.describe import describe
from tinyllm.stages import load_run
from tinyllm.tokenizer import CHAT_TOKENS
from tinyllm.train.config import WHERE
from tinyllm.train.interrupt import stop_on_signal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Whom to talk with, and how it answers."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of a model that was tuned on conversations")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="print the answer to this, and end; several are one conversation")
    parser.add_argument("--system", default="", metavar="TEXT", help="what the model is told before the conversation (default: nothing)")
    parser.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="which of the run's checkpoints (default: last)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", metavar="|".join(DEVICES), help=f"{WHERE} (default: %(default)s)")
    add_config(parser, SamplingConfig, "sampling")


def run(args: argparse.Namespace) -> int:
    """Answers to standard output, remarks to standard error; 0 at the end of the input or by /quit, 130 by Ctrl-C."""
    config, system = config_from(args, SamplingConfig), _argument(args.system, "--system")
    questions = [_argument(text, "--prompt") for text in args.prompt or ()]
    if "" in questions:
        raise ValueError("--prompt is empty: ask something, or leave it out")
    model, tokenizer, _ = load_run(args.run_folder, args.checkpoint, args.device)
    if missing := [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]:
        raise ValueError(f"{args.run_folder} has learned no conversations (its tokenizer has no {missing[0]}): "
                         f"make a run that has by tinyllm finetune instruct {args.run_folder} --data CONVERSATIONS.jsonl")
    chat = Chat(model, tokenizer, config, system)
    try:
        if questions:
            return 130 if any(_answer(chat, text) for text in questions) else 0
        if sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
            note(f"{args.run_folder}: {describe(model.config).parameters:,} parameters, a context of {context_of(model) or 'any number of'} tokens")
            note("say something; /help shows what else can be typed here, /quit leaves")
            return _at_terminal(chat)
        return _line_by_line(chat, sys.stdin.buffer if sys.stdin else ())
    except EOFError:  # the end of the input, or /quit
        return 0
    except KeyboardInterrupt:
        print(flush=True)
        return 130


def _argument(text: str, option: str) -> str:
    return decode(text.encode("utf-8", "surrogateescape"), option)


# ---- where questions come from ----


def _line_by_line(chat: Chat, lines) -> int:
    for number, line in enumerate(lines, 1):
        where = f"standard input, line {number}"
        text = decode(line, where)
        try:
            stopped = _take(chat, text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if stopped:
            return 130
    return 0


def _at_terminal(chat: Chat) -> int:
    """One Ctrl-C stops an answer; the next at the prompt, or two there, end the conversation."""
    try:
        import readline  # noqa: F401 - arrow keys and earlier lines, for input()
    except ImportError:  # Windows brings its own
        pass
    sys.stdin.reconfigure(errors="surrogateescape")  # `decode` says what was wrong
    stopped = False  # by Ctrl-C, with nothing typed since
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            raise
        except KeyboardInterrupt:
            if stopped:
                raise
            stopped = True
            note("\n(Ctrl-C again or /quit leaves)")
            continue
        try:
            stopped = _take(chat, _argument(line, "what was typed"))
        except ValueError as error:
            note(f"({error})")


def note(remark: str) -> None:
    """Standard output gets the answers alone, standard error all else."""
    print(remark, file=sys.stderr, flush=True)


# ---- what is done with a line ----


def _take(chat: Chat, line: str) -> bool:
    """Obey or answer a line; whether Ctrl-C stopped that. EOFError by /quit, ValueError for what cannot be done."""
    name, _, rest = line.strip().partition(" ")
    if not line.startswith("/"):
        return bool(name) and _answer(chat, line.strip())
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name}{suggestion(name, COMMANDS)} (see /help; a question that begins with / needs a space before it)")
    if rest and not COMMANDS[name].takes:
        raise ValueError(f"{name} stands alone on its line")
    note(f"({COMMANDS[name].run(chat, rest.strip())})")
    return False


def _answer(chat: Chat, text: str) -> bool:
    """Print the answer as it comes, and what is to be remarked on it; whether Ctrl-C stopped it."""
    pictures, forgotten = PICTURES if sys.stdout.isatty() else {}, chat.forgotten
    with stop_on_signal([signal.SIGINT]) as stop:  # asked after each token: what runs in several threads is never torn
        for piece in chat.ask(text):
            print(piece.text.translate(pictures), end="", flush=True)
            if stop:
                break
    print(flush=True)
    if stop:
        note("(stopped; the answer so far is part of the conversation, unless /undo takes it back)")
    elif piece.completion.reason == "length":
        note(f"(cut after {chat.config.max_tokens} tokens, see --max-tokens)")
    if piece.rolled:
        note("(this exchange alone outgrew the model's context, so it saw the newest part only)")
    elif chat.forgotten and not forgotten:
        note("(the conversation has outgrown the model's context: from now on it does not see the oldest messages)")
    return bool(stop)


class Command(NamedTuple):
    """takes : what stands after its name.     run : does it, and returns what to say about it; ValueError where it cannot be done."""

    takes: str
    help: str
    run: Callable[[Chat, str], str]


def _help(chat: Chat, _: str) -> str:
    lines = [f"{f'{name} {command.takes}':<22}{command.help}" for name, command in COMMANDS.items()]
    return "\n ".join([*lines, "All else is said to the model. Ctrl-C stops its answer."])


def _reset(chat: Chat, _: str) -> str:
    chat.reset()
    return "a new conversation" + (", the system message as before" if chat.system else "")


def _system(chat: Chat, text: str) -> str:
    chat.system = text
    return "the system message counts from the next answer" if text else "no system message any more"


def _undo(chat: Chat, _: str) -> str:
    if not chat.undo():
        raise ValueError("there is nothing to take back")
    return f"taken back; {len(chat.exchanges)} messages are left"


def _save(chat: Chat, file: str) -> str:
    if not file:
        raise ValueError("/save needs the name of a .jsonl file")
    if not chat.exchanges:
        raise ValueError("nothing has been said yet that could be saved")
    path = Path(file).expanduser()
    try:
        append_conversation(path, chat.messages)
    except OSError as error:
        raise ValueError(f"{path} is not saved: {error.strerror}") from error
    return f"saved as the last line of {path}"


def _quit(chat: Chat, _: str) -> str:
    raise EOFError


COMMANDS = {
    "/reset": Command("", "forget what was said; the system message stays", _reset),
    "/undo": Command("", "take back the last question and its answer", _undo),
    "/system": Command("[TEXT]", "tell the model how to answer; without TEXT, nothing", _system),
    "/save": Command("FILE.jsonl", "add the conversation to a file that instruction tuning reads", _save),
    "/help": Command("", "show this", _help),
    "/quit": Command("", "leave, as Ctrl-D does", _quit),
}
