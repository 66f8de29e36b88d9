// Attention of one query a head over the keys so far: flash-decoding (Dao et al. 2023). The place in a token's work: decode.cu.
//
// The keys are cut into spans, a block each, so that all of the GPU reads them; a block serves SHARE query heads that look at the same
// keys. LANES lanes hold a key's numbers, 16 bytes each: one load of a warp is 512 consecutive bytes. Each such team keeps, for the keys
// it has met, the running maximum m of the scores (in powers of two), l = Σ 2^(s-m) and o = Σ 2^(s-m)·v; two such records (m, l, o) and
// (m', l', o') merge to M = max(m, m'), 2^(m-M)·l + 2^(m'-M)·l', 2^(m-M)·o + 2^(m'-M)·o'. First the teams of a warp, then the
// warps, and at last, in a launch of its own, the spans; always in the same order.
//
// Bytes: each stored key and value once for every SHARE heads, 4·D bytes a position in 16 bits: GPT-2 124M, 500 tokens, 1.5 MB a layer.
// Launch: 128 threads, a block for every span of at least 64 positions, SHARE heads and text: 96 blocks there, bound by the way from memory.

#include "decode.cuh"

#define PIECES (HEAD_WIDTH / WIDE)
#define LANES (PIECES > 16 ? 32 : PIECES > 8 ? 16 : PIECES > 4 ? 8 : PIECES > 2 ? 4 : PIECES)      // to a key
#define OWN ((PIECES + LANES - 1) / LANES)                // pieces of a key that a lane holds
#define TEAMS (THREADS / LANES)
#define KEYS (OWN > 1 ? 2 : 4)                            // of a team that are under way together
#define RECORD (HEAD_WIDTH + 2)                           // o, m, l
#define LOG2_E 1.44269504f

__device__ __forceinline__ int first_column(int piece, int place) { return (piece * LANES + place) * WIDE; }      // beyond HEAD_WIDTH: nothing there

