// Attention's backward on tensor cores: the weights p are computed again, tile by tile, from q, k and the forward's lse.
//
// The softmax's derivative ds = p·(dp - Σ p·dp) needs no pass of its own over the keys: Σⱼ pⱼ·dpⱼ = Σⱼ pⱼ·(do·vⱼ) = do·o. So with c the
// scale
//
//     p = e^(c·s - lse)      dp = do·vᵀ      δ = Σ_D do·o      ds = p·(dp - δ)
//     dv = pᵀ·do             dk = c·dsᵀ·q    dq = c·ds·k
//
// 1. attention_statistics writes (lse·log2 e, δ) of each query, padded to whole tiles with (∞, 0): a padded query has p = 0.
// 2. attention_backward_keys: a block owns KEY_ROWS keys, keeps their dk and dv in registers, and visits the queries that see them, over
//    all heads that share them: every sum has one owner and one order. Scores are made transposed, keys down, queries across: pᵀ and dsᵀ
//    as one product leaves them are laid out as the left factor of the next, and never leave the registers. dq's sum runs over the keys,
//    that is over blocks: fp32 atomics gather it (ds is turned in shared memory), fast, but in an order that differs from run to run;
//    attention_convert makes 16-bit numbers of it.
// 3. Or, where runs must be bitwise equal, attention_backward_queries makes dq: a block owns 128 queries and visits the keys: 7 products
//    instead of 5.
//
// Cut of the work. dk and dv take OWN·HEAD_WIDTH registers a thread, so that a warp owns 32 keys up to D = 64, and 16 beyond. Scores are
// made for STRIP queries at a time: 255 registers then do, for two blocks a multiprocessor. Cycles of an H200's multiprocessor for 128 ×
// 64 scores of D = 64: products 2050 (mma.sync), shared memory 2300, exponentials 512, and 4096 words for the L2 cache to add to dq.
//
// FLOPs, causal, T = S: 5·T²·D a head. Bytes: q, k, v, o, do, dq, dk, dv, 18·T·D (o and do twice), and for the fp32 dq 12·T·D (set to zero,
// gathered, read). Predicted, not yet measured: 150 to 200 TFLOP/s of bf16 on an H200 at T = 1024, D = 64, of a bound of 530 by shared
// memory: of five products in a chain a warp waits more often than of the forward's two. Deterministic: 20 to 30 % slower.
// Sources: Dao et al. 2022; Dao 2023 (FlashAttention-2).

#include "attention_tiles.cuh"

#define STRIP 32                            // scores in registers at a time: of a warp's rows with this many queries (or keys)
#define KEY_ROWS (16 * OWN * WARPS)         // keys of a block that owns keys, 16·OWN a warp

// o, do (B, H, T, D), lse (B, H, T) -> statistics (B, H, 2, padded), padded a multiple of QUERY_ROWS.
// 8 threads a query. Grid: B·H·padded/16 blocks.
extern "C" __global__ void __launch_bounds__(THREADS) attention_statistics(
    const number* __restrict__ o, long long o_batch, long long o_head, long long o_row,
    const number* __restrict__ d_o, long long d_o_batch, long long d_o_head, long long d_o_row,
    const float* __restrict__ lse, float* __restrict__ statistics, int H, int T, int padded) {
    const int blocks = padded / (THREADS / 8), head = (int)blockIdx.x / blocks, b = head / H, h = head % H;
    const int row = (int)blockIdx.x % blocks * (THREADS / 8) + (int)threadIdx.x / 8;
    float delta = 0.0f;
    if (row < T)
        for (int chunk = threadIdx.x % 8; chunk < CHUNKS; chunk += 8) {
            const Vec x = *(const Vec*)(o + b * o_batch + h * o_head + row * o_row + 8 * chunk);
            const Vec dx = *(const Vec*)(d_o + b * d_o_batch + h * d_o_head + row * d_o_row + 8 * chunk);
#pragma unroll
            for (int i = 0; i < VEC; i++) delta += load(x.at[i]) * load(dx.at[i]);
        }
    for (int other = 4; other; other /= 2) delta += __shfl_xor_sync(ALL_LANES, delta, other);
    if (threadIdx.x % 8 == 0) {
        float* const to = statistics + 2 * (long long)head * padded + row;
        to[0] = row < T ? lse[(long long)head * T + row] * LOG2_E : INFINITY;
        to[padded] = delta;
    }
}

