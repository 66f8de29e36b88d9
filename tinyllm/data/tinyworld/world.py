"""The world: documents to pretrain on, dialogues to be tuned by, pairs to prefer from, notes to sort, and examinations.

What is held out.  A story belongs to the test part if the hash of its plot says so, a sum by its pair of numbers, a note by its text:
a tenth of each. A text of the other part is thrown away and drawn again, so neither part ever shows what belongs to the other. Facts are
there to be known: both parts state them all; but each can be asked for in three ways, one of which only examinations use.

Probabilities are those of the whole world, of which both parts are samples: ln p = Σ ln p(choice) counts the choices of the text that
was kept. Knowing that a text is a training text would save -ln 0.9 = 0.11 nats for each, to whoever knew the hash; no model can.
"""
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from hashlib import blake2b

from tinyllm.backend import random_stream
from tinyllm.data.tinyworld.draw import Draw, exact_entropy
from tinyllm.data.tinyworld.exchange import Exchange
from tinyllm.data.tinyworld.facts import SUBJECTS, Fact, deal_facts, describe
from tinyllm.data.tinyworld.items import Exercise, Item, Message, Preference
from tinyllm.data.tinyworld.notes import write_note
from tinyllm.data.tinyworld.story import tell
from tinyllm.data.tinyworld.sums import draw_sum

MIX = {"story": 0.3, "fact": 0.3, "quiz": 0.15, "sum": 0.2, "note": 0.05}  # shares of documents to pretrain on
STORY_QUESTIONS = 3  # after a story that is plain text: most of what there is to learn from it lies in the answers
SPLITS = ("train", "test", "all")
HELD_OUT = 0.1

SYSTEMS = {"": 0.6, "Answer briefly.": 0.2, "Answer in full.": 0.2}
STYLES = {"": {"full": 0.5, "curt": 0.5}, "Answer briefly.": {"curt": 1.0}, "Answer in full.": {"full": 1.0}}
SUM_STYLES = STYLES | {"": {"full": 0.2, "curt": 0.8}}  # people answer at once, and are often wrong: what reward can change
GREETED = {True: 0.2, False: 0.8}
GREETING = ("Hello!", "Hello! What would you like to know?")
TOPICS = {("fact",): 0.3, ("story",): 0.25, ("story, two questions",): 0.1, ("sum",): 0.2,
          ("fact", "fact"): 0.05, ("fact", "sum"): 0.05, ("sum", "fact"): 0.05}  # fmt: skip
PREFERENCE_TOPICS = {"fact": 0.6, "story": 0.4}
FAULTS = {"curt": 0.5, "wrong": 0.5}


