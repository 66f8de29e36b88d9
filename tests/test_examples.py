"""The examples run, are short, say what they show, and every figure that they print is right."""
import ast
import functools
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.data.tinyworld.best import all_pairs

FOLDER = Path(__file__).parent.parent / "examples"
PATHS = sorted(FOLDER.glob("*.py"))
SHORT = {
    "06_train_and_sample": ["--steps", "5"],
    "07_classify": ["--steps", "5"],
    "08_instruction_tuning": ["--steps", "5", "--tuning", "2"],
    "09_reward_model_and_ppo": ["--steps", "4"],
    "10_dpo": ["--steps", "2"],
    "11_grpo_on_sums": ["--steps", "2"],
    "12_masked_language_model": ["--steps", "4", "--rows", "4"],
    "13_deduplicate": ["--documents", "100"],
}


@pytest.fixture
def example():
    """A function that imports an example by the start of its name."""

    def load(number):
        (path,) = FOLDER.glob(f"{number}_*.py")
        spec = importlib.util.spec_from_file_location(f"example_{number}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@functools.cache
def run(path, *arguments):
    """An example as a reader runs it. One thread: matrices are tiny here, and other tests may want the cores."""
    environment = os.environ | {"PYTHONIOENCODING": "utf-8", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, path, *arguments], capture_output=True, encoding="utf-8", cwd=path.parent.parent, env=environment)


def test_they_are_numbered():
    assert [path.name[:2] for path in PATHS] == ["01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_is_short_and_says_what_it_shows(path):
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) < 150
    assert "You will see" in docstring and f"python examples/{path.name}" in docstring
    announced = re.findall(r"^ +(\d)\. ", docstring, re.MULTILINE)
    assert announced == [str(i) for i in range(1, len(announced) + 1)]
    assert 'if __name__ == "__main__":' in text


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_runs(path):
    done = run(path, *SHORT.get(path.stem, []))
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"\bnan\b|WRONG|DIFFERENT", done.stdout) and max(map(len, done.stdout.splitlines())) < 220


# ---- 01 ----


def test_autograd_gives_the_published_figures(example):
    ex = example("01")
    g, da, db = ex.with_values(-4.0, 2.0)
    assert (round(g, 4), round(da, 4), round(db, 4)) == (24.7041, 138.8338, 645.5773)  # micrograd's README
    assert ex.finite_differences(-4.0, 2.0) == pytest.approx((da, db), rel=1e-6)


def test_tensors_do_what_values_do(example):
    ex = example("01")
    points = [-4.0, 1.0, 3.0]
    g, da, db = ex.with_tensors(points, 2.0)
    single = [ex.with_values(a, 2.0) for a in points]
    np.testing.assert_allclose(g, [s[0] for s in single], rtol=1e-12)
    np.testing.assert_allclose(da, [s[1] for s in single], rtol=1e-12)
    assert db == pytest.approx(sum(s[2] for s in single), rel=1e-12)


def test_the_order_of_visits_saves_the_paths(example):
    ex = example("01")
    x, y = ex.doublings(10)
    assert ex.backward_by_paths(y) == x.grad == 2**10
    x, y = ex.doublings(50)
    assert y.backward() == 51 and x.grad == 2.0**50


def test_value_has_every_operator(example):
    Value = example("01").Value
    a, b = Value(3.0), Value(2.0)
    y = 1 + (5 - -a / b) * 2 - 4 / b + a.relu() + (-a).relu() + b**3 - a
    y.backward()
    assert (y.data, a.grad, b.grad) == (1 + (5 + 1.5) * 2 - 2 + 3 + 0 + 8 - 3, 2 / 2 + 1 - 1, -2 * 3 / 4 + 4 / 4 + 12)


# ---- 02 ----


def test_gradcheck_tells_right_from_wrong(example):
    ex = example("02")
    x, w = ex.points_and_centres()
    np.testing.assert_allclose(ex.squared_distances(x, w).numpy(), ((x[:, None] - w[None]) ** 2).sum(-1), rtol=1e-12)
    assert ex.gradcheck(ex.squared_distances, x, w) and ex.gradcheck(ex.squared_distances, x, w, method="complex").error < 1e-14
    for function in (ex.wrong_sign, ex.missing_term, ex.wrong_transpose):
        report = ex.gradcheck(function, x, w)
        assert not report and report.worst.name == "input 1" and report.error > 0.1
    assert ex.gradcheck(lambda x, w: ex.wrong_transpose(x, w).sum(), x, w)  # ones hide it
    assert ex.gradcheck(lambda x, w: ex.wrong_sign(x, w).sum(), x, w).error > 0.01  # … but nothing else


