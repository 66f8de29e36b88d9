"""The binding of cuBLASLt: every epilogue, what is kept and what is asked again, errors; and its descriptions in NVIDIA's own library."""
import ctypes
import functools
import operator
import re
import sys
from pathlib import Path

import fake_cublaslt
import fake_cuda
import numpy as np
import pytest

from tinyllm import ops
from tinyllm.kernels.cuda import cublaslt, linear

on_cpu = pytest.mark.cuda_on_cpu
SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 7, 15
MATRIX = cublaslt.Matrix(format=0, rows=8, columns=8, leading=8, transposed=False, count=1, stride=0, alignment=256)


def numbers(world, shape, dtype, seed):
    x = world.xp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)
    return x, x.get().astype(np.float64)


def _gelu(x):
    return ops.gelu_tanh.array(x)[0]


def _slope(x):
    return ops.gelu_tanh.array(x)[1](np.ones_like(x))


EPILOGUES = {  # name -> (has it a bias, an aux, formula: of a, b, their product, bias and aux, the result and what bias and aux hold then)
    "DEFAULT": (False, False, lambda a, b, ab, bias, aux: (ab, None, None)),
    "BIAS": (True, False, lambda a, b, ab, bias, aux: (ab + bias, bias, None)),
    "GELU_AUX": (False, True, lambda a, b, ab, bias, aux: (_gelu(ab), None, ab)),
    "GELU_AUX_BIAS": (True, True, lambda a, b, ab, bias, aux: (_gelu(ab + bias), bias, ab + bias)),
    "DGELU": (False, True, lambda a, b, ab, bias, aux: (ab * _slope(aux), None, aux)),
    "DGELU_BGRAD": (True, True, lambda a, b, ab, bias, aux: (ab * _slope(aux), (ab * _slope(aux)).sum(0), aux)),
    "BGRADA": (True, False, lambda a, b, ab, bias, aux: (ab, b.sum(0), None)),
    "BGRADB": (True, False, lambda a, b, ab, bias, aux: (ab, a.sum(1), None)),
}


USED = ("DEFAULT", "BIAS", "GELU_AUX", "GELU_AUX_BIAS", "DGELU")  # by linear.py: these have to be there on every GPU


