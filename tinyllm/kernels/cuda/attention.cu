// Attention's forward on tensor cores, with memory linear in T: a score lives in a register, never in memory.
//
// A block of threads takes 128 queries of one head and visits, in tiles, the keys that they may see. Per query it keeps the largest score
// so far m, the sum l of the exponentials, and o, unnormalised; when a tile raises m to m', what is there shrinks by e^(c·(m-m')):
//
//     s = q·kᵀ      p = e^(c·(s-m'))      l ← l·e^(c·(m-m')) + Σ p      o ← o·e^(c·(m-m')) + p·v        c the scale, > 0
//
// At the end o/l and lse = c·m + ln l are written, all that the backward needs. Exponentials are powers of 2, as the hardware has them: c
// is multiplied by log2 e beforehand. Sums are fp32; p is rounded to the format before it is multiplied with v, as q, k and v are.
//
// Which keys a query sees is a band (Band): causal is nothing ahead, a window of w is w-1 back (and ahead). Tiles outside of the band are
// not visited; of a tile, what a warp's 32 queries do not see is not multiplied; only where the band's edge runs through are scores
// hidden one by one. A query that sees nothing: o = 0, lse = ∞.
//
// A warp owns 32 queries, two mma tiles: with 16, reading k and v out of shared memory (128 bytes a cycle) would take longer than
// multiplying. Cycles of an H200's multiprocessor for 128 × 64 scores of D = 64: products 820 (mma.sync at five eighths of wgmma's 4096
// FLOPs a cycle), shared memory 640, exponentials 512 (16 a cycle), other arithmetic on scores and o about 500: they overlap as far as
// there are other blocks on the multiprocessor, one or two. While a tile is worked on, cp.async fetches the next; one barrier a tile.
//
// FLOPs, causal, T = S: 2·T²·D a head. Bytes: q, k, v, o once, 8·T·D; k and v again for each block, out of the L2 cache (Turn). At
// T = 1024, D = 64 these are 256 FLOPs a byte: memory is not the limit. Predicted, not yet measured: 200 to 250 TFLOP/s of bf16 on an
// H200 there, under half of the products' bound of 590: at two blocks the overlap is partial, and of the diagonal's tiles half is hidden.
// Sources: Milakov & Gimelshein 2018 (running softmax); Dao et al. 2022; Dao 2023 (FlashAttention-2, whose cut of the work this is).

#include "attention_tiles.cuh"

// The running softmax of 16·M queries: scores become p, and `top` (the largest score), `total` (this lane's share of l) and o follow.
template <int M, int N> __device__ __forceinline__ void running_softmax(
    float (&s)[M][N][4], float (&o)[M][2 * STEPS][4], float (&top)[M][2], float (&total)[M][2], float scale_log2) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {      // of the rows: own_row(0) and own_row(2)
            float higher = top[m][half];
#pragma unroll
            for (int n = 0; n < N; n++) higher = fmaxf(higher, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            higher = fmaxf(higher, __shfl_xor_sync(ALL_LANES, higher, 1));      // four lanes share a row
            higher = fmaxf(higher, __shfl_xor_sync(ALL_LANES, higher, 2));
            const float base = higher == -INFINITY ? 0.0f : higher * scale_log2;      // nothing seen yet: 2^(-∞ - 0) = 0, not 2^(∞ - ∞)
            const float shrink = exp2f(top[m][half] * scale_log2 - base);
            top[m][half] = higher;
            total[m][half] *= shrink;
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) total[m][half] += s[m][n][i] = exp2f(fmaf(s[m][n][i], scale_log2, -base));
#pragma unroll
            for (int n = 0; n < 2 * STEPS; n++)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; i++) o[m][n][i] *= shrink;
        }
}