// Where in a head's dq_sums the 16 rows from `row` on of 8 columns from 8·chunk on lie: 4 × 32 numbers, a lane's i-th at 32·i + lane, so
// that an atomic instruction of a warp adds to 128 bytes in a row. Only attention_convert has to know.
__device__ __forceinline__ int place_of_sums(int row, int chunk) { return (row / 16 * CHUNKS + chunk) * 128; }

// dq_sums += ds·k for the queries of a tile, from `row` on; ds_tile holds dsᵀ. A warp makes 32 queries × COLUMNS.
__device__ __forceinline__ void add_to_dq(float* dq_sums, const number* ds_tile, const number* keys, int row) {
    constexpr int DOWN = QUERY_TILE / 32, COLUMNS = HEAD_WIDTH * DOWN / WARPS;      // DOWN: warps below each other
    const int warp = threadIdx.x / 32, query = warp % DOWN * 32, column = warp / DOWN * COLUMNS;
    float dq[2][COLUMNS / 8][4];
    set_to_zero(dq);
#pragma unroll
    for (int k = 0; k < KEY_ROWS; k += 16) {
        unsigned left[2][4], right[4];
#pragma unroll
        for (int m = 0; m < 2; m++) load_matrix_x4_transposed(left[m], ds_tile + chunks_first<QUERY_TILE>(k, query / 8 + 2 * m));
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n += 2) {
            load_matrix_x4_transposed(right, keys + rows_first<HEAD_WIDTH>(k, column / 8 + n));
            mma_step(dq, n, left, right);
        }
    }
    dq_sums += place_of_sums(row + query, column / 8) + threadIdx.x % 32;
    each(dq, [&](float& x, int m, int n, int i) { atomicAdd(dq_sums + place_of_sums(16 * m, n) + 32 * i, x); });
}