@pytest.mark.parametrize("into", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("name", EPILOGUES)
def test_epilogues(world, name, into):
    if into == "float32" and "GELU" in name and world.name == "gpu":
        pytest.skip("how exact tanh is in fp32 is not documented, and nothing relies on it")
    (a, a64), (b, b64) = numbers(world, (48, 24), into, 0), numbers(world, (24, 32), into, 1)
    fed_bias, fed_aux, formula = EPILOGUES[name]
    bias, bias64 = numbers(world, (48 if name == "BGRADB" else 32,), into, 2) if fed_bias else (None, None)
    aux, aux64 = numbers(world, (48, 32), into, 3) if fed_aux else (None, None)
    out = world.xp.empty((48, 32), dtype=into)
    if not cublaslt.matmul(a, b, out, epilogue=getattr(cublaslt, name), bias=bias, aux=aux):
        assert world.name == "gpu" and name not in USED
        pytest.skip("this GPU has no algorithm for it")
    wants = formula(a64, b64, a64 @ b64, bias64, aux64)
    for y, want in zip((out, bias, aux), wants, strict=True):
        if want is not None:
            error = np.abs(y.get().astype(np.float64) - want).max() / np.abs(want).max()
            assert error < {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[into] * 1.5, name


def test_the_gradients_of_weights_and_bias_come_in_fp32_from_16_bits(world):
    (dy, dy64), (x, x64) = numbers(world, (40, 16), "bfloat16", 0), numbers(world, (40, 24), "bfloat16", 1)
    dw, db = world.xp.empty((16, 24), dtype=np.float32), world.xp.empty(16, dtype=np.float32)
    if not cublaslt.matmul(dy.T, x, dw, epilogue=cublaslt.BGRADB, bias=db):
        assert world.name == "gpu"
        pytest.skip("this GPU has no algorithm for it")
    assert np.allclose(dw.get(), dy64.T @ x64, atol=1e-5) and np.allclose(db.get(), dy64.sum(0), atol=1e-5)


@on_cpu
def test_how_the_library_sees_an_array(fake):
    """By columns: NumPy's rows are its columns. Distances in numbers, alignment in bytes and of every matrix."""
    x = fake.xp.zeros((3, 10, 16), dtype=np.float16)
    seen = {
        "rows": (x[0], (16, 10, 16, False, 1, 0, 256)),
        "columns": (x[0].T, (16, 10, 16, True, 1, 0, 256)),
        "part": (x[0, :, 2:7], (5, 10, 16, False, 1, 0, 4)),
        "several": (x, (16, 10, 16, False, 3, 160, 64)),
        "parts of several": (x[:, 1:3, 8:], (8, 2, 16, False, 3, 160, 16)),
        "one of several": (x[:1], (16, 10, 16, False, 1, 0, 256)),
        "one row": (x[0, 3:4], (16, 1, 16, False, 1, 0, 32)),
        "one column": (x[0, :, 3:4], (1, 10, 16, False, 1, 0, 2)),
        "the same ones": (fake.xp.broadcast_to(x[0], (4, 10, 16)), (16, 10, 16, False, 4, 0, 256)),
    }
    for name, (array, want) in seen.items():
        assert cublaslt.matrix(array) == (2, *want), name
    for array in (x[0, :, ::2], x[0, ::-1], fake.xp.broadcast_to(x[0, 0], (10, 16)), x.swapaxes(0, 2)[:, :, ::2]):
        assert cublaslt.matrix(array) is None


@on_cpu
def test_a_product_is_planned_once(fake):
    """A second product of the same kind asks nothing of the library, whatever is in its arrays and wherever they are."""
    calls = fake_cublaslt.library().calls
    a, b = fake.xp.ones((9, 16), dtype=np.float16), fake.xp.ones((16, 24), dtype=np.float16)
    bias, other = fake.xp.ones(24, dtype=np.float16), fake.xp.zeros(24, dtype=np.float16)
    linear.linear_forward(a, b.T, bias)
    calls.clear()
    assert linear.linear_forward(a + 1, b.T, other).get().tolist() == [[32.0] * 24] * 9
    assert set(calls) == {"matmul", "cublasLtMatmulDescSetAttribute"} and calls["matmul"] == 1  # the attribute: where the bias is
    linear.times(a, b[:, :23])
    assert calls["heuristic"] == 1


@on_cpu
def test_what_has_no_algorithm_goes_in_steps(fake, monkeypatch):
    """Where the library lacks an epilogue, the same comes from a product and a kernel; where it lacks a product, an error names it."""
    (x, x64), (w, w64), (b, b64) = (numbers(fake, shape, "float16", seed) for seed, shape in enumerate(((5, 8), (16, 8), (16,))))
    inner, matmul = x64 @ w64.T + b64, cublaslt.matmul
    assert matmul(x.astype(np.float32), w.astype(np.float32).T, fake.xp.empty((5, 16), dtype=np.float16)) is False
    products_only = lambda *arrays, epilogue=cublaslt.DEFAULT, bias=None, aux=None, **scales: (  # noqa: E731
        epilogue == cublaslt.DEFAULT and matmul(*arrays, **scales)
    )
    monkeypatch.setattr(cublaslt, "matmul", products_only)
    active, pre = linear.gelu_linear(x, w, b)
    assert np.allclose(pre.get(), inner, atol=0.01) and np.allclose(active.get(), _gelu(inner), atol=0.01)
    d_pre = linear.gelu_backward_times(x, w.T, pre)
    assert np.allclose(d_pre.get(), x64 @ w64.T * _slope(inner), atol=0.01)
    assert np.allclose(linear.linear_forward(x, w, b).get(), inner, atol=0.01)
    monkeypatch.setattr(cublaslt, "matmul", lambda *arrays, **settings: False)
    with pytest.raises(cublaslt.CublasLtError, match=r"no algorithm for the product of \(5, 8\) and \(8, 16\) in float16$"):
        linear.times(x, w.T)


@on_cpu
@pytest.mark.parametrize("major, fused", ((8, False), (9, True), (10, True), (12, False)))
def test_gelu_is_left_to_the_library_where_that_is_faster(fake, monkeypatch, major, fused):
    monkeypatch.setitem(fake_cuda.PROPERTIES, "major", major)
    epilogues, matmul = [], cublaslt.matmul
    spy = lambda *a, epilogue=cublaslt.DEFAULT, **k: epilogues.append(epilogue) or matmul(*a, epilogue=epilogue, **k)  # noqa: E731
    monkeypatch.setattr(cublaslt, "matmul", spy)
    x, w = fake.xp.ones((4, 8), dtype=np.float16), fake.xp.ones((16, 8), dtype=np.float16)
    active, pre = linear.gelu_linear(x, w)
    linear.gelu_backward_times(x, w.T, pre)
    assert epilogues == ([cublaslt.GELU_AUX, cublaslt.DGELU] if fused else [cublaslt.DEFAULT] * 2)
    assert active.get().tolist() == [[8.0] * 16] * 4
    linear.gelu_linear(x.astype(np.float32), w)
    assert epilogues[-1] == (cublaslt.GELU_AUX if fused else cublaslt.DEFAULT)  # fp32 beside fp16 is fp16
    linear.gelu_linear(x.astype(np.float32), w.astype(np.float32))
    assert epilogues[-1] == cublaslt.DEFAULT


@on_cpu
def test_products_on_two_streams_have_scratch_memory_of_their_own(fake):
    a = fake.xp.ones((8, 8), dtype=np.float32)
    places = set()
    for stream in (fake.xp.cuda.Stream(non_blocking=True), fake.xp.cuda.Stream(non_blocking=True)):
        with stream:
            linear.times(a, a)
            places.add(cublaslt._workspace(fake.xp, 0, stream.ptr).data.ptr)
    assert len(places) == 2


@on_cpu
def test_a_failing_call_is_named_with_its_status(fake):
    plan = cublaslt.Plan(cublaslt.library(), MATRIX, MATRIX, MATRIX)
    with pytest.raises(cublaslt.CublasLtError, match=r"^cublasLtMatrixLayoutSetAttribute failed: CUBLAS_STATUS_INVALID_VALUE$"):
        cublaslt._set(plan.lt, "MatrixLayout", plan.a, (99, ctypes.c_int32), 1)


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(OSError, match=r"^--device cuda needs .* pip install .*$"):
        cublaslt.library.__wrapped__()


# ---- the fake library holds to the documentation ----

@on_cpu
@pytest.mark.parametrize(
    ("changed", "status"),
    (
        ({}, SUCCESS),
        ({"a": {"leading": 7}}, INVALID_VALUE),  # columns would overlap
        ({"a": {"rows": 4}}, INVALID_VALUE),  # op(A) has not D's rows
        ({"b": {"rows": 4}}, INVALID_VALUE),
        ({"b": {"count": 2}}, INVALID_VALUE),
        ({"a": {"format": 2}}, NOT_SUPPORTED),  # A and B of different formats
        ({"d": {"format": 2}}, NOT_SUPPORTED),  # an fp16 result of fp32 factors
        ({"epilogue": cublaslt.DGELU, "leading": 8, "aux": 16}, SUCCESS),
        ({"epilogue": cublaslt.DGELU, "leading": 12, "aux": 16}, INVALID_VALUE),  # not a multiple of 8
        ({"epilogue": cublaslt.DGELU, "leading": 0, "aux": 16}, INVALID_VALUE),  # less than the rows
        ({"epilogue": cublaslt.DGELU, "leading": 8}, INVALID_VALUE),  # no aux
        ({"epilogue": cublaslt.BIAS}, INVALID_VALUE),  # no bias
        ({"epilogue": 3}, INVALID_VALUE),
    ),
)
def test_the_fake_refuses_what_is_documented_as_wrong(fake, changed, status):
    lt = cublaslt.library()
    a, b, d = (MATRIX._replace(**changed.get(name, {})) for name in "abd")
    plan = cublaslt.Plan(lt, a, b, d, changed.get("epilogue", cublaslt.DEFAULT), changed.get("leading", 0))
    plan.point_to(0, changed.get("aux", 0))
    if status == INVALID_VALUE:
        with pytest.raises(cublaslt.CublasLtError, match="CUBLAS_STATUS_INVALID_VALUE"):
            plan.search(256, 256, 256)
    else:
        assert plan.search(256, 256, 256) is (status == SUCCESS)


@on_cpu
def test_the_fake_runs_an_algorithm_only_as_it_was_found(fake):
    """Its problem, its alignments, scratch memory that is there and aligned."""
    lt, arrays = cublaslt.library(), [fake.xp.ones(2**10, dtype=np.float32), fake.xp.ones(2**10, dtype=np.float32), fake.xp.empty(2**20)]
    x, y, scratch = (array.data.ptr for array in arrays)
    plan, other = cublaslt.Plan(lt, MATRIX, MATRIX, MATRIX), cublaslt.Plan(lt, MATRIX._replace(transposed=True), MATRIX, MATRIX)
    assert plan.search(256, 256, 256) and other.search(256, 256, 256)
    plan.run(x, x, y, 1.0, 0.0, scratch, 0)
    for wrong in ((x + 128, x, y, scratch), (x, x + 128, y, scratch), (x, x, y + 128, scratch), (x, x, y, scratch + 128), (x, x, y, 0)):
        with pytest.raises(cublaslt.CublasLtError, match="cublasLtMatmul failed: CUBLAS_STATUS_INVALID_VALUE"):
            plan.run(*wrong[:3], 1.0, 0.0, wrong[3], 0)
    plan.algorithm = other.algorithm
    with pytest.raises(cublaslt.CublasLtError, match="cublasLtMatmul failed"):
        plan.run(x, x, y, 1.0, 0.0, scratch, 0)


# ---- NVIDIA's library, where it is installed (pip install nvidia-cublas): what needs no GPU of it ----


@pytest.fixture
def nvidia():
    try:
        return cublaslt.library.__wrapped__()
    except OSError:
        pytest.skip("cuBLASLt is not installed")


def read(lt, kind, of, attribute):
    number, c_type = attribute
    value, written = c_type(), ctypes.c_size_t()
    get = getattr(lt, f"cublasLt{kind}GetAttribute")
    assert get(of, number, ctypes.byref(value), ctypes.c_size_t(ctypes.sizeof(value)), ctypes.byref(written)) == SUCCESS
    assert written.value == ctypes.sizeof(value)
    return value.value


@on_cpu
def test_a_description_reads_back_from_nvidias_library(nvidia):
    a = cublaslt.Matrix(14, 16, 8, 24, True, 3, 400, 256)
    b, d = a._replace(rows=16, columns=32, transposed=False, stride=0), cublaslt.Matrix(0, 8, 32, 8, False, 3, 256, 16)
    plan = cublaslt.Plan(nvidia, a, b, d, cublaslt.GELU_AUX_BIAS, 40)
    plan.point_to(4096, 8192)
    attributes = ("TRANSPOSE_A", "TRANSPOSE_B", "EPILOGUE", "AUX_LEADING", "BIAS_POINTER", "AUX_POINTER")
    assert [read(nvidia, "MatmulDesc", plan.operation, getattr(cublaslt, name)) for name in attributes] == [1, 0, 164, 40, 4096, 8192]
    compute, scale, rows, columns, leading = (0, ctypes.c_int32), (1, ctypes.c_int32), *((i, ctypes.c_uint64) for i in (2, 3, 4))
    assert [read(nvidia, "MatmulDesc", plan.operation, attribute) for attribute in (compute, scale)] == [68, 0]
    for layout, matrix in ((plan.a, a), (plan.b, b), (plan.d, d)):
        attributes = ((0, ctypes.c_uint32), rows, columns, leading, cublaslt.BATCH_COUNT, cublaslt.BATCH_STRIDE)
        want = [matrix.format, matrix.rows, matrix.columns, matrix.leading, matrix.count, matrix.stride]
        assert [read(nvidia, "MatrixLayout", layout, attribute) for attribute in attributes] == want
    preference = cublaslt._create(nvidia, "MatmulPreference")
    for name in ("MAX_WORKSPACE", "REDUCTION_SCHEMES", "MIN_ALIGNMENT_A", "MIN_ALIGNMENT_B", "MIN_ALIGNMENT_C", "MIN_ALIGNMENT_D"):
        cublaslt._set(nvidia, "MatmulPreference", preference, getattr(cublaslt, name), 2)
        assert read(nvidia, "MatmulPreference", preference, getattr(cublaslt, name)) == 2
    with pytest.raises(cublaslt.CublasLtError, match="INVALID_VALUE"):
        cublaslt._set(nvidia, "MatmulDesc", plan.operation, (cublaslt.EPILOGUE[0], ctypes.c_int64), 1)  # of another size


HEADER = {  # our names -> those of cublasLt.h, after CUBLASLT_
    "DEFAULT": "EPILOGUE_DEFAULT", "BIAS": "EPILOGUE_BIAS", "GELU_AUX": "EPILOGUE_GELU_AUX", "GELU_AUX_BIAS": "EPILOGUE_GELU_AUX_BIAS",
    "DGELU": "EPILOGUE_DGELU", "DGELU_BGRAD": "EPILOGUE_DGELU_BGRAD", "BGRADA": "EPILOGUE_BGRADA", "BGRADB": "EPILOGUE_BGRADB",
    "TRANSPOSE_A": "MATMUL_DESC_TRANSA", "TRANSPOSE_B": "MATMUL_DESC_TRANSB", "EPILOGUE": "MATMUL_DESC_EPILOGUE",
    "BIAS_POINTER": "MATMUL_DESC_BIAS_POINTER", "AUX_POINTER": "MATMUL_DESC_EPILOGUE_AUX_POINTER",
    "AUX_LEADING": "MATMUL_DESC_EPILOGUE_AUX_LD", "BATCH_COUNT": "MATRIX_LAYOUT_BATCH_COUNT",
    "BATCH_STRIDE": "MATRIX_LAYOUT_STRIDED_BATCH_OFFSET", "MAX_WORKSPACE": "MATMUL_PREF_MAX_WORKSPACE_BYTES",
    "REDUCTION_SCHEMES": "MATMUL_PREF_REDUCTION_SCHEME_MASK", "MIN_ALIGNMENT_A": "MATMUL_PREF_MIN_ALIGNMENT_A_BYTES",
    "MIN_ALIGNMENT_B": "MATMUL_PREF_MIN_ALIGNMENT_B_BYTES", "MIN_ALIGNMENT_C": "MATMUL_PREF_MIN_ALIGNMENT_C_BYTES",
    "MIN_ALIGNMENT_D": "MATMUL_PREF_MIN_ALIGNMENT_D_BYTES", "SUM_IN_FP32": "REDUCTION_SCHEME_COMPUTE_TYPE",
}  # fmt: skip


@on_cpu
def test_constants_are_those_of_nvidias_headers(nvidia):
    folder = Path(nvidia._name).parents[1] / "include"
    if not (folder / "cublasLt.h").exists():
        pytest.skip("cublasLt.h is not installed")
    text = "".join((folder / name).read_text() for name in ("cublasLt.h", "cublas_api.h"))
    defined = dict(re.findall(r"\b(CUBLAS\w+) = ([\w |()]+)", text))

    def value(name):
        parts = re.findall(r"\w+", defined[name])  # numbers and other names, or-ed
        return functools.reduce(operator.or_, (int(part) if part.isdigit() else value(part) for part in parts))

    for ours, theirs in HEADER.items():
        mine = getattr(cublaslt, ours)
        assert (mine[0] if isinstance(mine, tuple) else mine) == value(f"CUBLASLT_{theirs}"), ours
    assert cublaslt.COMPUTE_FP32 == value("CUBLAS_COMPUTE_32F")
    assert {value(f"CUBLAS_STATUS_{name}"): name for name in cublaslt.STATUS.values()} == cublaslt.STATUS
