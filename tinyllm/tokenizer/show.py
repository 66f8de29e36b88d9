"""A tokenizer's work made visible: a text's tokens in colours, and the merges that made them, step by step."""

from collections.abc import Iterable

from tinyllm.tokenizer.base import Tokenizer, special_pattern
from tinyllm.tokenizer.bpe import merge_steps
from tinyllm.tokenizer.byte_level import BPETokenizer

SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥"}
BACKGROUNDS = (153, 157, 222, 217, 183)     # of the 256 terminal colours: light ones, so that black text reads well


def visible(data: bytes) -> str:
    """Bytes as something to look at: · for a space, ⏎ for a newline, \\x.. for what is not a printable character."""
    text = data.decode("utf-8", "backslashreplace")
    return "".join(SIGNS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text)


def ribbon(tokens: Iterable[bytes], *, color: bool = False) -> str:
    """The tokens on one line, each on its own background, or with | between them."""
    shown = [visible(token) for token in tokens]
    if not color:
        return "|".join(shown)
    return "".join(f"\x1b[30;48;5;{BACKGROUNDS[i % len(BACKGROUNDS)]}m{text}\x1b[0m" for i, text in enumerate(shown))


def show_steps(tokenizer: BPETokenizer, piece: str, *, color: bool = False) -> list[str]:
    """How one piece is encoded: its bytes, then a line for each merge and what the piece is after it, then its ids."""
    data, ranks = piece.encode("utf-8", "surrogatepass"), tokenizer.ranks
    steps = [("", tuple(data))]
    for (first, second), ids in merge_steps(data, ranks):
        made_of = f"{visible(tokenizer.token_bytes(first))} + {visible(tokenizer.token_bytes(second))}"
        steps.append((f"{made_of} = {ranks[first, second]}", ids))
    width = max(len(merged) for merged, _ in steps)
    lines = [f"  {merged:<{width}}    {ribbon(map(tokenizer.token_bytes, ids), color=color)}" for merged, ids in steps]
    return [*lines, "  ids " + " ".join(map(str, steps[-1][1]))]


def show(tokenizer: Tokenizer, text: str, *, color: bool = False) -> list[str]:
    """Lines that show the tokens of text (special tokens as such) and, for BPE, how each distinct piece was merged."""
    ids = tokenizer.encode(text, allowed_special="all")
    size = len(tokenizer.decode_bytes(ids))
    lines = [ribbon(map(tokenizer.token_bytes, ids), color=color), f"{len(ids)} tokens for {size} bytes: " + " ".join(map(str, ids))]
    if isinstance(tokenizer, BPETokenizer):
        special = tokenizer.special_tokens
        parts = special_pattern(special).split(text)[::2] if special else [text]
        for piece in dict.fromkeys(piece for part in parts for piece in tokenizer.split(part)):
            lines += ["", *show_steps(tokenizer, piece, color=color)]
    return lines
