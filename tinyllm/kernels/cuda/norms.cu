// LayerNorm and RMSNorm of rows of WIDTH numbers, forward (with a residual sum on the way) and backward (likewise).
//
//     forward    s = x + plus                                      stored in 16 bits, and normalised as stored
//                y = (s - mean)·r·w + b         r = 1/√(variance + eps)         (RMSNorm: mean = 0, no b)
//     backward   x̂ = (x - mean)·r         dx = r·(dy·w - mean(dy·w) - x̂·mean(dy·w·x̂)) + plus         (RMSNorm: no mean(dy·w))
//                dw = Σ_rows dy·x̂         db = Σ_rows dy
//
// Bytes moved, for each number of the row in 16 bits (op by op: the ops' array expressions in fp32, one pass each):
//                           op by op   here
//     forward                     60      4      read x, write y
//     forward with plus           66      8      read x and plus, write s and y
//     backward                    96      6      read dy and x, write dx
//     backward with plus         102      8      and read plus
// For each row, 8 bytes of statistics; for all rows, WIDTH gains. The variance is that of the centred numbers, in a second pass over
// registers: E[x²] - E[x]² would lose all digits of a row with a large mean.
//
// Launch: a row is kept in registers by WARPS warps. One warp, and TEAMS = 4 rows a block, for rows of up to 1024 numbers: sums need no
// barrier. Longer rows get a block, of as many threads as give each a vector. Forward: a row for every such team. Backward: 396 blocks,
// three for each of an H200's 132 multiprocessors, go through the rows with dw and db in registers; each block writes one partial row, and
// sums.cu's add_parts adds these in order. dw, db and the row, packed and unpacked, are up to 160 registers of the 168 that three blocks
// of four warps have.
//
// Predicted for N = 32,768, C = 768, 16 bits, at 4.3 TB/s, not yet measured: forward 23 µs, with plus 47; backward 35 µs, with plus 47, and
// 4 for the partial rows. 12 warps a multiprocessor with 3 KB of loads each: 36 KB, where 25 KB always under way are what that rate needs.
//
// Macros: WIDTH, VEC (divides WIDTH), WARPS, CENTRE (1: LayerNorm, 0: RMSNorm), FORMAT.

#define THREADS (32 * WARPS)                                    // for a row
#define TEAMS (WARPS == 1 ? 4 : 1)                              // rows in a block
#define PIECES ((WIDTH / VEC + THREADS - 1) / THREADS)          // vectors of a row that a thread has
#define SUMS (1 + CENTRE)                                       // dw, and db
#define EACH_PIECE(i, c) _Pragma("unroll") for (int i = 0, c = lane * VEC; i < PIECES; ++i, c += THREADS * VEC) if (c < WIDTH)

__device__ __forceinline__ Floats gains(const float* w, int column, float otherwise)
{
    if (w)
        return *(const Floats*)(w + column);
    Floats all;
    for (int j = 0; j < VEC; ++j)
        all.at[j] = otherwise;
    return all;
}

// to = sum + more, where there is more
__device__ __forceinline__ void add(Floats sum, const float* more, float* to)
{
    if (more) {
        const Floats others = *(const Floats*)more;
        for (int j = 0; j < VEC; ++j)
            sum.at[j] += others.at[j];
    }
    *(Floats*)to = sum;
}

__device__ __forceinline__ float row_mean(float x, float* scratch)
{
    return (WARPS == 1 ? warp_sum(x) : block_sum(x, scratch)) * (1.0f / WIDTH);
}

