"""Decoding on a GPU: one more token by a captured graph, held to the float64 model on the CPU, token for token, in every kind of cache."""
import gc
from functools import partial

import fake_cuda
import numpy as np
import pytest
from test_generate import KINDS as DECODED
from test_generate import PROMPTS, rows_of, transformer
from test_nn_cache import IDS, KINDS, TINY

from tinyllm.generate import SamplingConfig, beam_search, generate
from tinyllm.kernels.cuda import decode, launch
from tinyllm.nn import Linear, Transformer, TransformerConfig
from tinyllm.tensor import no_grad

TOLERANCE = {"fp32": 1e-5, "fp16": 0.02, "bf16": 0.1}  # of the largest score; what 16 bits make of a model whose weights are this large
OURS = [
    *(changes for changes in KINDS if changes.get("norm_placement") != "post"),
    *(dict(mlp=mlp) for mlp in ("gelu", "relu", "relu2", "silu", "geglu")),
    dict(arch="gpt2", bias=False, tie=False),
    dict(arch="gpt2", width=15, heads=3),  # 5 numbers a head: loaded one by one
    dict(width=48, heads=2, qk_norm=True),  # 24 numbers a head: 6 pieces for 8 lanes
    dict(width=36, heads=9, kv_heads=1),  # nine queries a key, three at a time
    dict(arch="gpt2", mlp_width=1100),  # long rows, shared by four warps
]


USUAL = {name: getattr(decode, name) for name in ("SPAN", "BLOCKS")}


@pytest.fixture(autouse=True)
def few_and_short(monkeypatch):
    """Borders between blocks of keys every few positions, and blocks that take rows of a matrix in turn."""
    monkeypatch.setattr(decode, "SPAN", 4)
    monkeypatch.setattr(decode, "BLOCKS", 2)


@pytest.fixture
def read(monkeypatch):
    """How many tokens our launches have read: by themselves, and as a graph."""
    counts, run = {"launched": 0, "replayed": 0}, decode._Sequence.__call__

    def counted(self, step):
        scores = run(self, step)
        counts["launched" if self.graph is None else "replayed"] += len(step)
        return scores

    monkeypatch.setattr(decode._Sequence, "__call__", counted)
    return counts


def on(xp, model):
    for _, p in model.named_parameters():
        p.data = xp.asarray(p.data)
    return model


def models(xp, precision="fp32", noise=0.4, **changes):
    """The same weights twice, far from those at the start: on the device, and in float64 on the CPU."""
    config = TINY | changes
    ours = Transformer(TransformerConfig(**config, precision=precision), np.random.default_rng(0))
    exact = Transformer(TransformerConfig(**config), np.random.default_rng(0), np.float64)
    rng = np.random.default_rng(1)
    for (_, p), (_, q) in zip(ours.named_parameters(), exact.named_parameters(), strict=True):
        p.data += (noise * rng.standard_normal(p.shape)).astype(np.float32)
        q.data = p.data.astype(np.float64)
    return on(xp, ours), exact


def scores(model, ids, chunks, padding=None):
    """Those after each call, in chunks of so many positions.     -> (calls, B, V)"""
    cache, found, start = model.new_cache(len(ids), left_padding=padding), [], 0
    with no_grad():
        for n in chunks:
            y = model.next_scores(ids[:, start : start + n], cache).data
            found.append(y.get() if hasattr(y, "get") else y)
            start += n
    return np.array(found, dtype=np.float64), cache


def off(found, expected):
    """The largest error, as a share of the largest score of its row."""
    return (np.abs(found - expected).max(-1) / np.abs(expected).max(-1)).max()


# ---- The scores.


@pytest.mark.parametrize("changes", OURS, ids=str)
def test_scores(changes, world, read):
    """A prompt, then tokens one by one, over borders of spans, rolling windows and all; rows of different lengths."""
    ours, exact = models(world.xp, **changes)
    chunks = [9, *[1] * 11]
    assert off(scores(ours, IDS, chunks, [0, 3, 8])[0], scores(exact, IDS, chunks, [0, 3, 8])[0]) < TOLERANCE["fp32"]
    assert read["launched"] + read["replayed"] == 3 * 11 and read["replayed"] > read["launched"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("changes", [dict(arch="gpt2"), dict(kv_heads=2, qk_norm=True), dict(width=32, window=5), dict(arch="gpt2", width=15, heads=3)], ids=str)
def test_scores_in_16_bits(changes, precision, world, read):
    """As good as op by op; in detail, values that come out half a digit apart change much."""
    ours, exact = models(world.xp, precision, **changes)
    chunks = [5, *[1] * 8]
    (found, cache), (expected, _) = scores(ours, IDS, chunks), scores(exact, IDS, chunks)
    assert cache.layers[0].keys.dtype.name == {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < TOLERANCE[precision] / 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "ROWS", 0)
        by_ops, _ = scores(ours, IDS, chunks)
    assert np.mean((found - expected) ** 2) < 2 * np.mean((by_ops - expected) ** 2)
    assert read["launched"] + read["replayed"] == 3 * 8


@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 17])
def test_batches_of_every_size(rows, world, read):
    ours, exact = models(world.xp, kv_heads=2)
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (rows, 12))
    assert off(scores(ours, ids, [9, 1, 1, 1])[0], scores(exact, ids, [9, 1, 1, 1])[0]) < TOLERANCE["fp32"]
    assert read["launched"] == rows and read["replayed"] == 2 * rows


