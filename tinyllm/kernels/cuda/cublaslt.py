"""NVIDIA's library of matrix products, cuBLASLt, by ctypes: only what a language model needs of it.

CuPy's own `@` cannot do batched bf16 products, does batched fp16 ones without tensor cores, copies transposed operands of batches, cannot
add into its result, and refuses to be captured in a CUDA graph. cuBLASLt does all of it: it takes the stream and its scratch memory as
arguments, and can add a bias, GELU or GELU's derivative to a product on the way out (an "epilogue"), where that costs no memory traffic.

Rows and columns.  The library stores matrices by columns, NumPy by rows. The same memory read the other way is the transpose: where
NumPy sees X (r × c) with rows `ld` numbers apart, the library sees Xᵀ (c × r) with columns `ld` apart. So Y = A·B is asked for as

    Yᵀ = Bᵀ·Aᵀ        the library's A is our B, its B our A, its D our Y

and nothing is copied. An array that lies by columns (`x.T` of a contiguous x) is X itself to the library, and gets the operation
"transpose". Its "rows of D" are the columns of our Y: a bias has one number for each column, as it should.

Plan.  What is to be computed, on which shapes, strides, formats and alignments, is a Plan; choosing an algorithm takes the library's
heuristic tens of microseconds, so plans are kept. After a first call with the same shapes, a call neither asks nor allocates anything,
which is what a captured graph needs. Sums are in fp32, in an order that is the same in every run on the same GPU (split sums go through
the scratch memory in fp32, not through 16-bit results); fp32 operands are multiplied as fp32, not as TF32.

Numbers below are those of NVIDIA's headers cublasLt.h and cublas_api.h (a test compares them) and library_types.h, CUDA 13.
Source: cuBLAS documentation, "Using the cuBLASLt API". Not yet run on a GPU.
"""
import ctypes
import functools
import weakref
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from typing import NamedTuple

from tinyllm.backend import HOW_TO_GET_CUPY, array_module
from tinyllm.kernels.cuda.vectors import power_of_two_in

FORMATS = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType, by name of the dtype
COMPUTE_FP32 = 68  # CUBLAS_COMPUTE_32F: products and sums at least in fp32
STATUS = {
    1: "NOT_INITIALIZED", 3: "ALLOC_FAILED", 7: "INVALID_VALUE", 8: "ARCH_MISMATCH", 11: "MAPPING_ERROR", 13: "EXECUTION_FAILED",
    14: "INTERNAL_ERROR", 15: "NOT_SUPPORTED", 16: "LICENSE_ERROR",
}  # fmt: skip
NOT_SUPPORTED = 15

# What is done to a product on its way out. bias: a number for each column of Y; aux: a matrix of Y's shape, rows a multiple of 8 apart.
DEFAULT = 1  # Y
BIAS = 4  # Y + bias
GELU_AUX = 160  # gelu_tanh(Y); Y itself into aux
GELU_AUX_BIAS = 164  # gelu_tanh(Y + bias); Y + bias into aux
DGELU = 192  # Y·gelu_tanh'(aux)
DGELU_BGRAD = 208  # the same, and its sum over rows into bias
BGRADA = 256  # Y; the sum over rows of our B into bias (over the products' common axis; a number for each column of Y)
BGRADB = 512  # Y; the sum over columns of our A into bias (likewise; a number for each row of Y)

# Attributes of a product (cublasLtMatmulDesc), a matrix (cublasLtMatrixLayout) and a search (cublasLtMatmulPreference), with their types.
TRANSPOSE_A, TRANSPOSE_B, EPILOGUE = (3, c_int32), (4, c_int32), (7, c_uint32)
BIAS_POINTER, AUX_POINTER, AUX_LEADING = (8, c_void_p), (11, c_void_p), (12, c_int64)
BATCH_COUNT, BATCH_STRIDE = (5, c_int32), (6, c_int64)
MAX_WORKSPACE, REDUCTION_SCHEMES = (1, c_uint64), (3, c_uint32)
MIN_ALIGNMENT_A, MIN_ALIGNMENT_B, MIN_ALIGNMENT_C, MIN_ALIGNMENT_D = ((i, c_uint32) for i in (5, 6, 7, 8))
SUM_IN_FP32 = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: of the ways to add up parts of a sum, only the one that loses nothing
WORKSPACE = 32 << 20  # bytes of scratch memory: what NVIDIA recommends for Hopper
ALIGNED = 256  # bytes; CuPy's pool hands out nothing less aligned, and no algorithm asks for more
KEPT = 4096  # plans (and what is known of arrays); each is a few kB of the host's memory


class CublasLtError(RuntimeError):
    """A call to cuBLASLt that failed; the message names it and the status."""


class _Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algorithm", c_uint64 * 8), ("workspace", c_size_t), ("state", c_int), ("waves", c_float), ("reserved", c_int * 4),
    ]  # fmt: skip


