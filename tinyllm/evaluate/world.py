"""tinyworld's examinations as tasks: what nobody was told in training, asked by subject; and its texts, whose exact entropy is known."""
from collections.abc import Iterable, Mapping

from tinyllm.data.tinyworld import Item, World, final_answer
from tinyllm.evaluate.tasks import Passage, Problem, Question, Task

TEXTS = 400
ENDS = {"stories": ("\n", "."), "sums": ("\n",)}  # a text goes on with the next question about the same story; a sum is worked out in sentences


def world_tasks(world: World, count: int = 200, texts: int = TEXTS) -> tuple[Task, ...]:
    """All that is asked about a world: knowledge (four choices, by subject), stories and sums (free answers), held-out texts by kind,
    and pairs of replies of which one is preferred.

    count : stories and sums to ask about, each.     texts : held-out texts to predict, each with its ln p: what no model can beat.
    """
    documents = Task("tinyworld texts", tuple(Passage(i.text, i.kind, i.log_probability) for i in world.documents("mix", texts, split="test")))
    return documents, *examination(world.suite(count)), preference_task(world, count)


def preference_task(world: World, count: int = 200) -> Task:
    """Held-out pairs, by what is wrong with the rejected reply: right is who takes the preferred one to be likelier."""
    return Task("preferences", tuple(
        Question(pair.prompt[-1]["content"], (pair.chosen, pair.rejected), 0, pair.fault, pair.prompt[-1]["content"])
        for pair in world.preferences(count, split="test")))  # fmt: skip


def examination(suite: Mapping[str, Iterable[Item]]) -> tuple[Task, ...]:
    """Questions by subject: those with choices as one task, "knowledge"; of the others, one task for each subject."""
    known, free = [], {}
    for subject, items in suite.items():
        for item in items:
            reply, turn = item.messages[-1]["content"], item.messages[-2]["content"]
            if item.choices:
                known.append(Question(item.text, tuple(item.choices), item.right, subject, turn))
            else:
                free.setdefault(subject, []).append(Problem(item.text, reply, item.answer, turn=turn))
    tasks = [Task("knowledge", tuple(known))] if known else []
    return (*tasks, *(Task(subject, tuple(problems), verifier=same_answer, stop=ENDS[subject]) for subject, problems in free.items()))


def same_answer(written: str, expected: str) -> bool:
    """The last word or number of both is the same: "…, so it is in the attic." answers "attic"."""
    wanted = final_answer(expected)
    if not wanted:
        raise ValueError(f"the expected answer {expected!r} has no word and no number in it: verify it by exact_match")
    return final_answer(written).casefold() == wanted.casefold()