def test_without_a_prompt(world):
    """The first token of all, and padding before it, which nobody sees."""
    ours, exact = models(world.xp)
    found, expected = scores(ours, IDS, [1] * 10, [0, 4, 9])[0], scores(exact, IDS, [1] * 10, [0, 4, 9])[0]
    for row, padded in enumerate([0, 4, 9]):
        assert off(found[padded:, row], expected[padded:, row]) < TOLERANCE["fp32"]


def test_the_same_bits_in_every_order(world):
    """Of threads, warps and blocks: sums are added in one order, whoever comes first."""
    if world.name == "gpu":
        pytest.skip("a GPU has its own order")
    import cuda_on_cpu

    ours, _ = models(world.xp, "bf16", kv_heads=1, arch="gpt2")
    cuda_on_cpu.in_every_order(lambda: scores(ours, IDS, [11, 1, 1, 1, 1])[0])


@pytest.mark.parametrize("mlp_width", [6400, 6144])
def test_several_shapes_of_shared_memory(mlp_width, world):
    """Rows of x for which shared memory has to be asked: a launch that takes less comes between those that take more. Rows of 6144 are 48 KB,
    all that a block gets without asking, of which the kernel's own arrays have had some."""
    ours, exact = models(world.xp, width=16, mlp_width=mlp_width, arch="gpt2", layers=2)
    ids = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 4))
    assert off(scores(ours, ids, [2, 1, 1])[0], scores(exact, ids, [2, 1, 1])[0]) < TOLERANCE["fp32"]


def test_how_many_texts_have_room():
    assert decode._batch(2, 6400 * 4) == 2 and decode._batch(8, 6400 * 4) == 2 and decode._batch(5, 64) == 8 and decode._batch(1, 64) == 1


def test_a_model_as_they_are(world, monkeypatch):
    """Heads of 64, several pieces a lane, spans as long as they are without this file's fixtures; GPT-2 124M on a GPU."""
    for name in ("SPAN", "BLOCKS"):
        monkeypatch.setattr(decode, name, USUAL[name])
    shape = dict(layers=world.size(1, 12), width=world.size(128, 768), heads=world.size(2, 12), mlp_width=world.size(1024, 3072))
    length, vocabulary = world.size(70, 300), world.size(200, 50257)
    ours, exact = models(world.xp, "bf16", 0.02, arch="gpt2", context=world.size(90, 1024), vocab_size=vocabulary, **shape)
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, length))
    found, expected = (scores(model, ids, [length - 3, 1, 1, 1])[0] for model in (ours, exact))
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.02


def test_every_weight_is_read_once(world):
    """In whole sectors, all 32 bytes of which are wanted; shared memory without conflicts."""
    if world.name == "gpu":
        pytest.skip("the emulator counts")
    import cuda_on_cpu

    ours, _ = models(world.xp, "bf16", arch="gpt2", width=64, heads=2, mlp_width=128, layers=1, vocab_size=96)
    cache = ours.new_cache(2)
    with no_grad():
        ours.next_scores(IDS[:2, :5], cache)
        moved = cuda_on_cpu.traffic(lambda: ours.next_scores(IDS[:2, 5:6], cache))
    products = [line for line in moved.lines if line.kernel.endswith("products")]
    weights = [line for line in products if "const Piece*)(w +" in line.where]
    matrices = sum(p.size for name, p in ours.named_parameters() if p.ndim == 2 and "position" not in name)
    assert sum(line.units for line in weights) * 32 == 2 * matrices
    assert all(line.units == line.ideal for line in products if line in weights or line.memory == "shared")


# ---- The graph.


def test_one_graph_for_all_positions(world, read):
    """The first token is launched, the second recorded, and from there on nothing is: not while the arrays stay."""
    ours, _ = models(world.xp, arch="gpt2")
    cache, seen = ours.new_cache(3), []
    with no_grad():
        ours.next_scores(IDS[:, :6], cache)
        for t in range(6, 14):
            ours.next_scores(IDS[:, t : t + 1], cache)
            seen.append(decode._decoders[cache].sequence.graph)
    assert seen[0] is None and seen[1] is not None and len({id(graph) for graph in seen[1:]}) == 1
    assert cache.length == 14 and all(layer.used == 14 for layer in cache.layers)