class Matrix(NamedTuple):
    """An array of one or more matrices as the library sees its memory: by columns. Distances are in elements."""

    format: int  # cudaDataType
    rows: int
    columns: int
    leading: int  # from one column to the next
    transposed: bool  # whether this is our matrix itself, which the library then has to transpose
    count: int  # of matrices
    stride: int  # from one matrix to the next; 0: all are the same one
    alignment: int  # of each, in bytes


@functools.cache
def library():
    """cuBLASLt, loaded at the first call. Raises OSError, in one line that says what to install."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublasLt").abs_path)
    except (ImportError, RuntimeError, OSError) as error:  # the second is pathfinder's, which finds no such library
        raise OSError(f"--device cuda needs the library cuBLASLt: {HOW_TO_GET_CUPY}") from error


def matrix(x) -> Matrix | None:
    """How the library sees an array (…, r, c) of at most one leading axis; None where it cannot walk it.

    Numbers of a row have to follow each other, and rows have to be evenly apart without overlap; or the same with columns. An axis of
    length 1 is never walked, whatever its stride.
    """
    return _matrix(x.shape, x.strides, x.dtype, _alignment(x))


@functools.lru_cache(KEPT)
def _matrix(shape: tuple, strides: tuple, dtype, alignment: int) -> Matrix | None:
    (rows, columns), (down, right) = shape[-2:], (step // dtype.itemsize for step in strides[-2:])
    by_rows = (right == 1 or columns == 1) and (down >= columns or rows == 1)
    by_columns = (down == 1 or rows == 1) and (right >= rows or columns == 1)
    if not by_rows and not by_columns:
        return None
    inner, outer, leading = (columns, rows, down) if by_rows else (rows, columns, right)
    many = len(shape) == 3 and shape[0] > 1
    count, stride = (shape[0], strides[0] // dtype.itemsize) if many else (1, 0)
    alignment = power_of_two_in(alignment | stride * dtype.itemsize)
    return Matrix(FORMATS[dtype.name], inner, outer, leading if outer > 1 else inner, not by_rows, count, stride, alignment)


def _alignment(x) -> int:
    """The greatest power of two that divides x's address, as far as it matters."""
    return power_of_two_in(x.data.ptr | ALIGNED)


