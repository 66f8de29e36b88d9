// Cross-entropy of rows of scores, and its gradient in the scores' place.
//
//   z: rows of V scores, `stride` numbers apart      t: targets      u: weights      ε: label smoothing      ζ: of the z-loss
//
//   top = max z     total = Σ e^(z - top)     lse = top + ln total
//   loss   = u·(ln total - (1-ε)·(z_t - top) - ε·(mean(z) - top) + ζ·lse²)        counted from the maximum: no digits are lost in lse - z_t
//   z ← gain·u·((1 + 2ζ·lse)·e^(z - top)/total - (1-ε)·[t] - ε/V)                 if `gradient`; ops/cross_entropy.py derives both
//
// `gain` is a power of two that lifts small probabilities into fp16's range; who uses the gradient divides by it. A row of weight 0 has loss
// and gradient 0 whatever its scores.
//
// Bytes. Op by op, in fp32 (4 bytes a score): maximum, shifted copy, exp, sum, division, the target's term: about 11 passes, 44 bytes a
// score. Here a row is read twice and written once, in 16 bits, and the second reading finds in the L2 cache what the first one brought
// (a row of 50,304 is 100 KB; two rows on each of 132 multiprocessors are 27 MB, the cache of an H200 50): 4 bytes a score from memory.
// N = 32,768 rows of V = 50,304: 6.6 GB, at 4.3 TB/s 1.5 ms, beside 12 ms for the three products around it (predicted, not yet measured).
//
// Launch. A block a row; 1024 threads, fewer for a small V, each on 16-byte vectors. One pass finds maximum and sum together: a thread
// that meets a larger score rescales its sum so far, once for each vector. WIDTH is a vector's length: 1 where rows do not lie at
// multiples of 16 bytes.

#ifndef WIDTH
#define WIDTH VEC
#endif
#define LOG2E 1.44269504f
#define LOWEST -3.402823466e38f      // finite, so that LOWEST - LOWEST is not NaN

struct __align__(WIDTH * sizeof(number)) Scores { number at[WIDTH]; };

// x: the scores from column i on; -∞ for what lies beyond the row, which then counts nothing.
__device__ __forceinline__ void read(const number* row, int i, int V, float* x) {
    const Scores some = *(const Scores*)(row + i);
    for (int j = 0; j < WIDTH; j++) x[j] = i + j < V ? load(some.at[j]) : -INFINITY;
}

extern "C" __global__ void __launch_bounds__(1024, 2)
cross_entropy(number* z, const int* targets, const float* weights, float* losses, int V, long long stride, float smoothing, float z_loss,
              float gain, int gradient) {
    __shared__ float scratch[32];
    z += blockIdx.x * stride;
    const int target = targets[blockIdx.x], first = threadIdx.x * WIDTH, step = blockDim.x * WIDTH;
    const float weight = weights[blockIdx.x];
    const float own = load(z[target]);      // every thread reads it before the first barrier, so before any is written

    float top = LOWEST, total = 0.0f, sum = 0.0f;
    for (int i = first; i < V; i += step) {
        float x[WIDTH], higher = top, part = 0.0f;
        read(z, i, V, x);
        for (int j = 0; j < WIDTH; j++) higher = fmaxf(higher, x[j]);
        for (int j = 0; j < WIDTH; j++) part += exp2f((x[j] - higher) * LOG2E);
        total = total * exp2f((top - higher) * LOG2E) + part;
        top = higher;
        if (smoothing != 0.0f)
            for (int j = 0; j < WIDTH; j++) sum += i + j < V ? x[j] : 0.0f;
    }
    const float mine = top;
    top = block_max(top, scratch);
    total = block_sum(total * exp2f((mine - top) * LOG2E), scratch);
    sum = smoothing != 0.0f ? block_sum(sum, scratch) : 0.0f;

    const float logarithm = logf(total), lse = top + logarithm;
    if (threadIdx.x == 0) {
        const float loss = logarithm - (1.0f - smoothing) * (own - top) - smoothing * (sum / V - top) + z_loss * lse * lse;
        losses[blockIdx.x] = weight == 0.0f ? 0.0f : weight * loss;
    }
    if (!gradient) return;

    const float scale = gain * weight * (1.0f + 2.0f * z_loss * lse) / total;
    const float spread = gain * weight * smoothing / V, wanted = gain * weight * (1.0f - smoothing);
    for (int i = first; i < V; i += step) {
        float x[WIDTH];
        Scores some;
        read(z, i, V, x);
        for (int j = 0; j < WIDTH; j++) {
            const float dz = scale * exp2f((x[j] - top) * LOG2E) - spread - (i + j == target ? wanted : 0.0f);
            some.at[j] = store(weight == 0.0f ? 0.0f : dz);
        }
        *(Scores*)(z + i) = some;
    }
}
