"""The fake device is as strict as CuPy, and the whole library runs on it: the same numbers as on the CPU, and nobody waits unasked.

Here everything is computed by its definition (no kernel, no compiler): fp32, and the 16-bit formats emulated as on the CPU.
test_device_ops.py has the same with kernels and with real 16-bit arrays.
"""
import operator
from types import ModuleType

import fake_cuda
import fake_cupy
import fake_ndarray
import numpy as np
import pytest

from tinyllm import ops
from tinyllm.anomaly import detect_anomaly
from tinyllm.backend import array_module, device_module, to_numpy
from tinyllm.generate import SamplingConfig, beam_search, generate, generate_naive
from tinyllm.kernels import plain_ops
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.ops.cases import CASES
from tinyllm.optim.flat import FlatParameters
from tinyllm.tensor import Tensor, no_grad

OWN = {"allowed", "forbidden", "synchronisations", "synchronise"}  # what only the fake has
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def by_definition():
    with plain_ops():
        yield


@pytest.fixture
def x():
    return fake_cupy.asarray(ARRAY)


# ---- the fake itself ----


@pytest.mark.cuda_on_cpu
def test_it_has_nothing_that_cupy_lacks():
    cupy = pytest.importorskip("cupy", reason="CuPy, to which the fake is held, is not installed; it needs no GPU for this")
    functions = {name for name, x in vars(fake_cupy).items() if not isinstance(x, ModuleType)}  # what it imports itself left out
    offered = [
        (fake_cupy, cupy, functions - OWN - set(vars(fake_ndarray)) | {"asarray", "ndarray"}),
        (fake_cupy.ndarray, cupy.ndarray, set(vars(fake_cupy.ndarray)) - {"_values", "_block", "_number", "__slots__", "__weakref__"}),
        (fake_cupy.ufunc, cupy.ufunc, {"at", "reduceat", "__call__"}),
        (fake_cupy.cuda, cupy.cuda, {"Stream", "Event", "Graph", "Device", "MemoryPool", "alloc", "set_allocator", "get_allocator",
                                     "using_allocator", "get_current_stream", "get_elapsed_time", "is_available", "runtime", "memory", "graph"}),
        (fake_cuda.runtime, cupy.cuda.runtime, set(vars(fake_cuda.runtime))),
        (fake_cuda.memory, cupy.cuda.memory, set(vars(fake_cuda.memory))),
        *[(getattr(fake_cuda, name), getattr(cupy.cuda, name), {n for n in vars(getattr(fake_cuda, name)) if n[0] != "_"})
          for name in ("Stream", "Event", "MemoryPool")],
    ]  # fmt: skip
    for fake, real, names in offered:
        missing = [name for name in names if name[:1] != "_" and not name.isupper() and not hasattr(real, name)]
        assert not missing, f"{real} has no {missing}"
        assert all(hasattr(fake, name) for name in names)
    assert issubclass(cupy.cuda.memory.OutOfMemoryError, MemoryError) and issubclass(cupy.cuda.runtime.CUDARuntimeError, RuntimeError)
    assert all(isinstance(getattr(cupy, name), cupy.ufunc) for name in fake_cupy.UFUNCS)
    assert not [name for name in fake_cupy.FUNCTIONS if isinstance(getattr(cupy, name), cupy.ufunc)]


@pytest.mark.parametrize("mix", [
    lambda x: x + ARRAY, lambda x: ARRAY + x, lambda x: ARRAY @ x.T, lambda x: x @ ARRAY.T, lambda x: x < ARRAY, lambda x: operator.iadd(x, ARRAY),
    np.exp, np.sum, np.asarray, lambda x: np.concatenate([x, x]), lambda x: np.where(x > 0, x, 0), lambda x: np.add(x, x),
    lambda x: fake_cupy.where(ARRAY > 0, x, x), lambda x: fake_cupy.maximum(x, ARRAY), lambda x: fake_cupy.concatenate([x, ARRAY]),
    lambda x: fake_cupy.zeros_like(ARRAY), lambda x: fake_cupy.exp(ARRAY), lambda x: fake_cupy.sum(ARRAY), lambda x: x + [1, 2, 3],
    lambda x: x.max(initial=0), lambda x: x.sum(where=True),
])  # fmt: skip
def test_arrays_of_the_host_do_not_mix_in(x, mix):
    with pytest.raises(TypeError):
        mix(x)


def test_what_cupy_lacks_is_missing():
    for name in ("errstate", "vecdot", "bfloat16", "ndindex", "testing"):
        assert not hasattr(fake_cupy, name)
    with pytest.raises(NotImplementedError):
        fake_cupy.multiply.reduceat(fake_cupy.ones(3), fake_cupy.asarray([0, 1]))