def test_rows_that_move(world, read):
    """Dropped, doubled, exchanged: the next token meets other arrays."""
    ours, exact = models(world.xp, kv_heads=2)
    found = {}
    for model in (ours, exact):
        cache, ids, results = model.new_cache(3, left_padding=[0, 2, 5]), IDS, []
        with no_grad():
            model.next_scores(ids[:, :6], cache)
            for t, rows in enumerate([None, None, [0, 2], None, None, [1, 1, 0, 1], None, [3]], 6):
                if rows is not None:
                    cache.reorder(np.array(rows))
                    ids = ids[rows]
                y = model.next_scores(ids[:, t : t + 1], cache).data
                results.append(y.get() if model is ours else y)
        found[model] = results
    for a, b in zip(found[ours], found[exact], strict=True):
        assert off(a.astype(np.float64), b) < TOLERANCE["fp32"]
    assert read["launched"] and read["replayed"]


def test_a_prompt_in_the_middle(world, read):
    """Several tokens at once between single ones go the ordinary way, into the same cache."""
    ours, exact = models(world.xp)
    chunks = [3, 1, 1, 1, 4, 1, 1, 2, 1]
    assert off(scores(ours, IDS, chunks)[0], scores(exact, IDS, chunks)[0]) < TOLERANCE["fp32"]
    assert read["launched"] == 3 and read["replayed"] == 3 * 5


def test_nothing_waits(world):
    """A token costs no synchronisation before somebody looks at it."""
    if world.name == "gpu":
        pytest.skip("only the fake device counts")
    ours, _ = models(world.xp, "bf16", arch="gpt2")
    cache = ours.new_cache(3)
    with fake_cuda.forbidden(), no_grad():
        ours.next_scores(IDS[:, :6], cache)
        for t in range(6, 10):
            ours.next_scores(IDS[:, t : t + 1], cache)


def test_results_are_ones_own(world):
    """Scores that are kept do not become those of the next token."""
    ours, _ = models(world.xp)
    cache = ours.new_cache(3)
    with no_grad():
        kept = [ours.next_scores(IDS[:, t : t + 1], cache).data for t in range(4)]
    assert not any(np.array_equal(a.get(), b.get()) for a, b in zip(kept, kept[1:], strict=False))


def test_weights_live_as_long_as_the_cache(world):
    ours, exact = models(world.xp)
    gc.collect()
    before = len(decode._decoders)
    _, cache = scores(ours, IDS, [4, 1, 1])
    assert len(decode._decoders) == before + 1
    del cache
    gc.collect()
    assert len(decode._decoders) == before
    for (_, p), (_, q) in zip(ours.named_parameters(), exact.named_parameters(), strict=True):
        with no_grad():
            p[...] = p.data * 0.9
        q.data *= 0.9
    assert off(scores(ours, IDS, [4, 1, 1])[0], scores(exact, IDS, [4, 1, 1])[0]) < TOLERANCE["fp32"]


# ---- What it is not made for, and bad input.


def test_what_it_is_not_made_for_goes_the_ordinary_way(world, read):
    class Twice(Linear):
        def forward(self, x, rng=None):
            return super().forward(x) * 2

    for changes in (dict(norm_placement="post"), dict(arch="gpt2")):
        ours, exact = models(world.xp, **changes)
        if changes == dict(arch="gpt2"):
            ours.blocks[1].mlp.down.__class__ = exact.blocks[1].mlp.down.__class__ = Twice
        assert off(scores(ours, IDS, [4, 1, 1])[0], scores(exact, IDS, [4, 1, 1])[0]) < TOLERANCE["fp32"]
    ours, _ = models(world.xp)
    scores(ours, np.zeros((decode.ROWS + 1, 5), int), [4, 1])
    with pytest.raises(RuntimeError, match="carries no gradients"):
        ours.next_scores(IDS[:, :1], ours.new_cache(3))
    assert read["launched"] == read["replayed"] == 0


def test_bad_input_is_one_line(world):
    ours, _ = models(world.xp)
    cache = ours.new_cache(3)
    with no_grad():
        ours.next_scores(IDS[:, :22], cache)
        with pytest.raises(ValueError, match="id 23 is outside the vocabulary of 23"):
            ours.next_scores(np.array([[1], [23], [2]]), cache)
        with pytest.raises(ValueError, match="cache is for 3 rows, got 2"):
            ours.next_scores(IDS[:2, :1], cache)
        for t in range(22, 24):
            ours.next_scores(IDS[:, t : t + 1], cache)
        with pytest.raises(ValueError, match="24 are used, and 1 more do not fit"):
            ours.next_scores(IDS[:, :1], cache)
    assert cache.length == 24


