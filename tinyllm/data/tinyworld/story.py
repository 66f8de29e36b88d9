"""A story: two people find something, one thing or another is taken elsewhere, and then there is something to ask.

    One day Anna found a red ball in the hall. Ben found a blue cup in the barn. Later Anna took the ball from the hall to the attic.
    Where is the ball? The ball is in the attic.

A move says where from: to tell it, one must know where the thing is, which is what questions ask as well.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllm.data.tinyworld import words
from tinyllm.data.tinyworld.draw import Draw
from tinyllm.data.tinyworld.exchange import Exchange

MOVES = {1: 0.6, 2: 0.4}  # how often things are taken elsewhere


@dataclass(frozen=True)
class Story:
    """A story with all that can be asked about it: where, who and what colour, of one thing or the other.     exchanges : by that

    key: who finds and moves what, and where; what is held out are these plots.
    """

    text: str
    exchanges: tuple[tuple[Exchange, ...], ...]
    key: str

    def ask(self, draw: Draw, kinds: int, each: int = 1) -> list[Exchange]:
        """Questions of so many kinds, one kind after the other, each about so many of the things."""
        return [exchange for kind in draw.distinct(self.exchanges, kinds) for exchange in draw.distinct(kind, each)]


@dataclass
class _Find:
    person: str
    colour: str
    thing: str
    room: str


def tell(draw: Draw, size: int) -> Story:
    """A story from a world with `size` people and things, and as many rooms and colours as there are up to that."""
    people, things = draw.distinct(words.PEOPLE[:size], 2), draw.distinct(words.THINGS[:size], 2)
    finds = [_Find(person, draw.one_of(words.COLOURS[:size]), thing, draw.one_of(words.ROOMS[:size]))
             for person, thing in zip(people, things, strict=True)]  # fmt: skip
    sentences = [f"{find.person} found a {find.colour} {find.thing} in the {find.room}." for find in finds]
    sentences[0] = f"{draw.one_of(words.OPENINGS)} {sentences[0]}"
    plot = [f"{find.person} {find.thing} {find.room}" for find in finds]
    for _ in range(draw.branch(MOVES)):
        moved = draw.one_of(finds)
        before, moved.room = moved.room, draw.one_of([room for room in words.ROOMS[:size] if room != moved.room])
        sentences.append(f"{draw.one_of(('Then', 'Later'))} {moved.person} took the {moved.thing} from the {before} to the {moved.room}.")
        plot.append(f"{moved.thing} {moved.room}")
    key = ", ".join(plot)
    return Story(" ".join(sentences), tuple(zip(*(_questions(find, size, key) for find in finds), strict=True)), key)


def _questions(find: _Find, size: int, key: str) -> list[Exchange]:
    def exchange(question: str, reply: str, answer: str, answers: Sequence[str]) -> Exchange:
        wrong = tuple(reply.format(other) for other in answers[:size] if other != answer)
        return Exchange(question, reply.format(answer), answer, "stories", wrong, key)

    thing = find.thing
    return [exchange(f"Where is the {thing}?", f"The {thing} is in the {{}}.", find.room, words.ROOMS),
            exchange(f"Who found the {thing}?", f"The {thing} was found by {{}}.", find.person, words.PEOPLE),
            exchange(f"What colour is the {thing}?", f"The {thing} is {{}}.", find.colour, words.COLOURS)]  # fmt: skip