def matmul(a, b, out, *, alpha: float = 1.0, beta: float = 0.0, epilogue: int = DEFAULT, bias=None, aux=None) -> bool:
    """out = epilogue(alpha·a·b + beta·out), on the current stream.     (n, k), (k, m) -> (n, m), or equally many of each

    a, b : 2-D, or 3-D of the same length, of one format and not empty; copied first where the library cannot walk them (`matrix`).
    out : likewise, in the same format or fp32, walked by rows.
    bias, aux : for the epilogues that have them, in out's format.

    Returns False, with nothing done, where the library has no algorithm for this. Raises CublasLtError where a call fails.
    """
    xp = array_module(out)
    (a, first), (b, second), target = _readable(xp, a), _readable(xp, b), matrix(out)
    if target is None or target.transposed:
        raise ValueError(f"matmul() into rows that are not contiguous (shape {out.shape}, strides {out.strides}): pass the transpose")
    device, stream = xp.cuda.runtime.getDevice(), xp.cuda.get_current_stream().ptr
    extra = (0 if bias is None else _alignment(bias), *((0, 0) if aux is None else (aux.strides[0] // aux.itemsize, _alignment(aux))))
    plan = _plan(library(), device, second, first, target, epilogue, *extra)
    if plan is None:
        return False
    plan.point_to(0 if bias is None else bias.data.ptr, 0 if aux is None else aux.data.ptr)
    plan.run(b.data.ptr, a.data.ptr, out.data.ptr, alpha, beta, _workspace(xp, device, stream).data.ptr, stream)
    return True


def _readable(xp, x):
    """x and its Matrix; for what the library cannot walk, a copy's."""
    known = matrix(x)
    if known is None:
        x = xp.ascontiguousarray(x)
        known = matrix(x)
    return x, known


@functools.cache
def _workspace(xp, device: int, stream: int):
    """Scratch memory for products on that stream, kept for good: products on one stream run one after the other and can share it."""
    return xp.empty(WORKSPACE, dtype=xp.uint8)


@functools.cache
def _handle(lt, device: int) -> c_void_p:
    """The library's context on a device, which has to be the current one."""
    handle = c_void_p()
    _call(lt, "cublasLtCreate", byref(handle))
    return handle


@functools.lru_cache(KEPT)
def _plan(lt, device: int, a: Matrix, b: Matrix, d: Matrix, epilogue: int, bias: int, leading: int, aux: int) -> "Plan | None":
    """The plan for this product, or None where the library has no algorithm. What a and b are is as the library counts.

    bias, aux : alignments in bytes, 0 without.    leading : from one row of aux to the next.
    """
    plan = Plan(lt, a, b, d, epilogue, leading, device)
    plan.point_to(bias, aux)  # the heuristic reads nothing from a pointer but its alignment, so the alignment itself will do
    return plan if plan.search(a.alignment, b.alignment, d.alignment) else None


class Plan:
    """A product as the library has it described, with the algorithm that its heuristic takes for the fastest."""

    def __init__(self, lt, a: Matrix, b: Matrix, d: Matrix, epilogue: int = DEFAULT, leading: int = 0, device: int = 0):
        self.lt, self.device, self.algorithm = lt, device, _Heuristic()
        self.operation = _create(lt, "MatmulDesc", c_int(COMPUTE_FP32), c_int(FORMATS["float32"]))
        self.a, self.b, self.d = (_layout(lt, matrix) for matrix in (a, b, d))
        made = [("MatmulDesc", self.operation), *(("MatrixLayout", layout) for layout in (self.a, self.b, self.d))]
        weakref.finalize(self, _destroy, lt, made).atexit = False
        for attribute, value in ((TRANSPOSE_A, a.transposed), (TRANSPOSE_B, b.transposed), (EPILOGUE, epilogue), (AUX_LEADING, leading)):
            _set(lt, "MatmulDesc", self.operation, attribute, value)

    def point_to(self, bias: int, aux: int) -> None:
        """Set the addresses of what the epilogue reads or writes, 0 for none."""
        if bias:
            _set(self.lt, "MatmulDesc", self.operation, BIAS_POINTER, bias)
        if aux:
            _set(self.lt, "MatmulDesc", self.operation, AUX_POINTER, aux)

    def search(self, a: int, b: int, d: int) -> bool:
        """Find an algorithm for addresses of these alignments; whether there is one."""
        lt, preference, found = self.lt, _create(self.lt, "MatmulPreference"), c_int(0)
        alignments = ((MIN_ALIGNMENT_A, a), (MIN_ALIGNMENT_B, b), (MIN_ALIGNMENT_C, d), (MIN_ALIGNMENT_D, d))
        for attribute, value in ((MAX_WORKSPACE, WORKSPACE), (REDUCTION_SCHEMES, SUM_IN_FP32), *alignments):
            _set(lt, "MatmulPreference", preference, attribute, value)
        status = lt.cublasLtMatmulAlgoGetHeuristic(
            _handle(lt, self.device), self.operation, self.a, self.b, self.d, self.d, preference, c_int(1), byref(self.algorithm), byref(found)
        )
        _destroy(lt, [("MatmulPreference", preference)])
        if status not in (0, NOT_SUPPORTED):
            raise _failed("cublasLtMatmulAlgoGetHeuristic", status)
        return status == 0 and found.value > 0 and self.algorithm.state == 0

    def run(self, a: int, b: int, d: int, alpha: float, beta: float, workspace: int, stream: int) -> None:
        """Start the product on these addresses, and return without waiting for it."""
        _call(
            self.lt, "cublasLtMatmul", _handle(self.lt, self.device), self.operation, byref(c_float(alpha)), c_void_p(a), self.a, c_void_p(b),
            self.b, byref(c_float(beta)), c_void_p(d), self.d, c_void_p(d), self.d, byref(self.algorithm), c_void_p(workspace),
            c_size_t(WORKSPACE), c_void_p(stream),
        )  # fmt: skip


def _layout(lt, matrix: Matrix) -> c_void_p:
    layout = _create(lt, "MatrixLayout", c_int(matrix.format), c_uint64(matrix.rows), c_uint64(matrix.columns), c_int64(matrix.leading))
    _set(lt, "MatrixLayout", layout, BATCH_COUNT, matrix.count)
    _set(lt, "MatrixLayout", layout, BATCH_STRIDE, matrix.stride)
    return layout


def _create(lt, kind: str, *arguments) -> c_void_p:
    made = c_void_p()
    _call(lt, f"cublasLt{kind}Create", byref(made), *arguments)
    return made


def _set(lt, kind: str, of: c_void_p, attribute: tuple[int, type], value) -> None:
    number, c_type = attribute
    value = c_type(value)
    _call(lt, f"cublasLt{kind}SetAttribute", of, c_int(number), byref(value), c_size_t(ctypes.sizeof(value)))


def _destroy(lt, made: list[tuple[str, c_void_p]]) -> None:
    for kind, what in made:
        _call(lt, f"cublasLt{kind}Destroy", what)


def _call(lt, name: str, *arguments) -> None:
    status = getattr(lt, name)(*arguments)
    if status:
        raise _failed(name, status)


def _failed(name: str, status: int) -> CublasLtError:
    return CublasLtError(f"{name} failed: CUBLAS_STATUS_{STATUS.get(status, status)}")
