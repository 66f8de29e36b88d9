"""From results to files in a run folder: card.md, card.html, and results.json and items.jsonl for who wants to compute on."""
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tinyllm.data.atomic import atomic_file
from tinyllm.evaluate.card import Card, html, markdown
from tinyllm.evaluate.charts import Curve
from tinyllm.evaluate.harness import Result
from tinyllm.evaluate.statistics import Figure
from tinyllm.train.run import Run, read_log

MOST_POINTS = 200  # of a curve: neighbours are averaged
CARD_FILES = ("card.md", "card.html", "results.json", "items.jsonl")


def training_curve(run: Run) -> list[Curve]:
    """Training and validation loss over the steps of a run; none where it kept no log, or a log without steps."""
    records = read_log(run.log) if run.log.exists() else []
    training = [(r["step"], r["loss"]) for r in records if r["event"] == "step" and r.get("loss") is not None]
    validation = [(r["step"], r["val_loss"]) for r in records if r["event"] == "evaluation" and r.get("val_loss") is not None]
    series = [(name, tuple(points)) for name, points in (("training", averaged(training)), ("validation", validation)) if points]
    return [Curve("Loss while training", "step", "loss", tuple(series))] if series else []


def reward_curve(run: Run) -> list[Curve]:
    """Mean reward of each rollout of a run, and in its evaluations; none where it drew no answers."""
    records = read_log(run.log) if run.log.exists() else []
    drawn = [(r["step"], r["reward"]) for r in records if r["event"] == "rollout"]
    measured = [(r["step"], r["reward"]) for r in records if r["event"] == "evaluation" and "reward" in r]
    series = [(name, tuple(points)) for name, points in (("training", averaged(drawn)), ("validation", measured)) if points]
    return [Curve("Reward while training", "step", "mean reward", tuple(series))] if drawn else []


def averaged(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points, each the mean of its neighbours."""
    count = min(most, len(points))
    parts = [points[len(points) * i // count : len(points) * (i + 1) // count] for i in range(count)]
    return [tuple(sum(values) / len(part) for values in zip(*part, strict=True)) for part in parts]


def write_card(folder: Path, card: Card) -> list[Path]:
    """Write the four files; each is there whole or not at all. Their paths. OSError, in one line, where that cannot be."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dict(model=label, task=r.task, subject=subject, **record), ensure_ascii=False, allow_nan=False)
             for label, results in card.columns for r in results for subject, record in zip(r.subjects, r.records, strict=True))  # fmt: skip
    texts = (markdown(card), html(card), json.dumps(as_json(card), indent=1, ensure_ascii=False) + "\n", "".join(f"{line}\n" for line in lines))
    paths = [folder / name for name in CARD_FILES]
    for path, text in zip(paths, texts, strict=True):
        with atomic_file(path) as file:
            file.write(text.encode())
    return paths


def as_json(card: Card) -> dict:
    """All figures of a card, by model, task, metric and subject."""
    models = {label: {result.task: _result(result) for result in results} for label, results in card.columns}
    compared = [dict(models=[first, second], task=task, metric=c.metric.name, **_plain(c))
                for first, second, comparisons in card.comparisons for task, c in comparisons]  # fmt: skip
    return dict(title=card.title, facts=dict(card.facts), models=models, comparisons=compared)


def _result(result: Result) -> dict:
    def figures(found: dict[str, Figure]) -> dict:
        return {name: _plain(figure) for name, figure in found.items()}

    by_subject = {subject: figures(result.figures(subject)) for subject in result.known_subjects()}
    kept = dict(style=result.style, shots=result.shots, truncated=result.truncated, seconds=round(result.seconds, 3))
    return dict(metrics=figures(result.figures()), subjects=by_subject, **kept)


def _plain(figure) -> dict:
    """Its numbers; what is infinite (a perplexity) becomes null, for which JSON has a word."""
    values = {field.name: getattr(figure, field.name) for field in dataclasses.fields(figure) if field.name != "metric"}
    return {name: None if value in (float("inf"), float("-inf")) else value for name, value in values.items()}