class World:
    """A world of `size` people, animals, towns and things, of which the seed says what is true; sums are of so many digits.

    All that it hands out is a function of (world, arguments): the first items of a longer sequence are those of a shorter one.
    Errors: ValueError for a size outside 2 … 8, digits below 1, and unknown names of kinds, subjects and splits.
    """

    def __init__(self, seed: int = 0, size: int = 8, digits: int = 2):
        if not 2 <= size <= 8:
            raise ValueError(f"the size of a world must be 2 to 8 people, animals, towns and things, found {size}")
        if digits < 1:
            raise ValueError(f"sums need numbers of at least 1 digit, found {digits}")
        self.seed, self.size, self.digits = seed, size, digits
        self.entities = deal_facts(random_stream(seed, "tinyworld facts"), size)
        self.facts = [fact for facts in self.entities.values() for fact in facts]
        self._kinds: dict[str, Callable[[Draw, str], Item]] = {
            "story": self._story, "fact": self._fact, "quiz": self._quiz, "sum": self._sum, "note": self._note,
            "dialogue": self._dialogue, "mix": lambda draw, split: self._kinds[draw.branch(MIX)](draw, split),
        }  # fmt: skip

    # ---- what it hands out ----

    def documents(self, kind: str, count: int, seed: int = 0, split: str = "train") -> Iterator[Item]:
        """`count` texts of a kind (story, fact, quiz, sum, note), of all these in the shares of MIX ("mix"), or dialogues ("dialogue").

        split: "train", "test" (what is held out), or "all". ln p of a text of the mix counts the choice of its kind.
        """
        make = self.generator(kind, split)
        random = random_stream(seed, f"tinyworld {self.seed} {kind} {split}")
        for _ in range(count):
            draw = Draw(random)
            item = make(draw)
            yield replace(item, log_probability=draw.log_probability)

    def generator(self, kind: str, split: str = "all") -> Callable[[Draw], Item]:
        """The function of a Draw that makes one text of a kind; with "all" it is the whole world's distribution, as it is defined."""
        _known(kind, self._kinds, "kind of text")
        make = self._kinds[kind]
        _known(split, SPLITS, "split")
        return lambda draw: make(draw, split)

    def entropy(self, kind: str) -> float:
        """The exact entropy of a kind's texts in nats per text: what the best of all models loses on them. Closed form."""
        return exact_entropy(self.generator(kind))

    def classification(self, count: int, seed: int = 0, split: str = "train") -> Iterator[Item]:
        """Notes; `answer` is the label, "spam" or "ham"."""
        return self.documents("note", count, seed, split)

    def preferences(self, count: int, seed: int = 0, split: str = "train") -> Iterator[Preference]:
        """Pairs of replies: right and in full is preferred to curt (and right), and to wrong (and in full)."""
        _known(split, SPLITS, "split")
        random = random_stream(seed, f"tinyworld {self.seed} preferences {split}")
        for _ in range(count):
            draw = Draw(random)
            if draw.branch(PREFERENCE_TOPICS) == "fact":
                exchange = self._ask_fact(draw, examined=split == "test")
            else:
                exchange = self._ask_story(draw, split)[0]
            fault = draw.branch(FAULTS)
            rejected = exchange.reply("curt") if fault == "curt" else draw.one_of(exchange.wrong)
            yield Preference((_user(exchange.question),), exchange.full, rejected, fault, exchange.key)

    def exercises(self, count: int, seed: int = 0, split: str = "train") -> Iterator[Exercise]:
        """Different sums to be answered in whatever way. ValueError where there are not so many."""
        _known(split, SPLITS, "split")
        draw, found = Draw(random_stream(seed, f"tinyworld {self.seed} exercises {split}")), set()
        for _ in range(100 * count):
            if len(found) == count:
                return
            exchange = self._of(split, draw, lambda: draw_sum(draw, self.digits))
            if exchange.key not in found:
                found.add(exchange.key)
                yield Exercise((_user(exchange.question),), exchange.answer, exchange.key)
        if len(found) < count:
            raise ValueError(f"there are not {count} different sums of the part {split!r}: ask for fewer, or for numbers of more digits")

    def questions(self, subject: str, count: int = 200) -> list[Item]:
        """The examination in a subject, of questions that no training text contains.

        Of animals, people, places and things: every fact there is, once, with four replies to choose from. Of stories and sums:
        `count` different ones, to be answered freely.
        """
        _known(subject, (*SUBJECTS, "stories", "sums"), "subject")
        draw = Draw(random_stream(0, f"tinyworld {self.seed} questions {subject}"))
        if subject in SUBJECTS:
            if self.size < 4:
                raise ValueError(f"four choices need a world of at least 4 entities, this one has {self.size}")
            return [self._choice_question(draw, fact) for fact in self.facts if fact.subject == subject]
        found: dict[str, Item] = {}
        while len(found) < count:
            item = self._free_question(draw, subject)
            found[item.key] = item
        return list(found.values())

    def suite(self, count: int = 200) -> dict[str, list[Item]]:
        """All examinations by subject."""
        return {subject: self.questions(subject, count) for subject in (*SUBJECTS, "stories", "sums")}

    # ---- held out ----

    def held_out(self, key: str) -> bool:
        """Whether what has this key belongs to the test part."""
        digest = blake2b(f"{self.seed} {key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < HELD_OUT * 2**64

    def _of(self, split: str, draw: Draw, make: Callable[[], object]) -> object:
        """What `make` makes, thrown away until its key is of the split. Only the choices of what is kept count."""
        before = draw.log_probability
        while True:
            made = make()
            if split == "all" or not made.key or self.held_out(made.key) == (split == "test"):
                return made
            draw.log_probability = before

    def _examined_wording(self, fact: Fact) -> int:
        """Which of the three ways to ask for a fact is kept for examinations."""
        return blake2b(f"{self.seed} {fact.statement()}".encode()).digest()[0] % 3

    # ---- plain texts ----

    def _story(self, draw: Draw, split: str) -> Item:
        """A story, and so many of the questions about it, each with its answer."""
        story = self._of(split, draw, lambda: tell(draw, self.size))
        asked = draw.distinct(story.exchanges, STORY_QUESTIONS)
        text = " ".join([story.text, *(exchange.text() for exchange in asked)])
        return Item("story", text, subject="stories", key=story.key)

    def _fact(self, draw: Draw, split: str) -> Item:
        subject, entity = draw.one_of(list(self.entities))
        return Item("fact", describe(draw, self.entities[subject, entity]), subject=subject)

    def _quiz(self, draw: Draw, split: str) -> Item:
        exchange = self._ask_fact(draw)
        return Item("quiz", exchange.text(), answer=exchange.answer, subject=exchange.subject)

    def _sum(self, draw: Draw, split: str) -> Item:
        exchange = self._of(split, draw, lambda: draw_sum(draw, self.digits))
        return Item("sum", exchange.text(), answer=exchange.answer, subject="sums", key=exchange.key)

    def _note(self, draw: Draw, split: str) -> Item:
        def make() -> Item:
            text, label = write_note(draw, self.size)
            return Item("note", text, answer=label, key=text)

        return self._of(split, draw, make)

    # ---- conversations ----

    def _ask_fact(self, draw: Draw, examined: bool = False) -> Exchange:
        fact = draw.one_of(self.facts)
        kept = self._examined_wording(fact)
        return fact.exchange(kept if examined else draw.one_of([wording for wording in range(3) if wording != kept]))

    def _ask_story(self, draw: Draw, split: str, questions: int = 1) -> list[Exchange]:
        """Questions about a story, which is told with the first of them."""
        story = self._of(split, draw, lambda: tell(draw, self.size))
        first, *others = draw.distinct(story.exchanges, questions)
        return [replace(first, question=f"{story.text} {first.question}"), *others]

    def _ask(self, draw: Draw, topic: str, split: str) -> list[Exchange]:
        if topic == "sum":
            return [self._of(split, draw, lambda: draw_sum(draw, self.digits))]
        if topic == "fact":
            return [self._ask_fact(draw)]
        return self._ask_story(draw, split, {"story": 1, "story, two questions": 2}[topic])

    def _dialogue(self, draw: Draw, split: str) -> Item:
        """A system message or none, a greeting or none, and one or two questions."""
        system = draw.branch(SYSTEMS)
        messages = [{"role": "system", "content": system}] if system else []
        if draw.branch(GREETED):
            messages += [_user(GREETING[0]), _assistant(GREETING[1])]
        exchanges = [exchange for topic in draw.branch(TOPICS) for exchange in self._ask(draw, topic, split)]
        for exchange in exchanges:
            messages += [_user(exchange.question), _assistant(exchange.reply(draw.branch(_styles(exchange)[system])))]
        text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        subjects = {exchange.subject for exchange in exchanges}
        key = " | ".join(exchange.key for exchange in exchanges if exchange.key)
        return Item("dialogue", text, tuple(messages), exchanges[-1].answer, subjects.pop() if len(subjects) == 1 else "", key=key)

    def _choice_question(self, draw: Draw, fact: Fact) -> Item:
        exchange = fact.exchange(self._examined_wording(fact))
        choices = draw.distinct([exchange.full, *draw.distinct(exchange.wrong, 3)], 4)
        messages = (_user(exchange.question), _assistant(exchange.full))
        return Item("fact", exchange.question, messages, exchange.answer, exchange.subject, tuple(choices))

    def _free_question(self, draw: Draw, subject: str) -> Item:
        if subject == "sums":
            exchange = self._of("test", draw, lambda: draw_sum(draw, self.digits))
            return Item("sum", exchange.question, (_user(exchange.question), _assistant(exchange.full)), exchange.answer, "sums", key=exchange.key)
        story = self._of("test", draw, lambda: tell(draw, self.size))
        exchange = draw.one_of(story.exchanges)
        asked = f"{story.text} {exchange.question}"
        messages = (_user(asked), _assistant(exchange.full))
        return Item("story", asked, messages, exchange.answer, "stories", key=story.key)


def _styles(exchange: Exchange) -> dict[str, dict[str, float]]:
    """By system message, how likely each style of reply is."""
    return SUM_STYLES if exchange.subject == "sums" else STYLES


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _known(name: str, names: Collection[str], what: str) -> None:
    if name not in names:
        raise ValueError(f"{what} {name!r} is unknown: use one of {', '.join(names)}")
