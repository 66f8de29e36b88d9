"""Conversations as tokens: who speaks is said by special tokens, which no text can imitate.

    <|system|>You are brief.<|end|><|user|>Hello!<|end|><|assistant|>Hi.<|end|>
                                                                ^^^^^^^^^^ what the model learns to write: targets that count

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": str}. Each is rendered as its role's token, the
content and <|end|>, with nothing between messages. A prompt ends with <|assistant|>, and the model's answer with <|end|>.
"""

from collections.abc import Iterable, Sequence

from tinyllm.config import suggestion
from tinyllm.tokenizer.base import Tokenizer

ROLES = ("system", "user", "assistant")
END = "<|end|>"
CHAT_TOKENS = (*(f"<|{role}|>" for role in ROLES), END)
Message = dict[str, str]


def add_special_tokens(tokenizer: Tokenizer, names: Iterable[str] = CHAT_TOKENS) -> Tokenizer:
    """The same tokenizer with these special tokens too; those that it has keep their ids, new ones come after all others.

    A model then needs rows for them (see nn.grow_vocabulary). ValueError for a kind of tokenizer that has no special tokens.
    """
    content = tokenizer.to_json()
    if "special_tokens" not in content:
        raise ValueError(f"a {tokenizer.kind} tokenizer has no special tokens, which a chat needs: use a bpe tokenizer")
    new = [name for name in names if name not in tokenizer.special_tokens]
    return type(tokenizer).from_json(content | {"special_tokens": [*content["special_tokens"], *new]})


def check_messages(messages: object, where: str) -> list[Message]:
    """The messages, with nothing but role and content. ValueError, starting with `where`, that names the field that is wrong.

    At least one; roles and contents as above; "system" only as the first.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: the field 'messages' must be a list of at least one message")
    return [_checked(message, i, f"{where}: messages[{i}]") for i, message in enumerate(messages)]


def _checked(message: object, number: int, where: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f'{where} must be an object like {{"role": "user", "content": "..."}}')
    for field in ("role", "content"):
        if not isinstance(message.get(field), str):
            raise ValueError(f"{where}.{field} {'must be a string' if field in message else 'is missing'}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{where}.role is {role!r}{suggestion(role, ROLES)}: it must be one of {', '.join(ROLES)}")
    if role == "system" and number:
        raise ValueError(f"{where}.role is 'system', which only the first message can be")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}.content holds half of a surrogate pair at character {error.start}; correct the record") from None
    return {"role": role, "content": content}


def render(messages: Sequence[Message], prompt: bool = False) -> str:
    """The conversation as one text, for people. (For a model, `encode_chat`: in a text, a content could look like a special token.)

    prompt : ends with <|assistant|>, where an answer is to come.
    """
    return "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages) + ("<|assistant|>" if prompt else "")


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and of each whether it is to be learned: an assistant's content and its <|end|>.

    A special token that is written in a content is taken as the ordinary text it is made of.
    ValueError where the tokenizer lacks one of CHAT_TOKENS.
    """
    special = _special(tokenizer)
    ids: list[int] = []
    learned: list[bool] = []
    for message in messages:
        said = [*tokenizer.encode_ordinary(message["content"]), special[END]]
        ids += [special[f"<|{message['role']}|>"], *said]
        learned += [False, *[message["role"] == "assistant"] * len(said)]
    return ids, learned


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """The ids after which the assistant's answer comes."""
    return [*encode_chat(tokenizer, messages)[0], _special(tokenizer)["<|assistant|>"]]


def shortened(tokenizer: Tokenizer, messages: Sequence[Message], limit: int) -> list[Message]:
    """As much of the conversation as fits into `limit` tokens: the system message stays, of the others the oldest go first.

    What is left begins with a user's message, as a conversation does. The last exchange always stays, whole, even where it is too long.
    """
    system, rest = [m for m in messages if m["role"] == "system"], [m for m in messages if m["role"] != "system"]
    lengths = [len(tokenizer.encode_ordinary(m["content"])) + 2 for m in rest]
    room = limit - sum(len(tokenizer.encode_ordinary(m["content"])) + 2 for m in system)
    starts = [i for i, m in enumerate(rest) if not i or (m["role"] == "user" and rest[i - 1]["role"] != "user")]
    start = next((i for i in starts if sum(lengths[i:]) <= room), starts[-1] if starts else 0)
    return [*system, *rest[start:]]


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    if missing := [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]:
        raise ValueError(f"the tokenizer has no {missing[0]}, which a chat needs: add_special_tokens(tokenizer) gives it all of them")
    return tokenizer.special_tokens
