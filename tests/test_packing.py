"""Packing: the fast form gives the rows of the definition, no document is lost, cut or seen by another."""
import time
import tracemalloc

import numpy as np
import pytest

from tinyllm import ops
from tinyllm.data import IGNORE, PackedRows
from tinyllm.data.packing import pack, pack_by_definition
from tinyllm.finetune.instruct import Example, InstructionBatches
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.tensor import no_grad

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


# Pretraining's rows: PackedRows

END = 0


def by_definition(tokens, context):
    """(inputs, targets) of each piece: a document's tokens are its targets, each after what stands before it in the document."""
    documents, document = [], []
    for token in tokens:
        document.append(token)
        if token == END:
            documents.append(document)
            document = []
    pieces = []
    for targets in [*documents, document]:
        inputs = [END, *targets][: len(targets)]
        pieces += [(inputs[i : i + context], targets[i : i + context]) for i in range(0, len(targets), context)]
    return pieces


def rows_of(batch):
    """The same, read back from a batch."""
    found = []
    for ids, targets, documents in zip(batch.ids, batch.targets, batch.documents, strict=True):
        assert ((targets == IGNORE) == (documents == IGNORE)).all() and (ids[targets == IGNORE] == 0).all()
        for number in sorted(set(documents.tolist()) - {IGNORE}):
            found.append((ids[documents == number].tolist(), targets[documents == number].tolist()))
    return found


def text(lengths, last=True):
    """Tokens of documents of such lengths, end_of_text included; the last one may lack it."""
    tokens = [token for n in lengths for token in [*RANDOM.integers(1, 50, n - 1).tolist(), END]]
    return np.array(tokens if last else tokens[:-1], np.uint16)


TEXTS = {
    "one": (text([7]), 8), "one, cut": (text([20]), 8), "one, no end": (text([7], last=False), 8), "only an end": (np.array([END], np.uint16), 8),
    "a token": (np.array([5], np.uint16), 8), "empty documents": (np.array([END] * 5 + [3, END], np.uint16), 4), "T = 1": (text([3, 1, 5]), 1),
    "full rows": (text([8, 8, 4, 4]), 8), "one more than a row": (text([9, 9]), 8), "no end at last": (text([5, 30, 2, 9], last=False), 8),
    "many": (text((RANDOM.zipf(1.4, 300) % 40 + 1).tolist()), 16), "no end at all": (np.arange(1, 40, dtype=np.uint16), 16),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_every_token_is_a_target_exactly_once_after_its_own_document_alone(name):
    tokens, context = TEXTS[name]
    packed = PackedRows(tokens, context, batch=3, seed=0, end_of_text=END)
    batches = list(packed.in_order())
    assert len(batches) == packed.batches and all(batch.ids.shape[1] <= context and len(batch) == 3 for batch in batches[:-1])
    assert sum(batch.weight for batch in batches) == len(tokens)
    expected = by_definition(tokens.tolist(), context)
    assert sorted(pair for batch in batches for pair in rows_of(batch)) == sorted(expected)


def test_an_epoch_of_steps_is_once_through_all_rows_in_another_order_each_time():
    tokens, context = TEXTS["many"]
    packed = PackedRows(tokens, context, batch=1, seed=3, end_of_text=END)
    epochs = [[rows_of(packed.batch(epoch * len(packed.rows) + n)) for n in range(len(packed.rows))] for epoch in range(2)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == sorted(rows_of(batch) for batch in packed.in_order())
    assert rows_of(PackedRows(tokens, context, 1, 3, END).batch(5)) == epochs[0][5] != rows_of(PackedRows(tokens, context, 1, 4, END).batch(5))


def test_each_nth_batch():
    packed = PackedRows(*TEXTS["many"], batch=2, seed=0, end_of_text=END)
    whole, some = list(packed.in_order()), list(packed.in_order(3))
    assert [rows_of(batch) for batch in some] == [rows_of(batch) for batch in whole[::3]]


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_a_document_in_a_shared_row_gets_the_scores_that_it_gets_alone(arch):
    """No document sees another: the model gives each the same scores, whatever stands beside it."""
    tokens, context = TEXTS["no end at last"][0], 8
    model = Transformer(TransformerConfig(vocab_size=50, layers=2, heads=2, width=16, context=context, arch=arch), np.random.default_rng(0))
    [batch] = PackedRows(tokens, context, batch=99, seed=0, end_of_text=END).in_order()
    with no_grad():
        together = ops.linear(model.hidden(batch.ids, documents=batch.documents), model.output_weight).numpy()
    places = batch.documents != IGNORE
    apart = np.zeros_like(together)
    for row, (ids, numbers) in enumerate(zip(batch.ids, batch.documents, strict=True)):
        for number in set(numbers.tolist()) - {IGNORE}:
            with no_grad():
                own = ids[numbers == number]
                apart[row, numbers == number] = model(own[None]).numpy()[0] if arch == "llama" else at_their_places(model, ids, numbers == number)
    np.testing.assert_allclose(together[places], apart[places], atol=1e-5)


def at_their_places(model, ids, mine):
    """Learned positions are counted along the row: the document where it stands, with other documents around it."""
    other = np.where(mine, ids, (ids + 7) % 49 + 1)
    return ops.linear(model.hidden(other[None], documents=np.where(mine, 1, 0)[None]), model.output_weight).numpy()[0][mine]


def test_packed_rows_that_make_no_sense():
    for tokens, context, batch in ((np.array([], np.uint16), 8, 1), (text([4]), 0, 1), (text([4]), 8, 0)):
        with pytest.raises(ValueError, match=f"found {len(tokens)}, {context} and {batch}"):
            PackedRows(tokens, context, batch, 0, END)


def test_no_python_object_for_each_token():
    """A million tokens in long documents take no more than some bytes each while they are packed."""
    tokens = text([2000] * 500)
    tracemalloc.start()
    PackedRows(tokens, 512, 8, 0, END)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * len(tokens)


@pytest.mark.slow
def test_a_million_documents_are_packed_in_seconds():
    lengths = RANDOM.integers(5, 400, 1_000_000)
    tokens = np.ones(lengths.sum(), np.uint16)
    tokens[np.cumsum(lengths) - 1] = END
    began = time.perf_counter()
    packed = PackedRows(tokens, 256, 16, 0, END)
    assert time.perf_counter() - began < 30 and packed.batch(0).weight > 15 * 256
