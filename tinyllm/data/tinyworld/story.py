"""A story: somebody finds something, takes it elsewhere, and meets somebody on the way; then there is something to ask.

    One day Anna found a red ball in the hall. On the way Anna met the fox. Later Anna took the ball from the hall to the attic.
    Where is the ball?    The ball is in the attic.

Of people, things, colours and animals a story has one each, so that a reader has to find them, and of several rooms the latest. With two
people who find a thing each, the same questions also ask which of two is meant, and that takes a model of this size several times as
long to learn: it answers with one of the two for the first million tokens.
"""
from collections.abc import Sequence
from dataclasses import dataclass

from tinyllm.data.tinyworld import words
from tinyllm.data.tinyworld.draw import Draw
from tinyllm.data.tinyworld.exchange import Exchange

MOVES = {1: 0.6, 2: 0.4}  # how often things are taken elsewhere


@dataclass(frozen=True)
class Story:
    """A story with all that can be asked about it.     key: who finds and moves what, and where; what is held out are these plots."""

    text: str
    exchanges: tuple[Exchange, ...]
    key: str


def tell(draw: Draw, size: int) -> Story:
    """A story from a world with `size` people, animals and things, and as many rooms and colours as there are up to that."""
    person, thing = draw.one_of(words.PEOPLE[:size]), draw.one_of(words.THINGS[:size])
    colour, animal = draw.one_of(words.COLOURS[:size]), draw.one_of(words.ANIMALS[:size])
    room = draw.one_of(words.ROOMS[:size])
    sentences = [f"{draw.one_of(words.OPENINGS)} {person} found a {colour} {thing} in the {room}."]
    plot = [person, thing, room]
    moves = draw.branch(MOVES)
    met = draw.one_of(range(moves))
    for move in range(moves):
        if move == met:
            sentences.append(f"On the way {person} met the {animal}.")
        before, room = room, draw.one_of([other for other in words.ROOMS[:size] if other != room])
        sentences.append(f"{draw.one_of(('Then', 'Later'))} {person} took the {thing} from the {before} to the {room}.")
        plot.append(room)
    key = " ".join(plot)

    def exchange(question: str, reply: str, answer: str, answers: Sequence[str]) -> Exchange:
        wrong = tuple(reply.format(other) for other in answers[:size] if other != answer)
        return Exchange(question, reply.format(answer), answer, "stories", wrong, key)

    return Story(" ".join(sentences), (
        exchange(f"Where is the {thing}?", f"The {thing} is in the {{}}.", room, words.ROOMS),
        exchange(f"Who found the {thing}?", f"The {thing} was found by {{}}.", person, words.PEOPLE),
        exchange(f"What colour is the {thing}?", f"The {thing} is {{}}.", colour, words.COLOURS),
        exchange(f"Whom did {person} meet?", f"{person} met the {{}}.", animal, words.ANIMALS),
    ), key)  # fmt: skip
