"""Messages to tell apart: ordinary ones and spam.

Both use the same words and signs; "free", "coins", "send" and "today" stand in either. What is offered and asked for makes it spam.
"""
from tinyllm.data.tinyworld import words
from tinyllm.data.tinyworld.draw import Draw

LABELS = {"ham": 0.5, "spam": 0.5}
FORMS = {
    "ham": (
        "Dear {a}, please take the {colour} {thing} to {town} today. I send you {number} coins for it. Yours, {b}.",
        "Dear {a}, I am free today. Come to {town} and bring the {colour} {thing} and {number} coins. Yours, {b}.",
        "Dear {a}, you left your {colour} {thing} and {number} coins in {town}. Come and take it today. Yours, {b}.",
    ),
    "spam": (
        "Dear {a}, take your free {colour} {thing} today. You only send {number} coins to {town} for it. Yours, {b}.",
        "Dear {a}, you win {number} coins and a {colour} {thing} today. Come to {town} and bring your key. Yours, {b}.",
        "Dear {a}, I bring you {number} free coins today. Send me the {colour} {thing} you left in {town}. Yours, {b}.",
    ),
}


def write_note(draw: Draw, size: int) -> tuple[str, str]:
    """A message and its label."""
    label = draw.branch(LABELS)
    a, b = draw.distinct(words.PEOPLE[:size], 2)
    text = draw.one_of(FORMS[label]).format(
        a=a, b=b, colour=draw.one_of(words.COLOURS[:size]), thing=draw.one_of(words.THINGS[:size]),
        town=draw.one_of(words.TOWNS[:size]), number=draw.one_of(words.NUMBERS[:size]),
    )  # fmt: skip
    return text, label
