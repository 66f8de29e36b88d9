"""Stages that begin from a run, given what they cannot use: exit status 2, one line with cause and remedy, nothing lost, nothing left."""
import json
import os
import shutil

import pytest
from test_bad_input import flip, refusal, truncate
from tiny_run import back_to, final_bytes, train
from tiny_stages import EXAMPLES, RUNS, Life, assistant, user, write

from tinyllm.cli.main import main


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    return Life(tmp_path_factory.mktemp("life"))


@pytest.fixture(scope="module")
def chars(tmp_path_factory):
    """A run whose tokenizer has no special tokens."""
    return train(tmp_path_factory.mktemp("chars"), "--steps", 2)


def refused(capfd, folder, life, name, content, *options) -> str:
    """What a stage says to examples of this content; `folder` and all that it began from are as before."""
    path = folder / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else "".join(json.dumps(record) + "\n" for record in content).encode())
    words = life.command(name, folder / "run", *options)
    words[words.index("--data") + 1] = str(path)
    before = {p: p.stat().st_mtime_ns for p in life.folder.rglob("*")}
    line = refusal(capfd, folder, words)
    assert before == {p: p.stat().st_mtime_ns for p in life.folder.rglob("*")}
    return line.replace(str(folder) + os.sep, "")


# Examples

def talk(*messages):
    return [{"messages": list(messages)}]


ALL = ("instruct", "classify", "dpo", "reward", "grpo", "ppo")
ANY = {
    b"": "data.jsonl",
    b"\n\n": "data.jsonl",
    b'{"prompt": \n': "data.jsonl, line 1: not valid JSON",
    b"\xff\xfe{": "data.jsonl, line 1: this is UTF-16",
    b'"text"\n': "data.jsonl, line 1: expected an object with a field",
    b"{}\n": "data.jsonl, line 1: the field ",
    b"[" * 100_000: "data.jsonl, line 1: not valid JSON",
}


@pytest.mark.parametrize("name", ALL)
def test_files_without_examples(life, tmp_path, capfd, name):
    for content, message in ANY.items():
        assert refused(capfd, tmp_path, life, name, content).startswith(message)
    line = refusal(capfd, tmp_path, [*life.command(name, tmp_path / "run"), "--data", tmp_path / "nowhere.jsonl"])
    assert line.startswith(f"{tmp_path / 'nowhere.jsonl'}: no such file")


