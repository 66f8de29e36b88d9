"""Every kernel is held to its op: the same values and gradients, on the op's own cases and on large odd shapes, deterministic."""
import os
import subprocess
import sys

import numpy as np
import pytest

import tinyllm.kernels.cpu
from tinyllm import ops
from tinyllm.gradcheck import gradcheck
from tinyllm.kernels import KERNELS, MODULES, plain_ops
from tinyllm.kernels.cpu import attention
from tinyllm.nn import Transformer, TransformerConfig
from tinyllm.nn.transformer import Block
from tinyllm.ops.cases import CASES
from tinyllm.tensor import OPS, Into, Tensor, no_grad
from tinyllm.threads import parallel, threads

RANDOM = np.random.default_rng(0)
N = RANDOM.standard_normal


def in_rows(B, T, documents):
    """Numbers of documents that share rows, as packing lays them: rising, and at the end of some rows padding, a document -1.     (B, T)"""
    numbers = np.sort(RANDOM.integers(0, documents, (B, T)))
    numbers[::2, -T // 7 :] = -1
    return numbers


LARGE = {  # odd sizes over several blocks and parts
    "embedding": [((N((70, 9)), RANDOM.integers(0, 70, (3, 100))), {}), ((N((7, 9)), np.zeros((2, 0), int)), {})],
    "linear": [((N((3, 257, 129)), N((65, 129)), N(65)), {}), ((N((5, 300)), N((4097, 300))), {}), ((N((2, 400, 33)), N((70, 33))), {})],
    "gelu_tanh": [((N((3, 257, 129)) * 3,), {}), ((N((40000, 1)),), {})],
    "swiglu": [((N((3, 257, 129)) * 3, N((3, 257, 129))), {})],
    "layernorm": [((N((3, 257, 129)), N(129), N(129)), {}), ((N((700, 65)), N(65)), {}), ((N((700, 65)),), dict(eps=0.1))],
    "rmsnorm": [((N((3, 257, 129)), N(129)), {}), ((N((700, 65)),), dict(eps=0.1))],
    "attention": [
        ((N((2, 4, 257, 16)), N((2, 2, 257, 16)), N((2, 2, 257, 16))), {}),
        ((N((3, 5, 64, 8)), N((3, 5, 64, 8)), N((3, 5, 64, 8))), dict(scale=0.5)),
        ((N((3, 4, 257, 8)), N((3, 2, 257, 8)), N((3, 2, 257, 8)), None, in_rows(3, 257, 9)), {}),
        ((N((30, 2, 70, 8)), N((30, 1, 70, 8)), N((30, 1, 70, 8)), None, in_rows(30, 70, 4)), dict(window=11)),  # several units of work
        ((N((2, 3, 150, 8)), N((2, 3, 150, 8)), N((2, 3, 150, 8)), None, in_rows(2, 150, 60)), dict(causal=False)),
        ((N((2, 3, 200, 8)), N((2, 3, 200, 8)), N((2, 3, 200, 8))), dict(window=70)),
        ((N((2, 3, 200, 8)), N((2, 3, 200, 8)), N((2, 3, 200, 8))), dict(window=2)),
        ((N((2, 3, 200, 8)), N((2, 3, 200, 8)), N((2, 3, 200, 8))), dict(window=33, causal=False)),
        ((N((1, 300, 2, 8)).swapaxes(1, 2), N((1, 300, 1, 8)).swapaxes(1, 2), N((1, 300, 1, 8)).swapaxes(1, 2)), {}),
    ],
    "linear_cross_entropy": [
        ((N((3, 50, 32)), N((65, 32)), RANDOM.integers(-1, 65, (3, 50))), dict(rows=40)),
        ((N((301, 32)), N((1001, 32)), RANDOM.integers(0, 1001, 301), RANDOM.uniform(size=301)), {}),
    ],
}  # fmt: skip


def both(name, arrays, settings, dy=None):
    """(value, gradients) by the kernel and by the op."""
    results = []
    for function in (KERNELS["cpu"][name], OPS[name].array):
        y, backward = function(*arrays, **settings)
        dy = np.asarray(N(y.shape), y.dtype) if dy is None else dy
        gradients = backward(dy)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        gradients = [g() if callable(g) else g for g, _ in zip(gradients, arrays, strict=False)]
        gradients = [g.array(np, x.shape, x.dtype) if isinstance(g, Into) else g for g, x in zip(gradients, arrays, strict=True)]
        results.append([y, *(g for g, x in zip(gradients, arrays, strict=True) if x is not None and x.dtype.kind == "f" and g is not None)])
    return results


def error(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float(np.abs(ours - theirs).max(initial=0)) / max(float(np.abs(theirs).max(initial=0)), 1e-300)


def test_every_kernel_has_its_tests():
    assert KERNELS["cpu"].keys() == LARGE.keys()
    assert MODULES["cpu"] == {(Block, "forward"), (Transformer, "stack")}  # test_kernels_block.py, test_kernels_decode.py


@pytest.mark.parametrize("name, number", [(name, i) for name, cases in LARGE.items() for i in range(len(cases))])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 3e-6)])
def test_equals_its_op(name, number, dtype, tolerance):
    """float32: both sum in another order, so they agree to a few units of rounding of the largest value."""
    arrays, settings = LARGE[name][number]
    arrays = [x if x is None or x.dtype.kind != "f" else x.astype(dtype) for x in arrays]
    assert max(error(*pair) for pair in zip(*both(name, arrays, settings), strict=True)) < tolerance


