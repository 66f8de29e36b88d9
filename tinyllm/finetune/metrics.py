"""How good a classifier is: everything is read off the confusion matrix."""
from collections.abc import Sequence

import numpy as np


def confusion_matrix(labels: Sequence[int], guesses: Sequence[int], classes: int) -> np.ndarray:
    """How often class i (row) was taken for class j (column).     (N,), (N,) int -> (K, K) int

    Raises ValueError where the two have different lengths, or a number is no class.
    """
    labels, guesses = np.asarray(labels, dtype=int), np.asarray(guesses, dtype=int)
    if labels.shape != guesses.shape or labels.ndim != 1:
        raise ValueError(f"a guess is needed for each label: got labels of shape {labels.shape}, guesses of {guesses.shape}")
    both = np.concatenate([labels, guesses])
    if both.size and not 0 <= both.min() <= both.max() < classes:
        raise ValueError(f"classes are numbered from 0 to {classes - 1}, found {both.min() if both.min() < 0 else both.max()}")
    return np.bincount(labels * classes + guesses, minlength=classes**2).reshape(classes, classes)


def accuracy(confusion: np.ndarray) -> float:
    """The share of texts whose class was guessed: the diagonal's. NaN for no text."""
    total = confusion.sum()
    return float(np.trace(confusion) / total) if total else float("nan")


def f1_scores(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class.     (K, K) -> (K,) ×3

        precision = of what was taken for the class, the share that is it          recall = of what is it, the share that was found
        F1 = 2·precision·recall / (precision + recall) = 2·hits / (is it + was taken for it)

    0 where there is nothing to divide by. Macro F1 is the mean over the classes, so that a rare one counts as much as a frequent one.
    """
    hits, real, taken = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    return _share(hits, taken), _share(hits, real), _share(2 * hits, real + taken)


def _share(part, whole):
    return np.divide(part, whole, out=np.zeros(len(whole)), where=whole > 0)


def report(confusion: np.ndarray, names: Sequence[str]) -> str:
    """All of it as a table for a terminal: a line a class, then accuracy and macro F1. Columns of numbers: taken for which class."""
    width = max(map(len, (*names, "class")))
    cells = max(len(str(confusion.max(initial=0))), *map(len, names))
    lines = [f"{'class':<{width}}  " + "  ".join(f"{name:>{cells}}" for name in names) + "   precision  recall      F1"]
    for name, counts, *scores in zip(names, confusion, *f1_scores(confusion), strict=True):
        precision, recall, f1 = scores
        lines.append(f"{name:<{width}}  " + "  ".join(f"{n:>{cells}}" for n in counts) + f"   {precision:9.3f}{recall:8.3f}{f1:8.3f}")
    return "\n".join([*lines, f"accuracy {accuracy(confusion):.3f}, macro F1 {f1_scores(confusion)[2].mean():.3f}"])
