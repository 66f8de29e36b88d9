// One more token for each of B texts, in six launches a block, made to be captured as a CUDA graph (decode.py says why and how fast).
// Here all but attention, which is in decode_attention.cu.
//
//   embed             x = token's vector + position's
//   normed_products   y = norm(x)·wᵀ + b                       query, key and value side by side; after the last block, the scores
//   attend, merge     keys and values stored, then each query's mean of the values
//   added_products    x += in·wᵀ + b                           attention's output, the MLP's way down
//   active_products   y = f(norm(x)·wᵀ + b)                    the MLP's way up
//
// Bytes. With few rows a product is bound by reading w once; all else (rows of x, partial means) fits into the L2 cache. So a warp has
// DEPTH 16-byte pieces of OUTPUTS rows of w under way before it waits for the first, every lane next to its neighbour, and asks for them
// before x is there; x, which all rows of w meet, lies in shared memory as the format's numbers. Norms are computed by every block for
// itself, while its weights come, where a launch of its own would cost one or two microseconds more.
//
// Launch shape. 128 threads. A product's blocks take rows of w in turn, OUTPUTS rows a warp; where a row is long and there are few,
// `split` warps share its columns. blockIdx.y counts groups of BATCH texts.
//
// What differs from token to token is in `steps`, STEP ints a text, so that the launches themselves never change:
//   the token's id, its position, the first key it sees, its own key's place, cos and sin of its position's angles (as bits of floats)
//
// The residual stream x and what comes out of the first product are fp32; what products and attention read is in the format.

#include "decode.cuh"

#define OUTPUTS (BATCH < 4 ? 2 : 4)      // rows of w that a warp takes together
#define DEPTH (BATCH < 4 ? 4 : 2)        // pieces of each that are under way

// ---- Products of BATCH rows in shared memory with all rows of w.

typedef float Scratch[WARPS][BATCH][OUTPUTS];             // in shared memory

// prepare() puts x into `rows` (BATCH, K), in shared memory. Then, for every OUTPUTS rows of w from m on, and every row b, one thread calls
// finish(m, b, sums), sums[o] = Σ_k rows[b][k]·w[m + o][k]; m + o may be beyond the last row. The order in which a sum's terms are added
// follows from K and split alone. Pieces of w are asked for as early as can be: the first before x is there, others before sums are added.
template <class Prepare, class Finish>
__device__ __forceinline__ void products(const number* rows, const number* w, int K, int M, int split, Scratch partial, Prepare prepare, Finish finish) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, teams = WARPS / split, team = warp / split;
    const int stride = split * 32, mine = warp % split * 32 + lane, pieces = K / WIDE;      // a lane's pieces: mine, mine + stride, …
    int start = blockIdx.x * teams * OUTPUTS, done = 0;      // the first of the block's rows of w; how many pieces of these are behind us
    Piece taken[DEPTH][OUTPUTS];
    const auto ask = [&] {
        UNROLL for (int d = 0; d < DEPTH; d++)
            UNROLL for (int o = 0; o < OUTPUTS; o++) {
                const int piece = done + mine + d * stride;
                if (piece < pieces) taken[d][o] = *(const Piece*)(w + (long long)min(start + team * OUTPUTS + o, M - 1) * K + piece * WIDE);
            }
    };
    ask();
    prepare();
    float sum[OUTPUTS][BATCH] = {};
    while (start < M) {
        UNROLL for (int d = 0; d < DEPTH; d++) {
            const int piece = done + mine + d * stride;
            if (piece >= pieces) continue;
            Piece x[BATCH];
            UNROLL for (int b = 0; b < BATCH; b++) x[b] = *(const Piece*)(rows + b * K + piece * WIDE);
            UNROLL for (int i = 0; i < WIDE; i++)
                UNROLL for (int b = 0; b < BATCH; b++)
                    UNROLL for (int o = 0; o < OUTPUTS; o++) sum[o][b] += number_of(taken[d][o], i) * number_of(x[b], i);
        }
        done += DEPTH * stride;
        const bool whole = done >= pieces;
        const int m = start;
        if (whole) start += gridDim.x * teams * OUTPUTS, done = 0;
        if (start < M) ask();
        if (!whole) continue;
        UNROLL for (int o = 0; o < OUTPUTS; o++)
            UNROLL for (int b = 0; b < BATCH; b++) {
                const float total = warp_sum(sum[o][b]);
                if (lane == 0) partial[warp][b][o] = total;
                sum[o][b] = 0.0f;
            }
        __syncthreads();
        if (threadIdx.x < teams * BATCH) {
            const int from = threadIdx.x / BATCH, b = threadIdx.x % BATCH;
            float total[OUTPUTS] = {};
            for (int part = 0; part < split; part++)
                UNROLL for (int o = 0; o < OUTPUTS; o++) total[o] += partial[from * split + part][b][o];
            finish(m + from * OUTPUTS, b, total);
        }
        __syncthreads();
    }
}

