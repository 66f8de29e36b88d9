"""How good is a model, and how sure is that? Read in this order:

    tasks.py        what can be asked: passages, questions with choices, problems with a free answer
    likelihood.py   ln p of given tokens after given tokens, for thousands of texts at once
    perplexity.py   perplexity and bits per byte, by windows that overlap
    styles.py       how a question becomes tokens: as a document, or as a turn in a conversation
    choices.py      multiple choice by log-likelihood, and four ways to be fair to long choices
    verifiers.py    is a free answer right?        generative.py   free answers
    statistics.py   the bootstrap: standard errors, and two models compared on the same items
    harness.py      one entrance for all of them
    formats.py      MMLU, HellaSwag, ARC and GSM8K as they were published        world.py   tinyworld's own examinations
    suite.py        tasks by name
    charts.py       curves and bars as SVG        card.py   the report card        report.py   its files in a run folder
"""
from tinyllm.evaluate.card import Card
from tinyllm.evaluate.charts import Curve
from tinyllm.evaluate.formats import READERS, read_arc, read_gsm8k, read_hellaswag, read_mmlu
from tinyllm.evaluate.harness import Result, evaluate, paired
from tinyllm.evaluate.likelihood import Likelihood, Request, log_likelihoods
from tinyllm.evaluate.perplexity import passages, token_log_probabilities
from tinyllm.evaluate.report import reward_curve, training_curve, write_card
from tinyllm.evaluate.statistics import Comparison, Figure, Metric, Scores, compare, figure
from tinyllm.evaluate.styles import Chat, Plain
from tinyllm.evaluate.suite import read_tasks
from tinyllm.evaluate.tasks import Passage, Problem, Question, Task

__all__ = [
    "READERS", "Card", "Chat", "Comparison", "Curve", "Figure", "Likelihood", "Metric", "Passage", "Plain", "Problem", "Question", "Request",
    "Result", "Scores", "Task", "compare", "evaluate", "figure", "log_likelihoods", "paired", "passages", "read_arc", "read_gsm8k",
    "read_hellaswag", "read_mmlu", "read_tasks", "reward_curve", "token_log_probabilities", "training_curve", "write_card",
]
