"""tinyworld's examinations as tasks: the right answers are right, and who knows them all scores 100 %."""
import numpy as np
import pytest
from chain_model import ChainModel

pytest.importorskip("tinyllm.data.tinyworld")

from tinyllm.data.tinyworld import World  # noqa: E402
from tinyllm.evaluate import Chat, Passage, Plain, Problem, Question, evaluate  # noqa: E402
from tinyllm.evaluate.world import same_answer, world_tasks  # noqa: E402
from tinyllm.tokenizer import BPETokenizer  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


@pytest.fixture(scope="module")
def tasks():
    return {task.name: task for task in world_tasks(World(), count=20, texts=30)}


def test_tasks_and_subjects(tasks):
    kinds = {name: task.kind for name, task in tasks.items()}
    assert kinds == {"tinyworld texts": Passage, "knowledge": Question, "stories": Problem, "sums": Problem, "preferences": Question}
    assert {q.subject for q in tasks["knowledge"].items} == {"animals", "people", "places", "things"}
    assert all(len(q.choices) == 4 for q in tasks["knowledge"].items) and len({q.answer for q in tasks["knowledge"].items}) == 4
    assert len(tasks["stories"].items) == len(tasks["sums"].items) == 20


def test_solutions_are_right_and_other_choices_are_not(tasks):
    for name in ("stories", "sums"):
        for problem in tasks[name].items:
            assert same_answer(problem.solution, problem.expected) and not same_answer("", problem.expected)
            assert same_answer(f"{problem.expected}.", problem.expected) and not same_answer(f"{problem.expected} or not", problem.expected)
    for n, problem in enumerate(tasks["sums"].items):
        a, b = (int(part.replace(" ", "")) for part in problem.turn.removeprefix("What is ").removesuffix("?").split("+"))
        assert problem.expected == " ".join(str(a + b)), n


def test_prompts_are_what_training_texts_look_like(tasks):
    """A question is asked as the world's quizzes are, and in a conversation by the user's words alone."""
    tokenizer = BPETokenizer([], special_tokens=SPECIAL)
    question = tasks["knowledge"].items[0]
    context, answer = Plain(tokenizer).pair(question, question.solution)
    assert tokenizer.decode(context + answer) == f"<|endoftext|>{question.turn} {question.solution}"
    assert tokenizer.decode(Chat(tokenizer).prompt(question)) == f"<|user|>{question.turn}<|end|><|assistant|>"


def test_all_of_it_can_be_measured(tasks):
    """A model that knows nothing scores chance, and loses more than the best possible."""
    tokenizer = BPETokenizer([], special_tokens=SPECIAL)
    V = tokenizer.vocab_size
    results = {r.task: r.figures() for r in evaluate(ChainModel(np.full((V, V), 1 / V)), tokenizer, list(tasks.values()))}
    texts = results["tinyworld texts"]["nats_per_token"]
    assert 0 < texts.best < texts.value == pytest.approx(texts.chance)
    assert results["knowledge"]["acc_norm_tokens"].chance == 0.25 and results["sums"]["same_answer"].value == 0
