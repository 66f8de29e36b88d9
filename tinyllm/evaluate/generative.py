"""Free answers: the model writes, greedily, and a verifier says whether that is right."""
from collections.abc import Sequence

import numpy as np

from tinyllm.evaluate.statistics import Metric, Scores
from tinyllm.evaluate.tasks import Task
from tinyllm.generate import Decoding, SamplingConfig
from tinyllm.generate.text import StopFilter
from tinyllm.tokenizer import StreamDecoder, Tokenizer

AT_ONCE = 32  # prompts that share a batch


def measure(model, tokenizer: Tokenizer, task: Task, style, progress):
    """The share of problems with a right answer.     -> {name: Scores}, a record of each problem, prompts longer than the context

    Raises ValueError for an expected answer that is empty, or that the verifier cannot use.
    """
    verify = task.verifier
    for number, problem in enumerate(task.items, 1):
        if not problem.expected.strip():
            raise ValueError(f"task {task.name}, problem {number}: the expected answer is empty")
        try:
            verify("", problem.expected)  # before anything is generated
        except ValueError as error:
            raise ValueError(f"task {task.name}, problem {number}: {error}") from error
    prompts = []
    for problem in task.items:
        prompts.append(style.prompt(problem, task.examples_for(problem), task.preamble_for(problem)))
    written, rolled = answers(model, tokenizer, prompts, style.end, task.max_tokens, task.stop, progress)
    right = np.array([verify(text, problem.expected) for text, problem in zip(written, task.items, strict=True)], dtype=np.float64)
    metric = Metric(verify.__name__, verify.__name__.replace("_", " "))
    records = [dict(prompt=p.prompt, expected=p.expected, written=text, **{metric.name: float(points)})
               for p, text, points in zip(task.items, written, right, strict=True)]  # fmt: skip
    return {metric.name: Scores(metric, right, np.ones(len(right)), np.zeros(len(right)))}, records, rolled


def answers(model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], end: int | None, max_tokens: int, stop: Sequence[str] = (),
            progress=lambda done, total: None) -> tuple[list[str], int]:
    """What the model writes after each prompt, always its likeliest token, up to the id `end` or a stop string.

    Prompts of about the same length share a batch. An answer's leading white space is no part of it.
    -> the texts, and how many prompts had outgrown the model's context.
    """
    config = SamplingConfig(max_tokens=max_tokens, temperature=0)
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n]))
    written, rolled = [""] * len(prompts), 0
    for first in range(0, len(order), AT_ONCE):
        chosen = order[first : first + AT_ONCE]
        decoding = Decoding(model, [prompts[n] for n in chosen], config, end_of_text=end)
        rolled += _write(decoding, [_Answer(tokenizer, stop) for _ in chosen], chosen, written)
        progress(min(first + AT_ONCE, len(order)), len(order))
    return written, rolled


class _Answer:
    """A text that grows by a token at a time. A stop string counts once something has been written: a model may begin with a new line."""

    def __init__(self, tokenizer, stop):
        self.decoder, self.filter, self.text = StreamDecoder(tokenizer), StopFilter(tuple(stop)), ""

    def push(self, shown: str) -> bool:
        """Take in text; whether the answer has ended."""
        self.text += self.filter.push(shown if self.text or self.filter.held else shown.lstrip())
        return self.filter.stopped


def _write(decoding, growing, chosen, written) -> int:
    for _ in range(decoding.config.max_tokens):
        if decoding.finished.all():
            break
        step = decoding.step()
        for row in np.flatnonzero(step.ids >= 0).tolist():
            if not step.finished[row] and growing[row].push(growing[row].decoder.push(int(step.ids[row]))):
                decoding.end(row)
    for row, number in enumerate(chosen):
        answer = growing[row]
        answer.push(answer.decoder.flush())
        written[number] = (answer.text + answer.filter.flush()).rstrip()
    return int(decoding.rolled.sum())