def test_numbers_keep_an_arrays_precision_as_they_do_in_cupy(x):
    assert (x * 2.0).dtype == (2 - x).dtype == (np.float32(2) * x).dtype == np.float32
    assert (np.float64(2) * x).dtype == (x * np.float64(2)).dtype == np.float64  # a trap, there as here
    assert type(x.sum()) is type(x[0, 0]) is type(fake_cupy.exp(x.max())) is fake_cupy.ndarray and x.sum().shape == ()


def test_views_know_their_base_and_share_memory(x):
    for view in (x[0], x.T, x.reshape(3, 2), x.swapaxes(0, 1)[1:], x.reshape(-1), fake_cupy.broadcast_to(x, (4, 2, 3)), x.view(np.uint32)):
        assert view.base is x
    for copy in (x + 0, x.copy(), x.astype(np.float32), x[[0, 1]], x.T.reshape(-1), fake_cupy.ascontiguousarray(x.T)):
        assert copy.base is None
    x.T[0, 1] = 40
    assert x.data.ptr % 512 == 0 and fake_cupy.asnumpy(x)[1, 0] == 40
    assert fake_cupy.asarray(x) is x and x.astype(np.float32, copy=False) is x


def test_indices_behave_as_they_do_in_cupy(x):
    assert x[:, np.array([3, -4])].get().tolist() == [[0, 2], [3, 5]]  # out of range: around
    x[np.array([0])] = 7.0
    with pytest.raises(ValueError, match="fill"):
        x[...] = ARRAY
    before = len(fake_cupy.synchronisations)
    assert x[x > 4].shape == (4,) and fake_cupy.synchronisations[before:] == ["x[mask]"]


def test_running_sums_make_reduceat_inexact():
    rows = fake_cupy.asarray(np.array([1e8, 1, 1], np.float32))
    assert fake_cupy.add.reduceat(rows, fake_cupy.asarray(np.array([0, 1]))).get().tolist() == [1e8, 0]


@pytest.mark.parametrize("look", [
    lambda x: float(x[0]), lambda x: int(x[0]), bool, repr, str, lambda x: x.item(), lambda x: x.get(), lambda x: x.tolist(), fake_cupy.asnumpy, fake_cupy.flatnonzero, to_numpy,
    lambda x: x[x > 0], lambda x: operator.setitem(x, x > 0, 1), lambda x: "1" if x else "0", fake_cupy.unique, "{}".format,
    lambda x: fake_cupy.cuda.Device().synchronize(), lambda x: fake_cupy.cuda.get_current_stream().synchronize(),
])  # fmt: skip
def test_whatever_waits_is_counted_and_can_be_forbidden(look):
    one, before = fake_cupy.ones(1, dtype=int), len(fake_cupy.synchronisations)
    look(one)
    assert len(fake_cupy.synchronisations) == before + 1
    with pytest.raises(RuntimeError, match="synchronises with the device in a step"), fake_cupy.forbidden("in a step"):
        look(one)
    with fake_cupy.forbidden(), fake_cupy.allowed():
        look(one)
    assert len(fake_cupy.synchronisations) == before + 1


def test_nothing_else_waits(x):
    with fake_cupy.forbidden():
        for row in x:
            assert len(row) == 3
        y = fake_cupy.where(x > 1, x, -1.0) @ fake_cupy.asarray(ARRAY.T)
        y[np.array([1, 0])] += y.sum(0)[:, None] * y.mean()
        y[fake_cupy.arange(2), fake_cupy.asarray([0, 1])] = 0


def test_a_graph_does_its_work_when_it_is_launched(x):
    stream, total, first = fake_cupy.cuda.Stream(non_blocking=True), fake_cupy.zeros(3, dtype=np.float32), fake_cupy.zeros((), dtype=int)
    with stream:
        stream.begin_capture()
        row = x[first] * 2
        total += row
        with pytest.raises(RuntimeError, match="capturing"):
            float(total[0])
        with pytest.raises(RuntimeError, match="captured"):
            fake_cupy.asarray([1.0])
        graph = stream.end_capture()
    assert total.get().tolist() == [0, 0, 0] and np.isnan(row.get()).all()
    graph.launch(stream)
    x[1], first[...] = 1.0, 1
    graph.launch(stream)
    assert total.get().tolist() == [2, 4, 6] and row.get().tolist() == [2, 2, 2]


def test_memory_is_counted_and_can_run_out():
    pool = fake_cupy.cuda.MemoryPool()
    with fake_cupy.cuda.using_allocator(pool.malloc):
        y = fake_cupy.zeros((256, 1024), dtype=np.float32)
        view = y[1:]
        assert pool.used_bytes() == 2**20
        pool.set_limit(size=3 * 2**20)
        z = y + view[0]
        with pytest.raises(MemoryError, match="Out of memory allocating 2,097,152 bytes"):
            fake_cupy.concatenate([y, z])
        del y
        assert pool.used_bytes() == 2 * 2**20  # the view keeps it
        del view, z
    assert pool.used_bytes() == 0 and pool.total_bytes() == 2 * 2**20