def test_the_best_step_depends_on_formula_and_precision(example):
    errors = example("02").errors_of_differences
    steps = [1e-1, 1e-5]
    (forward, central, _), (_, _, complex_step) = errors(np.float64, steps)
    assert forward == pytest.approx((math.exp(0.1) - 1) / 0.1 - 1) and central == pytest.approx(math.sinh(0.1) / 0.1 - 1)
    assert complex_step == pytest.approx(1 - math.sin(1e-5) / 1e-5, rel=1e-3)
    best = {dtype: np.min(errors(dtype, [10.0**-n for n in range(1, 14)]), 0) for dtype in (np.float64, np.float32)}
    assert best[np.float64][1] < 1e-9 < 1e-6 < best[np.float32][:2].min() and best[np.float64][2] < 1e-15


def test_single_precision_is_refused_and_a_model_passes(example):
    ex = example("02")
    assert "float64" in ex.refusal()
    report = ex.whole_model()
    assert report and ("query" in report.worst.name or "key" in report.worst.name)


# ---- 03 ----


def test_pairs_are_counted_right(example):
    ex = example("03")
    before, after = ex.first_merge()
    assert before[0] == (ex.TEXT.count(" t"), tuple(b" t"))
    for count, pair in before:  # none of these pairs can lie across two pieces
        assert count == ex.TEXT.count(bytes(pair).decode())
    assert (ex.TEXT.count(" th"), (256, ord("h"))) in after
    tokenizer = ex.train_bpe([ex.TEXT], 377)
    assert tokenizer.token_bytes(256) == b" t" and tokenizer.merges[0] == tuple(b" t")


def test_both_trainers_agree(example):
    (naive, _), (incremental, _) = example("03").both_trainers(merges=20)
    assert naive == incremental and len(naive) == 20


def test_merges_compress_and_nothing_is_lost(example):
    ex = example("03")
    rows = ex.compression()
    assert rows[0] == (257, 1.0, 1.0) and [row[1] for row in rows] == sorted(row[1] for row in rows)
    assert 3.5 < rows[-1][1] < 4 and all(unseen <= seen for _, seen, unseen in rows)
    tokenizer = ex.train_bpe([ex.TEXT], 377)
    assert tokenizer.decode(tokenizer.encode("naïve 🙂 日本")) == "naïve 🙂 日本"
    assert ex.streamed(tokenizer, "🙂") == ["", "", "", "🙂"]
    assert "allowed_special" in ex.refusal(tokenizer, "one<|endoftext|>two")
    assert tokenizer.encode("one<|endoftext|>two", allowed_special="all").count(tokenizer.end_of_text) == 1


# ---- 04 ----


def test_attention_comes_out_as_on_paper(example):
    ex = example("04")
    s, p, o = ex.attention_by_hand(*ex.four_words())
    np.testing.assert_allclose(s / math.log(2), [[0, 1, 1, 0], [0, 1, 2, 0], [0, 2, 0, 1], [0, 1, 2, 0]], atol=1e-14)
    np.testing.assert_allclose(p, [[1, 0, 0, 0], [1 / 3, 2 / 3, 0, 0], [1 / 6, 2 / 3, 1 / 6, 0], [1 / 8, 1 / 4, 1 / 2, 1 / 8]], rtol=1e-14)
    np.testing.assert_allclose(o, [[24, 0, 0, 0], [8, 16, 0, 0], [4, 16, 4, 0], [3, 6, 12, 3]], rtol=1e-14)


def test_attention_by_hand_equals_the_ops_on_random_numbers(example):
    ex = example("04")
    q, k, v = np.random.default_rng(0).standard_normal((3, 13, 6))
    s, _, o = ex.attention_by_hand(q, k, v)
    np.testing.assert_allclose(ex.by_op(ops.attention, q, k, v), o, atol=1e-14)
    np.testing.assert_allclose(ex.by_op(ops.tiled_attention, q, k, v, block=5), o, atol=1e-14)
    np.testing.assert_allclose(ex.word_by_word(q, k, v), o, atol=1e-14)
    for block in (1, 4, 13, 20):
        m, total, mean = ex.running_softmax(s[-1], v, block)[-1]
        np.testing.assert_allclose(mean / total, o[-1], atol=1e-14)
        assert m + math.log(total) == pytest.approx(np.logaddexp.reduce(s[-1]))
    changed = ex.attention_by_hand(np.vstack([q[:-1], [q[0]]]), np.vstack([k[:-1], [k[0]]]), np.vstack([v[:-1], [v[0]]]))[2] != o
    assert changed.any(1).tolist() == [False] * 12 + [True]


