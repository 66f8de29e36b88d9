"""A conversation that goes on: every answer is given in sight of what was said before."""
from collections.abc import Iterator

from tinyllm.generate.reply import in_sight, stream_replies
from tinyllm.generate.settings import SamplingConfig
from tinyllm.generate.text import Piece
from tinyllm.tokenizer import Tokenizer
from tinyllm.tokenizer.chat import Message


class Chat:
    """A model, and what has been said to it and by it.

        chat = Chat(model, tokenizer, SamplingConfig(), system="Be brief.")
        for piece in chat.ask("Hello!"):
            print(piece.text, end="", flush=True)

    system : what the model is told before the conversation; "" for nothing. It may be changed at any time, and counts from the next answer.
    exchanges : what has been said since, the user's and the assistant's messages in turn.
    forgotten : how many of these, the oldest, were not before the model's eyes any more when it answered last (see `in_sight`).

    Each answer reads the conversation anew. The cache of the answer before could spare that, but not once old messages are left out, which
    is when there is most to read: every later token then stands at another position. And an answer would depend, in its last bits, on
    how the conversation came about rather than on what it says. The price: to read a token takes about a fifteenth of the time that it
    takes to write one (one core, 4 layers of width 256, a context of 256; of a GPT-2 of 124M parameters, 512 tokens of it, a seventeenth).
    """

    def __init__(self, model, tokenizer: Tokenizer, config: SamplingConfig, system: str = ""):
        self.model, self.tokenizer, self.config, self.system = model, tokenizer, config, system
        self.exchanges: list[Message] = []
        self.forgotten, self.asked = 0, 0

    @property
    def messages(self) -> list[Message]:
        """The conversation, the system message first."""
        return [{"role": "system", "content": self.system}] * bool(self.system) + self.exchanges

    def ask(self, text: str) -> Iterator[Piece]:
        """The answer, in pieces as they come (see `stream`). Question and answer are part of the conversation as far as they have come.

        Who takes no more pieces stops the answer where it is. Every question draws from a random stream of its own, so that
        one that was taken back and asked again may be answered in another way. Where an answer fails, the conversation is as before.
        """
        question, answer = {"role": "user", "content": text}, {"role": "assistant", "content": ""}
        messages, number = [*self.messages, question], self.asked
        pieces = stream_replies(self.model, self.tokenizer, [messages], self.config, first_row=number)
        self.forgotten = len(messages) - len(in_sight(self.model, self.tokenizer, messages, self.config))
        self.exchanges += [question, answer]
        self.asked += 1
        try:
            for piece in pieces:
                answer["content"] += piece.text
                yield piece
        except Exception:
            self.undo()
            raise

    def undo(self) -> bool:
        """Take back the last question and its answer; whether there was one."""
        there = bool(self.exchanges)
        del self.exchanges[-2:]
        return there

    def reset(self) -> None:
        """Begin anew. The system message stays."""
        self.exchanges.clear()
        self.forgotten = 0
