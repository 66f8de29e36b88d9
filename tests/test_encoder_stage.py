"""`tinyllm train --objective mlm+nsp`: a run folder like any other, with both accuracies, which resumes bitwise; and what it refuses."""
import json
import math
import shutil

import numpy as np
import pytest
from tiny_run import back_to, final_bytes, history, text, train

from tinyllm.cli.main import main
from tinyllm.data.tinyworld import World
from tinyllm.nn import MaskedLanguageModel
from tinyllm.stages import load_module, load_run
from tinyllm.tokenizer import train_wordpiece
from tinyllm.train.run import read_log

MODEL = "--layers 1 --heads 2 --width 16 --context 24 --batch 4".split()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A file of descriptions, one document a line."""
    path = tmp_path_factory.mktemp("text") / "world.jsonl"
    path.write_text("".join(json.dumps({"text": item.text}) + "\n" for item in World(0, size=3).documents("fact", 40)))
    return path


def command(world, folder, *options):
    source = [] if "--data" in options else ["--data", world]
    return ["train", "--objective", "mlm+nsp", *source, *MODEL, "--out", folder, *options]


def learn(world, folder, *options):
    assert main(list(map(str, command(world, folder, *options)))) == 0
    return folder


def refused(capfd, *words):
    assert main(list(map(str, words))) == 2
    error = capfd.readouterr().err
    assert error.startswith("tinyllm: error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return learn(world, tmp_path_factory.mktemp("runs") / "run", "--steps", 6, "--eval-every", 2, "--accumulate", 2, "--dropout", 0.1)


def test_a_run_and_what_it_says_of_itself(finished):
    model, tokenizer, config = load_module(finished)
    assert isinstance(model, MaskedLanguageModel) and config.model.arch == "bert" and config.model.vocab_size == tokenizer.vocab_size
    evaluations = [r for r in read_log(finished / "log.jsonl") if r["event"] == "evaluation"]
    summary = json.loads((finished / "summary.json").read_text())
    for figures in (*evaluations, summary["figures"]):
        assert 0 <= figures["mlm_accuracy"] <= 1 and 0 <= figures["nsp_accuracy"] <= 1
    assert len(evaluations) == 4 and evaluations[0]["val_loss"] == pytest.approx(math.log(tokenizer.vocab_size) + math.log(2), abs=0.2)
    assert summary["val_loss"] < evaluations[0]["val_loss"] and summary["tokens"] == 6 * 2 * 4


def test_resumed_it_ends_with_the_same_bits(finished, tmp_path, world):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    back_to(run, 4)
    moved = world.with_suffix(".away")
    world.rename(moved)  # the folder holds all that it needs
    try:
        assert main(["train", "--resume", str(run)]) == 0
    finally:
        moved.rename(world)
    assert final_bytes(run) == final_bytes(finished) and history(run) == history(finished)


def test_micro_batches_learn_what_one_batch_does(finished, world, tmp_path):
    one = learn(world, tmp_path / "one", "--steps", 2, "--batch", 8, "--precision", "fp32")
    two = learn(world, tmp_path / "two", "--steps", 2, "--accumulate", 2)
    losses = [[r["loss"] for r in history(run) if r["event"] == "step"] for run in (one, two)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_masked_tokens_alone(world, tmp_path, capfd):
    run = learn(world, tmp_path / "run", "--steps", 2, "--objective", "mlm", "--arch", "llama")
    assert json.loads((run / "summary.json").read_text())["figures"].keys() == {"mlm_accuracy"}
    assert "rows: 48 for training, 5 for validation" in capfd.readouterr().out
    assert load_module(run)[0].encoder.position_embedding is None


def test_without_validation_and_with_a_given_tokenizer(world, tmp_path):
    train_wordpiece([text()], 60).save(tmp_path / "tokenizer.json")
    run = learn(world, tmp_path / "run", "--steps", 1, "--val-fraction", 0, "--tokenizer", tmp_path / "tokenizer.json")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["val_loss"] is None and summary["figures"] == {} and not (run / "data" / "val.bin").exists()


def test_it_writes_no_text(finished, capfd):
    assert "it is an encoder, which fills gaps and writes no text" in refused(capfd, "sample", finished)
    with pytest.raises(ValueError, match="encoder"):
        load_run(finished)


@pytest.mark.parametrize("options, message", [
    (["--objective", "nsp"], "--objective is 'nsp': it takes next-token, mlm, mlm+nsp; did you mean mlm+nsp?"),
    (["--pack"], "--pack goes with --objective next-token alone"),
    (["--label-smoothing", "0.1"], "--label-smoothing goes with --objective next-token alone"),
    (["--context", "4"], "the training part: two sentences need a context of at least 5 tokens, got 4"),
    (["--objective", "mlm", "--context", "2"], "the training part: a text needs a context of at least 3 tokens, got 2"),
    (["--vocab-size", "5"], "--vocab-size is 5: it must be at least 6"),
    (["--tokenizer", "bpe"], "--tokenizer bpe: it takes wordpiece, or the path"),
    (["--tokenizer", "nowhere.json", "--vocab-size", "90"], "--vocab-size goes with --tokenizer wordpiece alone"),
])  # fmt: skip
def test_what_does_not_fit_is_one_clear_line(world, tmp_path, capfd, options, message):
    assert message in refused(capfd, *command(world, tmp_path / "run", "--steps", 1), *options)
    assert not (tmp_path / "run").exists()


def test_texts_without_two_sentences_are_refused(tmp_path, capfd):
    (tmp_path / "one.txt").write_text("no end, no beginning")
    (tmp_path / "two.txt").write_text("nor here")
    error = refused(capfd, *command(None, tmp_path / "run", "--steps", 1, "--data", tmp_path / "one.txt", tmp_path / "two.txt"))
    assert "the training part: none of 1 documents has two sentences" in error and not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_mask_is_refused(world, tmp_path, capfd):
    decoder = train(tmp_path, "--steps", "1")
    error = refused(capfd, *command(world, tmp_path / "encoder", "--steps", 1, "--tokenizer", decoder))
    assert "has no [MASK], [CLS] and [SEP], which an encoder needs: take a wordpiece tokenizer" in error
    assert "is a run of another stage, pretrain: go on with" in refused(capfd, "train", "--resume", decoder, "--objective", "mlm")


def test_another_objective_is_no_way_to_go_on(finished, capfd, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    back_to(tmp_path / "run", 4)
    for objective in ("mlm", "next-token"):
        error = refused(capfd, "train", "--resume", tmp_path / "run", "--objective", objective)
        assert f"cannot resume with --objective {objective}: the run was started with --objective mlm+nsp" in error