@pytest.mark.parametrize("case", [c for c in CASES if c.op in LARGE], ids=lambda c: f"{c.op}: {c.label}")
def test_equals_its_op_on_the_ops_own_cases(case):
    arrays = [x.data if isinstance(x, Tensor) else x for x in case.arrays()]
    for ours, theirs in zip(*both(case.op, arrays, case.settings), strict=True):
        assert error(ours, theirs) < 1e-12


@pytest.mark.parametrize("name", LARGE)
def test_gradient(name):
    arrays, settings = LARGE[name][0]
    report = gradcheck(lambda *xs: OPS[name](*xs, **settings), *arrays, method="projection", directions=3)
    assert report, report


def test_what_a_kernel_is_not_made_for_goes_to_the_op():
    """Small arrays, other types, mixtures: bitwise what the op gives."""
    large = N((200, 200))
    for x in (N((3, 4)).astype(np.float32), large.astype(np.float16), large + 1j):
        assert np.array_equal(ops.gelu_tanh(Tensor(x)).data, OPS["gelu_tanh"].array(x)[0])
    y = ops.linear(Tensor(large), Tensor(large.astype(np.float32)))
    assert y.dtype == OPS["linear"].array(large, large.astype(np.float32))[0].dtype


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "documents", [None, in_rows(5, 100, 7), in_rows(5, 100, 80), np.zeros((5, 100), int)], ids=["none", "long", "short", "one"]
)
def test_the_sight_of_a_query_is_what_the_op_lets_it_see(documents, causal, window):
    """Also block by block: what is left out and what is hidden there is what nobody, and what not everybody, sees."""
    seen = attention.sight(100, documents, causal=causal, window=window)
    at = np.arange(100)
    expected = ops.visible(at, at, causal=causal, window=window)[None]
    if documents is not None:
        expected = expected & (documents[:, :, None] == documents[:, None, :])
    assert np.array_equal((at >= seen.first[..., None]) & (at < seen.after[..., None]), expected)
    scores = np.full((len(expected), 100, 100), -np.inf)
    for queries, keys, edges in seen.blocks:
        block = np.zeros((len(expected), 1, 1, keys.stop - keys.start, queries.stop - queries.start))
        for part, hidden in edges:
            block[..., part, :] += hidden
        scores[:, queries, keys] = block[:, 0, 0].swapaxes(1, 2)
        assert expected[:, queries, keys].any((0, 1))[[0, -1]].all()  # nothing is computed beyond the first and the last key
    assert np.array_equal(scores == 0, expected)


def test_documents_in_pieces_and_empty_windows_are_no_stretch():
    assert attention.sight(4, np.array([[0, 0, 1, 1], [2, 3, 3, 2]])) is None
    assert attention.sight(4, np.array([[-1, 0, -1, -1]])) is None
    assert attention.sight(4, window=0) is None
    assert attention.sight(4, np.array([[7, 7, 1, -1], [5, 5, 5, 5]])) is not None  # any numbers, in any order
    q, k, v = N((3, 2, 2, 40, 32))
    for documents, settings in ((np.arange(80).reshape(2, 40) % 3, {}), (None, dict(window=0))):
        ours = ops.attention(q, k, v, None, documents, **settings)
        assert np.array_equal(ours.data, OPS["attention"].array(q, k, v, None, documents, **settings)[0])


