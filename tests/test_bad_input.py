"""Bad input and bad luck: exit status 2, one line on standard error that names the cause and the remedy, nothing lost, nothing left."""
import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from tiny_run import ENVIRONMENT, ROOT, arguments, call, final_bytes, history, program, text, train

from tinyllm.cli.main import main
from tinyllm.data import open_shard
from tinyllm.stages import load_run, pretrain, stage
from tinyllm.train.checkpoint import list_checkpoints


def files(folder) -> dict:
    """Everything below a folder, folders with the value None."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refusal(capfd, folder, words, status=2) -> str:
    """The one line of a command that must fail and leave everything in the folder as it was."""
    before = files(folder)
    capfd.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as stopped:
        code = stopped.code
    _, err = capfd.readouterr()
    assert code == status, err
    assert err.startswith("tinyllm: error: ") and err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err, err
    assert files(folder) == before
    return err.removeprefix("tinyllm: error: ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with the checkpoints of steps 4, 8 and 12."""
    return train(tmp_path_factory.mktemp("finished"), "--steps", 12, "--checkpoint-every", 4, "--eval-every", 12, "--keep", 9)


@pytest.fixture
def stopped(finished, tmp_path):
    """A copy of it, as if the run had been killed after step 8."""
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000012")
    (run / "summary.json").unlink()
    return run


# Text

