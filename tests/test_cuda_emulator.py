"""The machine that runs kernels on the CPU: does it compute what a GPU computes, and see what would go wrong on one?

The first half, prelude.cuh function by function, runs on a GPU as well: what the emulator takes for granted is then checked there.
"""
import cuda_on_cpu
import numpy as np
import pytest
from cuda_on_cpu import CudaError, RawModule, in_every_order, order

from tinyllm.kernels.cuda import launch

PRELUDE = (launch.FOLDER / "prelude.cuh").read_text(encoding="utf-8")
HALVES = {"FP16": "float16", "BF16": "bfloat16"}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def on_device(world, source, grid, block, *arrays, shared=0, outputs=1, format="FP32"):
    """Run the one kernel, `test`, of a source on copies of these arrays. Returns the last `outputs` of them."""
    function = world.xp.RawModule(code=PRELUDE + source, options=(f"-DFORMAT={format}",), backend="nvrtc").get_function("test")
    moved = [world.xp.asarray(x) if isinstance(x, np.ndarray) else x for x in arrays]
    function((grid,), (block,), tuple(moved), shared_mem=shared)
    results = [x.get() for x in moved[-outputs:]]
    return results[0] if outputs == 1 else results


def half(values, format):
    """Values rounded to a 16-bit format, as its bits."""
    import ml_dtypes  # the extra kernels-ci has it

    return values.astype(np.float16 if format == "FP16" else ml_dtypes.bfloat16).view(np.uint16)


def value(bits, format):
    import ml_dtypes

    return bits.view(np.float16 if format == "FP16" else ml_dtypes.bfloat16).astype(np.float32)


# ---- prelude.cuh against NumPy, here and on a GPU

@pytest.mark.parametrize("format", HALVES)
def test_every_16_bit_number_loads(world, format):
    bits = np.arange(65536, dtype=np.uint16)
    got = on_device(world, """extern "C" __global__ void test(const number* x, float* y) {
        for (int i = threadIdx.x; i < 65536; i += blockDim.x) y[i] = load(x[i]);
    }""", 1, 64, bits, np.empty(65536, np.float32), format=format)
    np.testing.assert_array_equal(got, value(bits, format))


@pytest.mark.parametrize("format", HALVES)
def test_store_and_pack_round_to_nearest_even(world, format, rng):
    large = [65504, 65519.996, 65520, -65520, 3e38, np.inf, -np.inf]
    small = [0.0, -0.0, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, 2.0**-14, 6.1e-5, 1.5 * 2.0**-24]
    halfway = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
    x = np.concatenate([large + small + halfway, rng.normal(size=2000), np.exp(rng.uniform(-25, 25, 2000))]).astype(np.float32)
    stored, packed = on_device(world, """extern "C" __global__ void test(const float* x, int n, number* y, unsigned* words) {
        for (int i = threadIdx.x; i < n; i += blockDim.x) { y[i] = store(x[i]); words[i] = pack(x[i], -x[i]); }
    }""", 1, 64, x, np.int32(x.size), np.empty(x.size, np.uint16), np.empty(x.size, np.uint32), outputs=2, format=format)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(stored, half(x, format))
        np.testing.assert_array_equal(packed, half(x, format) | half(-x, format).astype(np.uint32) << 16)


@pytest.mark.parametrize("format", HALVES)
def test_nan_stays_nan(world, format):
    x = np.array([np.nan, -np.nan], np.float32)
    source = 'extern "C" __global__ void test(const float* x, number* y) { y[threadIdx.x] = store(x[threadIdx.x]); }'
    got = on_device(world, source, 1, 2, x, np.zeros(2, np.uint16), format=format)
    assert np.isnan(value(got, format)).all()


def test_unpack(world):
    got = on_device(world, """extern "C" __global__ void test(float* y) {
        const unsigned word = pack(1.5f, -3.0f);
        y[0] = unpack_low(word); y[1] = unpack_high(word);
    }""", 1, 1, np.empty(2, np.float32), format="BF16")
    assert list(got) == [1.5, -3.0]


