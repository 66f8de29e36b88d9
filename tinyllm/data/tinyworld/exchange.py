"""A question and what can be replied to it."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Exchange:
    """question; full: the right reply, a sentence that ends with the answer; wrong: full replies with another answer; key: see Item."""

    question: str
    full: str
    answer: str
    subject: str
    wrong: tuple[str, ...] = ()
    key: str = ""

    def reply(self, style: str) -> str:
        """The right reply, "full" or "curt"."""
        return self.full if style == "full" else f"{self.answer}."

    def text(self, style: str = "full") -> str:
        """Question and right reply in a text."""
        return f"{self.question} {self.reply(style)}"
