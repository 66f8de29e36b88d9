"""What a model can be asked, as plain data: passages to predict, questions with choices, problems with a free answer."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tinyllm.evaluate.verifiers import exact_match


@dataclass(frozen=True)
class Passage:
    """A text to predict.     log_probability : ln p of it under the process that wrote it, where that is known: no model can do better."""

    text: str
    subject: str = ""
    log_probability: float | None = None


@dataclass(frozen=True)
class Question:
    """A question with choices.     answer : the number of the right one, from 0.     prompt : all that stands before a choice in a text.

    turn : the question as somebody asks it in a conversation; by default the prompt.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    subject: str = ""
    turn: str = ""

    @property
    def solution(self) -> str:
        """The right choice."""
        return self.choices[self.answer]


@dataclass(frozen=True)
class Problem:
    """A question to be answered in the model's own words.     solution : a worked answer, as it is shown in examples.

    answer : what the verifier expects; by default the solution itself.     turn : as in Question.
    """

    prompt: str
    solution: str
    answer: str = ""
    subject: str = ""
    turn: str = ""

    @property
    def expected(self) -> str:
        return self.answer or self.solution


Item = Passage | Question | Problem


@dataclass(frozen=True)
class Task:
    """Items of one kind under a name.

    examples : solved items, of which `shots` of the same subject (of any, where there are none) precede each question.
    preamble : stands before all that; "{subject}" in it is the item's.
    unconditional : the prompt after which a choice's own probability is measured, for acc_mutual_info.
    verifier : whether (what was written, what was expected) is right; see verifiers.     max_tokens, stop : where a free answer ends at
    the latest.
    Raises ValueError for no items, items of several kinds, or more shots than there are examples for.
    """

    name: str
    items: tuple[Item, ...]
    examples: tuple[Item, ...] = ()
    shots: int = 0
    preamble: str = ""
    unconditional: str = "Answer:"
    verifier: Callable[[str, str], bool] = exact_match
    max_tokens: int = 64
    stop: tuple[str, ...] = ("\n",)

    def __post_init__(self):
        if not self.items:
            raise ValueError(f"task {self.name}: there are no items")
        if len(kinds := {type(item).__name__ for item in (*self.items, *self.examples)}) > 1:
            raise ValueError(f"task {self.name}: items and examples must be of one kind, found {', '.join(sorted(kinds))}")
        if self.shots < 0 or self.shots and self.kind is Passage:
            raise ValueError(f"task {self.name}: {self.shots} shots make no sense here")
        for subject in sorted({item.subject for item in self.items}):
            if (known := len(self._pool(subject))) < self.shots:
                raise ValueError(f"task {self.name}: {self.shots} shots were asked for, but there are {known} examples"
                                 f"{f' of {subject}' if subject else ''}: ask for fewer")  # fmt: skip

    @property
    def kind(self) -> type:
        """Passage, Question or Problem."""
        return type(self.items[0])

    def examples_for(self, item: Item) -> Sequence[Item]:
        """The first of the item's subject: published files give them in the order in which they are meant to be used."""
        return self._pool(item.subject)[: self.shots]

    def preamble_for(self, item: Item) -> str:
        return self.preamble.replace("{subject}", item.subject)

    def _pool(self, subject):
        return [example for example in self.examples if example.subject == subject] or self.examples
