"""Rows as a model gets them, made visible: what is trained on, where documents begin, what is padding.

    ¶<|user|>|Hello|<|end|>|<|assistant|>[Hi|.|<|end|>] ¶<|user|>|Bye|<|end|>|<|assistant|>[Bye|<|end|>] ░×5

A position has an input and the token after it as its target, if that counts. What is shown of a document are its tokens: its inputs, and
the last target, which is no input any more. Trained on are those that are a target; the first token of a document never is.
On a terminal colours take the place of brackets and bars.
"""
from collections.abc import Iterable
from itertools import groupby

import numpy as np

from tinyllm.data.batches import IGNORE, Batch, validation_batches
from tinyllm.data.packing import PackedRows
from tinyllm.data.prepare import encode_documents
from tinyllm.data.text import Document
from tinyllm.tokenizer import Tokenizer
from tinyllm.tokenizer.show import visible

LEARNED, GIVEN = (114, 150), (252, 254)  # of the 256 terminal colours, each two shades in turn, so that tokens can be told apart
BEGINS, PADDING = "¶", "░"


def show(tokenizer: Tokenizer, ids: np.ndarray, targets: np.ndarray, documents: np.ndarray | None = None, *, color: bool = False) -> str:
    """A legend, every row, and how many inputs there are, tokens trained on, and places filled with padding.     ids, targets, documents (B, T), see Batch

    documents : None where each row is one document. Padding is what stands at the end of a row with id 0 and no target.
    """
    padding = _padding(ids, targets)
    lines = [f"{_painted(['trained on'], [True], color)}  {_painted(['given'], [False], color)}  {BEGINS} a document, or the rest of one  {PADDING} padding"]
    for row in range(len(ids)):
        end = ids.shape[1] - padding[row]
        numbers = np.zeros(end, int) if documents is None else documents[row, :end]
        shown = [_document(tokenizer, ids[row, part], targets[row, part], color) for part in _parts(numbers)]
        shown += [f"{PADDING}×{padding[row]}"] * bool(padding[row])
        learned = int(np.count_nonzero(targets[row] != IGNORE))
        lines += ["", f"row {row + 1}: {_counts(end, learned, padding[row])}", " ".join(shown)]
    return "\n".join([*lines, "", f"in all: {_counts(ids.size - sum(padding), int(np.count_nonzero(targets != IGNORE)), sum(padding))}"])


def _padding(ids: np.ndarray, targets: np.ndarray) -> list[int]:
    """How many positions at the end of each row."""
    used = (ids != 0) | (targets != IGNORE)
    return [int(np.argmax(row[::-1])) if row.any() else len(row) for row in used]


def _parts(numbers: np.ndarray) -> list[slice]:
    """Where each document of a row stands."""
    edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    return [slice(start, end) for start, end in zip(edges, edges[1:], strict=False) if end > start]


def _document(tokenizer, ids, targets, color) -> str:
    tokens, learned = ids.tolist(), [False, *(targets != IGNORE).tolist()]
    if learned[-1]:
        tokens.append(int(targets[-1]))
    return BEGINS + _painted([visible(tokenizer.token_bytes(token)) for token in tokens], learned[: len(tokens)], color)


def _painted(tokens: list[str], learned: list[bool], color: bool) -> str:
    if color:
        shades = [(LEARNED if known else GIVEN)[i % 2] for i, known in enumerate(learned)]
        return "".join(f"\x1b[30;48;5;{shade}m{token}\x1b[0m" for token, shade in zip(tokens, shades, strict=True))
    runs = [(known, "|".join(token for token, _ in run)) for known, run in groupby(zip(tokens, learned, strict=True), lambda pair: pair[1])]
    return "".join(f"[{run}]" if known else run for known, run in runs)


def _counts(inputs: int, learned: int, padding: int) -> str:
    return f"{inputs:,} inputs, {learned:,} tokens trained on ({learned / max(inputs, 1):.1%}), {padding:,} padding ({padding / max(inputs + padding, 1):.1%})"


def text_rows(tokenizer: Tokenizer, documents: Iterable[Document], context: int, rows: int, packed: bool) -> Batch:
    """The first rows of documents as pretraining gets them: windows of one long row of tokens or, packed, whole documents that share rows.

    Rows carry document numbers either way, where the tokenizer has a token for the end of a text. Raises ValueError where it has none and
    rows are to be packed, and for text of less than two tokens.
    """
    end_of_text = tokenizer.end_of_text
    if packed and end_of_text is None:
        raise ValueError(f"--pack needs a tokenizer with a token for the end of a text, which a {tokenizer.kind} tokenizer has not")
    documents = list(documents)
    tokens = np.concatenate([ids for ids, _ in encode_documents(documents, tokenizer, end_of_text if len(documents) > 1 else None)])
    if len(tokens) < 2:
        raise ValueError(f"the text has {len(tokens)} tokens: from less than two nothing is learned")
    if packed:
        return next(PackedRows(tokens, context, rows, 0, end_of_text).in_order())
    return next(validation_batches(tokens, context, rows, end_of_text))
