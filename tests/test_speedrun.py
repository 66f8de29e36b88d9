"""The speedrun: a tiny one in all its parts, interrupted and gone on with, on one's own text; and, slowly, the whole of it with what it must reach."""
import json
import time

import pytest
from tiny_run import final_bytes, text

from tinyllm.cli.main import main
from tinyllm.data.tinyworld import World, save_records
from tinyllm.evaluate.world import world_tasks
from tinyllm.nn import TransformerConfig
from tinyllm.stages import speedrun
from tinyllm.stages import stage as stages
from tinyllm.train.run import Run

CHAIN = ("pretrain", "instruct", "dpo", "grpo")
STAGES = (*CHAIN, "classify-fine-tuned", "classify-frozen", "classify-from-scratch", "encoder")


@pytest.fixture
def tiny(monkeypatch):
    """As much of everything as a second or two allows."""
    for name, value in dict(PAGES=400, DIALOGUES=200, PAIRS=100, SUMS=100, DESCRIPTIONS=40, EXAMINED=1).items():
        monkeypatch.setattr(speedrun, name, value)
    monkeypatch.setattr(speedrun, "MODEL", TransformerConfig(layers=1, heads=2, width=16, context=128))
    monkeypatch.setattr(speedrun, "ENCODER", speedrun.EncoderModelConfig(arch="llama", layers=1, heads=2, width=16, context=32))
    monkeypatch.setattr(speedrun, "VOCAB_SIZE", 400)
    monkeypatch.setattr(speedrun, "world_tasks", lambda world: world_tasks(world, count=3, texts=10))


def tiny_run(folder, *options):
    return main(["speedrun", "--out", str(folder), "--scale", "0.001", *options])


def test_all_of_it(tiny, tmp_path, capsys):
    assert tiny_run(tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "== 7 of 7: grpo" in said and "now talk to it:" in said and "knowledge: accuracy" in said
    assert all(Run(tmp_path / "run" / name).summary.exists() for name in STAGES)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["models"]) == list(CHAIN)
    card = (tmp_path / "run" / "card.md").read_text()
    assert "## Spam, from 24 notes" in card and "## Encoder: held-out descriptions told right" in card and "| from-scratch |" in card
    page = (tmp_path / "run" / "card.html").read_text()
    assert "Reward while training, grpo" in page and "Loss while training, pretrain" in page
    for name in ("conversations", "pairs", "sums", "notes"):
        train, held_out = ((tmp_path / "run" / "data" / f"{name}-{split}.jsonl").read_text().splitlines() for split in ("train", "test"))
        if name in ("sums", "notes"):
            assert not {*train} & {*held_out}


@pytest.mark.parametrize("stage, how", [
    pytest.param("instruct", "start", marks=pytest.mark.slow), pytest.param("grpo", "evaluate", marks=pytest.mark.slow), ("dpo", "train"),
])
def test_an_interrupted_one_goes_on(tiny, tmp_path, capsys, monkeypatch, stage, how):
    """Ctrl-C between two stages, while measuring, or within a stage: what is complete stays, and the end is the same."""
    assert tiny_run(tmp_path / "whole", "--without", "classify", "encoder") == 0
    place, calls = stages if how == "train" else speedrun, []
    original = getattr(place, how)

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) != CHAIN.index(stage) + 1:
            return original(*arguments, **options)
        if how == "train":
            options["stop"].reason = "SIGINT"  # it ends after the first of two updates, saved
            return original(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, how, interrupted)
        assert tiny_run(tmp_path / "run", "--without", "classify", "encoder") == 130
    said = capsys.readouterr().out
    assert f"speedrun --resume {tmp_path / 'run'}" in said
    assert main(["speedrun", "--resume", str(tmp_path / "run")]) == 0
    assert "is complete already" in capsys.readouterr().out
    assert final_bytes(tmp_path / "run" / "grpo") == final_bytes(tmp_path / "whole" / "grpo")