// dk, dv; and dq_sums (B, H, padded, D) += ds·k, unless it is null.
// Grid: B·G·⌈S/KEY_ROWS⌉ blocks. Shared: KEY_ROWS rows of k and v, 2 tiles of q and do, KEY_ROWS × QUERY_TILE of ds, 2 tiles of statistics.
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_keys(
    const number* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    const number* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const number* __restrict__ v, long long v_batch, long long v_head, long long v_row,
    const number* __restrict__ d_o, long long d_o_batch, long long d_o_head, long long d_o_row,
    number* __restrict__ dk, long long dk_batch, long long dk_head, long long dk_row,
    number* __restrict__ dv, long long dv_batch, long long dv_head, long long dv_row,
    const float* __restrict__ statistics, float* __restrict__ dq_sums,
    int H, int G, int T, int S, int padded, int offset, int back, int ahead, const int* __restrict__ documents, float scale,
    int together) {
    DYNAMIC_SHARED(shared);
    number* const keys = (number*)shared;
    number* const values = keys + KEY_ROWS * HEAD_WIDTH;
    number* const queries = values + KEY_ROWS * HEAD_WIDTH;
    number* const gradients = queries + 2 * QUERY_TILE * HEAD_WIDTH;
    number* const ds_tile = gradients + 2 * QUERY_TILE * HEAD_WIDTH;
    float* const lse_and_delta = (float*)(ds_tile + KEY_ROWS * QUERY_TILE);
    const Turn turn(tiles_of(S, KEY_ROWS), together);      // under a causal mask the first keys have most to do
    const int share = H / G, b = turn.head / G, g = turn.head % G, first = turn.tile * KEY_ROWS;
    q += b * q_batch + g * share * q_head, d_o += b * d_o_batch + g * share * d_o_head;
    k += b * k_batch + g * k_head, v += b * v_batch + g * v_head, dk += b * dk_batch + g * dk_head, dv += b * dv_batch + g * dv_head;
    const long long head = (long long)b * H + g * share;      // the first of those that share these keys

    const Band band = {offset, back, ahead, T, S, documents + 2 * b * padded};
    const Range visits = tiles_that_see(band, first, KEY_ROWS, QUERY_TILE);
    const int tiles = visits.end - visits.begin, steps = tiles * share;
    const auto fetch = [&](int step) {      // the queries of a step
        const int h = step / tiles, row = (visits.begin + step % tiles) * QUERY_TILE, buffer = step % 2 * QUERY_TILE;
        copy_tile<QUERY_TILE>(queries + buffer * HEAD_WIDTH, q + h * q_head, q_row, row, T);
        copy_tile<QUERY_TILE>(gradients + buffer * HEAD_WIDTH, d_o + h * d_o_head, d_o_row, row, T);
        if (threadIdx.x < QUERY_TILE / 2) {
            const int plane = threadIdx.x / (QUERY_TILE / 4), column = threadIdx.x % (QUERY_TILE / 4) * 4;
            const float* const from = statistics + (2 * (head + h) + plane) * padded + row;
            copy_async16(lse_and_delta + 2 * buffer + plane * QUERY_TILE + column, from + column, true);
        }
    };
    copy_tile<KEY_ROWS>(keys, k, k_row, first, S);
    copy_tile<KEY_ROWS>(values, v, v_row, first, S);
    if (steps) fetch(0);
    copy_commit();

    const int own = threadIdx.x / 32 * 16 * OWN, key = first + own, last_key = key + 16 * OWN - 1;
    float dk_sum[OWN][2 * STEPS][4], dv_sum[OWN][2 * STEPS][4];
    set_to_zero(dk_sum);
    set_to_zero(dv_sum);
    for (int step = 0; step < steps; step++) {
        copy_wait<0>();
        __syncthreads();      // the queries are here for all, and all have done with those before and with ds
        if (step + 1 < steps) fetch(step + 1);
        copy_commit();
        const int row = (visits.begin + step % tiles) * QUERY_TILE;
#pragma unroll 1
        for (int strip = 0; strip < QUERY_TILE; strip += STRIP) {
            const int query = row + strip, last_query = query + STRIP - 1, buffer = step % 2 * QUERY_TILE;
            const number* const q_strip = queries + (buffer + strip) * HEAD_WIDTH;
            const number* const d_o_strip = gradients + (buffer + strip) * HEAD_WIDTH;
            const float* const lse = lse_and_delta + 2 * buffer + strip + own_column(0);
            float p[OWN][STRIP / 8][4], dp[OWN][STRIP / 8][4];      // transposed
            if (band.none(query, last_query, key, last_key)) {
                set_to_zero(p);
            } else {
                rows_times_rows(p, keys + own * HEAD_WIDTH, q_strip);
                if (!band.all(query, last_query, key, last_key))
                    each(p, [&](float& x, int m, int n, int i) {
                        if (!band.sees(query + 8 * n + own_column(i), key + 16 * m + own_row(i))) x = -INFINITY;
                    });
                each(p, [&](float& x, int, int n, int i) { x = exp2f(fmaf(x, scale * LOG2_E, -lse[8 * n + i % 2])); });
                scores_times_rows(dv_sum, p, d_o_strip);
                rows_times_rows(dp, values + own * HEAD_WIDTH, d_o_strip);
                each(p, [&](float& x, int m, int n, int i) { x *= dp[m][n][i] - lse[QUERY_TILE + 8 * n + i % 2]; });      // now ds
                scores_times_rows(dk_sum, p, q_strip);
            }
            if (dq_sums) to_tile<QUERY_TILE>(ds_tile + own * QUERY_TILE, p, strip / 8);
        }
        if (dq_sums) {
            __syncthreads();      // ds is here
            add_to_dq(dq_sums + (head + step / tiles) * padded * HEAD_WIDTH, ds_tile, keys, row);
        }
    }
    copy_wait<0>();
    __syncthreads();      // all have done with the keys
    each(dk_sum, [&](float& x, int, int, int) { x *= scale; });
    store_rows(dk_sum, keys + own * HEAD_WIDTH, dk, dk_row, key, S);
    store_rows(dv_sum, values + own * HEAD_WIDTH, dv, dv_row, key, S);
}

// dq = scale·dq_sums, in the format. dq_sums (B, H, padded, D). A thread makes 16 bytes of a row. Grid: B·H·padded·CHUNKS/THREADS blocks.
extern "C" __global__ void __launch_bounds__(THREADS) attention_convert(
    const float* __restrict__ dq_sums, number* __restrict__ dq, long long dq_batch, long long dq_head, long long dq_row,
    int H, int T, int padded, float scale) {
    const int blocks = padded * CHUNKS / THREADS, head = (int)blockIdx.x / blocks, b = head / H, h = head % H;
    const int index = (int)blockIdx.x % blocks * THREADS + (int)threadIdx.x;
    const int chunk = index / 16 % CHUNKS, row = index / (16 * CHUNKS) * 16 + index % 16;
    if (row >= T) return;
    // The row's even columns, in four lanes, and then its odd ones.
    const float* const from = dq_sums + (long long)head * padded * HEAD_WIDTH + place_of_sums(row, chunk) + row % 16 / 8 * 64 + row % 8 * 4;
    const float4 even = *(const float4*)from, odd = *(const float4*)(from + 32);
    const Vec rounded = {{store(even.x * scale), store(odd.x * scale), store(even.y * scale), store(odd.y * scale),
                          store(even.z * scale), store(odd.z * scale), store(even.w * scale), store(odd.w * scale)}};
    *(Vec*)(dq + b * dq_batch + h * dq_head + row * dq_row + 8 * chunk) = rounded;
}