// Each of the BATCH sums over the whole block, for every thread.
__device__ __forceinline__ void block_sums(float sum[BATCH], Scratch partial) {
    UNROLL for (int b = 0; b < BATCH; b++) {
        const float total = warp_sum(sum[b]);
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][b][0] = total;
    }
    __syncthreads();
    UNROLL for (int b = 0; b < BATCH; b++) {
        sum[b] = 0;
        UNROLL for (int warp = 0; warp < WARPS; warp++) sum[b] += partial[warp][b][0];
    }
    __syncthreads();
}

// rows[b] = (x[b] - μ)·gain/σ + shift, with μ = 0 unless `centre`: LayerNorm and RMSNorm of `count` rows, the others 0.
__device__ __forceinline__ void normalise(number* rows, const float* x, int count, int K, const float* gain, const float* shift, float eps, int centre,
                                          Scratch scratch) {
    float mean[BATCH] = {}, r[BATCH] = {};
    if (centre) {
        for (int k = threadIdx.x; k < K; k += THREADS)
            UNROLL for (int b = 0; b < BATCH; b++) mean[b] += b < count ? x[b * K + k] : 0.0f;
        block_sums(mean, scratch);
        UNROLL for (int b = 0; b < BATCH; b++) mean[b] /= K;
    }
    for (int k = threadIdx.x; k < K; k += THREADS)
        UNROLL for (int b = 0; b < BATCH; b++) {
            const float centred = b < count ? x[b * K + k] - mean[b] : 0.0f;
            r[b] += centred * centred;
        }
    block_sums(r, scratch);
    UNROLL for (int b = 0; b < BATCH; b++) r[b] = rsqrtf(r[b] / K + eps);
    for (int k = threadIdx.x; k < K; k += THREADS) {
        const float g = gain[k], s = shift ? shift[k] : 0.0f;
        UNROLL for (int b = 0; b < BATCH; b++) rows[b * K + k] = store(b < count ? (x[b * K + k] - mean[b]) * r[b] * g + s : 0.0f);
    }
    __syncthreads();
}

__device__ __forceinline__ int texts_here(int B) { return min(BATCH, B - (int)blockIdx.y * BATCH); }      // in this group of BATCH

// grid (C/128 up, B)
extern "C" __global__ void __launch_bounds__(THREADS) embed(const int* __restrict__ steps, const number* __restrict__ tokens,
                                                            const float* __restrict__ places, float* __restrict__ x, int C) {
    const int k = blockIdx.x * THREADS + threadIdx.x, *step = steps + blockIdx.y * STEP;
    if (k < C) x[blockIdx.y * C + k] = load(tokens[(long long)step[0] * C + k]) + (places ? places[(long long)step[1] * C + k] : 0.0f);
}

