import numpy as np
import pytest

from tinyllm.data import IGNORE, Batch, Epochs, RandomWindows, open_shard, validation_batches, write_shard


@pytest.fixture
def tokens(tmp_path):
    """1000 different tokens in a memory map, so that a token tells its place."""
    write_shard(tmp_path / "a.bin", [(range(1000), 1000)], "00" * 32, np.uint16)
    return open_shard(tmp_path / "a.bin").tokens


@pytest.mark.parametrize("kind", [RandomWindows, Epochs])
def test_batches_are_shifted_windows_and_depend_on_seed_and_step_alone(tokens, kind):
    batches = kind(tokens, 7, 5, seed=3)
    first = batches.batch(11)
    assert first.ids.shape == first.targets.shape == (5, 7) and first.ids.dtype == first.targets.dtype == np.int64
    assert np.array_equal(first.targets, first.ids + 1) and np.array_equal(np.diff(first.ids), np.ones((5, 6)))
    assert first.documents is None and first.weight == 35
    batches.batch(12), batches.batch(400)
    again = kind(np.array(tokens), 7, 5, seed=3)  # a fresh object, tokens in memory: as after a resume
    assert np.array_equal(batches.batch(11).ids, first.ids) and np.array_equal(again.batch(11).ids, first.ids)
    assert not np.array_equal(batches.batch(12).ids, first.ids)
    assert not np.array_equal(kind(tokens, 7, 5, seed=4).batch(11).ids, first.ids)


def test_random_windows_reach_both_ends_equally(tokens):
    starts = np.concatenate([RandomWindows(tokens[:13], 3, 100, seed=0).batch(n).ids[:, 0] for n in range(100)])
    counts = np.bincount(starts)
    assert len(counts) == 10 and np.all(np.abs(counts - 1000) < 150)  # 5 standard deviations


@pytest.mark.parametrize(
    "size, context, batch", [(1000, 7, 5), (1000, 10, 3), (101, 50, 1), (8, 7, 4), (9, 7, 2), (15, 7, 1), (2, 1, 1), (40, 1, 7)]
)
def test_an_epoch_repeats_nothing_and_misses_at_most_two_windows(tokens, size, context, batch):
    batches = Epochs(tokens[:size], context, batch, seed=5)
    count = 6 * batches.windows
    rows = np.concatenate([batches.batch(n).ids for n in range(-(-count // batch))])[:count]  # batches straddle epochs
    for epoch in rows.reshape(6, batches.windows, context):
        seen = np.sort(epoch.ravel())
        assert len(np.unique(seen)) == len(seen) > size - 1 - 2 * context
        assert seen[-1] - seen[0] == len(seen) - 1 and seen[-1] < size - 1  # one stretch, whose last target exists
    if size == 1000:
        phases = [epoch.min() for epoch in rows.reshape(6, -1, context)]
        assert len(set(phases)) > 1 and not np.array_equal(rows[: batches.windows], rows[batches.windows : 2 * batches.windows])


@pytest.mark.parametrize("kind", [RandomWindows, Epochs])
def test_text_shorter_than_a_window(tokens, kind):
    assert kind(tokens[:8], 7, 3, seed=0).batch(0).ids.tolist() == [list(range(7))] * 3
    with pytest.raises(ValueError, match="has 7 tokens, but a window of context 7 needs 8: .* lower the context to at most 6$"):
        kind(tokens[:7], 7, 3, seed=0)
    with pytest.raises(ValueError, match="needs 8: give more text$"):
        kind(tokens[:1], 7, 3, seed=0)
    with pytest.raises(ValueError, match="at least 1, found context 0 and batch 3"):
        kind(tokens, 0, 3, seed=0)


@pytest.mark.parametrize("size, context, batch", [(1000, 7, 5), (999, 10, 100), (2, 7, 5), (8, 7, 1), (9, 7, 5), (50, 1, 7)])
def test_validation_predicts_each_token_once(tokens, size, context, batch):
    batches = list(validation_batches(tokens[:size], context, batch))
    ids, targets = (np.concatenate([getattr(b, name) for b in batches]) for name in ("ids", "targets"))
    counted = targets != IGNORE
    assert targets[counted].tolist() == list(range(1, size)) and ids[counted].tolist() == list(range(size - 1))
    assert sum(b.weight for b in batches) == size - 1
    assert all(b.ids.shape[1] == context and len(b.ids) <= batch for b in batches)
    assert ids[~counted].tolist() in ([0] * np.sum(~counted), [size - 1] + [0] * (np.sum(~counted) - 1))  # the last token may be an input


def test_every_so_many_validation_batches_are_those_of_the_whole_pass(tokens):
    whole = list(validation_batches(tokens[:100], 7, 3))
    for every in (1, 2, 4, 9):
        some = list(validation_batches(tokens[:100], 7, 3, every=every))
        assert [b.targets.tolist() for b in some] == [b.targets.tolist() for b in whole[::every]]


def test_validation_needs_two_tokens(tokens):
    with pytest.raises(ValueError, match="has 1 tokens, at least 2 are needed"):
        next(validation_batches(tokens[:1], 7, 1))


def test_documents_are_numbered_within_the_row():
    tokens = np.array([5, 6, 0, 7, 0, 0, 8, 9, 4])
    (batch,) = validation_batches(tokens, 8, 1, end_of_text=0)
    assert batch.ids.tolist() == [[5, 6, 0, 7, 0, 0, 8, 9]]
    assert batch.documents.tolist() == [[0, 0, 1, 1, 2, 3, 3, 3]]
    for kind in (RandomWindows, Epochs):
        documents = kind(tokens, 4, 50, seed=0, end_of_text=0).batch(0).documents
        assert documents.shape == (50, 4)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 7, 12, 65])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_parts_are_all_rows_once_in_order_and_even(rows, count):
    ids = np.arange(rows * 4).reshape(rows, 4)
    targets = np.where(ids % 3 == 0, IGNORE, ids)
    whole = Batch(ids, targets, ids // 2)
    parts = [whole.part(number, count) for number in range(count)]
    assert len(whole) == rows == sum(len(part) for part in parts)
    for name in ("ids", "targets", "documents"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1
    assert sum(part.weight for part in parts) == whole.weight
    assert all(np.shares_memory(part.ids, ids) for part in parts if len(part))  # views: a part costs nothing
    assert Batch(ids, targets).part(0, count).documents is None
