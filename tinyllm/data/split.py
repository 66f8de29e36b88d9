"""Which text is learned and which is only measured."""
from collections.abc import Iterable

from tinyllm.backend import random_stream
from tinyllm.data.text import Document


def split(documents: Iterable[Document], val_fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Documents -> (train, validation), with about val_fraction of all characters in the validation part.

    Several documents are split whole: a text of which one half has been learned says little about the other half. They are visited
    in a random order, fixed by the seed, and each is taken for validation if that brings the part closer to its share; each side
    gets at least one, and both keep the order given. A single document is cut: its last val_fraction of characters is the
    validation part. With val_fraction 0 everything is training text.

    Errors: ValueError for a fraction outside [0, 1), no text at all, or a text too short to give both parts.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and less than 1, found {val_fraction}")
    documents = [document for document in documents if document.text]
    if not documents:
        raise ValueError("there is no text: the data holds no document that is not empty")
    if val_fraction == 0:
        return documents, []
    if len(documents) == 1:
        return _cut(documents[0], val_fraction)
    chosen = _choose([len(document.text) for document in documents], val_fraction, seed)
    train = [document for i, document in enumerate(documents) if i not in chosen]
    return train, [documents[i] for i in sorted(chosen)]


def _cut(document: Document, val_fraction: float) -> tuple[list[Document], list[Document]]:
    text = document.text
    cut = int(len(text) * (1 - val_fraction))
    if cut in (0, len(text)):
        raise ValueError(
            f"{document.source}: {len(text)} characters are too few to set aside {val_fraction:g} of them for validation; "
            "give more text, or a val_fraction of 0"
        )
    return [Document(text[:cut], document.source)], [Document(text[cut:], document.source)]


def _choose(lengths: list[int], val_fraction: float, seed: int) -> set[int]:
    """Indices of the documents for validation, for at least two documents."""
    order = random_stream(seed, "split").permutation(len(lengths)).tolist()
    target, size, chosen = val_fraction * sum(lengths), 0, []
    for i in order:
        if size + lengths[i] / 2 < target:  # then |size + length - target| < |size - target|
            chosen.append(i)
            size += lengths[i]
    if not chosen:
        chosen = [min(order, key=lengths.__getitem__)]  # all are longer than the share: the shortest is nearest to it
    return set(chosen[: len(lengths) - 1])
