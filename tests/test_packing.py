"""Packing: the fast form gives the rows of the definition, no document is lost, cut or seen by another."""
import numpy as np
import pytest

from tinyllm.data.packing import pack, pack_by_definition
from tinyllm.finetune.instruct import Example, InstructionBatches

RANDOM = np.random.default_rng(0)
CASES = [
    ([], 4), ([4], 4), ([1], 4), ([6, 5, 4, 3, 2], 10), ([3] * 7, 3), ([1] * 20, 8), ([5, 5, 5], 9),
    *((RANDOM.integers(1, top + 1, RANDOM.integers(1, 300)).tolist(), capacity) for top, capacity in ((10, 10), (40, 64), (500, 512), (64, 64))),
    ((RANDOM.zipf(1.5, 400) % 128 + 1).tolist(), 128),
]  # fmt: skip


@pytest.mark.parametrize("lengths, capacity", CASES, ids=lambda value: None)
def test_equals_its_definition(lengths, capacity):
    assert pack(lengths, capacity) == pack_by_definition(lengths, capacity)


@pytest.mark.parametrize("lengths, capacity", CASES, ids=lambda value: None)
def test_every_document_once_and_no_row_too_long(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    full = [sum(lengths[number] for number in row) for row in rows]
    assert all(0 < n <= capacity for n in full)
    assert sum(a + b <= capacity for i, a in enumerate(full) for b in full[:i]) == 0  # of two half-empty rows one would have been filled


def test_best_fit_and_not_the_first_that_fits():
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]  # 4 goes to 6, and 3 to 7
    assert pack([5, 7, 2], 9) == [[1, 2], [0]]  # 2 fills the row of 7, though there is room beside 5


def test_few_rows_for_many_documents():
    """Where short documents fill what long ones leave, hardly a row more than the tokens need."""
    lengths = RANDOM.integers(20, 120, 20000).tolist()
    rows = pack(lengths, 256)
    assert len(rows) < 1.01 * sum(lengths) / 256


@pytest.mark.parametrize("lengths, wrong", [([3, 9], "document 2 has 9 tokens"), ([0], "document 1 has 0 tokens")])
def test_what_does_not_fit(lengths, wrong):
    for function in (pack, pack_by_definition):
        with pytest.raises(ValueError, match=f"{wrong}, but a row holds from 1 to 8"):
            function(lengths, 8)


def test_packed_rows_are_batches_with_a_number_for_each_document():
    lengths = [6, 5, 4, 3, 2]
    examples = [Example(np.full(n, 10 + n), np.full(n, 20 + n)) for n in lengths]
    [batch] = InstructionBatches(examples, batch=2, seed=0, rows=pack(lengths, 10)).in_order()
    assert batch.ids.tolist() == [[16] * 6 + [14] * 4, [15] * 5 + [13] * 3 + [12] * 2]
    assert batch.documents.tolist() == [[0] * 6 + [1] * 4, [0] * 5 + [1] * 3 + [2] * 2]
