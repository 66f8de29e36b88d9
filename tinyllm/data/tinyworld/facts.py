"""What is true in a world: subjects, their entities, and of each entity three attributes, whose values the world's seed deals out.

Every value of an attribute belongs to one entity alone, so that three values of other entities are wrong answers for certain. A value is
one word, and every statement ends with it.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tinyllm.data.tinyworld import words
from tinyllm.data.tinyworld.draw import Draw
from tinyllm.data.tinyworld.exchange import Exchange


@dataclass(frozen=True)
class Attribute:
    """A property: two ways to state it, {} being the entity and {v} its value, three ways to ask for it, and the values there are."""

    statements: tuple[str, str]
    questions: tuple[str, str, str]
    values: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One entity's value of one attribute, and the values that are wrong for it."""

    subject: str
    entity: str
    attribute: Attribute
    value: str
    others: tuple[str, ...]

    def exchange(self, wording: int) -> Exchange:
        """The question for it, in one of three wordings."""
        wrong = tuple(self.statement(value=other) for other in self.others)
        return Exchange(self.attribute.questions[wording].format(self.entity), self.statement(), self.value, self.subject, wrong)

    def statement(self, wording: int = 0, value: str = "") -> str:
        """The fact as a sentence; with another value, what somebody might believe who is wrong."""
        return self.attribute.statements[wording].format(self.entity, v=value or self.value)


SUBJECTS = {
    "animals": (words.ANIMALS, (
        Attribute(("The {} lives in the {v}.", "The home of the {} is the {v}."),
                  ("Where does the {} live?", "What is the home of the {}?", "In which place does the {} live?"), words.HOMES),
        Attribute(("The {} eats {v}.", "The food of the {} is {v}."),
                  ("What does the {} eat?", "What is the food of the {}?", "Which food does the {} eat?"), words.FOODS),
        Attribute(("The {} is afraid of {v}.", "The fear of the {} is {v}."),
                  ("What is the {} afraid of?", "What is the fear of the {}?", "Of what is the {} afraid?"), words.FEARS))),
    "people": (words.PEOPLE, (
        Attribute(("{} works as a {v}.", "The work of {} is that of a {v}."),
                  ("What does {} work as?", "What is the work of {}?", "As what does {} work?"), words.JOBS),
        Attribute(("{} plays the {v}.", "The music of {} is that of the {v}."),
                  ("What does {} play?", "What is the music of {}?", "Which music does {} play?"), words.INSTRUMENTS),
        Attribute(("{} was born in {v}.", "The town of {} is {v}."),
                  ("Where was {} born?", "What is the town of {}?", "In which town was {} born?"), words.TOWNS))),
    "places": (words.TOWNS, (
        Attribute(("{} is known for its {v}.", "The pride of {} is its {v}."),
                  ("What is {} known for?", "What is the pride of {}?", "For what is {} known?"), words.SIGHTS),
        Attribute(("{} sells {v}.", "The trade of {} is in {v}."),
                  ("What does {} sell?", "What is the trade of {}?", "In what does {} trade?"), words.GOODS),
        Attribute(("{} is ruled by {v}.", "The mayor of {} is {v}."),
                  ("Who rules {}?", "Who is the mayor of {}?", "By whom is {} ruled?"), words.PEOPLE))),
    "things": (words.THINGS, (
        Attribute(("The {} is made of {v}.", "The stuff of the {} is {v}."),
                  ("What is the {} made of?", "What is the stuff of the {}?", "Of what is the {} made?"), words.MATERIALS),
        Attribute(("The {} was made by {v}.", "The maker of the {} is {v}."),
                  ("Who made the {}?", "Who is the maker of the {}?", "By whom was the {} made?"), words.PEOPLE),
        Attribute(("The {} comes from {v}.", "The origin of the {} is {v}."),
                  ("Where does the {} come from?", "What is the origin of the {}?", "From where does the {} come?"), words.TOWNS))),
}  # fmt: skip


def deal_facts(random: np.random.Generator, size: int) -> dict[tuple[str, str], tuple[Fact, ...]]:
    """(subject, entity) -> its facts, for the first `size` entities of each subject: each attribute's values are shuffled once."""
    facts: dict[tuple[str, str], tuple[Fact, ...]] = {}
    for subject, (entities, attributes) in SUBJECTS.items():
        for attribute in attributes:
            values = [attribute.values[i] for i in random.permutation(size)]
            for entity, value in zip(entities[:size], values, strict=True):
                others = tuple(other for other in values if other != value)
                facts[subject, entity] = (*facts.get((subject, entity), ()), Fact(subject, entity, attribute, value, others))
    return facts


def describe(draw: Draw, facts: Sequence[Fact]) -> str:
    """All facts of one entity, in any order, each in either wording. Every sentence names the entity: it shows what it belongs to."""
    return " ".join(fact.statement(draw.one_of((0, 1))) for fact in draw.distinct(facts, len(facts)))