// x (B, K) fp32, w (M, K), y (B, M) fp32.   grid (blocks, B/BATCH up), BATCH·K numbers of shared memory
extern "C" __global__ void __launch_bounds__(THREADS, 3) normed_products(const float* __restrict__ x, const float* __restrict__ gain,
        const float* __restrict__ shift, float eps, int centre, const number* __restrict__ w, const number* __restrict__ bias,
        float* __restrict__ y, int B, int K, int M, int split) {
    DYNAMIC_SHARED(shared);
    __shared__ Scratch scratch;
    number* rows = (number*)shared;
    const int first = blockIdx.y * BATCH, count = texts_here(B);
    const auto prepare = [&] { normalise(rows, x + (long long)first * K, count, K, gain, shift, eps, centre, scratch); };
    products(rows, w, K, M, split, scratch, prepare, [=](int m, int b, const float* sums) {
        UNROLL for (int o = 0; o < OUTPUTS; o++)
            if (b < count && m + o < M) y[(long long)(first + b) * M + m + o] = sums[o] + (bias ? load(bias[m + o]) : 0.0f);
    });
}

#define GELU 0
#define GELU_TANH 1
#define RELU 2
#define RELU2 3
#define SILU 4
__device__ __forceinline__ float activation(int kind, float x) {
    if (kind == GELU) return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    if (kind == GELU_TANH) return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    if (kind == SILU) return x / (1.0f + expf(-x));
    const float positive = fmaxf(x, 0.0f);
    return kind == RELU ? positive : positive * positive;
}

// x (B, K) fp32, w (M, K), y (B, M) in the format; gated: w's rows are gate 0, up 0, gate 1, up 1, …, and y (B, M/2) = f(gate)·up.
extern "C" __global__ void __launch_bounds__(THREADS, 3) active_products(const float* __restrict__ x, const float* __restrict__ gain,
        const float* __restrict__ shift, float eps, int centre, const number* __restrict__ w, const number* __restrict__ bias,
        number* __restrict__ y, int kind, int gated, int B, int K, int M, int split) {
    DYNAMIC_SHARED(shared);
    __shared__ Scratch scratch;
    number* rows = (number*)shared;
    const int first = blockIdx.y * BATCH, count = texts_here(B), width = gated ? M / 2 : M;
    const auto prepare = [&] { normalise(rows, x + (long long)first * K, count, K, gain, shift, eps, centre, scratch); };
    products(rows, w, K, M, split, scratch, prepare, [=](int m, int b, const float* sums) {
        UNROLL for (int o = 0; o < OUTPUTS; o++) {
            if (b >= count || m + o >= M || (gated && o % 2)) continue;
            float value = activation(kind, sums[o] + (bias ? load(bias[m + o]) : 0.0f));
            if (gated) value *= sums[o | 1] + (bias ? load(bias[m + o + 1]) : 0.0f);
            y[(long long)(first + b) * width + (gated ? (m + o) / 2 : m + o)] = store(value);
        }
    });
}

// in (B, K) in the format, w (M, K), x (B, M) fp32.
extern "C" __global__ void __launch_bounds__(THREADS, 3) added_products(const number* __restrict__ in, const number* __restrict__ w,
        const number* __restrict__ bias, float* __restrict__ x, int B, int K, int M, int split) {
    DYNAMIC_SHARED(shared);
    __shared__ Scratch scratch;
    Piece* rows = (Piece*)shared;
    const int first = blockIdx.y * BATCH, count = texts_here(B), pieces = K / WIDE;
    const Piece* source = (const Piece*)(in + (long long)first * K);
    const auto prepare = [&] {
        for (int i = threadIdx.x; i < BATCH * pieces; i += THREADS) rows[i] = i < count * pieces ? source[i] : Piece{};
        __syncthreads();
    };
    products((number*)shared, w, K, M, split, scratch, prepare, [=](int m, int b, const float* sums) {
        UNROLL for (int o = 0; o < OUTPUTS; o++)
            if (b < count && m + o < M) x[(long long)(first + b) * M + m + o] += sums[o] + (bias ? load(bias[m + o]) : 0.0f);
    });
}
