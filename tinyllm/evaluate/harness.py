"""One entrance for every kind of task: what was measured, with all that is needed to judge it, item by item.

The results depend on the model and the tasks alone: nothing is drawn but the resamples of the bootstrap, whose seed is fixed.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.evaluate import choices, generative, perplexity
from tinyllm.evaluate.statistics import Comparison, Figure, Scores, compare, figure
from tinyllm.evaluate.styles import Chat, Plain, style_of
from tinyllm.evaluate.tasks import Passage, Problem, Question, Task
from tinyllm.tokenizer import Tokenizer

MEASURES = {Passage: perplexity.measure, Question: choices.measure, Problem: generative.measure}


@dataclass(frozen=True)
class Result:
    """A task's scores. The first metric is the one to quote.

    scores : by metric's name.     subjects : (n,) each item's.     records : what happened to each item, as JSON can hold it.
    truncated : how many requests had their beginning cut off to fit the context: figures then speak of shortened prompts.
    """

    task: str
    scores: dict[str, Scores]
    subjects: tuple[str, ...]
    records: tuple[dict, ...]
    truncated: int
    shots: int
    style: str
    seconds: float

    def figures(self, subject: str | None = None) -> dict[str, Figure]:
        """Each metric with its error and baseline, over the items of one subject or over all."""
        chosen = np.array([subject is None or s == subject for s in self.subjects])
        return {name: figure(scores.only(chosen)) for name, scores in self.scores.items()}

    def known_subjects(self) -> list[str]:
        """In alphabetical order; none where items have none, or all the same."""
        found = sorted(set(self.subjects))
        return found if len(found) > 1 else []


def evaluate(model, tokenizer: Tokenizer, tasks: Sequence[Task], *, style: Plain | Chat | None = None,
             progress: Callable[[str, int, int], None] = lambda task, done, total: None) -> list[Result]:
    """Measure a model on each task, in order.

    style : how questions become tokens; by default Chat where the tokenizer has its special tokens, else Plain.
    progress(task, done, total) : called now and then.     Raises ValueError for tasks that cannot be measured, saying why.
    """
    style, results = style or style_of(tokenizer), []
    check_names(tasks)
    for task in tasks:
        start = time.perf_counter()
        scores, records, truncated = MEASURES[task.kind](
            model, tokenizer, task, style, lambda done, total, name=task.name: progress(name, done, total))
        subjects = tuple(item.subject for item in task.items)
        results.append(
            Result(task.name, scores, subjects, tuple(records), truncated, task.shots, style.name, time.perf_counter() - start))
    return results


def check_names(tasks: Sequence[Task]) -> None:
    """Raise ValueError where two tasks have the same name."""
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"two tasks have the name {max(names, key=names.count)!r}: results are told apart by it; leave one out")


def paired(first: Sequence[Result], second: Sequence[Result]) -> list[tuple[str, Comparison]]:
    """Two models' results on the same tasks, compared item by item.     -> (task, Comparison) for every metric that both have

    What is counted per token is left out where the two cut the texts differently: it would compare tokenizers.
    ValueError where the tasks are not the same.
    """
    if [r.task for r in first] != [r.task for r in second]:
        raise ValueError(f"results of {', '.join(r.task for r in first)} and {', '.join(r.task for r in second)} cannot be compared")
    found = []
    for a, b in zip(first, second, strict=True):
        for name in a.scores:
            if name in b.scores and np.array_equal(a.scores[name].weights, b.scores[name].weights):
                found.append((a.task, compare(a.scores[name], b.scores[name])))
    return found
