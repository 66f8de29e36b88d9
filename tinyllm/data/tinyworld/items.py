"""What a world hands out, its form on disk, and how a reply is read."""
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tinyllm.data.records import write_records

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": …}
SENTENCE_END = re.compile(r"(?<=[.?!]) ")
LAST_WORDS = re.compile(r"(\d(?: \d)*|\w+)\W*$")


@dataclass(frozen=True)
class Item:
    """A text, a conversation or an examination question.

    kind              story, fact, quiz, sum, note, dialogue; of an examination question its subject's kind
    text              the plain text; of a question the prompt, behind which " " and the reply follow
    messages          the conversation, of a question up to and with the right reply; empty for plain text
    answer            the word or number that is asked for, in the form that final_answer gives; of a note its label
    subject           animals, people, places, things, stories, sums, or "" where there is no single one
    choices           of a multiple-choice question the four replies, of which messages[-1]["content"] is the right one
    key               what is held out together; "" for what is there to be learned by heart
    log_probability   ln p in nats, of the text or conversation in the whole world: its training and test parts together
    """

    kind: str
    text: str
    messages: tuple[Message, ...] = ()
    answer: str = ""
    subject: str = ""
    choices: tuple[str, ...] = ()
    key: str = ""
    log_probability: float = 0.0

    @property
    def right(self) -> int:
        """Which of the choices is right."""
        return self.choices.index(self.messages[-1]["content"])

    def sentences(self) -> list[str]:
        return SENTENCE_END.split(self.text)

    def record(self) -> dict[str, object]:
        """The object that stands for it in a .jsonl file: `messages`, or `text`, with its `label` if it is a note."""
        if self.messages:
            return {"messages": list(self.messages)}
        return {"text": self.text, "label": self.answer} if self.kind == "note" else {"text": self.text}


@dataclass(frozen=True)
class Preference:
    """Two replies to the last message of prompt. fault says what is wrong with the rejected one: "curt" or "wrong"."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    fault: str
    key: str = ""

    def record(self) -> dict[str, object]:
        return {"prompt": list(self.prompt), "chosen": self.chosen, "rejected": self.rejected}


@dataclass(frozen=True)
class Exercise:
    """A question whose answer can be verified, without a reply that shows how."""

    prompt: tuple[Message, ...]
    answer: str
    key: str = ""

    def record(self) -> dict[str, object]:
        return {"prompt": list(self.prompt), "answer": self.answer}


def final_answer(reply: str) -> str:
    """What a reply comes down to: its last word, or its last number with its digits apart. "The sum is 8 5." -> "8 5"; "" for none."""
    found = LAST_WORDS.search(reply)
    return found[1] if found else ""


def save_records(path: str | os.PathLike, items: Iterable[Item | Preference | Exercise]) -> int:
    """Write their records as a .jsonl file (see `write_records`), and return how many."""
    return write_records(path, (item.record() for item in items))
