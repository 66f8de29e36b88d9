"""`tinyllm sample`, on a run that was trained for a few steps."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinyllm.cli.main import main
from tinyllm.generate import SamplingConfig, complete
from tinyllm.stages import load_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with a byte-level tokenizer and a context of 16."""
    base = tmp_path_factory.mktemp("sample")
    (base / "text.txt").write_text("def f(x):\n    return x + 1\n\n" * 200)
    model = "--layers 1 --heads 2 --width 16 --context 16 --batch 4 --steps 10 --vocab-size 265".split()
    assert main(["train", "--data", str(base / "text.txt"), *model, "--out", str(base / "run")]) == 0
    return str(base / "run")


def sample(capsys, *args):
    capsys.readouterr()
    status = main(["sample", *args])
    return (status, *capsys.readouterr())


def test_prompt_then_continuation_then_summary(folder, capsys):
    status, out, err = sample(capsys, folder, "--prompt", "def ", "--max-tokens", "8", "--seed", "3")
    model, tokenizer, _ = load_run(folder)
    assert (status, out) == (0, "def " + complete(model, tokenizer, "def ", SamplingConfig(max_tokens=8, seed=3)).text + "\n")
    assert err.startswith("8 tokens in ") and err.endswith("ended by length (1)\n")


def test_prompts_keep_their_order_and_their_texts_in_any_batch(folder, capsys, tmp_path, monkeypatch):
    lines = [f"def f{n}" for n in range(5)]
    (tmp_path / "prompts.txt").write_text("\n\n".join(lines) + "\n")
    options = [folder, "--prompt", "x", "--file", str(tmp_path / "prompts.txt"), "--max-tokens", "6", "--checkpoint", "best"]
    _, together, _ = sample(capsys, *options)
    texts = together.split("\n--------\n")
    assert len(texts) == 6 and all(text.startswith(prompt) for text, prompt in zip(texts, ["x", *lines], strict=True))
    monkeypatch.setattr("tinyllm.cli.sample.AT_ONCE", 2)
    assert sample(capsys, *options)[1] == together


def test_log_probabilities_are_listed(folder, capsys):
    _, out, _ = sample(capsys, folder, "--prompt", "def", "--max-tokens", "5", "--logprobs", "--temperature", "0")
    rows = [line.split(None, 2) for line in out.splitlines()[-6:]]
    assert len(rows) == 6 and rows[-1][1] == "in"
    assert sum(float(row[0]) for row in rows[:-1]) == pytest.approx(float(rows[-1][0]), abs=1e-3)


def test_says_that_the_context_was_outgrown(folder, capsys):
    note = "outgrew the model's context"
    assert note in sample(capsys, folder, "--max-tokens", "40")[2] and note not in sample(capsys, folder, "--max-tokens", "10")[2]


def test_other_ways_to_choose(folder, capsys):
    greedy = sample(capsys, folder, "--prompt", "def", "--temperature", "0", "--max-tokens", "9")[1]
    assert sample(capsys, folder, "--prompt", "def", "--top-k", "1", "--max-tokens", "9")[1] == greedy
    assert sample(capsys, folder, "--prompt", "def", "--beams", "3", "--max-tokens", "9")[0] == 0
    stop = greedy[3:][4:6]
    _, out, err = sample(capsys, folder, "--prompt", "def", "--temperature", "0", "--max-tokens", "9", "--stop", "never", "--stop", stop)
    assert out == "def" + greedy[3:].partition(stop)[0] + "\n" and "ended by stop (1)" in err


def test_control_characters_do_not_reach_a_terminal(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert sample(capsys, folder, "--prompt", "a\x1b[2J\r\x7f\x9b\tb\n", "--max-tokens", "1")[1].startswith("a␛[2J␍\ufffd\ufffd\tb\n")


@pytest.mark.parametrize("args, message", [
    (["nowhere"], "nowhere: no such run folder"),
    (["RUN", "--file", "nowhere.txt"], "there is no file nowhere.txt to read prompts from"),
    (["RUN", "--file", "EMPTY"], "has no prompt in it"),
    (["RUN", "--file", "BINARY"], "is not UTF-8 text, at byte 1"),
    (["RUN", "--top-p", "2"], "--top-p is 2.0: it must be at most 1"),
    (["RUN", "--checkpoint", "7"], "no checkpoint '7'"),
    (["RUN", "--beams", "2", "--temperature", "0"], "--temperature changes how tokens are drawn"),
])
def test_bad_input_is_one_line(folder, capsys, tmp_path, args, message):
    (tmp_path / "empty").write_text("\n\n")
    (tmp_path / "binary").write_bytes(b"a\xff")
    known = {"RUN": folder, "EMPTY": str(tmp_path / "empty"), "BINARY": str(tmp_path / "binary")}
    status, out, err = sample(capsys, *[known.get(arg, arg) for arg in args])
    assert (status, out, err.count("\n")) == (2, "", 1) and err.startswith("tinyllm: error: ") and message in err


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_cleanly(folder, tmp_path):
    (tmp_path / "many").write_text("def \n" * 100_000)
    command = [sys.executable, "-m", "tinyllm", "sample", folder, "--file", str(tmp_path / "many")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    shown = process.stdout.read(30)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=20)
    assert process.returncode == 130 and (shown + rest).startswith(b"def ") and rest.endswith(b"\n")
    assert b"Traceback" not in err and b"ended by Ctrl-C (" in err
