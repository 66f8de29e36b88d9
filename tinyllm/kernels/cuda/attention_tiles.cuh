// What attention.cu and attention_backward.cu share: tiles in shared memory, products of a warp, and who sees whom.
//
// Macros: HEAD_WIDTH is D: 32, 64, 96 or 128. DOCUMENTS: 1 where several share a row, none of which sees another. KEY_TILE, OWN,
// QUERY_TILE cut the work up, see attention.py, which sets them.
//
// Shared memory. A row of a tile is cut into chunks of 16 bytes. Chunk c of row r lies at place c ^ (r mod 8) of its row, or, where rows
// are an odd multiple of 64 bytes, c ^ (r/2 mod 4): then the 8 rows that ldmatrix reads at a time, and the 8 chunks that cp.async writes
// at a time, lie in different banks: no conflict anywhere, as tests/test_cuda_attention.py counts.

#define THREADS 128
#define WARPS (THREADS / 32)
#define CHUNKS (HEAD_WIDTH / 8)         // of 16 bytes in a row
#define STEPS (HEAD_WIDTH / 16)         // of a product that sums over the head's width; also pairs of 8 columns
#define QUERY_ROWS (32 * WARPS)         // queries of a block that owns queries, 32 a warp
#define ALL_LANES 0xffffffffu
#define LOG2_E 1.4426950408889634f

// ---- Tiles

// Where in a tile of WIDTH columns chunk `chunk` of row `row` lies.
template <int WIDTH> __device__ __forceinline__ int place(int row, int chunk) {
    return row * WIDTH + 8 * (chunk ^ (WIDTH % 64 ? row >> 1 & 3 : row & 7));
}
// place(row + lane_row, chunk ^ lane_chunk) for a row that 8 divides, as an exclusive or with what the lane's own part is, which stays the
// same: one instruction and one register, where the row is a constant.
template <int WIDTH> __device__ __forceinline__ int place_from(int row, int chunk, int lane_row, int lane_chunk) {
    constexpr int TURNED = WIDTH % 64 ? 3 : 7;      // the bits of a chunk's number that a row's number turns
    return row * WIDTH + 8 * (chunk & ~TURNED) + (place<WIDTH>(lane_row, lane_chunk) ^ 8 * (chunk & TURNED));
}
// This lane's address for reading four 8×8 matrices, 16 rows from `row` on by 2 chunks from `chunk` on, an even one: down the rows first …
template <int WIDTH> __device__ __forceinline__ int rows_first(int row, int chunk) {
    return place_from<WIDTH>(row, chunk, threadIdx.x & 15, threadIdx.x >> 4 & 1);
}
// … or across the chunks first.
template <int WIDTH> __device__ __forceinline__ int chunks_first(int row, int chunk) {
    return place_from<WIDTH>(row, chunk, (threadIdx.x & 7) + (threadIdx.x >> 4 & 1) * 8, threadIdx.x >> 3 & 1);
}

// Start copying ROWS rows from row `first` on; those from `count` on become zeros.
template <int ROWS>
__device__ __forceinline__ void copy_tile(number* tile, const number* from, long long row_stride, int first, int count) {
    constexpr int ACROSS = CHUNKS % 8 ? 4 : 8, DOWN = THREADS / ACROSS;      // threads along a row, rows at a time
    const int own_row = threadIdx.x / ACROSS, own_chunk = threadIdx.x % ACROSS;
    from += (first + own_row) * row_stride + 8 * own_chunk;
#pragma unroll
    for (int row = 0; row < ROWS; row += DOWN, from += DOWN * row_stride)
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk += ACROSS)
            copy_async16(tile + place<HEAD_WIDTH>(row + own_row, chunk ^ own_chunk), from + 8 * chunk, first + own_row + row < count);
}

// ---- A matrix in a warp's registers, 16·M × 8·N, as mma leaves it: x[m][n][i] is of row 16m + own_row(i), column 8n + own_column(i).

__device__ __forceinline__ int own_row(int i) { return (int)(threadIdx.x >> 2 & 7) + i / 2 * 8; }
__device__ __forceinline__ int own_column(int i) { return (int)(threadIdx.x & 3) * 2 + i % 2; }

// f(element, m, n, i) for each.
template <int M, int N, class F> __device__ __forceinline__ void each(float (&x)[M][N][4], F f) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) f(x[m][n][i], m, n, i);
}

template <int M, int N> __device__ __forceinline__ void set_to_zero(float (&x)[M][N][4]) {
    each(x, [](float& element, int, int, int) { element = 0.0f; });
}

// y += left·right, a step of a product: 16·M × 16 by 16 × 16, `right` being two of mma's right factors.
template <int M, int N>
__device__ __forceinline__ void mma_step(float (&y)[M][N][4], int n, const unsigned (&left)[M][4], const unsigned (&right)[4]) {
#pragma unroll
    for (int m = 0; m < M; m++) {
        mma(y[m][n], left[m], right);
        mma(y[m][n + 1], left[m], right + 2);
    }
}

