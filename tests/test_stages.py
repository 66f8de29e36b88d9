"""Every stage by its command: the folder that it leaves, its figures by definition, and what can be done with it next."""
import json
import shlex

import numpy as np
import pytest
from tiny_run import history, logits_loss, train
from tiny_stages import EXAMPLES, RUNS, Life, write

from tinyllm.align import rollouts
from tinyllm.align.logprobs import padded
from tinyllm.cli.main import main
from tinyllm.data import open_shard
from tinyllm.evaluate.world import same_answer
from tinyllm.finetune import encode_texts
from tinyllm.nn import Classifier, Transformer
from tinyllm.stages import STAGES, load_module, load_run
from tinyllm.stages.base import set_aside
from tinyllm.tensor import no_grad
from tinyllm.tokenizer import encode_chat, encode_prompt
from tinyllm.tokenizer.chat import CHAT_TOKENS, END
from tinyllm.train.checkpoint import list_checkpoints, load_checkpoint
from tinyllm.train.safetensors import load


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    return Life(tmp_path_factory.mktemp("life"))


@pytest.fixture(scope="module")
def done(life, tmp_path_factory):
    """name -> (a complete run, what it printed)"""
    folder, made = tmp_path_factory.mktemp("done"), {}

    def run(name, capsys):
        if name not in made:
            capsys.readouterr()
            made[name] = life.run(name, folder / name.replace(" ", "-")), capsys.readouterr().out
        return made[name]

    return run


def summary(run) -> dict:
    return json.loads((run / "summary.json").read_text())