def test_running_softmax_step_by_step(example):
    ex = example("04")
    (m1, l1, o1), (m2, l2, o2) = ex.running_softmax(np.log([1, 2, 4, 1]), 24 * np.eye(4), block=2)
    np.testing.assert_allclose([m1, l1, m2, l2], [math.log(2), 1.5, math.log(4), 2.0])
    np.testing.assert_allclose([o1, o2], [[12, 24, 0, 0], [6, 12, 24, 6]])


def test_rope_sees_distances_only(example):
    ex = example("04")
    one = np.array([1.0, 0.0])
    assert ex.rope_score(one, one, 1002, 1000) == pytest.approx(math.cos(2), abs=1e-12)
    q, k = np.random.default_rng(0).standard_normal((2, 8))
    assert ex.rope_score(q, k, 9, 5) == pytest.approx(ex.rope_score(q, k, 104, 100), abs=1e-12)
    assert abs(ex.rope_score(q, k, 9, 5) - ex.rope_score(q, k, 9, 4)) > 1e-3


# ---- 05 ----


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_one_batch_is_learned_by_heart(example, arch):
    ex = example("05")
    assert len({line[0] for line in ex.LINES}) == len(ex.LINES) and len({len(line) for line in ex.LINES}) == 1
    tokenizer, ids, targets = ex.batch_of(ex.LINES)
    assert np.array_equal(ids[:, 1:], targets[:, :-1])
    model = ex.new_model(arch, tokenizer.vocab_size, ids.shape[1])
    losses, norms, first_move = ex.overfit(model, ids, targets)
    assert abs(losses[0] - math.log(tokenizer.vocab_size)) < 0.05 and losses[-1] < 0.002
    assert np.median(first_move) == pytest.approx(ex.LR, rel=1e-3) and norms[-1] < 0.01 < norms[0]
    assert ex.recite(model, tokenizer, ex.LINES) == ex.LINES


# ---- 06 ----


def test_the_pipeline_in_five_steps():
    printed = run(PATHS[5], *SHORT[PATHS[5].stem]).stdout
    vocabulary, uniform, frequencies = map(float, re.search(r"(\d+) different.*?ln V = ([\d.]+).*? token is, ([\d.]+)\.", printed, re.S).groups())
    assert abs(uniform - math.log(vocabulary)) < 1e-3 and 5 < frequencies < uniform
    first = float(re.search(r"before training: validation loss ([\d.]+)", printed)[1])
    last = float(re.search(r"step 5/5 .* val +([\d.]+)", printed)[1])
    assert abs(first - uniform) < 0.05 and last < first - 0.3
    bits, zlib = map(float, re.search(r"take ([\d.]+) bits per byte.*needs ([\d.]+)\.", printed).groups())
    assert 1 < zlib < bits < 8  # five steps are not enough to be better
    assert len(re.findall(r"^ +before: ", printed, re.M)) == len(re.findall(r"^ +after: ", printed, re.M)) == 3


def test_loss_of_frequencies(example):
    tokens = np.array([0, 0, 1])
    assert example("06").loss_of_frequencies(tokens, np.array([0, 2]), 3) == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


@pytest.mark.slow
def test_the_whole_pipeline_learns_more_than_frequencies_and_compresses_better_than_zlib(example, tmp_path):
    ex = example("06")
    figures = ex.run(ex.main.__defaults__[0], tmp_path)
    assert [step for step, _ in figures["losses"]] == list(range(1, ex.main.__defaults__[0] + 1))
    assert figures["evaluations"][-1][1] < figures["frequencies"] - 1.5 and figures["bits"] < figures["zlib"] - 0.3


# ---- 07 ----


def test_labels_show_none_of_the_tested_words(example):
    ex = example("07")
    rng = np.random.default_rng(0)
    (known, labels), (unseen, _) = (ex.labelled(40, choose, rng) for choose in (lambda w: w[: ex.SHOWN], lambda w: w[ex.SHOWN :]))
    words = {word for side in ex.WORDS.values() for word in side}
    shown, tested = ({word for text in texts for word in re.findall(r"was (\w+)", text)} for texts in (known, unseen))
    assert shown | tested == words and not shown & tested and labels == [0, 1] * 20


