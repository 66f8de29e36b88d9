"""The report card and the command: what is in the files, that any text is safe in them, and what is refused."""
import json
import math
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from test_bad_input import refusal
from tiny_run import train

from tinyllm.cli.main import main
from tinyllm.evaluate import Card, Curve, Metric, Result, Scores, write_card
from tinyllm.evaluate.card import html, markdown, number
from tinyllm.evaluate.charts import Bar, bar_chart, line_chart, nice_ticks
from tinyllm.evaluate.report import averaged
from tinyllm.stages import load_run

ACC, LOSS = Metric("acc", "accuracy"), Metric("bits_per_byte", "bits per byte", better="lower", percent=False)
NASTY = "a|b\n<script>alert(1)</script> & *x* `y` [z](w) \\ é\x00"


def result(seed, metric=ACC, subjects=("x", "y"), n=40, prompt="2 + 2?", best=None):
    rng = np.random.default_rng(seed)
    values = (rng.random(n) < 0.7).astype(float) if metric is ACC else rng.random(n) + 1
    records = [dict(prompt=prompt, choices=["3", NASTY], answer=1, chosen=int(v), acc=v) if metric is ACC else dict(text="t") for v in values.tolist()]
    scores = Scores(metric, values, np.ones(n), np.full(n, 0.25), best)
    return Result(metric.name, {metric.name: scores}, tuple(subjects[i % len(subjects)] for i in range(n)), tuple(records), 3, 5, "plain", 1.0)


def card(**options):
    columns = [("before", [result(0), result(1, LOSS, ("",))]), (NASTY, [result(2)])]
    curves = [Curve("Loss <b>", "step", "nats", (("training", tuple((i, 5 / (i + 1)) for i in range(60))), ("validation", ((0, 5.0), (59, 0.4)))), (("best", 0.3),))]
    return Card("Card of " + NASTY, columns, [("run", NASTY)], curves, **options)