def kept(run, part) -> list[dict]:
    return [json.loads(line) for line in (run / "data" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()]


# The folder

@pytest.mark.parametrize("name", RUNS)
def test_what_a_run_leaves(life, done, capsys, name):
    run, out = done(name, capsys)
    stage = STAGES["dpo" if name in ("kto", "simpo") else name.split()[0]]
    assert {p.name for p in run.iterdir()} == {"config.json", "tokenizer.json", "data", "base", "checkpoints", "log.jsonl", "summary.json"}
    config = json.loads((run / "config.json").read_text())
    assert config["stage"] == stage.name and config["base"]["run"] == str(life.base) and config["train"]["steps"] == 8
    steps = [r for r in history(run) if r["event"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 9)) and all(np.isfinite([r["loss"], r["grad_norm"]]).all() for r in steps)
    assert [r["step"] for r in history(run) if r["event"] == "evaluation"] == [0, 5, 8]
    assert summary(run)["steps"] == 8 and (summary(run)["val_loss"] is None) == (stage.name in ("grpo", "ppo"))
    assert f" {stage.unit} in 0:00, " in out and "nan" not in out
    assert f"of which {summary(run)['parameters']:,} are learned" in out


@pytest.mark.parametrize("name", RUNS)
def test_examples_are_copied_and_some_set_aside(life, done, capsys, name):
    run, out = done(name, capsys)
    train, val = kept(run, "train"), kept(run, "val")
    given = EXAMPLES[RUNS[name][1]]
    source = life.folder / f"{RUNS[name][1]}.jsonl"
    numbers = sorted(int(record["source"].removeprefix(f"{source}:")) for record in train + val)
    assert numbers == list(range(1, len(given) + 1)) and len(val) == max(1, round(0.1 * len(given)))
    assert f"examples: {len(train)} for training, {len(val)} for validation" in out
    for record in train + val:
        original = given[int(record["source"].rpartition(":")[2]) - 1]
        assert {field: record[field] for field in original if field in record and field != "prompt"} == {f: v for f, v in original.items() if f in record and f != "prompt"}


@pytest.mark.parametrize("count, fraction, aside", [(0, 0.1, 0), (1, 0.5, 0), (2, 0.01, 1), (2, 0.9, 1), (10, 0.1, 1), (1000, 0.25, 250), (10, 0.0, 0), (3, 0.9, 2)])
def test_how_many_are_set_aside(count, fraction, aside):
    numbers = set_aside(count, fraction, 0)
    assert len(numbers) == aside and numbers <= set(range(count)) and numbers == set_aside(count, fraction, 0)
    assert aside in (0, 1, 2) or numbers != set_aside(count, fraction, 1)


def test_epochs_and_steps(life, tmp_path):
    """Without --steps: so often through the rows; prompts are answered once."""
    path = write(tmp_path / "notes.jsonl", EXAMPLES["notes"])
    assert main(["finetune", "classify", str(life.base), "--data", str(path), "--batch", "4", "--epochs", "2.5", "--out", str(tmp_path / "a")]) == 0
    assert summary(tmp_path / "a")["steps"] == round(2.5 * 11 / 4) and summary(tmp_path / "a")["tokens"] == 4 * 7
    words = life.command("grpo", tmp_path / "b", "--minibatches", "2", "--epochs", "1")
    place = words.index("--steps")
    assert main(words[:place] + words[place + 2 :]) == 0
    assert summary(tmp_path / "b")["steps"] == round(11 / 2) * 2


def test_a_measured_part_of_its_own_and_other_checkpoints(life, tmp_path):
    val = write(tmp_path / "val.jsonl", EXAMPLES["pairs"][:3])
    run = life.run("dpo", tmp_path / "run", "--val-data", val, "--checkpoint", "best")
    assert len(kept(run, "train")) == 12 and [record["source"] for record in kept(run, "val")] == [f"{val}:{n}" for n in (1, 2, 3)]
    begun = load(run / "base" / "model.safetensors")
    best = load_run(life.base, "best")[0].state_dict()
    assert all((begun[name][: len(w)] == w).all() for name, w in best.items())


# The tokens of the chat

def test_a_chat_stage_adds_its_tokens_once(life, done, capsys, tmp_path):
    run, _ = done("instruct", capsys)
    _, before, _ = load_run(life.base)
    model, tokenizer, config = load_run(run)
    assert config.base.new_tokens == len(CHAT_TOKENS) and model.config.vocab_size == tokenizer.vocab_size == before.vocab_size + len(CHAT_TOKENS)
    assert model.embedding.weight.shape[0] == tokenizer.vocab_size
    words = life.command("dpo", tmp_path / "next")
    words[words.index(str(life.base))] = str(run)
    assert main(words) == 0
    _, again, config = load_run(tmp_path / "next")
    assert config.base.new_tokens == 0 and again.fingerprint() == tokenizer.fingerprint()
    assert load_run(life.base)[1].fingerprint() == before.fingerprint()  # the base is as it was


# Figures by definition

def test_instruct_loss_by_definition(done, capsys):
    """Σ -ln p over the assistant's tokens, a conversation at a time, whether rows are shared or not."""
    for name in ("instruct", "instruct padded", "instruct lora", "instruct dora"):
        run, _ = done(name, capsys)
        model, tokenizer, _ = load_run(run)
        total = count = 0
        for record in kept(run, "val"):
            ids, learned = encode_chat(tokenizer, record["messages"])
            each = logits_each(model, ids)
            total += sum(-each[i - 1][ids[i]] for i, counts in enumerate(learned) if counts)
            count += sum(learned)
        assert summary(run)["val_loss"] == pytest.approx(total / count, rel=1e-5)


def logits_each(model: Transformer, ids: list[int]) -> np.ndarray:
    """ln p of every token after each.     (T, V), float64"""
    with no_grad():
        scores = model(np.array([ids])).numpy()[0].astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def answer_log_p(model, tokenizer, record, field) -> float:
    prompt, answer = encode_prompt(tokenizer, record["prompt"]), [*tokenizer.encode_ordinary(record[field]), tokenizer.special_tokens[END]]
    each = logits_each(model, [*prompt, *answer])
    return sum(each[len(prompt) - 1 + i][token] for i, token in enumerate(answer))


@pytest.mark.parametrize("name", ["dpo", "dpo lora"])
def test_dpo_figures_by_definition(done, capsys, name):
    """-ln σ(β·(Δ chosen - Δ rejected)), where Δ = ln π - ln ρ and ρ is what the run began with."""
    run, _ = done(name, capsys)
    model, tokenizer, config = load_run(run)
    begun = Transformer(config.model, np.random.default_rng(0))
    begun.load_state_dict(load(run / "base" / "model.safetensors"))
    losses, margins = [], []
    for record in kept(run, "val"):
        chosen, rejected = (answer_log_p(model, tokenizer, record, f) - answer_log_p(begun, tokenizer, record, f) for f in ("chosen", "rejected"))
        margins.append(0.1 * (chosen - rejected))
        losses.append(np.log1p(np.exp(-margins[-1])))
    assert summary(run)["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert summary(run)["figures"]["margins"] == pytest.approx(np.mean(margins), rel=1e-3)
    assert summary(run)["val_loss"] < np.log(2) and summary(run)["figures"]["reward_accuracy"] == 1  # it has learned what was preferred


def test_reward_figures_by_definition(done, capsys):
    run, _ = done("reward", capsys)
    model, tokenizer, _ = load_module(run)
    rewards = []
    for record in kept(run, "val"):
        rows = [[*encode_prompt(tokenizer, record["prompt"]), *tokenizer.encode_ordinary(record[f]), tokenizer.special_tokens[END]] for f in ("chosen", "rejected")]
        rewards.append([float(model(padded([row], [1])).data[0]) for row in rows])
    margins = np.array(rewards) @ [1, -1]
    assert summary(run)["val_loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean(), rel=1e-4)
    assert summary(run)["figures"]["margins"] == pytest.approx(margins.mean(), rel=1e-4)


@pytest.mark.parametrize("name", ["classify", "classify top"])
def test_classification_figures_by_definition(done, capsys, name):
    run, _ = done(name, capsys)
    model, tokenizer, config = load_module(run)
    assert isinstance(model, Classifier) and list(config.head.labels) == summary(run)["labels"] == ["beside", "over", "under"]
    losses, confusion = [], np.zeros((3, 3), int)
    for record in kept(run, "val"):
        [row], label = encode_texts(tokenizer, [record["text"]], config.model.context), config.head.labels.index(record["label"])
        with no_grad():
            scores = model(np.array([row]), np.array([len(row)])).numpy()[0].astype(float)
        losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label])
        confusion[label, scores.argmax()] += 1
    assert summary(run)["val_loss"] == pytest.approx(np.mean(losses), rel=1e-5) and summary(run)["confusion"] == confusion.tolist()
    assert summary(run)["figures"]["accuracy"] == np.trace(confusion) / confusion.sum()


def test_what_classification_leaves_as_it_was(life, done, capsys):
    run, _ = done("classify top", capsys)
    weights, begun = load_module(run)[0].state_dict(), load(run / "base" / "model.safetensors")
    assert all((weights[f"model.{name}"] == array).all() for name, array in begun.items())
    assert np.abs(weights["head.weight"]).max() > 0 and summary(run)["parameters"] == 3 * 16 + 3


def test_from_scratch_the_base_gives_nothing_but_its_tokenizer(life, tmp_path):
    run = life.run("classify", tmp_path / "run", "--scratch", "--lr", 0)
    weights, begun = load_module(run)[0].state_dict(), load(run / "base" / "model.safetensors")
    assert all((weights[f"model.{name}"] != array).any() for name, array in begun.items() if "norm" not in name)


# Stages that answer

@pytest.mark.parametrize("written, expected, right", [
    ("…, so it is in the attic.", "attic", True), ("The Attic", "attic", True), ("cellar", "attic", False), ("", "attic", False), ("3 + 4 = 7.", "7", True),
    ("17", "7", False), ("ça va café", "Café.", True),
])  # fmt: skip
def test_the_ending_of_an_answer(written, expected, right):
    assert same_answer(written, expected) is right


def test_an_answer_of_signs_alone_has_no_ending():
    """Else any reply without a word would be right."""
    with pytest.raises(ValueError, match="no word and no number"):
        same_answer("", "?!")


@pytest.mark.parametrize("verifier, answer, right", [("exact", "b", 1.0), ("contains", "b", 1.0), ("number", "7", 0.0)])
def test_grpo_counts_right_answers(life, tmp_path, monkeypatch, verifier, answer, right):
    """A policy that always writes "b" is right where "b" is expected."""
    _, tokenizer, _ = load_run(life.base)
    [letter] = tokenizer.encode_ordinary("b")
    sample = rollouts.sample

    def writes_b(policy, prompts, numbers, *args, **rest):
        found = sample(policy, prompts, numbers, *args, **rest)
        count = len(found.answers)
        return rollouts.Samples(found.numbers, found.prompts, [[letter, rest["end"]]] * count, [[-1.0, -1.0]] * count, np.ones(count, bool))

    monkeypatch.setattr(rollouts, "sample", writes_b)
    monkeypatch.setattr("tinyllm.stages.rollout.sample", writes_b)
    path = write(tmp_path / "tasks.jsonl", [{"prompt": f"{i}?", "answer": answer} for i in range(5)])
    words = life.command("grpo", tmp_path / "run", "--verifier", verifier)
    words[words.index("--data") + 1] = str(path)
    assert main(words) == 0
    rewards = [r["reward"] for r in history(tmp_path / "run") if r["event"] in ("rollout", "evaluation")]
    assert rewards == [right] * 5 and summary(tmp_path / "run")["figures"] == dict(reward=right, length=2.0)


def test_ppo_has_its_judge_in_the_folder(life, done, capsys):
    run, _ = done("ppo", capsys)
    judge = load_module(life.folder / "judge")[0].state_dict()
    copy = load(run / "base" / "reward" / "model.safetensors")
    assert judge.keys() == copy.keys() and all((judge[name] == copy[name]).all() for name in judge)
    policy, _, _ = load_run(run)
    assert isinstance(policy, Transformer) and not any(name.startswith("value") for name, _ in policy.named_parameters())


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_rewards_and_lengths_are_logged(done, capsys, name):
    run, out = done(name, capsys)
    made = [r for r in history(run) if r["event"] == "rollout"]
    assert all({"reward", "reward_std", "length", "ended", "entropy", "kl_k1", "kl_k2", "kl_k3"} <= r.keys() for r in made)
    assert abs(made[0]["kl_k3"]) < 1e-6 < abs(made[1]["kl_k3"])  # the first answers are the reference's own
    assert 1 <= made[0]["length"] <= 4 and "reward" in out
    assert "ratio" not in made[0]  # nothing had been learned before
    assert all(0 <= r["clip_fraction"] <= 1 and r["approx_kl"] > 0 and r["ratio"] != 1 for r in made[1:]) and len(made) > 1


# Next

@pytest.mark.parametrize("name", RUNS)
def test_the_next_command_works_as_it_is_printed(done, capsys, name, tmp_path, monkeypatch):
    _, out = done(name, capsys)
    words = shlex.split(out[out.index("now try: ") :].removeprefix("now try: "))
    assert words[:3] == ["python", "-m", "tinyllm"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    more = ["--steps", "2", "--max-tokens", "4"] if words[3] == "align" else []
    assert main([*words[3:], *more]) == 0


def test_a_text_to_try_that_could_be_taken_for_an_option(life, tmp_path, capsys):
    records = [{"text": f"--{word}\nline" + "x" * 100, "label": word} for word in ("the", "fox")] * 3
    words = life.command("classify", tmp_path / "run")
    words[words.index("--data") + 1] = str(write(tmp_path / "notes.jsonl", records))
    assert main(words) == 0
    last = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("now try: "))
    assert last[-1] in ("--text=--the", "--text=--fox") and main(last[3:]) == 0


def test_predictions(life, done, capsys, tmp_path):
    run, _ = done("classify", capsys)
    path = write(tmp_path / "texts.jsonl", [{"text": record["text"]} for record in EXAMPLES["notes"]])
    assert main(["finetune", "predict", str(run), "--text", "a \x1b[31m text", "--text", "the fox " * 200, "--data", str(path)]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "1 of 14 texts are longer than the model's context of 64 tokens: only their beginning is read"
    assert len(lines) == 14 and "\x1b" not in lines[0] and lines[1].endswith('..."')
    model, tokenizer, config = load_module(run)
    for line, record in zip(lines[2:], EXAMPLES["notes"], strict=True):
        label, share, shown = line.split(maxsplit=2)
        [row] = encode_texts(tokenizer, [record["text"]], 64)
        with no_grad():
            scores = model(np.array([row]), np.array([len(row)])).numpy()[0].astype(float)
        probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        assert label == config.head.labels[probabilities.argmax()] and float(share[:-1]) == pytest.approx(100 * probabilities.max(), abs=0.01)
        assert json.loads(shown) == record["text"]


@pytest.mark.parametrize("name", ["instruct lora", "dpo", "grpo", "ppo"])
def test_a_tuned_model_describes_itself_writes_and_is_measured(done, capsys, name, tmp_path):
    run, _ = done(name, capsys)
    assert main(["describe", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{run} is a run of {name.split()[0]}: what follows is its language model") and "284 x 16" in out
    assert main(["sample", str(run), "--prompt", "the", "--max-tokens", "3"]) == 0
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox")
    assert main(["eval", str(run), "--tasks", f"text={text}", "--out", str(tmp_path / "card")]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["eval", str(run)]) == 2
    assert "has no validation text in" in capsys.readouterr().err


# Adapters

@pytest.mark.parametrize("name, learned", [("instruct lora", 2), ("instruct dora", 2), ("dpo lora", 2), ("grpo lora", 2)])
def test_an_adapter_leaves_the_base_as_it_was(done, capsys, name, learned):
    run, _ = done(name, capsys)
    newest = load_checkpoint(list_checkpoints(run / "checkpoints")[-1])
    begun = load(run / "base" / "model.safetensors")
    for key, array in begun.items():
        same = (newest.model[key] == array).all()
        assert same == (key != "embedding.weight"), key  # whose rows for the chat's tokens are new, and learned
    adapter = {key for key in newest.model if "lora" in key or "magnitude" in key}
    assert newest.model.keys() == begun.keys() | adapter and all(np.abs(newest.model[key]).max() > 0 for key in adapter)
    assert all(newest.model[key].shape[learned - 2 if key.endswith("lora_a") else -1] == 2 for key in adapter if "lora" in key)
    moments = sum(array.size for key, array in newest.optimizer.items() if array.ndim)
    assert moments < 3 * summary(run)["parameters"] < 3 * sum(array.size for array in begun.values())  # none for what is frozen


@pytest.mark.parametrize("name", ["instruct lora", "instruct dora"])
def test_merged_it_does_the_same(done, capsys, name):
    run, _ = done(name, capsys)
    apart, tokenizer, _ = load_module(run)
    merged, _, _ = load_run(run)
    ids = np.array([tokenizer.encode_ordinary("the quick brown fox")])
    with no_grad():
        np.testing.assert_allclose(merged(ids).numpy(), apart(ids).numpy(), rtol=1e-4, atol=1e-5)
    assert not any("lora" in key for key, _ in merged.named_parameters()) and any("lora" in key for key, _ in apart.named_parameters())


def test_an_adapter_upon_an_adapter(life, done, capsys, tmp_path):
    """The second begins from the sum of base and first; its own begins at zero, so that nothing has changed yet."""
    run, _ = done("instruct lora", capsys)
    words = life.command("dpo lora", tmp_path / "second", "--lr", "0")
    words[words.index(str(life.base))] = str(run)
    assert main(words) == 0
    (first, tokenizer, _), (second, _, config) = load_run(run), load_run(tmp_path / "second")
    ids = np.array([tokenizer.encode_ordinary("the quick brown fox")])
    with no_grad():
        assert (first(ids).numpy() == second(ids).numpy()).all()
    newest = load_checkpoint(list_checkpoints(tmp_path / "second" / "checkpoints")[-1])
    assert config.base.new_tokens == 0 and (newest.model["embedding.weight"] == first.state_dict()["embedding.weight"]).all()
    assert summary(tmp_path / "second")["parameters"] == sum(a.size for key, a in newest.model.items() if "lora" in key)


def test_where_the_output_weights_are_apart_their_new_rows_are_learned_too(life, tmp_path):
    train(life.folder, "--tokenizer", life.base, "--no-tie", "--context", 64, "--steps", 2, "--out", tmp_path / "base")
    words = life.command("instruct lora", tmp_path / "run")
    words[words.index(str(life.base))] = str(tmp_path / "base")
    assert main(words) == 0
    begun, newest = load(tmp_path / "run" / "base" / "model.safetensors"), load_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1]).model
    assert {key for key, array in begun.items() if (newest[key] != array).any()} == {"embedding.weight", "head.weight"}


# Pretraining on packed documents

def test_bits_per_byte_of_packed_documents_by_definition(tmp_path):
    """All tokens of the validation part are targets, those of a document given what stands before them in it."""
    path = write(tmp_path / "texts.jsonl", [{"text": record["text"] * 3} for record in EXAMPLES["notes"] * 4])
    run = train(tmp_path, "--data", path, "--tokenizer", "bpe", "--vocab-size", 270, "--pack", "--context", 64, "--steps", 3)
    model, tokenizer, _ = load_run(run)
    shard = open_shard(run / "data" / "val.bin")
    nats, ids = 0.0, [tokenizer.end_of_text]
    for token in shard.tokens.tolist():
        ids.append(token)
        if token == tokenizer.end_of_text:
            nats += logits_loss(model, np.array([ids[:-1]]), np.array([ids[1:]]))
            ids = [tokenizer.end_of_text]
    assert ids == [tokenizer.end_of_text]
    assert summary(run)["bits_per_byte"] == pytest.approx(nats / np.log(2) / shard.header.text_bytes, rel=1e-5)
    assert summary(run)["val_loss"] == pytest.approx(nats / len(shard), rel=1e-5)
