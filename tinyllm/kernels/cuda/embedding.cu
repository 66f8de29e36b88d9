// The gradient of a table of vectors: dw[id] += Σ dy over all positions that hold this id, always in the same order.
//
// Adding by atomics would be simple, fast, and different in every run. Here the positions are sorted by id (stably), so that those of one
// id are a run, and the sorted positions are cut into chunks of 32, whatever the runs are: a frequent id (a newline: thousands of
// positions) does not keep one block busy while the others have nothing to do.
//
//     sum_chunks    a run inside one chunk: its sum is added to dw. A run that goes over a border leaves the sum of its part in this chunk
//                   in `parts`: slot 0 where it began in an earlier chunk, slot 1 where it begins here.
//     join_chunks   where a run begins in a chunk and goes on: adds up slot 1 and the slots 0 of the following chunks, and adds that to dw
//
// Bytes: dy once, dw read and written for each id that occurs, parts (1/16 of dy as fp32, at most) written and read. In fp32 for
// N = 32,768, C = 768: 100 MB of dy and up to 60 MB of dw. op by op: dy five times (gathered, running sums, their differences), dw twice.
//
// Launch: sum_chunks: a block for each chunk and 256·VEC columns, a thread VEC columns: for N = 32,768 about 1,500 threads a
// multiprocessor, two vectors of each on their way. join_chunks: a thread for each chunk and column; all blocks but those with a crossing
// run leave at once.
// Predicted for N = 32,768, C = 768, 4.3 TB/s, not yet measured: 45 µs + 5 µs.
//
// Macros: VEC, FORMAT (of dy; dw and parts are fp32).

#define CHUNK 32

// order: positions sorted by id; ids: their ids, ascending; both (count).    parts: (chunks, 2, width)
extern "C" __global__ void sum_chunks(const number* dy, const int* order, const int* ids, float* dw, float* parts, int count, int width)
{
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    if (column >= width)
        return;
    const int start = blockIdx.x * CHUNK, end = min(start + CHUNK, count);
    Floats sum = {};
    Vec next = *(const Vec*)(dy + (long long)order[start] * width + column);
    for (int i = start; i < end; ++i) {
        const Vec row = next;
        if (i + 1 < end) // is on its way while this row is added
            next = *(const Vec*)(dy + (long long)order[i + 1] * width + column);
        for (int j = 0; j < VEC; ++j)
            sum.at[j] += load(row.at[j]);
        const int id = ids[i];
        const bool last = i + 1 == count || ids[i + 1] != id; // of its run
        if (!last && i + 1 < end)
            continue;
        const bool began_here = start == 0 || ids[start - 1] != id;
        if (last && began_here) {
            Floats* to = (Floats*)(dw + (long long)id * width + column);
            Floats total = *to;
            for (int j = 0; j < VEC; ++j)
                total.at[j] += sum.at[j];
            *to = total;
        } else
            *(Floats*)(parts + (2LL * blockIdx.x + began_here) * width + column) = sum;
        sum = {};
    }
}

extern "C" __global__ void join_chunks(const int* ids, float* dw, const float* parts, int count, int width)
{
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    const int start = blockIdx.x * CHUNK, next = start + CHUNK;
    if (column >= width || next >= count)
        return;
    const int id = ids[next];
    if (ids[next - 1] != id || (start > 0 && ids[start - 1] == id))
        return; // no run that begins in this chunk goes on
    float sum = parts[(2LL * blockIdx.x + 1) * width + column];
    for (int first = next; first < count && ids[first] == id; first += CHUNK)
        sum += parts[2LL * (first / CHUNK) * width + column];
    dw[(long long)id * width + column] += sum;
}