// dq of 128 queries. Grid: B·H·⌈T/QUERY_ROWS⌉ blocks. Shared: QUERY_ROWS rows of q and do, 2 strips of k and of v.
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_backward_queries(
    const number* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    const number* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const number* __restrict__ v, long long v_batch, long long v_head, long long v_row,
    const number* __restrict__ d_o, long long d_o_batch, long long d_o_head, long long d_o_row,
    number* __restrict__ dq, long long dq_batch, long long dq_head, long long dq_row,
    const float* __restrict__ statistics,
    int H, int G, int T, int S, int padded, int offset, int back, int ahead, const int* __restrict__ documents, float scale,
    int together) {
    DYNAMIC_SHARED(shared);
    number* const queries = (number*)shared;
    number* const gradients = queries + QUERY_ROWS * HEAD_WIDTH;
    number* const keys = gradients + QUERY_ROWS * HEAD_WIDTH;
    number* const values = keys + 2 * STRIP * HEAD_WIDTH;
    const int tiles = tiles_of(T, QUERY_ROWS);
    const Turn turn(tiles, together);
    const int b = turn.head / H, h = turn.head % H, g = h / (H / G);
    const int first = (tiles - 1 - turn.tile) * QUERY_ROWS;      // as in the forward
    q += b * q_batch + h * q_head, d_o += b * d_o_batch + h * d_o_head, dq += b * dq_batch + h * dq_head;
    k += b * k_batch + g * k_head, v += b * v_batch + g * v_head;

    const Band band = {offset, back, ahead, T, S, documents + 2 * b * padded};
    const Range visits = tiles_seen_by(band, first, QUERY_ROWS, STRIP);
    const auto fetch = [&](int tile) {
        copy_tile<STRIP>(keys + tile % 2 * STRIP * HEAD_WIDTH, k, k_row, tile * STRIP, S);
        copy_tile<STRIP>(values + tile % 2 * STRIP * HEAD_WIDTH, v, v_row, tile * STRIP, S);
    };
    copy_tile<QUERY_ROWS>(queries, q, q_row, first, T);
    copy_tile<QUERY_ROWS>(gradients, d_o, d_o_row, first, T);
    if (visits.begin < visits.end) fetch(visits.begin);
    copy_commit();

    const int own = threadIdx.x / 32 * 32, query = first + own, last_query = query + 31;
    float lse[2][2], delta[2][2], sum[2][2 * STEPS][4];
    set_to_zero(sum);
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float* const of_row = statistics + 2 * (long long)turn.head * padded + query + 16 * m + own_row(2 * half);
            lse[m][half] = of_row[0], delta[m][half] = of_row[padded];
        }
    for (int tile = visits.begin; tile < visits.end; tile++) {
        copy_wait<0>();
        __syncthreads();      // as in the forward
        if (tile + 1 < visits.end) fetch(tile + 1);
        copy_commit();
        const int key = tile * STRIP, last_key = key + STRIP - 1;
        if (band.none(query, last_query, key, last_key)) continue;
        const number* const k_strip = keys + tile % 2 * STRIP * HEAD_WIDTH;
        const number* const v_strip = values + tile % 2 * STRIP * HEAD_WIDTH;
        float p[2][STRIP / 8][4], dp[2][STRIP / 8][4];
        rows_times_rows(p, queries + own * HEAD_WIDTH, k_strip);
        if (!band.all(query, last_query, key, last_key))
            each(p, [&](float& x, int m, int n, int i) {
                if (!band.sees(query + 16 * m + own_row(i), key + 8 * n + own_column(i))) x = -INFINITY;
            });
        rows_times_rows(dp, gradients + own * HEAD_WIDTH, v_strip);
        each(p, [&](float& x, int m, int n, int i) {
            x = exp2f(fmaf(x, scale * LOG2_E, -lse[m][i / 2])) * (dp[m][n][i] - delta[m][i / 2]);      // now ds
        });
        scores_times_rows(sum, p, k_strip);
    }
    copy_wait<0>();      // as in the forward
    __syncthreads();
    each(sum, [&](float& x, int, int, int) { x *= scale; });
    store_rows(sum, queries + own * HEAD_WIDTH, dq, dq_row, query, T);
}