def steps(count=3):
    config = TransformerConfig(vocab_size=300, layers=2, heads=4, kv_heads=2, width=64, context=96)
    model = Transformer(config, np.random.default_rng(0))
    ids = np.random.default_rng(1).integers(0, 300, (8, 97))
    for _ in range(count):
        loss = ops.linear_cross_entropy(model.hidden(ids[:, :-1]), model.output_weight, ids[:, 1:])
        loss.backward()
        for _, p in model.named_parameters():
            p.data = p.data - 0.1 * p.grad
            p.grad = None
    return loss.item(), np.concatenate([p.data.ravel() for _, p in model.named_parameters()])


def test_training_is_deterministic_and_close_to_that_of_the_ops():
    (loss, weights), (again, same) = steps(), steps()
    assert loss == again and np.array_equal(weights, same)
    with plain_ops():
        plain, expected = steps()
    assert loss == pytest.approx(plain, rel=1e-5)
    assert np.abs(weights - expected).max() < 1e-4


def test_evaluation_prepares_no_gradient():
    (x, w, t), settings = LARGE["linear_cross_entropy"][0]
    with no_grad():
        y, backward = KERNELS["cpu"]["linear_cross_entropy"](x, w, t, **settings)
    with pytest.raises(TypeError):
        backward(np.ones(()))[0]()
    assert y > 0


# Threads.


@pytest.fixture
def three_threads():
    before = threads()
    threads(3)
    yield
    threads(before)


def test_parts_cover_everything_once(three_threads):
    for length in (0, 1, 2, 3, 7, 100):
        seen = np.zeros(length, int)

        def work(part, number, seen=seen):
            assert 0 <= number < 3
            seen[part] += 1

        parallel(work, length)
        assert (seen == 1).all()


def test_errors_reach_the_caller_and_the_threads_live_on(three_threads):
    def fail(part, number):
        if number == 2:
            raise ValueError("in a thread")

    for _ in range(3):
        with pytest.raises(ValueError, match="in a thread"):
            parallel(fail, 30)
    done = []
    parallel(lambda part, number: done.append(number), 30)
    assert sorted(done) == [0, 1, 2]


def test_nested_calls_run_in_place(three_threads):
    done = []
    parallel(lambda part, number: parallel(lambda p, n: done.append((number, n)), 30), 30)
    assert sorted(done) == [(i, j) for i in range(3) for j in range(3)]


def test_the_number_is_checked_and_results_do_not_depend_on_timing(three_threads):
    with pytest.raises(ValueError, match="at least 1"):
        threads(0)
    assert threads() == 3
    first = steps(1)[1]
    assert all(np.array_equal(first, steps(1)[1]) for _ in range(3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_after_fork(three_threads):
    parallel(lambda part, number: None, 30)
    code = (
        "import os, numpy as np\nfrom tinyllm.threads import parallel, threads\nthreads(2)\nparallel(lambda p, n: None, 9)\n"
        "pid = os.fork()\nseen = []\nparallel(lambda p, n: seen.append(n), 9)\nassert sorted(seen) == [0, 1]\n"
        "if pid: assert os.waitpid(pid, 0)[1] == 0\nelse: os._exit(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_importing_changes_no_thread_setting():
    code = (
        "import threading, numpy\nfrom tinyllm.threads import _blas\nbefore = _blas().get()\nimport tinyllm, tinyllm.nn\n"
        "assert _blas().get() == before and threading.active_count() == 1"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_library_works_without_kernels(tmp_path):
    """A copy of the package with kernels/ deleted trains a step."""
    import shutil

    source = os.path.dirname(tinyllm.__file__)
    shutil.copytree(source, tmp_path / "tinyllm", ignore=shutil.ignore_patterns("kernels", "__pycache__"))
    code = (
        "import numpy as np\nfrom tinyllm import ops\nfrom tinyllm.nn import Transformer, TransformerConfig\n"
        "m = Transformer(TransformerConfig(vocab_size=300), np.random.default_rng(0))\nids = np.zeros((2, 129), int)\n"
        "ops.linear_cross_entropy(m.hidden(ids[:, :-1]), m.output_weight, ids[:, 1:]).backward()\n"
        "import sys\nassert not any('kernels' in name for name in sys.modules if name.startswith('tinyllm'))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=60, env=os.environ | {"PYTHONPATH": str(tmp_path)}).returncode == 0