# ---- Whole texts.


@pytest.mark.parametrize("kind", ["gpt2", "llama", "grouped", "multi_query", "window", "window_alibi", "window_learned", "odd_context"])
def test_the_same_texts(kind, world, read):
    """Greedy, with rows that end and contexts that roll."""
    assert kind in DECODED
    ours, exact = on(world.xp, transformer(kind, np.float32)), transformer(kind)
    config = SamplingConfig(max_tokens=12, temperature=0)
    end = rows_of(generate(exact, PROMPTS, config))[-1][0][2]
    found, expected = rows_of(generate(ours, PROMPTS, config, end_of_text=end)), rows_of(generate(exact, PROMPTS, config, end_of_text=end))
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, a), (_, b) in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert read["launched"]


SAMPLED = {
    "plain": {}, "top_k": dict(top_k=4), "top_p": dict(top_p=0.8), "min_p": dict(min_p=0.05), "typical": dict(typical=0.7), "greedy": dict(temperature=0),
    "penalties": dict(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1), "all": dict(top_k=9, top_p=0.9, min_p=0.01, typical=0.9, presence_penalty=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLED)
def test_one_look_a_token(name, world):
    """Sampled on the device: the CPU's tokens, and the host waits once for each."""
    ours, exact = on(world.xp, transformer("llama", np.float32)), transformer("llama")
    config = SamplingConfig(max_tokens=6, seed=5, **dict(temperature=1.1) | SAMPLED[name])
    before = len(fake_cuda.synchronisations)
    found = rows_of(generate(ours, PROMPTS[:3], config))
    assert len(fake_cuda.synchronisations) - before == (6 if world.name == "fake" else 0)
    assert [ids for ids, _ in found] == [ids for ids, _ in rows_of(generate(exact, PROMPTS[:3], config))]


def test_beams(world):
    ours, exact = on(world.xp, transformer("grouped", np.float32)), transformer("grouped")
    search = partial(beam_search, prompt=PROMPTS[1], config=SamplingConfig(max_tokens=6, beams=3), end_of_text=3)
    assert [beam.ids for beam in search(ours)] == [beam.ids for beam in search(exact)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("config", [dict(temperature=0), dict(top_p=0.9, top_k=5)], ids=str)
def test_damaged_weights_are_found(value, config, world):
    ours = on(world.xp, transformer("gpt2", np.float32))
    ours.blocks[1].mlp.down.weight.data[3, 3] = value
    with pytest.raises(ValueError, match="not numbers"):
        list(generate(ours, PROMPTS[:2], SamplingConfig(max_tokens=3, **config)))


# ---- Planted errors.

PLANTED = {
    "a sum is read before it is there": ("        __syncthreads();\n        if (threadIdx.x < teams", "        if (threadIdx.x < teams"),
    "and written over while it is read": ("            finish(m + from * OUTPUTS, b, total);\n        }\n        __syncthreads();", "            finish(m + from * OUTPUTS, b, total);\n        }"),
    "rows before they are there": ("Piece{};\n        __syncthreads();", "Piece{};"),
    "the last span's key is forgotten": ("const bool has_new = last / span == (int)blockIdx.x;", "const bool has_new = false;"),
    "the angle's sign": ("(c < half ? -beside : beside)", "(c < half ? beside : -beside)"),
    "one group of heads for all": ("group = head / (H / G);", "group = 0;"),
    "no bias on the way down": ("+= sums[o] + (bias ? load(bias[m + o]) : 0.0f)", "+= sums[o]"),
    "the mean stays": ("- mean[b]) * r[b]", ") * r[b]"),
    "padding is seen": ("first = step[2]", "first = 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name, world, monkeypatch):
    """In the arithmetic by the results, in the order of threads by the emulator."""
    if world.name == "gpu":
        pytest.skip("for the emulator")
    import cuda_on_cpu

    (right, wrong), source = PLANTED[name], launch.source
    files = ("decode", "decode_attention")
    assert sum(source(file).count(right) for file in files) == 1
    monkeypatch.setattr(launch, "source", lambda file: source(file).replace(right, wrong) if file in files else source(file))
    launch._module.cache_clear()
    launch.function.cache_clear()
    try:
        errors = []
        for changes in (dict(arch="gpt2"), dict(kv_heads=2)):
            ours, exact = models(world.xp, **changes)
            errors.append(off(scores(ours, IDS, [9, 1, 1, 1], [0, 3, 8])[0], scores(exact, IDS, [9, 1, 1, 1], [0, 3, 8])[0]))
    except cuda_on_cpu.CudaError as error:
        assert "race" in str(error) or "twice" in str(error)
    else:
        assert not all(error < TOLERANCE["fp32"] for error in errors)  # NaN neither
    finally:
        launch._module.cache_clear()
        launch.function.cache_clear()
