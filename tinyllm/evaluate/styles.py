"""How a question becomes tokens: as a document that goes on with the answer, or as a turn in a conversation.

    Plain    preamble, examples and question as one text:     Question: …\\nAnswer: red\\n\\nQuestion: …\\nAnswer:     and then " blue"
    Chat     <|system|>preamble<|end|><|user|>question<|end|><|assistant|>answer<|end|> …        and then "blue<|end|>"

Text of an item is always taken as ordinary text: a "<|end|>" that is written in a question ends no turn.
"""
from collections.abc import Sequence

from tinyllm.evaluate.tasks import Problem, Question
from tinyllm.tokenizer import CHAT_TOKENS, Tokenizer, encode_prompt

Asked = Question | Problem


class Plain:
    """For a model of texts. end : the id with which it ends an answer, None where the tokenizer has no end-of-text token."""

    name = "plain"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.end = tokenizer, tokenizer.end_of_text
        self.beginning = [] if self.end is None else [self.end]

    def prompt(self, item: Asked, shots: Sequence[Asked] = (), preamble: str = "") -> list[int]:
        """Ids after which the answer comes."""
        return self.beginning + self.tokenizer.encode_ordinary(_document(item, shots, preamble))

    def pair(self, item: Asked, answer: str, shots: Sequence[Asked] = (), preamble: str = "") -> tuple[list[int], list[int]]:
        """The ids that are given, and those of the answer.

        They are cut out of the tokens of the whole text, which a model has seen in training, and not made separately: where a token
        reaches over the border, it belongs to the answer.
        """
        text = _document(item, shots, preamble)
        alone, whole = self.tokenizer.encode_ordinary(text), self.tokenizer.encode_ordinary(f"{text} {answer}")
        shared = next((n for n, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), min(len(alone), len(whole)))
        return self.beginning + whole[:shared], whole[shared:]


def _document(item, shots, preamble):
    solved = [f"{shot.prompt} {shot.solution}" for shot in shots]
    return "\n\n".join([*([preamble] if preamble else []), *solved, item.prompt])


class Chat:
    """For a model of conversations. ValueError where the tokenizer lacks one of the special tokens."""

    name = "chat"

    def __init__(self, tokenizer: Tokenizer):
        if missing := [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]:
            raise ValueError(f"this model knows no conversations: its tokenizer has no {missing[0]}; evaluate it in the plain style")
        self.tokenizer, self.end = tokenizer, tokenizer.special_tokens["<|end|>"]

    def prompt(self, item: Asked, shots: Sequence[Asked] = (), preamble: str = "") -> list[int]:
        """Ids after which the answer comes."""
        turns = [("system", preamble)] if preamble else []
        for shot in shots:
            turns += [("user", shot.turn or shot.prompt), ("assistant", shot.solution)]
        turns.append(("user", item.turn or item.prompt))
        return encode_prompt(self.tokenizer, [{"role": role, "content": content} for role, content in turns])

    def pair(self, item: Asked, answer: str, shots: Sequence[Asked] = (), preamble: str = "") -> tuple[list[int], list[int]]:
        """The ids that are given, and those of the answer, its end included: "red" is not "red and blue"."""
        return self.prompt(item, shots, preamble), [*self.tokenizer.encode_ordinary(answer), self.end]


STYLES = {style.name: style for style in (Plain, Chat)}


def style_of(tokenizer: Tokenizer) -> Plain | Chat:
    """Chat where the tokenizer has its special tokens, which fine-tuning adds; Plain elsewhere."""
    return Chat(tokenizer) if "<|assistant|>" in tokenizer.special_tokens else Plain(tokenizer)
