// AdamW over flat buffers without a look from the host: Σ g², what follows from it, the update.
//
//   squares   partial sums of g², then `total`: their sum         n numbers                  reads 4 bytes each
//   decide    one thread: finite? clip factor, loss scale, Adam's constants                  a few dozen numbers
//   adamw     p, m, v from g, and p once more in 16 bits          n numbers                  reads 16 bytes each, writes 12 + 2
//
// Bytes. Op by op an update takes about 14 passes over fp32 arrays after the clip factor has come to the host, and a pass to make the
// 16-bit copy: 70 bytes a parameter. Here it is 34. GPT-2's 124 million: 4.2 GB, at 4.3 TB/s 1.0 ms (predicted, not yet measured).
//
// Squares are taken and added up in double, as on the CPU: no square of a finite gradient overflows, nothing small gets lost. A GPU for games
// has one unit for doubles to 64 for floats: a conversion and an addition for each 4 bytes, on an RTX 4090 about 320 thousand million a second
// (estimated), still above the 250 that its memory delivers; one for computing has plenty. Every sum is in an order that the number of elements
// alone decides, so it is the same in every run and on every GPU.
//
// Launch. squares: up to 1024 blocks of 256 threads, which stride over the whole array by 4 numbers a thread: enough loads under way for
// any GPU, and few enough partial sums for one block to add up. adamw: a thread for each 4 neighbouring numbers: four loads and three stores
// of 16 bytes, and nothing to share.

#define BLOCK 256

// Fields of the state, named in the same order in adamw.py's STATE. All are doubles, so that one array holds them: counts are exact up to 2^53.
enum {
    SCALE,          // what the next loss is multiplied by
    GOOD_STEPS,     // in a row, since the scale last changed
    UPDATES,        // of the weights so far: Adam's t
    DIVERGED,       // 0 or 1; from then on nothing changes but LATER
    LATER,          // steps since it diverged
    LOSS, NORM, USED_SCALE, MOVED,                      // of the newest step: its figures, and whether the weights moved
    KEEP, MEAN_FACTOR, SQUARE_FACTOR, RATE, EPSILON     // what `adamw` multiplies with, if they do
};

struct __align__(16) Four { float at[4]; };                      // what a thread works on
struct __align__(4 * sizeof(number)) Copies { number at[4]; };

// Numbers i to i+3 of n, 0 beyond the end.
__device__ __forceinline__ Four four(const float* x, long long i, long long n) {
    if (i + 4 <= n) return *(const Four*)(x + i);
    Four some = {};
    for (int j = 0; j < 4; j++) if (i + j < n) some.at[j] = x[i + j];
    return some;
}
__device__ __forceinline__ void put(float* x, long long i, long long n, const Four& some) {
    if (i + 4 <= n) *(Four*)(x + i) = some;
    else for (int j = 0; j < 4; j++) if (i + j < n) x[i + j] = some.at[j];
}

__device__ __forceinline__ bool is_finite(double x) { return x - x == 0.0; }     // ∞ - ∞ and NaN - NaN are NaN