// q (B, H, T, D), k, v (B, G, S, D) -> o like q, lse (B, H, T). Strides in numbers, of batch, head and position.
// documents (B, padded, 2), padded a multiple of QUERY_ROWS, or null without DOCUMENTS.
// Grid: B·H·⌈T/QUERY_ROWS⌉ blocks. Shared: QUERY_ROWS rows of q, 2 tiles of k and of v.
extern "C" __global__ void __launch_bounds__(THREADS, 2) attention_forward(
    const number* __restrict__ q, long long q_batch, long long q_head, long long q_row,
    const number* __restrict__ k, long long k_batch, long long k_head, long long k_row,
    const number* __restrict__ v, long long v_batch, long long v_head, long long v_row,
    number* __restrict__ o, long long o_batch, long long o_head, long long o_row,
    float* __restrict__ lse, int H, int G, int T, int S, int offset, int back, int ahead, const int* __restrict__ documents,
    float scale, int together) {
    DYNAMIC_SHARED(shared);
    number* const queries = (number*)shared;
    number* const keys = queries + QUERY_ROWS * HEAD_WIDTH;
    number* const values = keys + 2 * KEY_TILE * HEAD_WIDTH;
    const int tiles = tiles_of(T, QUERY_ROWS);
    const Turn turn(tiles, together);
    const int b = turn.head / H, h = turn.head % H, g = h / (H / G);
    const int first = (tiles - 1 - turn.tile) * QUERY_ROWS;      // under a causal mask the last queries have most to do
    q += b * q_batch + h * q_head, k += b * k_batch + g * k_head, v += b * v_batch + g * v_head, o += b * o_batch + h * o_head;

    const Band band = {offset, back, ahead, T, S, documents + 2 * b * tiles * QUERY_ROWS};
    const Range visits = tiles_seen_by(band, first, QUERY_ROWS, KEY_TILE);
    const auto fetch = [&](int tile) {
        copy_tile<KEY_TILE>(keys + tile % 2 * KEY_TILE * HEAD_WIDTH, k, k_row, tile * KEY_TILE, S);
        copy_tile<KEY_TILE>(values + tile % 2 * KEY_TILE * HEAD_WIDTH, v, v_row, tile * KEY_TILE, S);
    };
    copy_tile<QUERY_ROWS>(queries, q, q_row, first, T);
    if (visits.begin < visits.end) fetch(visits.begin);
    copy_commit();

    const int warp = threadIdx.x / 32, query = first + 32 * warp, last_query = query + 31;
    number* const own_queries = queries + 32 * warp * HEAD_WIDTH;
    float sum[2][2 * STEPS][4], top[2][2] = {{-INFINITY, -INFINITY}, {-INFINITY, -INFINITY}}, total[2][2] = {};
    set_to_zero(sum);
    for (int tile = visits.begin; tile < visits.end; tile++) {
        copy_wait<0>();
        __syncthreads();      // the tile is here for all, and all have done with the one before, whose place the next one takes
        if (tile + 1 < visits.end) fetch(tile + 1);
        copy_commit();
        const int key = tile * KEY_TILE, last_key = key + KEY_TILE - 1;
        if (band.none(query, last_query, key, last_key)) continue;
        float s[2][KEY_TILE / 8][4];
        rows_times_rows(s, own_queries, keys + tile % 2 * KEY_TILE * HEAD_WIDTH);
        if (!band.all(query, last_query, key, last_key))
            each(s, [&](float& x, int m, int n, int i) {
                if (!band.sees(query + 16 * m + own_row(i), key + 8 * n + own_column(i))) x = -INFINITY;
            });
        running_softmax(s, sum, top, total, scale * LOG2_E);
        scores_times_rows(sum, s, values + tile % 2 * KEY_TILE * HEAD_WIDTH);
    }
    copy_wait<0>();      // where no tile was visited, the queries are still on their way to where store_rows writes
    __syncthreads();

#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float l = total[m][half];
            l += __shfl_xor_sync(ALL_LANES, l, 1);
            l += __shfl_xor_sync(ALL_LANES, l, 2);
            const int row = query + 16 * m + own_row(2 * half);
            if (own_column(0) == 0 && row < T) lse[(long long)turn.head * T + row] = l == 0.0f ? INFINITY : top[m][half] * scale + logf(l);
            total[m][half] = l == 0.0f ? 0.0f : 1.0f / l;
        }
    each(sum, [&](float& x, int m, int, int i) { x *= total[m][i / 2]; });
    store_rows(sum, own_queries, o, o_row, query, T);
}
