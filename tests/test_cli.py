"""The command line as a whole: commands, options made from the configurations, help, exit statuses."""
import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from tiny_run import ENVIRONMENT, MODEL, ROOT, arguments, call, train

from tinyllm.cli.arguments import Parser, add_config, config_from, given, number, whole_number
from tinyllm.cli.main import COMMANDS, main
from tinyllm.config import option_name, setting
from tinyllm.nn import TransformerConfig
from tinyllm.stages import PretrainConfig

# What the main job must offer, whatever else it does.
OPTIONS = """
--data --tokenizer --vocab-size --arch --layers --heads --kv-heads --width --mlp-width --context --batch --accumulate --steps --minutes --lr
--min-lr --warmup --schedule --beta1 --beta2 --weight-decay --clip --dropout --bias --no-bias --tie --no-tie --precision --device
--val-fraction --eval-every --checkpoint-every --keep --seed --out --resume
""".split()


def train_parser() -> Parser:
    parser = Parser(prog="tinyllm train")
    importlib.import_module("tinyllm.cli.train").add_arguments(parser)
    return parser


def status(capsys, *words) -> tuple[int, str, str]:
    capsys.readouterr()
    try:
        code = main(list(map(str, words)))
    except SystemExit as stopped:  # argparse: --help, and what it cannot parse
        code = stopped.code or 0
    return (code, *capsys.readouterr())


# Help

def test_every_promised_option_exists_and_every_setting_is_an_option():
    known = {option for action in train_parser()._actions for option in action.option_strings}
    assert not set(OPTIONS) - known
    for kind in PretrainConfig.kinds().values():
        for field in dataclasses.fields(kind):
            assert option_name(field.name) in known  # vocab_size of the model is that of the data
    assert known == {"-h", "--help", "--out", "--resume", "--objective"} | {
        option for kind in PretrainConfig.kinds().values() for field in dataclasses.fields(kind)
        for option in [option_name(field.name)] + (["--no-" + option_name(field.name)[2:]] if "bool" in str(field.type) else [])
    }  # fmt: skip