RECORDS = {
    "instruct": [
        (talk(), "line 1: the field 'messages' must be a list of at least one message"),
        ([{"messages": "hello"}], "line 1: the field 'messages' must be a list"),
        (talk("hello"), 'line 1: messages[0] must be an object like {"role"'),
        (talk({"role": "user"}), "line 1: messages[0].content is missing"),
        (talk(user("a"), assistant(3)), "line 1: messages[1].content must be a string"),
        (talk({"role": "bot", "content": "a"}), "line 1: messages[0].role is 'bot': it must be one of system, user, assistant"),
        (talk({"role": "assistent", "content": "a"}), "did you mean assistant?"),
        (talk(user("a"), {"role": "system", "content": "b"}), "messages[1].role is 'system', which only the first message can be"),
        (talk(user("a")), "line 1: none of the messages is the assistant's"),
        (talk(user("\ud800"), assistant("a")), "messages[0].content holds half of a surrogate pair"),
        (talk(user("x" * 300), assistant("a")), "none of 1 conversations has an answer within the context of 64 tokens"),
    ],
    "classify": [
        ([{"text": "a", "label": "x"}], "data.jsonl: 1 texts with 1 labels (x): at least 2 are to be told apart"),
        ([{"text": "a", "label": 1.5}], "line 1: the field 'label' must be a string or a whole number, found a number"),
        ([{"text": "a", "label": True}], "line 1: the field 'label' must be a string or a whole number, found true or false"),
        ([{"text": None, "label": "x"}], "line 1: the field 'text' must be a string, found null"),
        ([{"text": " ", "label": "x"}], "line 1: the text is empty"),
        ([{"text": "a", "label": ""}], "line 1: the label is empty"),
        ([{"text": "a"}], "line 1: the field 'label' is missing; fields found: 'text'"),
        ([{"text": str(i), "label": f"{i}"} for i in range(9)], "is in the validation part only: give more texts of it, or another --seed"),
    ],
    "dpo": [
        ([{"prompt": "a", "chosen": "b"}], "line 1: the field 'rejected' is missing"),
        ([{"prompt": "a", "chosen": "b", "rejected": ["c"]}], "line 1: the field 'rejected' must be a string, found a list"),
        ([{"prompt": "a", "chosen": "", "rejected": "b"}], "line 1: the field 'chosen' is empty"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "line 1: the fields 'chosen' and 'rejected' are equal"),
        ([{"prompt": 7, "chosen": "b", "rejected": "c"}], "line 1: the field 'prompt' must be a string or a list of messages, found a number"),
        ([{"prompt": [], "chosen": "b", "rejected": "c"}], "must be a list of at least one message"),
        ([{"prompt": [assistant("a")], "chosen": "b", "rejected": "c"}], "the last message of 'prompt' is the assistant's: it must be a user's"),
        ([*EXAMPLES["pairs"], {"prompt": "a" * 100, "chosen": "b", "rejected": "c"}], "data.jsonl:13: prompt and answer are "),
        ([*EXAMPLES["pairs"], {"prompt": "a", "chosen": "b", "rejected": "c" * 100}], "data.jsonl:13: prompt and answer are "),
    ],
    "grpo": [
        ([{"prompt": "a"}], "line 1: the field 'answer' is missing"),
        ([{"prompt": "a", "answer": 4}], "line 1: the field 'answer' must be a string, found a number"),
        ([{"prompt": "a", "answer": " "}], "line 1: the field 'answer' is empty: nothing could be verified"),
        ([{"prompt": "", "answer": "b"}], "line 1: the field 'prompt' is empty"),
        ([*EXAMPLES["tasks"], {"prompt": "a" * 100, "answer": "b"}], "data.jsonl:13: the prompt has "),
    ],
    "ppo": [
        ([{"prompt": None}], "line 1: the field 'prompt' must be a string or a list of messages, found null"),
        ([{"prompt": [user("a"), assistant("b"), user(" ")]}], "line 1: the field 'prompt' is empty: there is nothing to answer"),
        ([{"promt": "a"}], "line 1: the field 'prompt' is missing; fields found: 'promt'"),
        ([*EXAMPLES["tasks"], {"prompt": "a" * 100}], "data.jsonl:13: the prompt has "),
    ],
}  # fmt: skip
RECORDS["reward"] = RECORDS["dpo"]


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_cannot_be_used(life, tmp_path, capfd, name):
    for records, message in RECORDS[name]:
        line = refused(capfd, tmp_path, life, name, records)
        assert message in line, line
        assert "data.jsonl" in line or "none of 1 conversations" in line


def test_bad_examples_to_measure_on(life, tmp_path, capfd):
    for name, records, message in [
        ("instruct", talk(user("x" * 300), assistant("a")), "none of 1 conversations"),
        ("dpo", [{"prompt": "a" * 100, "chosen": "b", "rejected": "c"}], "val.jsonl:1: prompt and answer are "),
        ("grpo", [{"prompt": "a"}], "val.jsonl, line 1: the field 'answer' is missing"),
        ("classify", [{"text": "a", "label": "new"}, {"text": "a", "label": "over"}], "val.jsonl:1: the label 'new' is in the validation part only"),
    ]:
        path = write(tmp_path / "val.jsonl", records)
        assert message in refusal(capfd, tmp_path, life.command(name, tmp_path / "run", "--val-data", path))