__device__ __forceinline__ float team_sum(float x) {
    for (int other = LANES / 2; other; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}

// 2^(m - M), where no key at all (m = -∞) weighs nothing.
__device__ __forceinline__ float weight(float m, float M) { return m == -INFINITY ? 0.0f : exp2f(m - M); }

// This lane's part of a query or key: brought to unit root-mean-square where there is a gain, and turned by its position's angles.
__device__ __forceinline__ void turned(float out[OWN][WIDE], const float* row, const float* gain, float eps, const int* step, int rotary, int place) {
    const int half = HEAD_WIDTH / 2;
    float r = 1.0f;
    if (gain) {
        float squares = 0.0f;
        UNROLL for (int p = 0; p < OWN; p++)
            UNROLL for (int i = 0; i < WIDE; i++) {
                const int c = first_column(p, place) + i;
                squares += c < HEAD_WIDTH ? row[c] * row[c] : 0.0f;
            }
        r = rsqrtf(team_sum(squares) / HEAD_WIDTH + eps);
    }
    UNROLL for (int p = 0; p < OWN; p++)
        UNROLL for (int i = 0; i < WIDE; i++) {
            const int c = first_column(p, place) + i, pair = c < half ? c : c - half, other = c < half ? c + half : c - half;
            out[p][i] = 0.0f;
            if (c >= HEAD_WIDTH) continue;
            out[p][i] = row[c] * r * (gain ? gain[c] : 1.0f);
            if (rotary) {
                const float beside = row[other] * r * (gain ? gain[other] : 1.0f), cosine = __int_as_float(step[4 + pair]), sine = __int_as_float(step[4 + half + pair]);
                out[p][i] = out[p][i] * cosine + (c < half ? -beside : beside) * sine;
            }
        }
}

struct Records { float m[SHARE], l[SHARE], o[SHARE][OWN][WIDE]; };

// One more key with this score, and its value.
__device__ __forceinline__ void meet(Records& mine, int r, float score, const Piece value[OWN]) {
    const float top = fmaxf(mine.m[r], score), before = weight(mine.m[r], top), p = exp2f(score - top);
    mine.m[r] = top;
    mine.l[r] = mine.l[r] * before + p;
    UNROLL for (int part = 0; part < OWN; part++)
        UNROLL for (int i = 0; i < WIDE; i++) mine.o[r][part][i] = mine.o[r][part][i] * before + p * number_of(value[part], i);
}

// The record of another team of this warp, merged into one's own; both partners come out with the same.
__device__ __forceinline__ void merge_teams(Records& mine, int r, int distance) {
    const float m = __shfl_xor_sync(0xffffffffu, mine.m[r], distance), top = fmaxf(mine.m[r], m);
    const float a = weight(mine.m[r], top), b = weight(m, top);
    mine.m[r] = top;
    mine.l[r] = a * mine.l[r] + b * __shfl_xor_sync(0xffffffffu, mine.l[r], distance);
    UNROLL for (int part = 0; part < OWN; part++)
        UNROLL for (int i = 0; i < WIDE; i++) mine.o[r][part][i] = a * mine.o[r][part][i] + b * __shfl_xor_sync(0xffffffffu, mine.o[r][part][i], distance);
}

// Of `count` records, each `stride` floats after the one before: number c of the merged o (not yet divided), and m and l.
__device__ __forceinline__ float merged(const float* records, int count, long long stride, int c, float& m, float& l) {
    float o = 0.0f;
    m = -INFINITY, l = 0.0f;
    for (int i = 0; i < count; i++) m = fmaxf(m, records[i * stride + HEAD_WIDTH]);
    for (int i = 0; i < count; i++) {
        const float share = weight(records[i * stride + HEAD_WIDTH], m);
        l += share * records[i * stride + HEAD_WIDTH + 1];
        o += share * records[i * stride + c];
    }
    return o;
}

// qkv (B, (H + 2G)·D) fp32, keys and values (B, G, capacity, D), mean (B, H·D), both in the format.
// With a single span, blocks write the mean; otherwise records (B, H, spans, RECORD), for `merge`.
// grid (capacity/span up, H/SHARE, B); two blocks a processor leave registers enough for SHARE heads
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend(const float* __restrict__ qkv, number* keys, number* values,
        const int* __restrict__ steps, const float* __restrict__ query_gain, const float* __restrict__ key_gain, float eps,
        const float* __restrict__ slopes, float scale, float softcap, int rotary, int H, int G, int capacity, int span,
        float* __restrict__ records, number* __restrict__ mean) {
    __shared__ float warps[WARPS][SHARE][RECORD];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = threadIdx.x / LANES, place = lane % LANES;
    const int b = blockIdx.z, head = blockIdx.y * SHARE, group = head / (H / G);
    const int *step = steps + b * STEP, first = step[2], last = step[3];
    const int begin = max(first, (int)blockIdx.x * span), end = min(last, ((int)blockIdx.x + 1) * span);      // of the keys that are stored
    const bool has_new = last / span == (int)blockIdx.x;
    if (begin >= end && !has_new) return;

    const float* row = qkv + (long long)b * (H + 2 * G) * HEAD_WIDTH;
    const long long cached = ((long long)b * G + group) * capacity * HEAD_WIDTH;
    Piece key[KEYS][OWN], value[KEYS][OWN];
    const auto ask = [&](int start) {
        UNROLL for (int n = 0; n < KEYS; n++)
            UNROLL for (int p = 0; p < OWN; p++) {
                const int j = start + n * TEAMS + team, c = first_column(p, place);
                const bool there = j < end && c < HEAD_WIDTH;
                key[n][p] = there ? *(const Piece*)(keys + cached + (long long)j * HEAD_WIDTH + c) : Piece{};
                value[n][p] = there ? *(const Piece*)(values + cached + (long long)j * HEAD_WIDTH + c) : Piece{};
            }
    };
    ask(begin);      // on their way while the queries are turned
    float q[SHARE][OWN][WIDE];
    Records mine;
    UNROLL for (int r = 0; r < SHARE; r++) {
        turned(q[r], row + (head + r) * HEAD_WIDTH, query_gain, eps, step, rotary, place);
        mine.m[r] = -INFINITY, mine.l[r] = 0.0f;
        UNROLL for (int p = 0; p < OWN; p++)
            UNROLL for (int i = 0; i < WIDE; i++) mine.o[r][p][i] = 0.0f;
    }
    const auto score = [&](int r, const Piece key[OWN], int distance) {
        float s = 0.0f;
        UNROLL for (int p = 0; p < OWN; p++)
            UNROLL for (int i = 0; i < WIDE; i++) s += q[r][p][i] * number_of(key[p], i);
        s = team_sum(s) * scale;
        if (softcap > 0.0f) s = softcap * tanhf(s / softcap);
        return (slopes ? s - slopes[head + r] * distance : s) * LOG2_E;
    };

    for (int start = begin; start < end; start += KEYS * TEAMS) {      // the same for all lanes, as sums over a team ask for
        UNROLL for (int n = 0; n < KEYS; n++) {
            const int j = start + n * TEAMS + team;
            UNROLL for (int r = 0; r < SHARE; r++) {
                const float s = score(r, key[n], last - j);
                if (j < end) meet(mine, r, s, value[n]);
            }
        }
        ask(start + KEYS * TEAMS);
    }
    if (has_new) {      // its key and value are still in registers: every block that needs them computes them, one stores them
        float k[OWN][WIDE];
        Piece key[OWN] = {}, value[OWN] = {};
        turned(k, row + (H + group) * HEAD_WIDTH, key_gain, eps, step, rotary, place);
        UNROLL for (int p = 0; p < OWN; p++) {
            const int c = first_column(p, place);
            if (c >= HEAD_WIDTH) continue;
            key[p] = rounded(k[p]);
            value[p] = rounded(row + (H + G + group) * HEAD_WIDTH + c);
            if (team == 0 && head % (H / G) == 0) {
                *(Piece*)(keys + cached + (long long)last * HEAD_WIDTH + c) = key[p];
                *(Piece*)(values + cached + (long long)last * HEAD_WIDTH + c) = value[p];
            }
        }
        UNROLL for (int r = 0; r < SHARE; r++) {
            const float s = score(r, key, 0);
            if (team == 0) meet(mine, r, s, value);
        }
    }

    UNROLL for (int r = 0; r < SHARE; r++) {
        for (int distance = LANES; distance < 32; distance *= 2) merge_teams(mine, r, distance);
        if (lane == place) {      // the warp's first team
            UNROLL for (int p = 0; p < OWN; p++)
                UNROLL for (int i = 0; i < WIDE; i++)
                    if (first_column(p, place) < HEAD_WIDTH) warps[warp][r][first_column(p, place) + i] = mine.o[r][p][i];
            if (place == 0) warps[warp][r][HEAD_WIDTH] = mine.m[r], warps[warp][r][HEAD_WIDTH + 1] = mine.l[r];
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < SHARE * HEAD_WIDTH; i += THREADS) {
        const int r = i / HEAD_WIDTH, c = i % HEAD_WIDTH;
        float m, l;
        const float o = merged(warps[0][r], WARPS, SHARE * RECORD, c, m, l);
        if (gridDim.x == 1) mean[((long long)b * H + head) * HEAD_WIDTH + i] = store(o / l);
        else {
            float* record = records + (((long long)b * H + head + r) * gridDim.x + blockIdx.x) * RECORD;
            record[c] = o;
            if (c == 0) record[HEAD_WIDTH] = m, record[HEAD_WIDTH + 1] = l;
        }
    }
}

// The means out of the records of all spans that hold a visible key.   grid (H, B)
extern "C" __global__ void __launch_bounds__(THREADS) merge(const float* __restrict__ records, const int* __restrict__ steps,
                                                            number* __restrict__ mean, int spans, int span) {
    const int *step = steps + blockIdx.y * STEP, from = step[2] / span, count = step[3] / span - from + 1;
    const long long head = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    for (int c = threadIdx.x; c < HEAD_WIDTH; c += THREADS) {
        float m, l;
        const float o = merged(records + (head * spans + from) * RECORD, count, RECORD, c, m, l);
        mean[head * HEAD_WIDTH + c] = store(o / l);
    }
}