def test_choices_are_listed_and_defaults_shown():
    text = " ".join(train_parser().format_help().split())
    for choices in ("gpt2|llama", "cosine|linear|constant|wsd", "fp32|bf16|fp16", "cpu|cuda"):
        assert choices in text
    for line in ("--lr X highest learning rate (default: 0.002)", "--tie, --no-tie use the token embedding", "(default: by --arch)"):
        assert line in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_readable(command, capsys):
    code, out, err = status(capsys, command, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: tinyllm {command} [-h]")
    assert all(len(line) <= 120 for line in out.splitlines())
    parser = Parser(prog="x")
    importlib.import_module(f"tinyllm.cli.{command}").add_arguments(parser)
    for action in parser._actions:
        assert action.help or action.choices, action.dest
        if action.help:
            assert action.help[-1] not in ".,"  # phrases, as in the rest


def test_options_are_grouped(capsys):
    _, out, _ = status(capsys, "train", "--help")
    titles = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    assert titles == ["options", "objective", "run", "text and tokenizer", "model", "training"]
    assert out.index("--vocab-size N ") < out.index("\nmodel:") < out.index("--layers N ") < out.index("\ntraining:") < out.index("--lr X ")


def test_overview_names_every_command(capsys):
    for words in ([], ["--help"], ["-h"]):
        code, out, err = status(capsys, *words)
        assert (code, err) == (0, "") and all(f"  {name} " in out for name in COMMANDS) and "tinyllm train" in out
    code, out, _ = status(capsys, "--version")
    assert code == 0 and re.fullmatch(r"tinyllm \d+\.\d+\.\d+\n", out)


def test_overview_loads_no_more_than_the_package_itself():
    """The help brings nothing beyond the math that importing tinyllm brings, so that it is there at once."""
    code = (
        "import sys, tinyllm; before = set(sys.modules); sys.argv = ['tinyllm', '--help']\n"
        "from tinyllm.cli.main import main; assert main() == 0\n"
        "print(*sorted(name for name in set(sys.modules) - before if name.startswith('tinyllm')), file=sys.stderr)"
    )
    done = call([sys.executable, "-c", code])
    assert done.returncode == 0 and set(done.stderr.split()) <= {"tinyllm.cli", "tinyllm.cli.arguments", "tinyllm.cli.main", "tinyllm.config"}


def test_module_and_script_are_the_same_program(tmp_path):
    by_module = call([sys.executable, "-m", "tinyllm", "train", "--help"])
    by_script = call([sys.executable, "-c", "import sys; from tinyllm.cli.main import main; sys.exit(main())", "train", "--help"])
    assert by_module.returncode == by_script.returncode == 0 and by_module.stdout == by_script.stdout != ""
    with open(ROOT / "pyproject.toml", encoding="utf-8") as file:
        assert 'tinyllm = "tinyllm.cli.main:main"' in file.read()
    failed = call([sys.executable, "-m", "tinyllm", "trian"])
    assert (failed.returncode, failed.stdout) == (2, "") and "did you mean train?" in failed.stderr


# Options from configurations

@dataclasses.dataclass(frozen=True)
class Sample:
    size: int | None = setting(None, "how 100% big (default: as big as needed)", minimum=1)
    rate: float = setting(0.5, "how fast")
    wild: bool = setting(True, "whether")
    names: tuple[str, ...] = setting((), "which", several=True)
    single: tuple[str, ...] = setting((), "one at a time")
    hidden: int = 3  # no setting: no option


def test_options_that_are_not_given_leave_no_trace():
    parser = Parser(prog="x")
    add_config(parser, Sample, "sample")
    assert given(parser.parse_args([]), Sample) == {} and config_from(parser.parse_args([]), Sample) == Sample()
    args = parser.parse_args("--size 3 --rate 1e-3 --no-wild --names a b --names c --single x --single y".split())
    assert config_from(args, Sample) == Sample(3, 1e-3, False, ("a", "b", "c"), ("x", "y"))
    assert "--hidden" not in parser.format_help()
    text = " ".join(parser.format_help().split())
    assert "how 100% big (default: as big as needed)" in text and "how fast (default: 0.5)" in text and "whether (default: yes)" in text


@pytest.mark.parametrize("kind, good, bad", [
    (whole_number, {"3": 3, "-2": -2, " 7 ": 7}, ["", "3.0", "1e3", "abc", "0x10", "nan"]),
    (number, {"3": 3.0, "1e-4": 1e-4, "-.5": -0.5}, ["", "nan", "inf", "-inf", "1e999", "0,1", "x"]),
])
def test_numbers(kind, good, bad):
    for word, value in good.items():
        assert kind(word) == value
    for word in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a (whole|finite) number"):
            kind(word)


# Running

@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_sample_after_training(tmp_path, kind, capfd):
    sizes = ["--vocab-size", 280] if kind == "bpe" else []
    code, out, _ = status(capfd, *arguments(tmp_path, "--steps", 5, "--tokenizer", kind, *sizes))
    assert code == 0
    *_, place, suggestion = out.splitlines()
    assert place == f"everything is in {tmp_path / 'run'}: config.json, tokenizer.json, checkpoints/, log.jsonl, summary.json"
    command = suggestion.removeprefix("now try: python -m tinyllm ")
    assert command.startswith(f"sample {tmp_path / 'run'} --prompt ")
    done = subprocess.run(f"{sys.executable} -m tinyllm {command} --max-tokens 9", shell=True, capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.decode().strip()
    done = call([sys.executable, "-m", "tinyllm", "sample", str(tmp_path / "run"), "--prompt", "the fox", "--max-tokens", "9", "--seed", "1"])
    assert done.returncode == 0 and done.stdout.startswith("the fox") and len(done.stdout) > len("the fox\n")


def test_what_a_person_sees(tmp_path, capsys):
    code, out, err = status(capsys, *arguments(tmp_path, "--steps", 20, "--eval-every", 10))
    assert (code, err) == (0, "")
    patterns = [
        r"text: 1 document, [\d,]+ characters", r"tokenizer: char, \d+ entries", r"tokens: [\d,]+ for training, \d+ for validation; 1\.\d\d bytes per token",
        r"model: llama, [\d,]+ parameters, .* MFLOP a token", r"before training: validation loss 3\.\d+",
        r"step 10/20  loss +\d\.\d+  val +\d\.\d+  lr \d\.\de-0\d  grad \d\.\d\d +[\d,]+ tok/s  0:\d\d left", r"    \".*\"",
        r"step 20/20 .*", r"trained on 1,280 tokens in 0:\d\d, [\d,]+ tokens/s", r"validation loss 3\.\d+ nats per token, \d\.\d+ bits per byte, over all of it",
    ]  # fmt: skip
    for pattern in patterns:
        assert re.search(f"^{pattern}$", out, re.MULTILINE), pattern
    assert "· training   o validation" in out


def test_a_terminal_gets_one_line_that_stays_up_to_date(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = status(capsys, *arguments(tmp_path, "--steps", 6, "--eval-every", 6))
    lines = re.findall(r"\r([^\r\n]*)\x1b\[K", out)
    assert len([line for line in lines if line.startswith("step ")]) == 6 and all(len(line) <= 59 for line in lines)
    assert max(len(line) for line in out.partition("\n\n")[2].splitlines() if "|" in line or "+--" in line) <= 60


def test_text_that_the_terminal_cannot_show(tmp_path):
    """The loss curve and the samples are not ASCII; a run must not end because of that."""
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}
    done = call([sys.executable, "-m", "tinyllm", *arguments(tmp_path, "--steps", 4)], env=environment)
    assert (done.returncode, done.stderr) == (0, "") and "? training" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="pipes of a shell")
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["describe"], arguments.__name__])
def test_a_reader_that_leaves_is_no_error(tmp_path, words):
    words = arguments(tmp_path, "--steps", 4) if isinstance(words, str) else words
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "tinyllm", *words], cwd=ROOT, env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")
    assert not (tmp_path / "run").exists()