@pytest.mark.parametrize("format, vec", [("FP32", 4), ("FP16", 8), ("BF16", 8)])
def test_vectors_are_16_bytes(world, format, vec, rng):
    x = rng.normal(size=64).astype(np.float32)
    x = x if format == "FP32" else half(x, format)
    got = on_device(world, """extern "C" __global__ void test(const number* x, number* y) {
        Vec v = reinterpret_cast<const Vec*>(x)[threadIdx.x];
        for (int i = 0; i < VEC; i++) v.at[i] = store(-load(v.at[i]));
        reinterpret_cast<Vec*>(y)[threadIdx.x] = v;
    }""", 1, 64 // vec, x, np.empty_like(x), format=format)
    np.testing.assert_array_equal(got, -x if format == "FP32" else x ^ 0x8000)


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_sums_and_maxima(world, threads, rng):
    x = rng.normal(size=(3, threads)).astype(np.float32)
    got = on_device(world, """extern "C" __global__ void test(const float* x, float* y) {      // four in a row share their scratch memory
        __shared__ float scratch[32];
        const int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
        y[i] = block_sum(x[i], scratch);
        y[n + i] = block_max(x[i], scratch);
        y[2 * n + i] = block_sum(-x[i], scratch);
        y[3 * n + i] = block_max(-x[i], scratch);
        y[4 * n + i] = warp_sum(x[i]);
        y[5 * n + i] = warp_max(x[i]);
    }""", 3, threads, x, np.empty((6, 3, threads), np.float32))
    warps = x.reshape(3, -1, 32)
    for part, expected in zip(got, [x.sum(-1), x.max(-1), -x.sum(-1), -x.min(-1), warps.sum(-1), warps.max(-1)], strict=True):
        per_thread = np.repeat(expected.ravel(), part.size // expected.size).reshape(part.shape)
        np.testing.assert_allclose(part, per_thread, rtol=1e-5, atol=1e-4)
        assert (part.reshape(expected.size, -1) == part.reshape(expected.size, -1)[:, :1]).all()      # the same to the bit in every thread


PRODUCT = """// a (16, 16), b (16, 8), or (8, 16) where TRANSPOSED
extern "C" __global__ void test(const number* a, const number* b, float* c) {
    __shared__ __align__(16) number tile[16 * 16 + 16 * 8];
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) tile[i] = a[i];
    for (int i = lane; i < 128; i += 32) tile[256 + i] = b[i];
    __syncwarp();
    unsigned left[4], right[2];
    load_matrix_x4(left, tile + lane % 16 * 16 + lane / 16 * 8);
    if (TRANSPOSED) load_matrix_x2(right, tile + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
    else load_matrix_x2_transposed(right, tile + 256 + lane % 16 * 8);
    const int g = lane / 4, t = lane % 4;
    float sum[4] = {1, 2, 3, 4};
    mma(sum, left, right);
    c[g * 8 + 2 * t] = sum[0] - 1;
    c[g * 8 + 2 * t + 1] = sum[1] - 2;
    c[(g + 8) * 8 + 2 * t] = sum[2] - 3;
    c[(g + 8) * 8 + 2 * t + 1] = sum[3] - 4;
}"""


@pytest.mark.parametrize("format", HALVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_on_tensor_cores(world, format, transposed, rng):
    a, b = half(rng.normal(size=(16, 16)), format), half(rng.normal(size=(16, 8)), format)
    source = f"#define TRANSPOSED {int(transposed)}\n{PRODUCT}"
    got = on_device(world, source, 1, 32, a, np.ascontiguousarray(b.T) if transposed else b, np.empty((16, 8), np.float32), format=format)
    np.testing.assert_allclose(got, value(a, format).astype(float) @ value(b, format).astype(float), atol=2e-5)


def test_load_matrix_x4_transposed(world):
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    got = on_device(world, """extern "C" __global__ void test(const number* x, unsigned* y) {
        __shared__ __align__(16) number tile[256];
        for (int i = threadIdx.x; i < 256; i += 32) tile[i] = x[i];
        __syncthreads();
        unsigned r[4];
        load_matrix_x4_transposed(r, tile + threadIdx.x * 8);
        for (int i = 0; i < 4; i++) y[i * 32 + threadIdx.x] = r[i];
    }""", 1, 32, x, np.empty((4, 32), np.uint32), format="FP16")
    np.testing.assert_array_equal(got.view(np.uint16).reshape(4, 8, 8), x.swapaxes(1, 2))


def test_asynchronous_copies(world, rng):
    x = rng.normal(size=(2, 128)).astype(np.float32)
    got = on_device(world, """extern "C" __global__ void test(const float* x, float* y) {
        DYNAMIC_SHARED(bytes);
        float* const tile = reinterpret_cast<float*>(bytes);
        const int i = threadIdx.x * 4;
        copy_async16(tile + i, x + i, true);
        copy_commit();
        copy_async16(tile + 128 + i, threadIdx.x % 2 ? nullptr : x + 128 + i, threadIdx.x % 2 == 0);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        for (int k = 0; k < 4; k++) y[i + k] = tile[127 - i - k];
        copy_wait<0>();
        __syncthreads();
        for (int k = 0; k < 4; k++) y[128 + i + k] = tile[255 - i - k];
    }""", 1, 32, x, np.empty((2, 128), np.float32), shared=1024)
    x[1].reshape(-1, 4)[1::2] = 0
    np.testing.assert_array_equal(got, x[:, ::-1])


def test_shuffles_and_votes(world):
    got = on_device(world, """extern "C" __global__ void test(int* y) {
        const int lane = threadIdx.x;
        const unsigned all = 0xffffffffu;
        y[lane] = __shfl_sync(all, lane * 10, 5);
        y[32 + lane] = __shfl_xor_sync(all, lane, 3);
        y[64 + lane] = __shfl_up_sync(all, lane, 2);
        y[96 + lane] = __shfl_down_sync(all, lane, 2);
        y[128 + lane] = __shfl_sync(all, lane, 1, 8);
        y[160 + lane] = __shfl_up_sync(all, lane, 1, 8);
        y[192 + lane] = __shfl_down_sync(all, lane, 1, 8);
        y[224 + lane] = (int)__ballot_sync(all, lane % 3 == 0);
        y[256 + lane] = __any_sync(all, lane == 7) * 2 + __all_sync(all, lane < 31);
        if (lane < 16) y[288 + lane] = __shfl_xor_sync(0x0000ffffu, lane, 8);      // half a warp
        else y[288 + lane] = __shfl_xor_sync(0xffff0000u, lane, 4);
        y[320 + lane] = (int)__shfl_xor_sync(all, (double)lane + 0.5, 1);
        y[320 + lane] += __syncthreads_count(lane < 3) * 100;
        y[320 + lane] += __syncthreads_or(lane == 2) * 1000;
    }""", 1, 32, np.empty((11, 32), np.int32))
    lane = np.arange(32)
    votes = np.array([sum(1 << i for i in range(0, 32, 3))], np.uint32).view(np.int32)[0]
    expected = [np.full(32, 50), lane ^ 3, np.where(lane < 2, lane, lane - 2), np.where(lane > 29, lane, lane + 2), lane // 8 * 8 + 1,
                np.where(lane % 8 == 0, lane, lane - 1), np.where(lane % 8 == 7, lane, lane + 1), np.full(32, votes), np.full(32, 2),
                np.where(lane < 16, lane ^ 8, lane ^ 4), (lane ^ 1) + 1300]
    np.testing.assert_array_equal(got, np.array(expected))


def test_atomics(world):
    sums, integers = on_device(world, """extern "C" __global__ void test(float* x, int* y) {
        atomicAdd(x, 1.0f);
        atomicAdd(x + 1, (float)blockIdx.x);
        atomicAdd(y, 2);
        atomicMax(y + 1, (int)threadIdx.x);
        atomicMin(y + 2, -(int)threadIdx.x);
        atomicCAS(y + 3, 0, 9);
        atomicExch(y + 4, 5);
        atomicOr(y + 5, 1 << threadIdx.x % 4);
    }""", 3, 64, np.zeros(2, np.float32), np.zeros(6, np.int32), outputs=2)
    assert list(sums) == [192, 192] and list(integers) == [384, 63, -63, 9, 5, 15]


def test_small_numbers_vanish_as_they_do_where_denormals_are_flushed(world):
    source = 'extern "C" __global__ void test(const float* x, float* y) { *y = *x * 0.5f; }'
    assert on_device(world, source, 1, 1, np.array([2e-38], np.float32), np.ones(1, np.float32)) == 0


# ---- What must be caught: sound kernels, and then what a planted error writes in the place of what, and the complaint

REVERSE = """extern "C" __global__ void test(const float* x, float* y) {
    __shared__ float tile[64];
    for (int row = 0; row < 3; row++) {
        tile[threadIdx.x] = x[row * 64 + threadIdx.x];
        __syncthreads();  // after writing
        y[row * 64 + threadIdx.x] = tile[63 - threadIdx.x];
        __syncthreads();  // after reading
    }
}"""
SHIFT = """extern "C" __global__ void test(const float* unused, float* y) {
    const float next = y[threadIdx.x + 1];
    __syncthreads();
    y[threadIdx.x] = next;
}"""
COPIES = """extern "C" __global__ void test(const float* x, float* y) {
    __shared__ __align__(16) float tile[256];
    copy_async16(tile + threadIdx.x * 4, x + threadIdx.x * 4, true);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x * 4];
}"""
NEIGHBOUR = """extern "C" __global__ void test(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    y[threadIdx.x] = tile[threadIdx.x ^ 1];
}"""
MATRIX = """extern "C" __global__ void test(const float* x, float* y) {
    __shared__ __align__(16) unsigned tile[64 * 4];
    for (int i = 0; i < 4; i++) tile[threadIdx.x * 4 + i] = i;
    __syncwarp();
    unsigned r[4];
    load_matrix_x4(r, tile + threadIdx.x * 4);
    y[threadIdx.x] = r[0];
}"""
COUNT = """extern "C" __global__ void test(const float* x, float* y) {
    if (threadIdx.x == 0) atomicAdd(y, x[blockIdx.x]);
}"""
OWN_PART = """extern "C" __global__ void test(const float* x, float* y) {
    y[blockIdx.x * 64 + threadIdx.x] = x[threadIdx.x];
}"""
VECTOR = """extern "C" __global__ void test(const float* x, float* y) {
    *reinterpret_cast<Vec*>(y + 4 * threadIdx.x) = *reinterpret_cast<const Vec*>(x);
}"""
DYNAMIC = """extern "C" __global__ void test(const float* x, float* y) {
    DYNAMIC_SHARED(bytes);
    reinterpret_cast<float*>(bytes)[threadIdx.x] = 1;
    y[threadIdx.x] = reinterpret_cast<float*>(bytes)[threadIdx.x];
}"""
SUM = """extern "C" __global__ void test(const float* x, float* y) {
    const float sum = warp_sum(x[threadIdx.x]);
    __syncthreads();
    y[threadIdx.x] = sum;
}"""
TWO_STAGES = """extern "C" __global__ void test(const float* x, float* y) {      // the next tile is copied while this one is read
    __shared__ __align__(16) float tile[2][256];
    const int i = threadIdx.x * 4;
    copy_async16(tile[0] + i, x + i, true);
    copy_commit();
    float sum = 0;
    for (int step = 0; step < 3; step++) {
        if (step < 2) copy_async16(tile[(step + 1) % 2] + i, x + (step + 1) * 256 % 512 + i, true);
        copy_commit();
        copy_wait<1>();
        __syncthreads();  // all copies have come
        for (int k = 0; k < 256; k += 5) sum += tile[step % 2][k];
        __syncthreads();  // all have read
    }
    y[threadIdx.x] = sum;
}"""

EITHER_WAY = """extern "C" __global__ void test(const float* x, float* y) {      // a compiler may give each half a barrier of its own
    __shared__ float tile[64];
    const bool odd = x[threadIdx.x] != 2 * (threadIdx.x / 2);
    if (odd) tile[threadIdx.x] = 1; else tile[threadIdx.x] = 2;
    __syncthreads();
    if (odd) y[threadIdx.x] = tile[0]; else y[threadIdx.x] = tile[1];
}"""

SOUND = [EITHER_WAY, REVERSE, SHIFT, COPIES, NEIGHBOUR, MATRIX, COUNT, OWN_PART, VECTOR, DYNAMIC, SUM, TWO_STAGES]
PLANTED = {
    "read before all have written": (REVERSE, "__syncthreads();  // after writing", "", "race .* shared memory"),
    "written before all have read": (REVERSE, "__syncthreads();  // after reading", "", "race .* shared memory"),
    "in place, read late": (SHIFT, "__syncthreads();", "", "race .* global memory"),
    "a copy not waited for": (COPIES, "copy_wait<0>();", "", "asynchronous copy, not yet waited for"),
    "a copy not committed": (COPIES, "copy_commit();", "", "asynchronous copy, not yet waited for"),
    "waited for too few copies": (COPIES, "copy_wait<0>", "copy_wait<1>", "asynchronous copy, not yet waited for"),
    "another thread's copy": (COPIES, "__syncthreads();", "__syncwarp();", None),      # sound: each reads its own
    "another thread's copy without a barrier":
        (COPIES, "__syncthreads();\n    y[threadIdx.x] = tile[threadIdx.x * 4]", "y[threadIdx.x] = tile[(threadIdx.x ^ 1) * 4]", "race"),
    "another warp's tile after a warp's barrier": (NEIGHBOUR, "^ 1", "^ 32", "race .* shared memory"),
    "lanes without a warp's barrier": (NEIGHBOUR, "__syncwarp();", "", "race .* shared memory"),
    "a shuffle is no barrier for memory":
        (NEIGHBOUR, "__syncwarp();", "if (__shfl_xor_sync(0xffffffffu, 0, 1)) return;", "race .* shared memory"),
    "ldmatrix without a barrier": (MATRIX, "__syncwarp();", "", "race .* shared memory"),
    "ldmatrix off its rows": (MATRIX, "r, tile + threadIdx.x * 4", "r, tile + threadIdx.x * 4 + 2 * (threadIdx.x == 3)", "misaligned"),
    "added without an atomic": (COUNT, "atomicAdd(y, x[blockIdx.x])", "*y += x[blockIdx.x]", "race .* of another block"),
    "atomic here, plain there":
        (COUNT, "atomicAdd(y, x[blockIdx.x])", "if (blockIdx.x) *y = 1; else atomicAdd(y, 1.0f)", "race .* of another block"),
    "two blocks write one place": (OWN_PART, "* 64 +", "* 63 +", "race .* of another block"),
    "another block's result": (OWN_PART, "= x[threadIdx.x]", "= y[(blockIdx.x ^ 1) * 64]", "race .* of another block"),
    "read past the end": (OWN_PART, "x[threadIdx.x]", "x[512 + threadIdx.x]", "out of bounds: read"),
    "read before the beginning": (OWN_PART, "x[threadIdx.x]", "x[(int)threadIdx.x - 1]", "out of bounds: read"),
    "written past the end": (OWN_PART, "y[blockIdx.x * 64 +", "y[512 + blockIdx.x * 64 +", "out of bounds: write"),
    "a null pointer": (OWN_PART, "x[threadIdx.x]", "((const float*)nullptr)[threadIdx.x]", "out of bounds"),
    "a vector across the end": (VECTOR, "y + 4 * threadIdx.x", "y + 512 - 2 * (threadIdx.x == 3)", "misaligned|out of bounds"),
    "a vector off its grid": (VECTOR, "y + 4 * threadIdx.x", "y + 4 * threadIdx.x + 1", "misaligned"),
    "more shared memory than asked for": (DYNAMIC, "[threadIdx.x] = 1", "[threadIdx.x + 64] = 1", "out of bounds: write"),
    "a warp's barrier that does not name all who come":
        (SUM, "__syncthreads();", "if (threadIdx.x < 32) __syncthreads(); else __syncwarp(0x3);", "lane that the mask does not name"),
    "a barrier for half of the block":
        (SUM, "__syncthreads();", "if (threadIdx.x % 2) __syncthreads(); else __shfl_sync(0xffffffffu, 0, 0);", "nobody can go on"),
    "two different barriers":
        (SUM, "__syncthreads();", "if (threadIdx.x % 2) __syncthreads(); else __syncthreads_or(1);", "different barriers"),
    "two different operations":
        (SUM, "__syncthreads();", "if (threadIdx.x % 2) __shfl_sync(~0u, 0, 0); else __ballot_sync(~0u, 1);", "different operations"),
    "a shuffle from a lane that has left": (SUM, "const float sum", "if (threadIdx.x == 9) return;\n    const float sum", "takes no part"),
    "ldmatrix by half a warp": (MATRIX, "unsigned r[4];", "unsigned r[4]; if (threadIdx.x & 1) return;", "all 32 lanes"),
    "two stages: copied over what is still read": (TWO_STAGES, "__syncthreads();  // all have read", "", "race"),
    "two stages: read before all copies have come": (TWO_STAGES, "__syncthreads();  // all copies have come", "", "race"),
    "two stages: one group too many under way": (TWO_STAGES, "copy_wait<1>", "copy_wait<2>", "not yet waited for"),
}


def run(source, format="FP32", block=64, shared=256):
    grid = 3 if "blockIdx" in source else 1
    x, y = np.arange(512, dtype=np.float32), np.zeros(512, np.float32)
    RawModule(code=PRELUDE + source, options=(f"-DFORMAT={format}",)).get_function("test")((grid,), (block,), (x, y), shared_mem=shared)
    return y


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("source", SOUND)
def test_sound_kernels_pass_in_every_order(source):
    in_every_order(lambda: run(source, "FP16" if source is MATRIX else "FP32"), seeds=range(5))


@pytest.mark.cuda_on_cpu
@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name):
    source, right, wrong, complaint = PLANTED[name]
    assert source.count(right) == 1
    planted = source.replace(right, wrong)
    for seed in range(3):      # in every order, not by luck
        with order(seed):
            if complaint is None:
                run(planted)
            else:
                with pytest.raises(CudaError, match=complaint):
                    run(planted, "FP16" if source is MATRIX else "FP32")


@pytest.mark.cuda_on_cpu
def test_a_complaint_names_kernel_thread_and_lines():
    complaint = (r"test: block \(\d, 0, 0\), thread \d+: race on byte \d+ of shared memory: \w+ at line \d+ `.*tile.*`; "
                 r"(written|read) by .* at line \d+ `.*tile.*`")
    with pytest.raises(CudaError, match=complaint):
        run(REVERSE.replace("__syncthreads();  // after writing", ""))


@pytest.mark.cuda_on_cpu
def test_results_that_depend_on_the_order_are_seen():
    source = 'extern "C" __global__ void test(const float* x, float* y) { atomicAdd(y, 1.0f / (1 + blockIdx.x * 64 + threadIdx.x)); }'
    with pytest.raises(AssertionError, match="depends on the order of threads: seed 0 and seed 1 differ"):
        in_every_order(lambda: run(source), seeds=(0, 1))


@pytest.mark.cuda_on_cpu
def test_shared_memory_holds_nan_at_first():
    source = """extern "C" __global__ void test(const float* x, float* y) {
        __shared__ float tile[64];
        DYNAMIC_SHARED(more);
        y[0] = tile[5];
        y[1] = *(float*)more;
        tile[5] = *(float*)more = 1;
    }"""
    y = run(source, block=1)
    assert np.isnan(y[:2]).all()
    y = run(source, block=1)      # what the block before left is gone
    assert np.isnan(y[:2]).all()


@pytest.mark.cuda_on_cpu
def test_launches_that_a_gpu_refuses():
    source = """extern "C" __global__ void __launch_bounds__(2 * 32) test(const float* x, number* y, int n, long long stride, float scale) {
        __shared__ float tile[1024];
        tile[n] = scale;
        __syncthreads();
        y[0] = store(tile[n]);
    }"""
    function = RawModule(code=PRELUDE + source, options=("-DFORMAT=FP16", "--std=c++17")).get_function("test")
    x, y = np.zeros(8, np.float32), np.zeros(8, np.float16)
    good = [x, y, np.int32(1), np.int64(1), np.float32(1)]
    function((1,), (1,), tuple(good))
    function((1,), (1,), (np.uintp(0), *good[1:]))
    for grid, block, shared, complaint in [
            ((0,), (32,), 0, "grid"), ((1, 70000), (32,), 0, "grid"), ((1,), (65,), 0, "from 1 to 64"), ((1,), (8, 8), 0, "one dimension"),
            ((1,), (64,), 50000, "max_dynamic_shared_size_bytes is 45056")]:
        with pytest.raises(CudaError, match=complaint):
            function(grid, block, tuple(good), shared_mem=shared)
    read_only = y.copy()
    read_only.flags.writeable = False
    for i, bad, complaint in [
            (0, y, "const float\\*, the argument an array of float16"), (1, x, "unsigned short"), (1, read_only, "read-only"),
            (2, 1, "int, the argument int 1"), (2, np.int64(1), "parameter 3 is int"), (3, np.int32(1), "long long"), (4, 1.0, "float"),
            (4, np.float64(1), "float"), (0, np.uintp(8), "an address")]:
        with pytest.raises(CudaError, match=complaint):
            function((1,), (64,), (*good[:i], bad, *good[i + 1:]))
    with pytest.raises(CudaError, match="5 parameters, 4 arguments"):
        function((1,), (64,), tuple(good[:4]))
    function.max_dynamic_shared_size_bytes = 225 * 1024
    with pytest.raises(CudaError, match="a block gets 232448"):
        function((1,), (64,), tuple(good))


@pytest.mark.cuda_on_cpu
def test_what_does_not_compile_is_told():
    with pytest.raises(CudaError, match="no kernel 'other'"):
        RawModule(code=PRELUDE + OWN_PART).get_function("other")
    with pytest.raises(CudaError, match="g\\+\\+ found errors(.|\n)*nonsense"):
        RawModule(code=PRELUDE + "nonsense").get_function("test")
    with pytest.raises(ValueError, match="does not know the compiler options"):
        RawModule(code=PRELUDE, options=("--fmad=false",))


@pytest.mark.cuda_on_cpu
def test_views_may_be_read_as_far_as_their_memory_goes():
    x = np.arange(1024, dtype=np.float32)
    function = RawModule(code=PRELUDE + OWN_PART).get_function("test")
    function((8,), (64,), (x[960:], np.zeros(512, np.float32)))
    with pytest.raises(CudaError, match="out of bounds"):
        function((8,), (64,), (x[961:], np.zeros(512, np.float32)))


@pytest.mark.cuda_on_cpu
def test_a_promise_about_pointers_is_held_to():
    """--restrict: what is written through one of them is reached through no other. Views of one array that lie apart are."""
    source = PRELUDE + """extern "C" __global__ void test(const float* a, const float* b, float* y) { y[threadIdx.x] = a[threadIdx.x] + b[threadIdx.x]; }"""
    x = np.arange(96, dtype=np.float32)
    function = RawModule(code=source, options=("--restrict",)).get_function("test")
    function((1,), (32,), (x, x, x[32:]))
    with pytest.raises(CudaError, match="parameters 2 and 3 are the same memory"):
        function((1,), (32,), (x, x[32:], x[32:]))
    RawModule(code=source).get_function("test")((1,), (32,), (x, x[32:], x[32:]))


@pytest.mark.cuda_on_cpu
def test_the_cache_is_kept_by_content():
    first, again = RawModule(code=PRELUDE + SUM), RawModule(code=PRELUDE + SUM)
    assert first._library._name == again._library._name
    other = RawModule(code=PRELUDE + SUM, options=("-DFORMAT=FP16",))
    assert other._library._name != first._library._name
    assert cuda_on_cpu.cache_folder().stat().st_mode & 0o077 == 0


@pytest.mark.cuda_on_cpu
def test_the_portable_way_from_fiber_to_fiber(monkeypatch):
    """What runs where the processor is not an x86-64."""
    monkeypatch.setattr(cuda_on_cpu, "MACHINE", (*cuda_on_cpu.MACHINE, "-DMACHINE_PORTABLE"))
    monkeypatch.setattr(cuda_on_cpu, "_machine", cuda_on_cpu._machine.__wrapped__)
    reversed_rows = np.arange(192, dtype=np.float32).reshape(3, 64)[:, ::-1].ravel()
    np.testing.assert_array_equal(in_every_order(lambda: run(REVERSE))[:192], reversed_rows)
    with pytest.raises(CudaError, match="race"):
        run(REVERSE.replace("__syncthreads();  // after reading", ""))