// x = a·bᵀ over the head's width. a: 16·M rows of a tile, b: 8·N rows.
template <int M, int N> __device__ __forceinline__ void rows_times_rows(float (&x)[M][N][4], const number* a, const number* b) {
    set_to_zero(x);
#pragma unroll 2      // unrolled wholly, more addresses are held in registers than there are
    for (int step = 0; step < STEPS; step++) {
        unsigned left[M][4], right[4];
#pragma unroll
        for (int m = 0; m < M; m++) load_matrix_x4(left[m], a + rows_first<HEAD_WIDTH>(16 * m, 2 * step));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            load_matrix_x4(right, b + chunks_first<HEAD_WIDTH>(8 * n, 2 * step));
            mma_step(x, n, left, right);
        }
    }
}

// y += x·b, x rounded to the format. b: 8·N rows of a tile. x's registers are, in pairs, the left factor's.
template <int M, int N>
__device__ __forceinline__ void scores_times_rows(float (&y)[M][2 * STEPS][4], const float (&x)[M][N][4], const number* b) {
#pragma unroll
    for (int n = 0; n < N; n += 2) {
        unsigned left[M][4], right[4];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) left[m][i] = pack(x[m][n + i / 2][i % 2 * 2], x[m][n + i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            load_matrix_x4_transposed(right, b + rows_first<HEAD_WIDTH>(8 * n, 2 * step));
            mma_step(y, 2 * step, left, right);
        }
    }
}

// Round x to the format and write it to rows of a tile of WIDTH columns, from chunk `chunk` on.
template <int WIDTH, int M, int N> __device__ __forceinline__ void to_tile(number* rows, const float (&x)[M][N][4], int chunk) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                *(unsigned*)(rows + place<WIDTH>(16 * m + own_row(i), chunk + n) + own_column(0)) = pack(x[m][n][i], x[m][n][i + 1]);
}

// Write x to the rows from `first` on that are below `count`: through as many rows of shared memory, which only this warp uses, so that
// each lane writes 16 bytes of a row.
template <int M> __device__ __forceinline__ void store_rows(
    const float (&x)[M][2 * STEPS][4], number* shared_rows, number* to, long long row_stride, int first, int count) {
    __syncwarp();
    to_tile<HEAD_WIDTH>(shared_rows, x, 0);
    __syncwarp();
    for (int i = threadIdx.x % 32; i < 16 * M * CHUNKS; i += 32) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const Vec* const from = (const Vec*)(shared_rows + place<HEAD_WIDTH>(row, chunk));
        if (first + row < count) *(Vec*)(to + (first + row) * row_stride + 8 * chunk) = *from;
    }
}

// ---- Who sees whom, and whose turn it is

// Query t, at position t + offset among the keys, sees the keys from `back` before it to `ahead` after it; with DOCUMENTS, where queries
// and keys are the same tokens, those of its own document. `documents` has where each token's begins and ends, padded to whole tiles: to
// ask for the least of two indices would take more registers than there are.
struct Band {
    int offset, back, ahead, queries, keys;
    const int* documents;
    __device__ int begin(int token) const { return DOCUMENTS ? documents[2 * token] : 0; }
    __device__ int end(int token) const { return DOCUMENTS ? documents[2 * token + 1] : keys; }
    __device__ bool sees(int query, int key) const {
        return key <= query + offset + ahead && key >= query + offset - back && (!DOCUMENTS || begin(key) == begin(query)) && key < keys;
    }
    // Of the queries and keys from the first to the last one: is every pair seen, is none?
    __device__ bool all(int query, int last_query, int key, int last_key) const { return sees(query, last_key) && sees(last_query, key); }
    __device__ bool none(int query, int last_query, int key, int last_key) const {
        return key > last_query + offset + ahead || last_key < query + offset - back || query >= queries || key >= end(last_query) ||
               (DOCUMENTS && last_key < begin(query));
    }
};

struct Range {      // of tiles
    int begin, end;
};
// The tiles in which the keys lie that some query of `count` from `query` on sees …
__device__ __forceinline__ Range tiles_seen_by(const Band& band, int query, int count, int tile) {
    const int last = min(band.queries, query + count) - 1;
    const int low = max(band.begin(query), query + band.offset - band.back);
    const int high = min(band.end(last), last + 1 + band.offset + band.ahead);
    return {low / tile, high <= low ? low / tile : (high + tile - 1) / tile};
}
// … and those in which the queries lie that see some key of `count` from `key` on.
__device__ __forceinline__ Range tiles_that_see(const Band& band, int key, int count, int tile) {
    const int last = min(band.keys, key + count) - 1;
    const int low = max(band.begin(key), key - band.ahead - band.offset);
    const int high = min(DOCUMENTS ? band.end(last) : band.queries, last + 1 + band.back - band.offset);
    return {low / tile, high <= low ? low / tile : (high + tile - 1) / tile};
}

__device__ __forceinline__ int tiles_of(int length, int tile) { return (length + tile - 1) / tile; }

// Which head and tile this block is for. Blocks run about in the order of their numbers: `together` heads at a time, whose keys and values
// the L2 cache then holds; of these all first tiles, then all second ones, and so on, so that the longest should be first.
struct Turn {
    int head, tile;
    __device__ Turn(int tiles, int together) {
        const int first = (int)blockIdx.x / (tiles * together) * together, inside = (int)blockIdx.x - first * tiles;
        const int heads = min(together, (int)gridDim.x / tiles - first);
        head = first + inside % heads;
        tile = inside / heads;
    }
};