def test_describe_of_a_run_is_that_of_its_settings(tmp_path, capsys):
    run = train(tmp_path, "--steps", 2)
    of_run = status(capsys, "describe", run)
    vocabulary = json.loads((run / "config.json").read_text())["model"]["vocab_size"]
    assert of_run == status(capsys, "describe", *MODEL, "--vocab-size", vocabulary) and of_run[0] == 0


def test_models_config_is_what_the_options_say():
    args = train_parser().parse_args("--arch gpt2 --layers 2 --no-bias --kv-heads 1 --softcap 30".split())
    assert config_from(args, TransformerConfig) == TransformerConfig(arch="gpt2", layers=2, bias=False, kv_heads=1, softcap=30.0)


def test_a_gpu_that_fails_is_one_line_and_a_mistake_of_ours_a_traceback(monkeypatch, capsys):
    driver = type("CUDARuntimeError", (RuntimeError,), {"__module__": "cupy_backends.cuda.api.runtime"})

    def describe(error):
        def run(args):
            raise error

        monkeypatch.setattr(importlib.import_module("tinyllm.cli.describe"), "run", run)
        return main(["describe"])

    assert describe(driver("cudaErrorIllegalAddress: an illegal\nmemory access")) == 1
    assert capsys.readouterr().err == (
        "tinyllm: error: the GPU, or what drives it, failed: cudaErrorIllegalAddress: an illegal memory access; "
        "see tinyllm doctor and nvidia-smi, or use --device cpu\n"
    )
    with pytest.raises(RuntimeError, match="ours"):
        describe(RuntimeError("ours"))
