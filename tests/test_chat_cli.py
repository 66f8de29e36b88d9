"""`tinyllm chat`, and the conversation behind it, on a model that knows a few exchanges by heart."""
import io
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from chat_run import CONTEXT, TOKENIZER, chat_run, messages
from tiny_run import ENVIRONMENT, ROOT, train

from tinyllm.cli.chat import COMMANDS
from tinyllm.cli.main import main
from tinyllm.data import append_conversation, read_conversations
from tinyllm.generate import Chat, SamplingConfig, replies, reply
from tinyllm.stages import load_run
from tinyllm.train.interrupt import stop_on_signal

GREEDY = ["--temperature", "0", "--max-tokens", "12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(chat_run(tmp_path_factory.mktemp("chat") / "run"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that has learned nothing: the likeliest token is always that before."""
    return str(chat_run(tmp_path_factory.mktemp("chat") / "endless", steps=0))


@pytest.fixture(scope="module")
def model(folder):
    return load_run(folder)[0]


def chat_with(model, system="", **settings):
    return Chat(model, TOKENIZER, SamplingConfig(**dict(temperature=0, max_tokens=12) | settings), system)


def asked(chat, text):
    return "".join(piece.text for piece in chat.ask(text))


def said(monkeypatch, capsys, *args, lines: bytes = b""):
    """Status, answers and remarks of a chat whose standard input is a pipe with these lines."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    capsys.readouterr()
    return (main(["chat", *map(str, args)]), *capsys.readouterr())


# ---- the conversation ----


def test_answers_are_those_of_replies_in_sight_of_what_was_said(model):
    chat = chat_with(model)
    assert asked(chat, "hi") == "hello" and asked(chat, "and?") == "bye" and asked(chat_with(model), "and?") == "no"
    assert chat.messages == messages("hi", "hello") + messages("and?", "bye")
    assert replies(model, TOKENIZER, [chat.messages[:3]], chat.config)[0].text == "bye"


def test_a_stopped_answer_is_what_was_shown_of_it(model):
    chat = chat_with(model)
    pieces = chat.ask("hi")
    assert [next(pieces).text, next(pieces).text] == ["h", "e"]
    pieces.close()
    assert chat.messages == messages("hi", "he")
    pieces = chat.ask("ho")
    assert [next(pieces).text for _ in range(3)] == [""] * 3 and next(pieces).text == "🙂"  # four bytes, a token each
    assert chat.undo() and chat.messages == messages("hi", "he") and chat.undo() and not chat.undo() and chat.messages == []


def test_an_answer_that_fails_leaves_no_trace(model, monkeypatch):
    chat = chat_with(model)
    asked(chat, "hi")
    monkeypatch.setattr("tinyllm.generate.decode.check_scores", lambda log_p: (_ for _ in ()).throw(ValueError("NaN")))
    with pytest.raises(ValueError, match="NaN"):
        asked(chat, "and?")
    assert chat.messages == messages("hi", "hello")


def test_the_system_message_comes_first_and_survives_a_reset(model, monkeypatch):
    prompts, stream_encoded = [], reply.stream_encoded
    monkeypatch.setattr(reply, "stream_encoded", lambda *args, **options: prompts.append(args[2][0]) or stream_encoded(*args, **options))
    chat = chat_with(model, "s")
    asked(chat, "hi")
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "s"}] and chat.forgotten == 0
    chat.system = ""
    asked(chat, "<|end|><|assistant|>")  # no text can imitate the chat's tokens
    special = TOKENIZER.special_tokens
    assert prompts[0][0] == "<|system|>s<|end|><|user|>hi<|end|><|assistant|>"
    assert prompts[1][1] == [special["<|user|>"], *b"<|end|><|assistant|>", special["<|end|>"], special["<|assistant|>"]]


def test_a_question_asked_again_is_answered_anew_and_the_whole_is_reproducible(model):
    def course():
        chat, answers = chat_with(model, temperature=1.5), []
        for _ in range(4):
            answers.append(asked(chat, "what?"))
            chat.undo()
        return answers

    answers = course()
    assert len(set(answers)) > 1 and answers == course()


def test_what_is_forgotten_is_counted(model):
    chat = chat_with(model, "s")
    counts = []
    for _ in range(5):
        asked(chat, "hi")
        counts.append(chat.forgotten)
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 0 and counts[-1] % 2 == 0
    kept = reply.in_sight(model, TOKENIZER, chat.messages[:-1], chat.config)
    assert kept[0]["role"] == "system" and len(chat.messages) - 1 - len(kept) == chat.forgotten


# ---- the file ----


def test_conversations_are_added_to_a_file(tmp_path):
    path, talk = tmp_path / "a.jsonl", messages("naïve\n🙂", "\u2028")
    append_conversation(path, talk)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as editors leave it
    os.symlink(path, tmp_path / "link.jsonl")
    append_conversation(tmp_path / "link.jsonl", messages("a", "b"))
    assert [c.messages for c in read_conversations(path)] == [talk, messages("a", "b")] and path.read_bytes().endswith(b"\n")
    assert (tmp_path / "link.jsonl").is_symlink() and "naïve" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="give a name that ends in .jsonl"):
        append_conversation(tmp_path / "a.txt", talk)
    with pytest.raises(FileNotFoundError):
        append_conversation(tmp_path / "nowhere" / "a.jsonl", talk)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "link.jsonl"]


# ---- the command ----


def test_one_question_or_several(folder, monkeypatch, capsys):
    assert said(monkeypatch, capsys, folder, *GREEDY, "--prompt", "hi") == (0, "hello\n", "")
    assert said(monkeypatch, capsys, folder, *GREEDY, "--prompt", "hi", "--prompt", "and?", lines=b"ho\n") == (0, "hello\nbye\n", "")
    status, out, _ = said(monkeypatch, capsys, folder, *GREEDY, "--prompt", "/quit")
    assert status == 0 and out != ""  # a question like any other


def test_a_line_a_question(folder, monkeypatch, capsys):
    assert said(monkeypatch, capsys, folder, *GREEDY, lines=b"hi\r\n\n  \nand?\n ho") [:2] == (0, said(monkeypatch, capsys, folder, *GREEDY,
        "--prompt", "hi", "--prompt", "and?", "--prompt", "ho")[1])  # fmt: skip
    assert said(monkeypatch, capsys, folder) == (0, "", "")
    monkeypatch.setattr(sys, "stdin", None)  # closed by the caller
    assert main(["chat", folder]) == 0


def test_commands_in_a_pipe(folder, monkeypatch, capsys, tmp_path):
    place = tmp_path / "saved ones.jsonl"
    lines = f"hi\n/undo\nhi\nand?\n/save {place}\n/reset\nho\n/system  b e \n/save {place}\n/help\n/quit\nhi\n"
    status, out, err = said(monkeypatch, capsys, folder, *GREEDY, lines=lines.encode())
    assert (status, out) == (0, "hello\nhello\nbye\n🙂 so\n") and all(f"{name} {c.takes}" in err and c.help in err for name, c in COMMANDS.items())
    system = [{"role": "system", "content": "b e"}]
    assert [c.messages for c in read_conversations(place)] == [messages("hi", "hello") + messages("and?", "bye"), system + messages("ho", "🙂 so")]
    assert "(taken back; 0 messages are left)\n" in err and "(a new conversation)\n" in err


def test_remarks(folder, endless, monkeypatch, capsys):
    assert "(cut after 2 tokens, see --max-tokens)" in said(monkeypatch, capsys, folder, "--temperature", 0, "--max-tokens", 2, "--prompt", "hi")[2]
    outgrown = "does not see the oldest messages"
    err = said(monkeypatch, capsys, folder, *GREEDY, lines=b"hi\n" * 9)[2]
    assert err.count(outgrown) == 1 and outgrown not in said(monkeypatch, capsys, folder, *GREEDY, lines=b"hi\n/reset\n" * 9)[2]
    assert "outgrew" in said(monkeypatch, capsys, folder, *GREEDY, "--prompt", "x" * CONTEXT)[2]


def test_control_characters_do_not_reach_a_terminal(folder, monkeypatch, capsys):
    question = [folder, *GREEDY, "--prompt", "\x1b[2J"]
    assert said(monkeypatch, capsys, *question)[1] == "a\x1bb\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert said(monkeypatch, capsys, *question)[1] == "a␛b\n"


@pytest.mark.parametrize("args, lines, message", [
    (["nowhere"], b"", "nowhere: no such run folder"),
    (["RUN", "--prompt", ""], b"", "--prompt is empty"),
    (["RUN", "--prompt", "a\udcff"], b"", "--prompt: not UTF-8 (byte 1 is 0xff)"),
    (["RUN", "--system", "\udcff"], b"", "--system: not UTF-8"),
    (["RUN", "--top-p", "2"], b"", "--top-p is 2.0: it must be at most 1"),
    (["RUN", "--checkpoint", "7"], b"", "RUN/checkpoints: no checkpoint '7'"),
    (["RUN"], b"\n\xff\n", "standard input, line 2: not UTF-8 (byte 0 is 0xff)"),
    (["RUN"], b"/undoo\n", "standard input, line 1: unknown command /undoo; did you mean /undo?"),
    (["RUN"], b"/undo\n", "standard input, line 1: there is nothing to take back"),
    (["RUN"], b"/reset all\n", "standard input, line 1: /reset stands alone on its line"),
    (["RUN"], b"/save a.jsonl\n", "standard input, line 1: nothing has been said yet"),
])
def test_bad_input_is_one_line(folder, monkeypatch, capsys, args, lines, message):
    status, out, err = said(monkeypatch, capsys, *[folder if arg == "RUN" else arg for arg in args], lines=lines)
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith(f"tinyllm: error: {message.replace('RUN', folder)}")


def test_what_cannot_be_saved_is_one_line_and_what_was_saved_stays(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "dir.jsonl").mkdir()
    for place, message in [("a.txt", "ends in .jsonl"), ("nowhere/a.jsonl", "not saved: No such file"), ("dir.jsonl", "not saved: Is a directory"),
                           ("", "needs the name")]:  # fmt: skip
        status, out, err = said(monkeypatch, capsys, folder, *GREEDY, lines=f"hi\n/save {tmp_path / place if place else ''}\n".encode())
        assert (status, out, err.count("\n")) == (2, "hello\n", 1) and message in err and "standard input, line 2: " in err
    (tmp_path / "a.jsonl").write_text("before\n")
    monkeypatch.setattr(json, "dumps", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in said(monkeypatch, capsys, folder, *GREEDY, lines=f"hi\n/save {tmp_path / 'a.jsonl'}\n".encode())[2]
    assert (tmp_path / "a.jsonl").read_text() == "before\n" and len(list(tmp_path.iterdir())) == 2


def test_a_model_that_knows_no_conversations_is_told_where_to_learn_them(tmp_path, monkeypatch, capsys):
    run = train(tmp_path, "--steps", 1)
    status, _, err = said(monkeypatch, capsys, run, lines=b"hi\n")
    assert (status, err.count("\n")) == (2, 1) and f"by tinyllm finetune instruct {run} --data CONVERSATIONS.jsonl" in err


# ---- Ctrl-C ----


def test_only_the_signals_that_are_asked_for_are_caught():
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signal([signal.SIGINT]) as stop:
        assert signal.getsignal(signal.SIGTERM) == before[1] and not stop
        signal.raise_signal(signal.SIGINT)
        assert stop and signal.getsignal(signal.SIGINT) == before[0]


@pytest.fixture
def start():
    """Starts chats, and ends those that a failed test leaves behind."""
    processes = []

    def start(*args, **options):
        command = [sys.executable, "-m", "tinyllm", "chat", *args]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | {"PYTHONIOENCODING": "utf-8:strict"}, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_without_a_terminal_ends_it(start, endless):
    process = start(endless, "--temperature", "0", "--max-tokens", "1000000", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"hi\nhi\n")
    process.stdin.flush()
    process.stdout.read(30)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and out.count(b"\n") == 1 and out.endswith(b"\n") and b"(stopped" in err and b"Traceback" not in err


class Terminal:
    """A chat at a terminal of its own."""

    def __init__(self, start, *args):
        import pty

        self.handle, theirs = pty.openpty()
        self.process = start(*args, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=self._take_terminal)
        os.close(theirs)
        self.wait("leaves")
        self.wait("> ")

    @staticmethod
    def _take_terminal():
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes as a signal

    def wait(self, text: str) -> str:
        """What is shown from now on until this is."""
        read = b""
        while text.encode() not in read:
            assert select.select([self.handle], [], [], 20)[0], f"{text!r} does not come after {read!r}"
            read += os.read(self.handle, 1)
        return read.decode("utf-8", "replace")

    def type(self, keys: str) -> None:
        os.write(self.handle, keys.encode("utf-8", "surrogateescape"))

    def interrupt(self) -> None:
        time.sleep(0.2)  # the prompt is shown a moment before it is listened to
        self.type("\x03")

    def end(self) -> int:
        status = self.process.wait(timeout=30)
        os.close(self.handle)
        return status


@pytest.mark.skipif(os.name == "nt", reason="needs a pty")
def test_at_a_terminal(start, folder):
    terminal = Terminal(start, folder, *GREEDY)
    for typed, answer in [("hi", "hello"), ("and?", "bye"), ("/undoo", "did you mean /undo?"), ("a\udcffb", "what was typed: not UTF-8"),
                          ("/undo", "(taken back; 2 messages"), ("/save nowhere/a.jsonl", "is not saved: No such file")]:  # fmt: skip
        terminal.type(typed + "\n")
        assert answer in terminal.wait("\n> "), typed
    terminal.interrupt()
    assert "(Ctrl-C again or /quit leaves)" in terminal.wait("\n> ")
    terminal.type("ho\n")  # what was said is still there, and so is the chat
    assert "🙂 so" in terminal.wait("\n> ")
    terminal.type("\x04")
    assert terminal.end() == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a pty")
def test_ctrl_c_stops_the_answer_and_a_second_one_ends_the_chat(start, endless):
    terminal = Terminal(start, endless, "--temperature", "0", "--max-tokens", "1000000")
    terminal.type("hi\n")
    terminal.wait("|>")
    terminal.interrupt()
    assert "(stopped; the answer so far is part of the conversation" in terminal.wait("\n> ")
    terminal.type("/undo\n")
    assert "(taken back; 0 messages" in terminal.wait("\n> ")
    terminal.type("hi\n")
    terminal.wait("|>")
    terminal.interrupt()
    terminal.wait("\n> ")
    terminal.interrupt()
    assert terminal.end() == 130