def test_it_takes_cupys_place(monkeypatch, x):
    monkeypatch.setitem(__import__("sys").modules, "cupy", fake_cupy)
    monkeypatch.setattr("tinyllm.backend._preparations", [])
    assert device_module("cuda") is fake_cupy is array_module(x) is fake_cupy.get_array_module(x)


# ---- the library on it ----


def on_device(x):
    """An argument of a case as the device gets it: fp32 there; integers and masks stay on the host."""
    if isinstance(x, Tensor):
        return Tensor(on_device(x.data))
    return fake_cupy.asarray(x.astype(np.float32)) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x


def leaf(x):
    floating = isinstance(x, np.ndarray | fake_cupy.ndarray) and x.dtype.kind == "f"
    return Tensor(x, requires_grad=True) if floating else x


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}: {c.label}")
def test_every_op_runs_on_the_device_and_nobody_waits(case):
    arrays = case.arrays()
    here, there = [leaf(x) for x in arrays], [leaf(on_device(x)) for x in arrays]
    expected = case.function(*here)
    dy = case.upstream(expected.shape)
    expected.backward(dy)
    with fake_cupy.forbidden():
        found = case.function(*there)
        found.backward(fake_cupy.asarray(dy.astype(np.float32)))
    assert type(found.data) is fake_cupy.ndarray and found.dtype == np.float32
    for theirs, ours in [(expected.data, found.data)] + [(a.grad, b.grad) for a, b in zip(here, there, strict=True) if isinstance(b, Tensor)]:
        if theirs is not None:
            assert ours.dtype == np.float32 and ours.shape == theirs.shape
            assert np.abs(ours.get() - theirs).max(initial=0) < 1e-5 * max(1, np.abs(theirs).max(initial=0))


@pytest.mark.parametrize("op, arguments, at_fault", [
    (ops.embedding, [(6, 3), np.array([[5, 6]])], "id 6 is outside"),
    (ops.cross_entropy, [(2, 3), np.array([1, -2])], "id -2 is outside"),
    (ops.linear_cross_entropy, [(2, 3), (4, 3), np.array([4, 4])], "id 4 is outside"),
])  # fmt: skip
@pytest.mark.parametrize("place", ["host", "device"])
def test_bad_ids_are_found_wherever_they_are(op, arguments, at_fault, place):
    ids = arguments[-1] if place == "host" else fake_cupy.asarray(arguments[-1])
    with pytest.raises(ValueError, match=at_fault):
        op(*(Tensor(fake_cupy.zeros(shape, dtype=np.float32)) for shape in arguments[:-1]), ids)


def test_ids_on_the_device_give_the_same():
    w, ids, targets = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32), np.array([[1, 5, 1]]), np.array([[2, -1, 6]])
    results = []
    for xp in (lambda a: a, fake_cupy.asarray):
        table = Tensor(fake_cupy.asarray(w), requires_grad=True)
        loss = ops.linear_cross_entropy(ops.embedding(table, xp(ids)), table, xp(targets), xp(np.array([[1.0, 2.0, 3.0]], np.float32)))
        loss.backward()
        results.append((loss.item(), table.grad.get()))
    assert results[0][0] == results[1][0] and np.array_equal(results[0][1], results[1][1])


def test_a_batch_without_targets_warns_where_the_host_can_see_it():
    logits, targets = Tensor(fake_cupy.ones((2, 3)), requires_grad=True), np.array([-1, -1])
    with pytest.warns(RuntimeWarning, match="every target is ignored"):
        ops.cross_entropy(logits, targets)
    loss = ops.cross_entropy(logits, np.array([1, 2]), fake_cupy.zeros(2))  # weights on the device are not looked at
    loss.backward()
    assert loss.item() == 0 and not logits.grad.get().any()


V = 29
TINY = dict(vocab_size=V, layers=2, heads=4, width=16, mlp_width=24, context=12)
IDS, TARGETS = np.random.RandomState(0).randint(0, V, (2, 3, 12))
TARGETS[0, :3] = -1
DOCUMENTS = np.cumsum(np.random.RandomState(1).uniform(size=(3, 12)) < 0.2, axis=1)
CHOICES = [
    dict(arch="gpt2", dropout=0.1), dict(arch="llama", kv_heads=2, tie=False),
    dict(arch="llama", attention="tiled", qk_norm=True, norm_placement="post", positions="sinusoidal"),
    dict(positions="alibi", mlp="relu2", bias=True, softcap=4.0, recompute=True, dropout=0.2), dict(positions="none", window=4, mlp="geglu"),
]  # fmt: skip


