"""A small world whose every text has a known probability: what a model could learn at best is a number. In reading order:

draw.py         chance: one object through which every choice goes, so that a text's probability adds up by itself
words.py        the names, things and places that there are
exchange.py     a question and what can be replied to it
facts.py        what is true in this world, by subject, and how it is said and asked
story.py        somebody finds something, takes it elsewhere, and meets somebody; then questions
sums.py         sums with their carries written out
notes.py        messages, some of them spam
items.py        what comes out: Item, Preference, their form on disk, and the answer at the end of a reply
world.py        World: documents, dialogues, preferences, labelled notes and examination questions; what is held out
entropy.py      the exact entropy of each kind of text, and what a tokenizer makes of it
best.py         the best that any encoder could do: next sentences and masked tokens
"""
from tinyllm.data.tinyworld.best import best_masked_accuracy, best_masked_in_pairs, best_next_sentence_accuracy
from tinyllm.data.tinyworld.draw import Draw, derivations
from tinyllm.data.tinyworld.entropy import Surprise, nats_per_token, surprise
from tinyllm.data.tinyworld.items import Item, Preference, final_answer, save_records
from tinyllm.data.tinyworld.world import MIX, World

__all__ = [
    "MIX",
    "Draw",
    "Item",
    "Preference",
    "Surprise",
    "World",
    "best_masked_accuracy",
    "best_masked_in_pairs",
    "best_next_sentence_accuracy",
    "derivations",
    "final_answer",
    "nats_per_token",
    "save_records",
    "surprise",
]