def test_on_text_of_ones_own(tiny, tmp_path, capsys):
    """Stages without examples are left out, and the text is measured by what was set aside of it."""
    for number in range(30):
        (tmp_path / f"text{number}.txt").write_text(f"{number}. {text(80 + number)[number:]}", encoding="utf-8")
    save_records(tmp_path / "talk.jsonl", World(0).documents("dialogue", 40))
    files = [str(tmp_path / f"text{number}.txt") for number in range(30)]
    assert tiny_run(tmp_path / "run", "--data", *files, "--conversations", str(tmp_path / "talk.jsonl")) == 0
    said = capsys.readouterr()
    assert "== 3 of 3: instruct" in said.out and list(json.loads((tmp_path / "run" / "results.json").read_text())["models"]) == ["pretrain", "instruct"]


def test_text_of_which_nothing_is_left(tiny, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("=*= " * 200, encoding="utf-8")
    assert tiny_run(tmp_path / "run", "--data", str(tmp_path / "text.txt")) == 2
    assert "cleaning dropped every document" in capsys.readouterr().err


@pytest.mark.parametrize("options, line", [
    ("--without pretrain", "--without pretrain: only classify, encoder, instruct, dpo, grpo can be left out"),
    ("--without grop", "--without grop; did you mean grpo?"),
    ("--pairs p.jsonl", "--pairs goes with text of your own: give --data, too"),
    ("--data nowhere.txt", "nowhere.txt: no such file or folder"),
    (f"--data {__file__} --pairs nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--scale 0", "--scale is 0.0: it must be at least"),
    ("--resume nowhere", "not found, so nowhere is not a folder of tinyllm speedrun"),
    ("--out x --resume y", "--out and --resume exclude each other"),
])
def test_what_makes_no_sense(options, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["speedrun", *options.split()]) == 2
    assert line in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_folders_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert tiny_run(tmp_path / "full") == 2 and "is not an empty folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    speedrun.SpeedrunConfig().save(tmp_path / "run" / "speedrun.json")
    assert tiny_run(tmp_path / "run") == 2 and "go on with --resume" in capsys.readouterr().err
    assert main(["speedrun", "--resume", str(tmp_path / "run"), "--seed", "3"]) == 2
    assert "--seed is not what" in capsys.readouterr().err
    (tmp_path / "run" / "speedrun.json").write_text('{"seed": 1, "sede": 2}')
    assert main(["speedrun", "--resume", str(tmp_path / "run")]) == 2 and "is damaged: " in capsys.readouterr().err


@pytest.mark.slow
def test_what_it_must_reach(tmp_path):
    """Every figure that is promised, and the time, for which the machine must have nothing else to do, and two cores like those in README."""
    began = time.perf_counter()
    assert main(["speedrun", "--out", str(tmp_path / "run")]) == 0
    minutes = (time.perf_counter() - began) / 60
    models = json.loads((tmp_path / "run" / "results.json").read_text())["models"]

    def value(stage, task, metric="acc", subject=None):
        return (models[stage][task]["subjects"][subject] if subject else models[stage][task]["metrics"])[metric]["value"]

    texts = models["pretrain"]["tinyworld texts"]["metrics"]["nats_per_token"]
    assert texts["value"] - texts["best"] <= 0.03
    assert all(value("instruct", "knowledge", subject=subject) >= 0.95 for subject in ("animals", "people", "places", "things"))
    assert all(value(stage, "stories", "same_answer") >= 0.9 for stage in ("instruct", "dpo", "grpo"))
    assert value("grpo", "sums", "same_answer") >= 0.9 and value("grpo", "sums", "same_answer") > value("dpo", "sums", "same_answer")
    assert value("dpo", "preferences") >= 0.95
    for task, metric in (("knowledge", "acc"), ("stories", "same_answer"), ("sums", "same_answer")):
        assert value("dpo", task, metric) >= value("instruct", task, metric) - 0.01
    accuracy = {name: json.loads(Run(tmp_path / "run" / f"classify-{name}").summary.read_text())["figures"]["accuracy"]
                for name in ("fine-tuned", "frozen", "from-scratch")}  # fmt: skip
    assert accuracy["fine-tuned"] >= 0.97
    assert json.loads(Run(tmp_path / "run" / "encoder").summary.read_text())["figures"]["nsp_accuracy"] >= 0.95
    assert minutes <= 10, f"all figures are reached, but it took {minutes:.1f} minutes"