extern "C" __global__ void __launch_bounds__(THREADS * TEAMS) norm_forward(
    const number* x, const number* plus, const float* w, const float* b, number* s, number* y, float* statistics, int rows, float eps)
{
    __shared__ float scratch[32];
    const int row = blockIdx.x * TEAMS + threadIdx.x / THREADS, lane = threadIdx.x % THREADS;
    if (row >= rows)
        return; // a whole warp; where there are barriers, the block has one row
    const long long start = (long long)row * WIDTH;
    Vec kept[PIECES];
    float sum = 0;
    EACH_PIECE(i, c) {
        kept[i] = *(const Vec*)(x + start + c);
        if (plus) {
            const Vec more = *(const Vec*)(plus + start + c);
            for (int j = 0; j < VEC; ++j)
                kept[i].at[j] = store(load(kept[i].at[j]) + load(more.at[j]));
            *(Vec*)(s + start + c) = kept[i];
        }
        for (int j = 0; j < VEC; ++j)
            sum += load(kept[i].at[j]);
    }
    const float mean = CENTRE ? row_mean(sum, scratch) : 0;
    float squares = 0;
    EACH_PIECE(i, c)
        for (int j = 0; j < VEC; ++j) {
            const float centred = load(kept[i].at[j]) - mean;
            squares += centred * centred;
        }
    const float r = rsqrtf(row_mean(squares, scratch) + eps);
    if (lane == 0) {
        statistics[2 * row] = mean;
        statistics[2 * row + 1] = r;
    }
    EACH_PIECE(i, c) {
        const Floats gain = gains(w, c, 1), bias = gains(b, c, 0);
        for (int j = 0; j < VEC; ++j)
            kept[i].at[j] = store((load(kept[i].at[j]) - mean) * r * gain.at[j] + bias.at[j]);
        *(Vec*)(y + start + c) = kept[i];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS * TEAMS, TEAMS > 1 && FORMAT != FP32 ? 3 : 1) norm_backward(
    const number* dy, const number* x, const float* statistics, const float* w, const number* plus, number* dx, float* parts, int rows)
{
    __shared__ float scratch[32];
    __shared__ __align__(16) float sums[TEAMS > 1 ? SUMS * WIDTH : 1];
    __shared__ __align__(16) float gains[WIDTH];
    const int team = threadIdx.x / THREADS, lane = threadIdx.x % THREADS;
    for (int c = threadIdx.x; c < WIDTH; c += THREADS * TEAMS)
        gains[c] = w ? w[c] : 1;
    __syncthreads();
    Floats dw[PIECES] = {}, db[PIECES] = {};
    for (int row = blockIdx.x * TEAMS + team; row < rows; row += gridDim.x * TEAMS) {
        const long long start = (long long)row * WIDTH;
        const float mean = statistics[2 * row], r = statistics[2 * row + 1];
        Vec upstream[PIECES], kept[PIECES];
        EACH_PIECE(i, c) {
            upstream[i] = *(const Vec*)(dy + start + c);
            kept[i] = *(const Vec*)(x + start + c);
        }
        float along = 0, common = 0;
        __syncwarp(); // gains are read again for each row: kept in registers they would take the place of other rows' warps
        EACH_PIECE(i, c) {
            const Floats gain = *(const Floats*)(gains + c);
            for (int j = 0; j < VEC; ++j) {
                const float d = load(upstream[i].at[j]), x_hat = (load(kept[i].at[j]) - mean) * r;
                dw[i].at[j] += d * x_hat;
                db[i].at[j] += d;
                along += d * gain.at[j] * x_hat;
                common += d * gain.at[j];
            }
        }
        along = row_mean(along, scratch);
        common = CENTRE ? row_mean(common, scratch) : 0;
        __syncwarp();
        EACH_PIECE(i, c) {
            const Floats gain = *(const Floats*)(gains + c);
            Vec result;
            if (plus)
                result = *(const Vec*)(plus + start + c);
            for (int j = 0; j < VEC; ++j) {
                const float x_hat = (load(kept[i].at[j]) - mean) * r;
                const float d = r * (load(upstream[i].at[j]) * gain.at[j] - common - x_hat * along);
                result.at[j] = store(plus ? d + load(result.at[j]) : d);
            }
            *(Vec*)(dx + start + c) = result;
        }
    }
    parts += (long long)blockIdx.x * SUMS * WIDTH;
    for (int turn = 0; turn < TEAMS; ++turn) { // one warp after another adds its sums to those before, the last one writes them
        float* to = turn == TEAMS - 1 ? parts : sums;
        if (team == turn)
            EACH_PIECE(i, c) {
                add(dw[i], turn ? sums + c : nullptr, to + c);
                if (CENTRE)
                    add(db[i], turn ? sums + (SUMS - 1) * WIDTH + c : nullptr, to + (SUMS - 1) * WIDTH + c);
            }
        __syncthreads();
    }
}
