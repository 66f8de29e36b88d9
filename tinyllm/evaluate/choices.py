"""Multiple choice by log-likelihood: the model picks what it finds likeliest. There are four ways to be fair to long or rare choices.

    acc                    ln p(c | q)                           as it is: short choices have an advantage
    acc_norm               ln p(c | q) / bytes of c              per byte: independent of the tokenizer
    acc_norm_tokens        ln p(c | q) / tokens of c             per token
    acc_mutual_info        ln p(c | q) - ln p(c | "Answer:")     how much likelier the question makes it: common words lose their advantage

Where several choices share the first place, the point is shared among them: who finds all choices alike has exactly the score of
who guesses.
Sources: Brown et al. 2020, section 2.4 (per token, and against the unconditional); Gao 2021 (per byte), whose names these are.
"""
import numpy as np

from tinyllm.evaluate.likelihood import Request, log_likelihoods
from tinyllm.evaluate.statistics import Metric, Scores
from tinyllm.evaluate.tasks import Problem, Question, Task
from tinyllm.tokenizer import Tokenizer

ACC = Metric("acc", "accuracy")
ACC_NORM = Metric("acc_norm", "accuracy, per byte")
ACC_NORM_TOKENS = Metric("acc_norm_tokens", "accuracy, per token")
ACC_MUTUAL_INFO = Metric("acc_mutual_info", "accuracy, beyond the unconditional")


def measure(model, tokenizer: Tokenizer, task: Task, style, progress):
    """The four accuracies on the questions of a task.     -> {name: Scores}, a record of each question, requests that were truncated

    Raises ValueError, naming the question, for one with a choice that has no tokens or does not fit.
    """
    requests = []
    for number, question in enumerate(task.items):
        check_question(question, f"{task.name}, question {number + 1}")
        shots, preamble = task.examples_for(question), task.preamble_for(question)
        requests += [Request(*style.pair(question, choice, shots, preamble)) for choice in question.choices]
    nothing = Problem(task.unconditional, "")
    alone = [Request(*style.pair(nothing, choice)) for question in task.items for choice in question.choices]
    answers = log_likelihoods(model, requests + alone, progress=progress)
    given, unconditional = answers[: len(requests)], answers[len(requests) :]
    ends = np.cumsum([len(question.choices) for question in task.items])[:-1]
    log_p, log_p_alone = (np.split([a.total for a in part], ends) for part in (given, unconditional))
    tokens = np.split([len(a.log_probabilities) for a in given], ends)
    sizes = [np.array([len(choice.encode()) for choice in question.choices]) for question in task.items]
    ranked = {  # what each metric compares the choices by
        ACC: log_p,
        ACC_NORM: [p / n for p, n in zip(log_p, sizes, strict=True)],
        ACC_NORM_TOKENS: [p / n for p, n in zip(log_p, tokens, strict=True)],
        ACC_MUTUAL_INFO: [p - q for p, q in zip(log_p, log_p_alone, strict=True)],
    }
    chance = np.array([1 / len(question.choices) for question in task.items])
    ones, scores = np.ones(len(task.items)), {}
    for metric, by_question in ranked.items():
        points = np.array([credit(x, q.answer) for x, q in zip(by_question, task.items, strict=True)])
        scores[metric.name] = Scores(metric, points, ones, chance)
    records = [_record(q, p, scores, n) for n, (q, p) in enumerate(zip(task.items, log_p, strict=True))]
    return scores, records, sum(answer.truncated for answer in given)


def credit(ranks: np.ndarray, answer: int) -> float:
    """1 where the answer alone ranks highest, 1/k where it shares the first place with k - 1 others, else 0."""
    first = ranks == ranks.max()
    return float(first[answer] / first.sum())


def check_question(question: Question, where: str) -> None:
    """Raise ValueError, saying where, unless there are two choices that can be told apart, none is empty, and one is the answer."""
    if len(question.choices) < 2 or len(set(question.choices)) < len(question.choices) or not all(question.choices):
        raise ValueError(f"{where}: expected at least two choices, all different and none empty, found {list(question.choices)!r}")
    if not 0 <= question.answer < len(question.choices):
        raise ValueError(f"{where}: the answer is number {question.answer} of {len(question.choices)} choices, counted from 0")


def _record(question, log_p, scores, n):
    return dict(
        prompt=question.prompt, choices=list(question.choices), answer=question.answer, chosen=int(np.argmax(log_p)),
        log_probabilities=[float(p) for p in log_p], **{name: float(s.values[n]) for name, s in scores.items()},
    )  # fmt: skip