@pytest.mark.slow
def test_pretraining_is_what_tells_unseen_words_apart(example):
    results, _, _ = example("07").run(250)
    (_, every, _, scratch, _), (_, head, _, frozen, _), (_, adapter, _, adapted, _), (_, all_, _, tuned, _) = results
    assert scratch < 0.75 and min(frozen, adapted, tuned) > 0.95 and all(loss < 0.05 for _, _, loss, _, _ in results)
    assert head == 130 < adapter < all_ == every


# ---- 08 ----


def test_a_conversation_is_shown_token_by_token(example):
    printed = run(PATHS[7], *SHORT[PATHS[7].stem]).stdout
    ids, targets = re.search(r"^1\. (.*)\n   (.*)\n", printed).groups()
    ids, targets = ids.split(), targets.split()
    answer = ids.index("<|assistant|>")
    assert targets == ["-"] * answer + ids[answer + 1 :] + ["<|end|>"]
    assert float(re.search(r"scores within ([\d.e-]+)\.", printed)[1]) < 1e-4


@pytest.mark.slow
def test_tuning_makes_what_pretraining_knew_answerable(example):
    before, after, adapted = example("08").run()
    assert not any(ok for *_, ok in before) and sum(ok for *_, ok in after) >= 7 and sum(ok for *_, ok in adapted) >= 7


# ---- 12 ----


def test_all_pairs_are_those_that_are_drawn(example):
    """The probabilities by which the best possible is worked out, against pairs as they come."""
    ex = example("12")
    tokenizer = ex.train_wordpiece((document.text for document in ex.descriptions(300, seed=0)), 400, or_fewer=True)
    table, probabilities = all_pairs(ex.WORLD, tokenizer)
    number = {tuple(row[row >= 0].tolist()): i for i, row in enumerate(table)}
    assert len(number) == len(table) == (2 * len(ex.WORLD.facts)) ** 2 and probabilities.sum() == pytest.approx(1)
    (batch,) = ex.batches_of(tokenizer, ex.descriptions(3000, seed=3), 6000, seed=0).in_order()
    drawn = [probabilities[number[tuple(row[row != tokenizer.pad].tolist())]] for row in batch.restored().ids]
    kinds = np.unique(probabilities)
    assert len(kinds) == 2  # may follow, may not
    for kind in kinds:
        p = probabilities[probabilities == kind].sum()
        assert abs(np.mean(np.array(drawn) == kind) - p) < 4 * (p * (1 - p) / 6000) ** 0.5 + 1e-9


@pytest.mark.slow
def test_an_encoder_learns_nearly_all_there_is_to_learn(example, capsys):
    losses, masked, follows = example("12").main()
    assert masked[0] > masked[1] - 0.05 and follows[0] >= 0.95 and follows[1] == pytest.approx(0.9896, abs=1e-4)


# ---- 13 ----


def test_duplicates_are_measured_as_printed():
    printed = run(FOLDER / "13_deduplicate.py", *SHORT["13_deduplicate"]).stdout
    shared, union, similarity = re.search(r"share (\d+) of (\d+): similarity ([\d.]+)", printed).groups()
    assert float(similarity) == pytest.approx(int(shared) / int(union), abs=5e-4)
    for k, *shares in re.findall(r"(\d+) orders: ([\d.]+) of them by definition, ([\d.]+)", printed):
        assert all(abs(float(share) - float(similarity)) < 4 / (2 * int(k) ** 0.5) for share in shares)
    rows = re.findall(r"^ +(0\.\d+) +([\d.]+) +([\d.]+)  \|", printed, re.M)
    assert len(rows) == 6
    for s, measured, formula in (map(float, row) for row in rows):
        assert formula == pytest.approx(1 - (1 - s**8) ** 16, abs=5e-4)
        assert abs(measured - formula) < 4 * math.sqrt(formula * (1 - formula) / 500) + 2e-3
    naive, found = re.search(r"(\d+) repeat an earlier one", printed)[1], re.search(r"(\d+) found", printed)[1]
    assert 5 < int(found) <= int(naive) <= int(found) + 3  # the bands miss one pair in twenty at the threshold


# ---- pictures ----


@pytest.mark.parametrize("number, arguments", [("04", []), ("05", []), ("06", ["--steps", "1"])])
def test_pictures(number, arguments, tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = FOLDER.glob(f"{number}_*.py")
    done = run(path, *arguments, "--plot", str(tmp_path / "a.png"))
    assert done.returncode == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="^--plot needs matplotlib: pip install matplotlib$"):
        example("04").draw(np.eye(4), "a.png")