class Outline(HTMLParser):
    """Checks that what is opened is closed, and collects names of tags and what they hold."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else():
    page = html(card())
    seen = Outline(page)
    assert "script" not in seen.tags and "alert(1)" in seen.text and {"svg", "table", "polyline", "rect"} <= set(seen.tags)
    assert not any(word in page.replace("http://www.w3.org/2000/svg", "") for word in ("http:", "https:", "src=", "url(", "@import"))
    for svg in page.split("<figure>")[1:]:
        ElementTree.fromstring(svg.partition("</figure>")[0])  # well-formed
    assert page.count("<figure>") == 2 and "\0" not in page


def test_tables_of_markdown_have_as_many_cells_as_columns():
    text = markdown(card())
    tables = [part.split("\n") for part in text.split("\n\n") if part.startswith("|")]
    assert len(tables) == 5  # overview; by metric, by subject, some answers; by metric
    for rows in tables:
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "<script>" not in text.replace("\\<script\\>", "") and "5 shots, 3 prompts cut to fit the context" in text


def test_figures_are_shown_with_their_errors_and_baselines():
    text = markdown(card())
    values = result(0).scores["acc"].values
    assert f"{100 * values.mean():.1f} % ± {100 * values.std() / math.sqrt(40):.0f}" in text and "25.0 %" in text
    assert number(0.1234, LOSS, "+") == "+0.1234" and number(None, ACC) == "–" and number(math.inf, LOSS) == "∞" and number(12345.6, LOSS) == "1.235e+04"


def test_comparisons_say_who_is_better():
    from tinyllm.evaluate import compare

    def made(values, metric):
        values = np.array(values, float)
        return Scores(metric, values, np.ones(len(values)), values * 0)

    low, high = np.arange(30) % 2, np.arange(30) % 2 + 1.0
    for metric, first, second, word in ((ACC, low, high, "better"), (LOSS, low, high, "worse"), (LOSS, high, low, "better"), (ACC, low, low, "undecided")):
        text = markdown(Card("c", [], comparisons=[("old", "new", [("t", compare(made(first, metric), made(second, metric)))])]))
        assert f"| {word} |" in text and "new against old, item by item" in text


def test_files(tmp_path):
    paths = write_card(tmp_path / "deep" / "er", card())
    assert [p.name for p in paths] == ["card.md", "card.html", "results.json", "items.jsonl"]
    kept = json.loads(paths[2].read_text())
    assert kept["models"]["before"]["acc"]["subjects"]["x"]["acc"]["items"] == 20 and kept["models"]["before"]["acc"]["shots"] == 5
    rows = [json.loads(line) for line in paths[3].read_text().splitlines()]
    assert len(rows) == 120 and rows[0]["model"] == "before" and rows[0]["subject"] == "x" and rows[-1]["choices"][1] == NASTY


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 12), (1e-7, 3e-7), (5, 5), (0, 0), (1234, 98765), (-1, -0.5)])
def test_ticks_are_round_and_cover_all(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 9 and len(set(np.round(np.diff(ticks), 12))) <= 2
    step = ticks[1] - ticks[0]
    assert f"{step:.0e}"[0] in "125"


def test_charts_of_little():
    assert line_chart(Curve("t", "x", "y", ())) == "" == line_chart(Curve("t", "x", "y", (("a", ((0, math.nan),)),)))
    ElementTree.fromstring(line_chart(Curve("t", "x", "y", (("a", ((3, 1.0),)), ("b", ())))))
    ElementTree.fromstring(bar_chart("t", ["s" * 99], ["m"], [[Bar(1.0, None, None, 0.25)]]))


def test_averaging_keeps_the_mean():
    points = [(i, float(i % 7)) for i in range(1000)]
    thin = averaged(points, 100)
    assert len(thin) == 100 and np.mean(thin, axis=0) == pytest.approx(np.mean(points, axis=0)) and averaged([]) == [] and averaged(points[:3]) == points[:3]


# ---- the command ----

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train(tmp_path_factory.mktemp("eval"), "--steps", 10, "--checkpoint-every", 5)


@pytest.fixture
def run(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


def test_eval_writes_the_card_into_the_run(run, capsys):
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert "validation: bits per byte" in out and str(run / "evaluation" / "card.html") in out
    kept = json.loads((run / "evaluation" / "results.json").read_text())["models"][str(run)]["validation"]["metrics"]
    summary = json.loads((run / "summary.json").read_text())
    assert kept["nats_per_token"]["value"] == pytest.approx(summary["val_loss"], rel=0.02)  # that one has fewer tokens before each
    assert "Loss while training" in (run / "evaluation" / "card.html").read_text()
    before = [(run / "evaluation" / name).read_bytes() for name in ("card.md", "items.jsonl")]
    assert main(["eval", str(run)]) == 0 and before == [(run / "evaluation" / name).read_bytes() for name in ("card.md", "items.jsonl")]
    load_run(run)


def test_eval_of_texts_and_questions_and_another_run(run, folder, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("the quick brown fox jumps over lazy dogs " * 30)
    letters = "".join(sorted(set((tmp_path / "more.txt").read_text()) - set("\n ")))
    records = [{"question": {"stem": "the", "choices": [{"text": a, "label": "A"}, {"text": b, "label": "B"}]}, "answerKey": "A"}
               for a, b in zip(letters, letters[1:], strict=False)]  # fmt: skip
    (tmp_path / "ARC-Test.jsonl").write_text("\n".join(map(json.dumps, records)))
    out = tmp_path / "card"
    assert main(["eval", str(run), "--compare", str(folder), "--tasks", f"text={tmp_path / 'more.txt'}", "validation", "--limit", "1", "--out", str(out)]) == 0
    text = (out / "card.md").read_text()
    assert "item by item" in text and "| undecided |" in text and not (run / "evaluation").exists()
    assert main(["eval", str(run), "--tasks", f"arc={tmp_path / 'ARC-Test.jsonl'}"]) == 2  # "Question" has letters that this model lacks
    assert "is not among the" in capsys.readouterr().err


BAD = [
    (["--tasks", "mlu=x"], "unknown task 'mlu'; did you mean mmlu?: there are validation, tinyworld, mmlu=PATH"),
    (["--tasks", "mmlu"], "task mmlu: write mmlu=PATH"), (["--tasks", "validation=x"], "task validation=x: write validation"),
    (["--tasks", "mmlu="], "task mmlu=: write mmlu=PATH"), (["--tasks", "arc=/nowhere.jsonl"], "/nowhere.jsonl: no such file"),
    (["--tasks", "text=/nowhere"], "/nowhere: no such file or folder"), (["--limit", "0"], "--limit is 0: it must be at least 1"),
    (["--shots", "-1"], "--shots is -1"), (["--style", "chat"], "knows no conversations"), (["--checkpoint", "7"], "7"),
    (["--compare", "/nowhere"], "/nowhere: no such run folder"), (["--tasks", "validation", "validation"], "two tasks have the name 'validation'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda w: " ".join(w) if isinstance(w, list) else "")
def test_what_the_command_refuses(run, capfd, words, message):
    assert message in refusal(capfd, run, ["eval", run, *words])


def test_a_run_without_validation_text(run, capfd):
    (run / "data" / "val.bin").unlink()
    assert "has no validation text" in refusal(capfd, run, ["eval", run])