@pytest.mark.parametrize("name", ["instruct", "kto", "ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "reward", "grpo"))])
def test_a_single_example_is_learned_from(life, tmp_path, name):
    path = write(tmp_path / "one.jsonl", EXAMPLES[RUNS[name][1]][:1])
    words = life.command(name, tmp_path / "run")
    words[words.index("--data") + 1] = str(path)
    assert main(words) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["val_loss"] is None and summary["figures"] == {} and summary["steps"] == 8
    assert (tmp_path / "run" / "data" / "val.jsonl").read_text() == ""


def test_an_answer_that_the_verifier_cannot_take(life, tmp_path, capfd):
    line = refused(capfd, tmp_path, life, "grpo", [{"prompt": "a", "answer": "four"}], "--verifier", "number")
    assert line.startswith("data.jsonl:1: --verifier number cannot verify it: the expected answer 'four' has no number in it")


# What is begun from

@pytest.mark.parametrize("name", ["instruct", "dpo"])
def test_a_base_that_cannot_chat(life, chars, tmp_path, capfd, name):
    words = life.command(name, tmp_path / "run")
    words[words.index(str(life.base))] = str(chars)
    assert "a char tokenizer has no special tokens, which a chat needs: use a bpe tokenizer" in refusal(capfd, tmp_path, words)


def test_a_base_of_characters_can_be_tuned_to_classify(chars, tmp_path, capfd):
    records = [{"text": f"{word} {i}" if i > 9 else word * (i + 1), "label": word} for word in ("the", "fox") for i in range(6)]
    path = write(tmp_path / "notes.jsonl", records)
    words = ["finetune", "classify", str(chars), "--data", str(path), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert main(words) == 0
    assert main(["finetune", "predict", str(tmp_path / "run"), "--text", "the"]) == 0
    write(path, [*records, {"text": "§", "label": "the"}])
    assert "'§' (U+00A7) at position 0" in refusal(capfd, tmp_path, [*words, "--out", tmp_path / "other"])


def test_runs_of_the_wrong_kind(life, tmp_path, capfd):
    life.run("classify", tmp_path / "classifier")
    for base, message in [("classifier", "it tells texts apart and writes none: see tinyllm finetune predict"), ("nowhere", "no such run folder"), ("", ": not found, so ")]:
        words = life.command("instruct", tmp_path / "run")
        words[words.index(str(life.base))] = str(tmp_path / base)
        assert message in refusal(capfd, tmp_path, words)
    words = life.command("dpo", tmp_path / "run")
    words[words.index(str(life.base))] = str(life.folder / "judge")
    assert f"{life.folder / 'judge'}: it judges answers and writes none: see tinyllm align ppo" in refusal(capfd, tmp_path, words)
    for judge, message in [(life.base, "is a run of another stage, pretrain: make one with tinyllm align reward"), (tmp_path / "nowhere", "no such run folder")]:
        assert message in refusal(capfd, tmp_path, life.command("ppo", tmp_path / "run", "--reward-model", judge))
    for run, message in [(life.base, "is a run of another stage, pretrain: predict needs one of tinyllm finetune classify"), (tmp_path / "nowhere", "no such run folder")]:
        assert message in refusal(capfd, tmp_path, ["finetune", "predict", run, "--text", "a"])
    for kind in ("sample", "eval"):
        assert "it tells texts apart and writes none: see tinyllm finetune predict" in refusal(capfd, tmp_path, [kind, tmp_path / "classifier"])


def test_a_reward_model_of_another_base(life, tmp_path, capfd):
    """It reads other tokens, or fewer of them."""
    (tmp_path / "runs").mkdir()
    for options, message in [(["--vocab-size", 270, "--context", 64], "reads other tokens than"),
                             (["--tokenizer", life.base, "--context", 32], "reads 32 tokens at most")]:  # fmt: skip
        base, judge = tmp_path / "runs" / f"base{options[1]}", tmp_path / "runs" / f"judge{options[1]}"
        kind = [] if "--tokenizer" in options else ["--tokenizer", "bpe"]
        train(tmp_path, *kind, *options, "--steps", 1, "--out", base)
        path = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
        assert main(["align", "reward", str(base), "--data", str(path), "--steps", "1", "--out", str(judge)]) == 0
        line = refusal(capfd, tmp_path, life.command("ppo", tmp_path / "run", "--reward-model", judge))
        assert message in line and line.endswith("train it from that run\n")


def test_a_damaged_base(life, tmp_path, capfd):
    mine = life.copied(tmp_path / "life")
    newest = sorted((mine.base / "checkpoints").iterdir())[-1]
    flip(newest / "model.safetensors")
    assert f"{newest / 'model.safetensors'} is damaged" in refusal(capfd, tmp_path, mine.command("dpo", tmp_path / "run"))
    assert "no checkpoint '7'; there are last, best" in refusal(capfd, tmp_path, life.command("dpo", tmp_path / "run", "--checkpoint", 7))


# Options

OPTIONS = {
    "instruct": {
        "--loss kto": "unknown option --loss",
        "--layers 3": "unknown option --layers",
        "--bach 3": "unknown option --bach; did you mean --batch?",
        "--alpha 4": "--alpha is a setting of an adapter: give it a --rank, too",
        "--dora": "--dora is a setting of an adapter: give it a --rank, too",
        "--adapter-dropout 0.1": "--adapter-dropout is a setting of an adapter",
        "--targets query": "--targets is a setting of an adapter",
        "--rank 0": "--rank is 0: it must be at least 1",
        "--rank 2 --targets qeury": "LoRA: no linear map of the blocks is called 'qeury'; did you mean query?",
        "--val-fraction 1": "--val-fraction is 1.0: it must be at most 0.9",
        "--epochs 0": "--epochs is 0.0: it must be at least 1e-06",
        "--minutes 1": "--steps and --minutes are two answers to one question",
        "--device tpu": "--device is 'tpu': it takes cpu, cuda",
    },
    "classify": {
        "--pooling max": "--pooling is 'max': it takes last, first, mean",
        "--learn-blocks 2": "the model has 1 blocks, of which 2 cannot be learned: choose 0 to 1",
        "--scratch --learn-blocks 0": "--scratch begins with random weights, which all have to learn: leave out --learn-blocks",
        "--rank 2": "unknown option --rank",
    },
    "dpo": {
        "--loss gpo": "--loss is 'gpo': it takes dpo, ipo, kto, orpo, simpo; did you mean",
        "--label-smoothing 0.7": "--label-smoothing is 0.7: it must be at most 0.5",
        "--beta 0": "--beta is 0.0: it must be at least 1e-06",
        "--loss orpo --beta 0.2": "--beta weighs the distance to a reference, which --loss orpo has none of",
        "--loss ipo --label-smoothing 0.2": "--label-smoothing is a setting of --loss dpo, which --loss ipo does not look at",
        "--gamma 2": "--gamma is a setting of --loss simpo",
        "--loss kto --strength 0.3": "--strength is a setting of --loss orpo",
        "--val-fraction 0.2 --val-data pairs.jsonl": "--val-data and --val-fraction are two answers to one question",
        "--z-loss 1": "unknown option --z-loss",
    },
    "reward": {"--label-smoothing 0.1": "unknown option --label-smoothing", "--beta 1": "unknown option --beta; did you mean --beta"},
    "grpo": {
        "--answers 1": "--answers 1: answers are compared within a group, so it takes at least 2",
        "--minibatches 7": "--minibatches 7 is more than the 6 answers of a rollout: lower it",
        "--verifier prefix": "--verifier is 'prefix': it takes ending, exact, number, contains",
        "--max-tokens 60": "tasks.jsonl:1: the prompt has 13 tokens, and answers up to 60: together more than the model's context of 64",
        "--batch 3": "unknown option --batch",
        "--minutes 1": "unknown option --minutes",
    },
    "ppo": {
        "--kl 0": "--kl-target adapts --kl, which is 0: give it a value to begin from",
        "--rank 2": "unknown option --rank",
        "--verifier exact": "unknown option --verifier",
        "--reward-model ": "--reward-model is missing: give a run of tinyllm align reward",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_make_no_sense(life, tmp_path, capfd, name):
    for options, message in OPTIONS[name].items():
        line = refusal(capfd, tmp_path, life.command(name, tmp_path / "run", *options.split(" ")))
        assert message in line, line


@pytest.mark.parametrize("name", ["instruct", "ppo"])
def test_what_is_missing(life, tmp_path, capfd, name):
    words = life.command(name, tmp_path / "run")
    without = [word for word in words if word != str(life.base)]
    assert "a run to begin from is missing: give its folder first" in refusal(capfd, tmp_path, without)
    place = words.index("--data")
    assert "--data is missing: give the file with the examples" in refusal(capfd, tmp_path, words[:place] + words[place + 2 :])
    (tmp_path / "run" / "base").mkdir(parents=True)
    assert "has a base in it that a run would overwrite: give another folder" in refusal(capfd, tmp_path, words)


def test_nothing_to_predict(life, tmp_path, capfd):
    run = life.run("classify", tmp_path / "run")
    assert "there is nothing to tell apart: give a --text or --data" in refusal(capfd, tmp_path, ["finetune", "predict", run])
    assert "text 2 of 2 is empty" in refusal(capfd, tmp_path, ["finetune", "predict", run, "--text", "a", "--text", " "])
    assert "nowhere: no such file or folder" in refusal(capfd, tmp_path, ["finetune", "predict", run, "--data", tmp_path / "nowhere"])
    assert "no checkpoint '4'" in refusal(capfd, tmp_path, ["finetune", "predict", run, "--text", "a", "--checkpoint", "4"])


# Resuming

@pytest.fixture
def stopped(life, tmp_path):
    """name -> a run that was killed after step 6."""
    def make(name):
        run = life.run(name, tmp_path / name)
        back_to(run, 6)
        return run

    return make


def test_resuming_with_the_command_of_another_stage(life, stopped, capfd):
    run = stopped("instruct")
    for words, right in [(["align", "dpo"], "finetune instruct"), (["train"], "finetune instruct"), (["finetune", "classify"], "finetune instruct")]:
        line = refusal(capfd, run, [*words, "--resume", run])
        assert line.startswith(f"{run} is a run of another stage, instruct: go on with ") and line.endswith(f"tinyllm {right} --resume {run}\n")
    assert f"RUN and --resume exclude each other: {run} has what it began from in it" in refusal(capfd, run, ["finetune", "instruct", life.base, "--resume", run])
    assert "cannot resume with --batch 5: the run was started with --batch 3" in refusal(capfd, run, ["finetune", "instruct", "--resume", run, "--batch", 5])
    assert "cannot resume with --rank 5: the run was started without --rank" in refusal(capfd, run, ["finetune", "instruct", "--resume", run, "--rank", 5])


def edit(path):
    """Another content that can be read just as well."""
    path.write_bytes(path.read_bytes().replace(b"e", b"a", 1))


@pytest.mark.parametrize("name, files", [
    ("instruct", ["data/train.jsonl", "data/val.jsonl", "base/model.safetensors", "tokenizer.json"]),
    ("classify", ["data/train.jsonl", "data/val.jsonl", "base/model.safetensors"]),
    ("ppo", ["data/train.jsonl", "base/reward/model.safetensors", "base/reward/config.json"]),
])
def test_damaged_files_of_a_run(stopped, tmp_path, capfd, name, files):
    run = stopped(name)
    weights = shutil.copytree(run, tmp_path / "copy")
    for file in files:
        for damage in (flip, truncate, edit, os.unlink):
            damage(run / file)
            line = refusal(capfd, run, [*RUNS[name][0], "--resume", run])
            said = f"{run / file}: no such file" if damage is os.unlink else f"{run / file} is damaged: its SHA-256 is not the one in config.json"
            assert line == f"cannot resume {run}: {said}. Put the file back from a copy, or start a new run\n"
            shutil.copy(weights / file, run / file)
    assert main([*RUNS[name][0], "--resume", str(run)]) == 0


def test_without_its_base_a_run_does_not_begin_with_random_weights(life, stopped, tmp_path, capfd):
    run = stopped("instruct")
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "base")
    assert f"cannot resume {run}: {run / 'base' / 'model.safetensors'}: no such file" in refusal(capfd, run, ["finetune", "instruct", "--resume", run])


def test_a_damaged_checkpoint_with_a_rollout(stopped, life, tmp_path, capfd):
    run = stopped("grpo")
    flip(run / "checkpoints" / "step-000006" / "rollout.safetensors")
    line = refusal(capfd, run, ["align", "grpo", "--resume", run])
    assert "rollout.safetensors is damaged" in line and "step-000003 is intact, use that" in line
    shutil.rmtree(run / "checkpoints" / "step-000006")
    assert main(["align", "grpo", "--resume", str(run)]) == 0
    assert final_bytes(run) == final_bytes(life.run("grpo", tmp_path / "whole"))


def test_config_without_what_a_stage_needs(stopped, capfd):
    run = stopped("classify")
    whole = json.loads((run / "config.json").read_text())
    for part, change, message in [("head", {"labels": []}, "config.json has head.labels"), ("base", {"copied": ["x"]}, "is missing"), ("head", None, "it must be an object with")]:
        (run / "config.json").write_text(json.dumps(whole | {part: change and whole[part] | change}))
        line = refusal(capfd, run, ["finetune", "classify", "--resume", run])
        assert message in line or "cannot resume" in line, line
