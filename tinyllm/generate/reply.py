"""The assistant's next message: a prompt in the chat template, and a continuation that ends with <|end|>."""
from collections.abc import Iterator, Sequence

from tinyllm.generate.settings import SamplingConfig
from tinyllm.generate.text import Completion, Piece, completions, stream_encoded
from tinyllm.generate.window import context_of
from tinyllm.tokenizer import Tokenizer
from tinyllm.tokenizer.chat import END, Message, encode_prompt, render, shortened


def stream_replies(model, tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], config: SamplingConfig, *,
                   first_row: int = 0) -> Iterator[Piece]:
    """The answers to several conversations at once, in pieces as they come (see `stream`).

    Of each the model sees what is `in_sight`. Raises ValueError for a tokenizer without the chat's special tokens.
    """
    seen = [in_sight(model, tokenizer, messages, config) for messages in conversations]
    prompts = [(render(messages, prompt=True), encode_prompt(tokenizer, messages)) for messages in seen]
    return stream_encoded(model, tokenizer, prompts, config, end=tokenizer.special_tokens[END], first_row=first_row)


def replies(model, tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], config: SamplingConfig, *,
            first_row: int = 0) -> list[Completion]:
    """The answers, whole. `reason` is "end_of_text" where the model ended its answer itself."""
    return completions(stream_replies(model, tokenizer, conversations, config, first_row=first_row))


def in_sight(model, tokenizer: Tokenizer, messages: Sequence[Message], config: SamplingConfig) -> list[Message]:
    """What the model sees of a conversation when it answers.

    One that would leave no room for config.max_tokens in its context loses its oldest messages (see `shortened`), down to half a context.
    """
    context = context_of(model)
    return list(messages) if context is None else shortened(tokenizer, messages, max(context - config.max_tokens, context // 2) - 1)
