// What every kernel here needs, put in front of its source: number formats, 16-byte vectors, sums over a warp or a block, and the tensor
// core's instructions. No header of CUDA's is included, so NVRTC compiles this anywhere in a few hundredths of a second.
//
// A format is how numbers are stored; arithmetic is in fp32. bf16 is the upper half of fp32 (8 bits of exponent, 7 of fraction), fp16
// has 5 and 10.

#define FP32 0
#define FP16 1
#define BF16 2
#ifndef FORMAT
#define FORMAT FP32
#endif

typedef unsigned short half_number;      // the bits of an fp16 or bf16 number
#if FORMAT == FP32
typedef float number;
#else
typedef half_number number;
#endif

// ---- Instructions, one function each. Where the compiler is not CUDA's (tests run the kernels on the CPU), tests/cuda_on_cpu.h has them.
#ifdef __CUDACC__

#define INFINITY __int_as_float(0x7f800000)
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]      // shared memory whose size the launch gives

#if FORMAT == BF16
#define FORMAT_PTX "bf16"
#else
#define FORMAT_PTX "f16"
#endif

// The bits of x rounded to the nearest number of the format, ties to even; beyond fp16's range infinity; NaN stays NaN.
__device__ __forceinline__ half_number rounded_bits(float x) {
    half_number bits;
    asm("cvt.rn." FORMAT_PTX ".f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

__device__ __forceinline__ float value_of_bits(half_number bits) {
#if FORMAT == BF16
    return __uint_as_float((unsigned)bits << 16);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}

// Two rounded numbers in a word, the first one in its lower half: one instruction for both.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned word;
    asm("cvt.rn." FORMAT_PTX "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// c (16, 8) += a (16, 16) · b (16, 8) by a whole warp: 16-bit factors, fp32 sums. With lane = 4g + t, a lane holds of
//   a: rows g, g+8, columns 2t, 2t+1 and +8   a[0] (g; 2t..)   a[1] (g+8; 2t..)   a[2] (g; 2t+8..)   a[3] (g+8; 2t+8..)
//   b: column g                               b[0] rows 2t, 2t+1                  b[1] rows 2t+8, 2t+9
//   c: c[0], c[1] (g; 2t, 2t+1)               c[2], c[3] (g+8; 2t, 2t+1)
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k16".
__device__ __forceinline__ void mma(float c[4], const unsigned a[4], const unsigned b[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." FORMAT_PTX "." FORMAT_PTX ".f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ unsigned shared_address(const void* shared) { return (unsigned)__cvta_generic_to_shared(shared); }

// Matrices of 8 rows of 8 16-bit numbers out of shared memory. Lanes 8i..8i+7 pass the addresses (16-byte aligned) of matrix i's rows;
// lane 4g + t gets in r[i] the numbers 2t and 2t+1 of row g, or, transposed, of column g. _x2 reads the addresses of lanes 0-15.
// The lanes' own stores are not waited for: __syncwarp() or __syncthreads() first.
__device__ __forceinline__ void load_matrix_x4(unsigned r[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared_row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x2(unsigned r[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(shared_row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(unsigned r[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(shared_row)) : "memory");
}
__device__ __forceinline__ void load_matrix_x2_transposed(unsigned r[2], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(shared_row)) : "memory");
}

// 16 bytes from global to shared memory without passing through registers; where not valid, zeros, and nothing is read. Both addresses
// are 16-byte aligned. What was copied is there for the copying thread after copy_wait, for the others after a barrier as well.
__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }      // the copies so far are a group
// Wait until at most n of this thread's latest groups are under way.
template <int n> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory"); }

#endif

// ---- Numbers of the format, in and out.
__device__ __forceinline__ float load(float x) { return x; }
#if FORMAT == FP32
__device__ __forceinline__ number store(float x) { return x; }
#else
__device__ __forceinline__ float load(number x) { return value_of_bits(x); }
__device__ __forceinline__ number store(float x) { return rounded_bits(x); }
__device__ __forceinline__ float unpack_low(unsigned word) { return value_of_bits((half_number)(word & 0xffffu)); }
__device__ __forceinline__ float unpack_high(unsigned word) { return value_of_bits((half_number)(word >> 16)); }
#endif

// Numbers that one instruction moves: 16 bytes, at an address divisible by 16; fewer where VEC is given (a power of two, see vectors.py).
#ifndef VEC
#define VEC (16 / (int)sizeof(number))
#endif
struct __align__(VEC * sizeof(number)) Vec { number at[VEC]; };
struct __align__(VEC < 4 ? 4 * VEC : 16) Floats { float at[VEC]; };      // as many in fp32: of a gain, or a sum; moved 16 bytes at a time

// ---- Sums and maxima. All 32 lanes of a warp take part, and each gets the result, the same to the last bit: at every step of the
// butterfly both partners add the same two numbers.
__device__ __forceinline__ float warp_sum(float x) {
    for (int other = 16; other; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
    for (int other = 16; other; other /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, other));
    return x;
}

// The same over a block of whole warps. shared32: 32 floats of shared memory, free for the next call or another use when this returns,
// and not in use when it is called.
__device__ __forceinline__ float block_sum(float x, float* shared32) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_sum(x);
    if (lane == 0) shared32[warp] = x;
    __syncthreads();
    x = warp_sum(lane < blockDim.x / 32 ? shared32[lane] : 0.0f);
    __syncthreads();
    return x;
}
__device__ __forceinline__ float block_max(float x, float* shared32) {
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_max(x);
    if (lane == 0) shared32[warp] = x;
    __syncthreads();
    x = warp_max(lane < blockDim.x / 32 ? shared32[lane] : -INFINITY);
    __syncthreads();
    return x;
}