def models(**changes):
    """The same model on the CPU and on the device."""
    made = []
    for xp in (np, fake_cupy):
        model = Transformer(TransformerConfig(**(TINY | changes)), np.random.default_rng(0))
        rng = np.random.default_rng(1)
        for _, p in model.named_parameters():
            p.data = xp.asarray(p.data + (0.2 * rng.standard_normal(p.shape)).astype(np.float32))
        made.append(model)
    return made


def step(model, documents=None):
    hidden = model.hidden(IDS, documents=documents, rng=np.random.default_rng(2) if model.config.dropout else None)
    loss = ops.linear_cross_entropy(hidden, model.output_weight, TARGETS)
    loss.backward(1024.0)
    return loss


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_a_training_step_is_the_cpus_and_does_not_wait(choices, precision):
    here, there = models(precision=precision, **choices)
    documents = DOCUMENTS if choices.get("positions") == "none" else None
    expected = step(here, documents)
    with fake_cupy.forbidden():
        found = step(there, documents)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, p), (_, q) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert np.abs(q.grad.get() - p.grad).max() < 1e-5 * np.abs(p.grad).max(), name


def test_gradients_land_in_flat_arrays():
    here, there = models()
    flats = [FlatParameters(model.named_parameters()) for model in (here, there)]
    step(here)
    with fake_cupy.forbidden():
        step(there)
        found = flats[1].grad
    assert type(found) is fake_cupy.ndarray and there.blocks[0].mlp.up.weight.grad.base is found
    assert np.abs(found.get() - flats[0].grad).max() < 1e-5 * np.abs(flats[0].grad).max()


def test_weights_move_between_cpu_and_device():
    here, there = models()
    state = here.state_dict()
    for _, p in there.named_parameters():
        p.data[...] = 0
    there.load_state_dict(state)
    assert all(np.array_equal(values, state[name]) for name, values in there.state_dict().items())
    assert all(type(p.data) is fake_cupy.ndarray for _, p in there.named_parameters())


def test_anomalies_are_found_on_the_device():
    y = Tensor(fake_cupy.asarray(np.array([1.0, 0.0])), requires_grad=True)
    with detect_anomaly(), pytest.raises(FloatingPointError, match="'div' made NaN or infinity"):
        1 / y
    _, there = models(recompute=True)
    with detect_anomaly():
        assert np.isfinite(step(there).item())


SAMPLING = [
    dict(temperature=0.0), dict(temperature=0.7, top_k=5), dict(top_p=0.8), dict(min_p=0.1, typical=0.7),
    dict(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1),
]  # fmt: skip
GROWING = [dict(arch="gpt2"), dict(kv_heads=2, tie=False), dict(window=4), dict(positions="alibi", window=5)]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
@pytest.mark.parametrize("choices", GROWING, ids=str)
def test_texts_grow_as_on_the_cpu(choices, sampling):
    """Prompts of three lengths (left padding), past the context (12) or with a rolling cache. The host waits once a token."""
    here, there = models(**choices)
    prompts, config = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], SamplingConfig(max_tokens=18, seed=3, **sampling)
    expected, steps = list(generate(here, prompts, config, end_of_text=0)), []
    waits = len(fake_cupy.synchronisations)
    for found in generate(there, prompts, config, end_of_text=0):
        steps.append(found)
        assert len(fake_cupy.synchronisations) - waits == 1
        waits = len(fake_cupy.synchronisations)
    assert len(steps) == len(expected)
    for ours, theirs in zip(steps, expected, strict=True):
        assert np.array_equal(ours.ids, theirs.ids) and np.allclose(ours.log_probabilities, theirs.log_probabilities, atol=1e-5)


def test_other_ways_to_generate_are_the_cpus():
    here, there = models(kv_heads=2)
    config = SamplingConfig(max_tokens=6, beams=3)
    assert [b.ids for b in beam_search(here, [1, 2], config, end_of_text=0)] == [b.ids for b in beam_search(there, [1, 2], config, end_of_text=0)]
    config = SamplingConfig(max_tokens=16, seed=3, temperature=0.8, repetition_penalty=1.2)
    assert generate_naive(here, [1, 2], config) == generate_naive(there, [1, 2], config)


def test_a_cache_on_the_device_gives_the_full_forward():
    _, there = models(arch="gpt2")
    with no_grad(), fake_cupy.forbidden():
        cache = there.new_cache(3)
        parts = [there(IDS[:, a:b], cache=cache).data for a, b in ((0, 5), (5, 6), (6, 12))]
        whole = there(IDS).data
    assert np.abs(np.concatenate([p.get() for p in parts], 1) - whole.get()).max() < 1e-4