TEXTS = {
    "missing": ([], "no such file or folder"),
    "empty.txt": (b"", "the file holds no text"),
    "binary.txt": (b"\x7fELF\0\0\1", "a binary file (byte 4 is NUL), expected text; convert it"),
    "latin.txt": ("Straße".encode("latin-1"), "not UTF-8 (byte 4 is 0xdf); convert it, for example with iconv"),
    "utf16.txt": ("text".encode("utf-16"), "this is UTF-16, expected UTF-8; convert it"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "broken.jsonl, line 2: not valid JSON"),
    "fieldless.jsonl": (b'{"text": "a"}\n\n{"txet": "b"}\n', "fieldless.jsonl, line 3: the field 'text' is missing; fields found: 'txet'"),
    "number.jsonl": (b'{"text": 3}', "number.jsonl, line 1: the field 'text' must be a string, found a number"),
    "list.jsonl": (b'["text"]', "list.jsonl, line 1: expected an object with a field 'text', found a list"),
    "short.txt": (b"abcdef", "training part has 5 tokens, but a window of context 16 needs 17: give more text, or lower the context"),
    "tiny.txt": (b"a", "1 characters are too few to set aside 0.1 of them for validation; give more text"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_none(tmp_path, capfd, name):
    content, message = TEXTS[name]
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    line = refusal(capfd, tmp_path, arguments(tmp_path, "--steps", 2, "--data", tmp_path / name))
    assert str(tmp_path / name) in line or name == "short.txt"
    assert message in line


@pytest.mark.parametrize("content", [{}, {"a.bin": b"text", ".hidden.txt": b"text"}, {"a.txt": b"", "b.md": b"\0"}])
def test_folder_without_text(tmp_path, capfd, content):
    (tmp_path / "texts").mkdir()
    for name, data in content.items():
        (tmp_path / "texts" / name).write_bytes(data)
    line = refusal(capfd, tmp_path, arguments(tmp_path, "--data", tmp_path / "texts"))
    assert "texts: a folder with no text in any .txt, .md, .py, .jsonl file" in line


def test_validation_part_too_short(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("ab" * 100)
    line = refusal(capfd, tmp_path, arguments(tmp_path, "--data", tmp_path / "a.txt", "--val-fraction", 0.005))
    assert "the validation part has 1 tokens, at least 2 are needed" in line and "more text" in line


def test_vocabulary_larger_than_the_text_can_give(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("abc " * 50)
    line = refusal(capfd, tmp_path, arguments(tmp_path, "--tokenizer", "bpe", "--data", tmp_path / "a.txt", "--vocab-size", 5000))
    assert "5000 (--vocab-size) is more than this text can give" in line and "ask for at most 2" in line


def test_text_that_the_given_tokenizer_cannot_encode(finished, tmp_path, capfd):
    (tmp_path / "a.txt").write_text("the quick brown fox " * 20 + "§")
    line = refusal(capfd, tmp_path, arguments(tmp_path, "--tokenizer", finished, "--data", tmp_path / "a.txt"))
    assert "'§' (U+00A7) at position" in line and "not among the" in line and "byte-level BPE" in line


# Options. All of these must be found before the text is read, which may take minutes.

OPTIONS = {
    "--layer 3": "unknown option --layer; did you mean --layers?",
    "--xyzzy": "unknown option --xyzzy (see tinyllm train --help)",
    "book.txt": "unknown argument book.txt",
    "--layers abc": "argument --layers: 'abc' is not a whole number",
    "--layers 0": "--layers is 0: it must be at least 1",
    "--layers": "argument --layers: expected one argument",
    "--layers 1.5": "'1.5' is not a whole number",
    "--lr -1": "--lr is -1.0: it must be at least 0",
    "--lr nan": "argument --lr: 'nan' is not a finite number",
    "--lr inf": "'inf' is not a finite number",
    "--val-fraction 2": "--val-fraction is 2.0: it must be at most 0.9",
    "--dropout 1": "--dropout is 1.0: it must be at most 0.99",
    "--min-lr 1": "--min-lr 1.0 is above --lr 0.002",
    "--seed -1": "--seed is -1: it must be at least 0",
    "--minutes 0": "--minutes is 0.0: it must be at least 0.01",
    "--minutes 1e308": "--minutes is 1e+308: it must be at most 1000000.0",
    "--schedule cosin": "--schedule is 'cosin': it takes cosine, linear, constant, wsd; did you mean cosine?",
    "--arch elmo": "--arch is 'elmo': it takes gpt2, llama, bert",
    "--precision fp8": "--precision is 'fp8': it takes fp32, bf16, fp16",
    "--heads 3": "--heads 3 does not divide --width 16",
    "--heads 4 --kv-heads 3": "--kv-heads 3 does not divide --heads 4",
    "--rope-theta 1": "--rope-theta is 1.0: it must be at least 1.01",
    "--rope-scaling yarn --rope-factor 17": "--rope-factor 17.0 is above --context 16: the original context would be empty",
    "--heads 16": "width / heads is 1: it must be even",
    "--steps 3 --minutes 1": "--steps and --minutes are two answers to one question: give one of them",
    "--vocab-size 300": "--vocab-size goes with --tokenizer bpe alone, char has a size of its own: leave it out",
    "--tokenizer bpe --vocab-size 100": "--vocab-size is 100: it must be at least 257",
    "--document-mask": "--document-mask needs a tokenizer with <|endoftext|>, which char has not: use --tokenizer bpe",
    "--tokenizer nowhere.json": "--tokenizer nowhere.json: it takes bpe, char, or the path of a tokenizer file or run folder",
    "--tokenizer TEXT": "is not a tokenizer file",
    "--tokenizer FOLDER": "there is no tokenizer file",
    "--out TEXT": "text.txt is a file: give a folder",
    "--out TEXT/run": "text.txt/run: Not a directory; give another folder",
    "--out RUN": "holds a run already: continue it with --resume",
    "--out RUN --resume RUN": "--out and --resume exclude each other",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_that_make_no_sense(finished, tmp_path, capfd, monkeypatch, options):
    (tmp_path / "text.txt").write_text(text(), encoding="utf-8")
    known = {"TEXT": tmp_path / "text.txt", "FOLDER": tmp_path, "RUN": finished, "TEXT/run": tmp_path / "text.txt" / "run"}
    read = []
    monkeypatch.setattr(pretrain, "read_documents", lambda *args, **rest: read.append(args))
    monkeypatch.setattr(pretrain, "standard_library", lambda *args, **rest: read.append(args))
    before = files(finished)
    line = refusal(capfd, tmp_path, arguments(tmp_path, *[known.get(word, word) for word in options.split()]))
    assert OPTIONS[options] in line and not read
    assert files(finished) == before


def test_unknown_command(tmp_path, capfd):
    assert refusal(capfd, tmp_path, ["trian"]) == "unknown command 'trian'; did you mean train? (see tinyllm --help)\n"
    assert refusal(capfd, tmp_path, ["-x"]) == "unknown command '-x' (see tinyllm --help)\n"


def test_cuda_without_cupy(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # as where it is not installed
    line = refusal(capfd, tmp_path, arguments(tmp_path, "--device", "cuda"))
    assert line.startswith('--device cuda needs CuPy, which is not installed: pip install "cupy-cuda13x[ctk]"')


def test_a_model_that_does_not_fit_into_memory(tmp_path, capfd):
    arguments(tmp_path)  # writes the text
    line = refusal(capfd, tmp_path, arguments(tmp_path, "--width", 10**8, "--heads", 1, "--steps", 1))
    assert line.startswith("not enough memory: a step on 4 windows of 16 tokens takes about ") and "(Unable to allocate " in line, line


# Folders that hold something already

@pytest.mark.parametrize("name", ["tokenizer.json", "data", "checkpoints", "log.jsonl", "summary.json"])
def test_out_that_would_overwrite_somebody_elses_file(tmp_path, capfd, name):
    mine = tmp_path / "run" / name if "." in name else tmp_path / "run" / name / "train.bin"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"a year of work")
    arguments(tmp_path)  # writes the text
    line = refusal(capfd, tmp_path, arguments(tmp_path, "--steps", 1))
    assert f"has a {name} in it that a run would overwrite: give another folder" in line


def test_other_files_in_the_folder_do_no_harm(tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    refusal(capfd, tmp_path, arguments(tmp_path, "--data", tmp_path / "missing"))
    train(tmp_path, "--steps", 1)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


# Interrupted before there is anything to resume

@pytest.mark.parametrize("place", ["train_bpe", "prepare", "timed", "Transformer"])
def test_ctrl_c_during_preparation_leaves_no_half_run(tmp_path, capfd, monkeypatch, place):
    def interrupted(*args, **rest):
        original(*args, **rest)
        raise KeyboardInterrupt

    room = stage if place == "timed" else pretrain
    original = getattr(room, place)
    plan = ["--minutes", 0.01] if place == "timed" else ["--steps", 2]
    command = arguments(tmp_path, "--tokenizer", "bpe", "--vocab-size", 270, *plan)
    with monkeypatch.context() as patch:
        patch.setattr(room, place, interrupted)
        assert refusal(capfd, tmp_path, command, status=130) == "stopped\n"
    assert main(command) == 0


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_while_reading_and_tokenizing(tmp_path):
    (tmp_path / "text.txt").write_text(text(400_000), encoding="utf-8")
    command = [sys.executable, "-m", "tinyllm", *arguments(tmp_path, "--tokenizer", "bpe")]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("text: 1 document")
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "tinyllm: error: stopped\n") and not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_killed_during_preparation_does_not_block_a_new_start(tmp_path, capfd):
    command = arguments(tmp_path, "--steps", 2)
    died = call(program("prepare", 3, *command))
    assert died.returncode == -signal.SIGKILL and (tmp_path / "run" / "preparing").exists()
    assert "is not a run folder" in refusal(capfd, tmp_path, ["train", "--resume", tmp_path / "run"])
    assert main(command) == 0
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "config.json", "data", "log.jsonl", "summary.json", "tokenizer.json"]


# Damaged runs

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [flip, truncate, os.unlink])
def test_damaged_checkpoint(stopped, capfd, finished, name, damage):
    newest = stopped / "checkpoints" / "step-000008"
    damage(newest / name)
    kind = "missing" if damage is os.unlink else "damaged"
    line = refusal(capfd, stopped, ["train", "--resume", stopped])
    assert line.startswith(f"{newest / name} is {kind}")
    assert line.endswith(f"{stopped / 'checkpoints' / 'step-000004'} is intact, use that: delete {newest} and resume again\n")
    assert f"{newest / name} is {kind}" in refusal(capfd, stopped, ["sample", stopped, "--prompt", "the"])
    shutil.rmtree(newest)
    assert main(["train", "--resume", str(stopped)]) == 0
    assert final_bytes(stopped) == final_bytes(finished) and history(stopped) == history(finished)


def test_no_intact_checkpoint(stopped, capfd):
    for checkpoint in list_checkpoints(stopped / "checkpoints"):
        flip(checkpoint / "model.safetensors")
    line = refusal(capfd, stopped, ["train", "--resume", stopped])
    assert "no other checkpoint beside it is intact; start a new run" in line


CONFIGS = {
    "{": "config.json is damaged",
    "[]": "config.json is damaged: it must be an object with stage, model, train, data",
    '{"data": {}, "model": {}}': "config.json is damaged: it must be an object with model, train, data",
    "\x00": "config.json is damaged",
    "": "config.json is damaged",
}


@pytest.mark.parametrize("content", CONFIGS)
def test_damaged_config(stopped, capfd, content):
    (stopped / "config.json").write_text(content)
    for words in (["train", "--resume", stopped], ["sample", stopped, "--prompt", "the"], ["describe", stopped]):
        line = refusal(capfd, stopped, words)
        assert CONFIGS[content] in line and line.endswith("put back what it was, or start a new run\n")


@pytest.mark.parametrize("part, name, value, message", [
    ("model", "layers", "one", "layers is 'one', which is not of type int"),
    ("model", "layers", True, "layers is True"),
    ("model", "layers", None, "layers is None"),
    ("model", "layers", 0, "--layers is 0: it must be at least 1"),
    ("model", "vocab_size", "x", "vocab_size is 'x'"),
    ("model", "heads", 5, "--heads 5 does not divide --width 16"),
    ("model", "wdith", 5, "unknown setting 'wdith'; did you mean width?"),
    ("data", "data", [3], "data is 3, which is not of type str"),
    ("train", "lr", "fast", "lr is 'fast', which is not of type float"),
])
def test_config_that_makes_no_sense(stopped, capfd, part, name, value, message):
    content = json.loads((stopped / "config.json").read_text())
    content[part][name] = value
    (stopped / "config.json").write_text(json.dumps(content))
    line = refusal(capfd, stopped, ["train", "--resume", stopped])
    assert "config.json is damaged: " in line and message in line


@pytest.mark.parametrize("part, name, value", [("train", "lr", 0.5), ("model", "width", 32), ("model", "norm_eps", 0.1), ("train", "steps", 13)])
def test_config_that_is_no_longer_what_was_trained(stopped, capfd, part, name, value):
    content = json.loads((stopped / "config.json").read_text())
    before, content[part][name] = content[part][name], value
    (stopped / "config.json").write_text(json.dumps(content))
    line = refusal(capfd, stopped, ["train", "--resume", stopped])
    if name == "width":
        assert "shape" in line or "was trained with 16" in line
    else:
        assert f"config.json has {part}.{name} {value}, but " in line and f"was trained with {before}: put that back" in line


def test_damaged_tokenizer(stopped, capfd):
    whole = (stopped / "tokenizer.json").read_text()
    for content in (whole[:-10], "", '{"kind": "bpe"}', whole.replace('"a"', '"A"', 1)):
        (stopped / "tokenizer.json").write_text(content)
        line = refusal(capfd, stopped, ["train", "--resume", stopped])
        assert line.startswith(f"cannot resume {stopped}: ") and line.endswith(". Put the file back from a copy, or start a new run\n")
        assert "tokenizer" in line
    (stopped / "tokenizer.json").unlink()
    assert "there is no tokenizer file" in refusal(capfd, stopped, ["train", "--resume", stopped])


@pytest.mark.parametrize("damage", [flip, truncate, os.unlink])
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_damaged_tokens(stopped, capfd, name, damage):
    damage(stopped / "data" / name)
    line = refusal(capfd, stopped, ["train", "--resume", stopped])
    assert f"cannot resume {stopped}: {stopped / 'data' / name}: " in line and line.endswith("from a copy, or start a new run\n")


def test_damaged_log(stopped, capfd):
    log = stopped / "log.jsonl"
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([*lines[:3], b"@", *lines[3:]]))
    assert "log.jsonl, line 4: not a record of a run" in refusal(capfd, stopped, ["train", "--resume", stopped])
    log.write_bytes(b"\n".join(lines))
    assert main(["train", "--resume", str(stopped)]) == 0


@pytest.mark.parametrize("words, message", [
    (["--lr", "0.5"], "cannot resume with --lr 0.5: the run was started with --lr 0.002; leave the option out, or start a new run with another --out"),
    (["--bias"], "cannot resume with --bias: the run was started with --no-bias;"),
    (["--keep", "0"], "--keep is 0: it must be at least 1"),
    (["--checkpoint-every", "0"], "--checkpoint-every is 0: it must be at least 1"),
    (["--log-every", "-5"], "--log-every is -5: it must be at least 1"),
    (["--device", "gpu"], "--device is 'gpu': "),
    (["--minutes", "3"], "cannot resume with --minutes 3.0: the run was started without --minutes;"),
    (["--data", "a", "b"], "cannot resume with --data a b: the run was started with --data "),
    (["--steps", "99"], "cannot resume with --steps 99: the run was started with --steps 12;"),
    (["--width", "32"], "cannot resume with --width 32: the run was started with --width 16;"),
    (["--arch", "gpt2"], "cannot resume with --arch gpt2: the run was started with --arch llama;"),
])
def test_resume_with_another_config(stopped, capfd, words, message):
    assert message in refusal(capfd, stopped, ["train", "--resume", stopped, *words])


def test_resume_of_what_is_no_run(tmp_path, capfd):
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty", "text.txt"):
        line = refusal(capfd, tmp_path, ["train", "--resume", tmp_path / name])
        assert line == f"{tmp_path / name / 'config.json'}: not found, so {tmp_path / name} is not a run folder of tinyllm train\n"


def test_an_empty_name_is_not_the_current_folder_or_a_new_run(tmp_path, capfd, monkeypatch):
    """What a shell makes of "$RUN" where RUN is not set."""
    (tmp_path / "text.txt").write_text(text(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "not a run folder of tinyllm train" in refusal(capfd, tmp_path, ["train", "--resume", ""])
    assert "not a run folder of tinyllm train" in refusal(capfd, tmp_path, ["describe", ""])
    assert "the name of a text file or folder is empty" in refusal(capfd, tmp_path, arguments(tmp_path, "--data", ""))


def test_sample_without_checkpoint(stopped, capfd):
    shutil.rmtree(stopped / "checkpoints")
    line = refusal(capfd, stopped, ["sample", stopped, "--prompt", "the"])
    assert line == f"{stopped / 'checkpoints'}: holds no complete checkpoint; train first\n"
    assert "no such run folder; tinyllm train makes one" in refusal(capfd, stopped, ["sample", stopped / "nowhere"])


# A full disk

@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
@pytest.mark.parametrize("limit, what", [(20_000, "cannot save the checkpoint "), (3_000, "cannot ")])
def test_full_disk_while_saving(stopped, finished, limit, what):
    """20,000 bytes hold the weights, but not the optimizer's state; 3,000 not even those, or the log."""
    before = files(stopped / "checkpoints")
    failed = call(program("disk", limit, "train", "--resume", stopped))
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert failed.stderr.startswith(f"tinyllm: error: {what}") and "File too large" in failed.stderr
    assert "free some space or mend the folder, then resume" in failed.stderr
    assert files(stopped / "checkpoints") == before
    assert load_run(stopped)
    assert main(["train", "--resume", str(stopped)]) == 0
    assert final_bytes(stopped) == final_bytes(finished) and history(stopped) == history(finished)


@pytest.mark.parametrize("name", ["tokenizer.json", "train.bin", "config.json"])
def test_full_disk_while_preparing(tmp_path, capfd, monkeypatch, name):
    """Each of the files of the preparation in turn goes to a device that is full."""
    real = builtins.open

    def full(path, mode="r", *args, **rest):
        here = name in str(path) and str(path).endswith(".tmp")
        return real("/dev/full" if here else path, mode, *args, **rest)

    command = arguments(tmp_path, "--steps", 2)
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        line = refusal(capfd, tmp_path, command)
    assert "No space left on device" in line
    assert main(command) == 0


def test_nothing_was_learned_from_the_validation_part(finished):
    """The shards that all of the above start from are what they should be."""
    train_part, val = (open_shard(finished / "data" / name) for name in ("train.bin", "val.bin"))
    assert len(train_part) + len(val) == len(text())