// Every thread of a block of BLOCK gets the sum, added up as a tree.
__device__ __forceinline__ double sum_of_block(double x, double* shared) {
    shared[threadIdx.x] = x;
    for (int half = BLOCK / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    __syncthreads();
    return shared[0];
}

extern "C" __global__ void __launch_bounds__(BLOCK) squares(const float* g, long long n, double* partial) {
    __shared__ double shared[BLOCK];
    double sum = 0.0;
    const long long step = 4LL * BLOCK * gridDim.x;
    for (long long i = 4LL * (blockIdx.x * BLOCK + threadIdx.x); i < n; i += step) {
        const Four some = four(g, i, n);
        for (int j = 0; j < 4; j++) sum += (double)some.at[j] * some.at[j];
    }
    sum = sum_of_block(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(BLOCK) total(const double* partial, int count, double* sum) {
    __shared__ double shared[BLOCK];
    double mine = 0.0;
    for (int i = threadIdx.x; i < count; i += BLOCK) mine += partial[i];
    mine = sum_of_block(mine, shared);
    if (threadIdx.x == 0) *sum = mine;
}

// One step of optim.Control, in the terms of optim.LossScaler, optim.clip_factor and AdamW._update. growth_interval 0: the scale never
// grows.     clip 0: no limit.
extern "C" __global__ void decide(double* state, const double* loss, const double* square, double lr, double clip, double growth_interval,
                                  double minimum, double beta1, double beta2, double epsilon, double weight_decay) {
    state[MOVED] = 0.0;
    if (state[DIVERGED]) {
        state[LATER] += 1.0;
        return;
    }
    const double scale = state[SCALE], norm = sqrt(*square) / scale;
    state[LOSS] = *loss;
    state[NORM] = norm;
    state[USED_SCALE] = scale;
    if (!is_finite(*loss) || !is_finite(norm)) {
        state[DIVERGED] = scale / 2.0 < minimum;
        if (!state[DIVERGED]) {
            state[SCALE] = scale / 2.0;
            state[GOOD_STEPS] = 0.0;
        }
        return;
    }
    state[GOOD_STEPS] += 1.0;
    if (state[GOOD_STEPS] == growth_interval) {
        state[SCALE] = scale * 2.0;
        state[GOOD_STEPS] = 0.0;
    }
    state[UPDATES] += 1.0;
    state[MOVED] = 1.0;
    const double factor = (clip && clip < norm + 1e-6 ? clip / (norm + 1e-6) : 1.0) / scale;
    const double c = sqrt(1.0 - pow(beta2, state[UPDATES]));
    state[KEEP] = 1.0 - lr * weight_decay;
    state[MEAN_FACTOR] = (1.0 - beta1) * factor;
    state[SQUARE_FACTOR] = sqrt(1.0 - beta2) * factor;
    state[RATE] = lr * c / (1.0 - pow(beta1, state[UPDATES]));
    state[EPSILON] = epsilon * c;
}

// m ← β₁·m + (1-β₁)·factor·g     v ← β₂·v + (√(1-β₂)·factor·g)²     p ← keep·p - rate·m/(√v + ε·c)     keep: 1 where weights do not decay
// c = √(1-β₂ᵗ), rate = lr·c/(1-β₁ᵗ): optim/adamw.py says why this is AdamW. The first `decayed` weights decay. Where the step is left out, all
// stay as they are. In FP16 and BF16 `copy` gets p in that format, also then: so it holds p after every step, whatever it held before.
extern "C" __global__ void __launch_bounds__(BLOCK)
adamw(float* p, float* m, float* v, const float* g, number* copy, long long n, long long decayed, float beta1, float beta2,
      const double* state) {
    const long long i = 4LL * ((long long)blockIdx.x * BLOCK + threadIdx.x);
    Four weight = four(p, i, n);
    if (state[MOVED]) {
        const float keep = (float)state[KEEP], mean_factor = (float)state[MEAN_FACTOR], square_factor = (float)state[SQUARE_FACTOR];
        const float rate = (float)state[RATE], epsilon = (float)state[EPSILON];
        const Four gradient = four(g, i, n);
        Four mean = four(m, i, n), square = four(v, i, n);
        for (int j = 0; j < 4; j++) {
            const float root = square_factor * gradient.at[j];
            mean.at[j] = beta1 * mean.at[j] + mean_factor * gradient.at[j];
            square.at[j] = beta2 * square.at[j] + root * root;
            const float kept = i + j < decayed ? keep * weight.at[j] : weight.at[j];
            weight.at[j] = kept - rate * mean.at[j] / (sqrtf(square.at[j]) + epsilon);
        }
        put(p, i, n, weight);
        put(m, i, n, mean);
        put(v, i, n, square);
    }
#if FORMAT != FP32
    Copies rounded;
    for (int j = 0; j < 4; j++) rounded.at[j] = store(weight.at[j]);
    if (i + 4 <= n) *(Copies*)(copy + i) = rounded;
    else for (int j = 0; j < 4; j++) if (i + j < n) copy[i + j] = rounded.at[j];
#endif
}
