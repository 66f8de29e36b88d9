// Sums over the rows of a matrix, always in the same order: two runs agree to the last bit.
//
//     column_parts   parts[p, c] = Σ x[n, c] over the rows n of part p             a bias's gradient, its first half
//     add_parts      y[m] = Σ parts[p, m] over p                                   the second half of every sum over rows here
//
// Bytes: x once, and 128 partial rows of fp32 written and read again: N = 32,768 rows of C = 768 in 16 bits are 50 MB and 0.8 MB. A single
// stage would keep C/256 blocks busy, on a GPU with room for a thousand.
//
// column_parts   grid (C / (32·VEC), parts), 8 warps a block. A warp reads 32·VEC neighbouring numbers of a row (512 bytes) at a time, the
//                warps of a block take turns at the rows of its part, and add up through shared memory.
// add_parts      grid M / 32, 16 warps a block: 32 sums, each shared out over 16 threads, since a thread that added all parts by itself
//                would wait for memory once for each of a few.
// Predicted for N = 32,768, C = 768, 16 bits, at 4.3 TB/s, not yet measured: 12 µs + 3 µs.

#define WARPS 8         // of column_parts
#define ADDING_WARPS 16 // of add_parts

extern "C" __global__ void __launch_bounds__(32 * WARPS) column_parts(
    const number* x, float* parts, int rows, int columns, long long pitch, int share)
{
    __shared__ __align__(16) float sums[WARPS][32 * VEC];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = (blockIdx.x * 32 + lane) * VEC;
    const int end = min(rows, (int)(blockIdx.y + 1) * share);
    Floats sum = {};
    if (column < columns)
#pragma unroll 4
        for (int row = blockIdx.y * share + warp; row < end; row += WARPS) {
            const Vec numbers = *(const Vec*)(x + row * pitch + column);
            for (int j = 0; j < VEC; ++j)
                sum.at[j] += load(numbers.at[j]);
        }
    *(Floats*)(sums[warp] + lane * VEC) = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < 32 * VEC; i += 32 * WARPS) {
        const int column = blockIdx.x * 32 * VEC + i;
        float total = 0;
        for (int w = 0; w < WARPS; ++w)
            total += sums[w][i];
        if (column < columns)
            parts[(long long)blockIdx.y * columns + column] = total;
    }
}

extern "C" __global__ void __launch_bounds__(32 * ADDING_WARPS) add_parts(const float* parts, float* y, int count, int columns)
{
    __shared__ float sums[ADDING_WARPS][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = blockIdx.x * 32 + lane;
    float sum = 0;
    if (column < columns)
#pragma unroll 4
        for (int part = warp; part < count; part += ADDING_WARPS)
            sum += parts[(long long)part * columns + column];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < columns) {
        for (int w = 1; w < ADDING_WARPS; ++w)
            sum += sums[w][lane];
        y[column] = sum;
    }
}
