// CUDA C's words for g++: put in front of a .cu file (g++ -include), it lets the file be compiled for the CPU, where
// cuda_on_cpu.cpp runs it. Functions named machine_* are that file's. Nothing of the C++ library is included: it would take longer to
// compile than the kernels.
#pragma once

// ---- What the machine offers. Within a warp, each lane hands over a record; when all lanes of the mask have come, the machine fills in
// the answers.
struct dim3 { unsigned x, y, z; };
enum { WARP_SYNC, WARP_SHUFFLE, WARP_BALLOT, WARP_MMA, WARP_MATRICES };
struct MachineShuffle { unsigned long long value; int from; };      // from: the lane to read, out of range for "my own"
struct MachineBallot { unsigned votes; };
struct MachineMma { int bf16; float* c; const unsigned* a; const unsigned* b; };
struct MachineMatrices { unsigned* result; const void* row; int count; bool transposed; };
extern "C" {
dim3 machine_thread() __attribute__((const));      // const: the same for as long as a kernel's call lasts
dim3 machine_block() __attribute__((const));
dim3 machine_grid_size() __attribute__((const));
dim3 machine_block_size() __attribute__((const));
unsigned char* machine_dynamic_shared() __attribute__((const));
void machine_block_barrier(int how, int* value, int line);      // how: 0 only wait, 1 sum the values of all threads
void machine_warp(int operation, unsigned mask, void* record);
void machine_atomic(void* to, const void* from, int bytes);      // copies, between the place itself and the caller's variable
void machine_copy_async16(void* shared, const void* global, bool valid);
void machine_copy_commit();
void machine_copy_wait(int left);
unsigned short machine_to_fp16(float);
float machine_from_fp16(unsigned short);
unsigned short machine_to_bf16(float);
}

#ifndef MACHINE_ITSELF      // the rest is CUDA C
#define __global__ __attribute__((cuda_kernel, noinline))      // cuda_kernel: g++ drops it, cuda_on_cpu.py looks for it
#define __launch_bounds__(threads, ...) __attribute__((cuda_launch_bounds((threads))))
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("cuda_shared")))      // one block runs at a time, so its memory may be static
#define DYNAMIC_SHARED(name) unsigned char* const name = machine_dynamic_shared()
#define INFINITY __builtin_inff()

struct __align__(8) int2 { int x, y; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(8) float2 { float x, y; };
struct __align__(16) int4 { int x, y, z, w; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
struct __align__(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- Mathematics
extern "C" {
float expf(float); float exp2f(float); float logf(float); float log2f(float); float log1pf(float); float expm1f(float);
float sqrtf(float); float tanhf(float); float erff(float); float sinf(float); float cosf(float); float powf(float, float);
float fabsf(float); float floorf(float); float ceilf(float); float rintf(float);
float fmaxf(float, float); float fminf(float, float); float copysignf(float, float); float fmaf(float, float, float);
double exp(double); double log(double); double sqrt(double); double pow(double, double); double fabs(double);
double fmax(double, double); double fma(double, double, double);
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
#define MACHINE_MIN_MAX(type) \
    inline type min(type a, type b) { return b < a ? b : a; } \
    inline type max(type a, type b) { return a < b ? b : a; }
MACHINE_MIN_MAX(int) MACHINE_MIN_MAX(unsigned) MACHINE_MIN_MAX(long long) MACHINE_MIN_MAX(unsigned long long)
MACHINE_MIN_MAX(float) MACHINE_MIN_MAX(double)
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
template <class To, class From> inline To machine_same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "other size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return machine_same_bits<unsigned>(x); }
inline int __float_as_int(float x) { return machine_same_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return machine_same_bits<float>(x); }
inline float __int_as_float(int x) { return machine_same_bits<float>(x); }
template <class T> inline T __ldg(const T* at) { return *at; }      // ways through the caches make no difference here
template <class T> inline T __ldcs(const T* at) { return *at; }
template <class T> inline T __ldcg(const T* at) { return *at; }
template <class T> inline void __stcs(T* at, T x) { *at = x; }
template <class T> inline void __stcg(T* at, T x) { *at = x; }

// ---- Where am I; wait for the others
#define threadIdx machine_thread()
#define blockIdx machine_block()
#define gridDim machine_grid_size()
#define blockDim machine_block_size()
constexpr int warpSize = 32;

// The line tells one barrier from another; its place in the code would not, since a compiler may make two of one.
inline void __syncthreads(int line = __builtin_LINE()) { machine_block_barrier(0, nullptr, line); }
inline int __syncthreads_count(int x, int line = __builtin_LINE()) { int n = x != 0; machine_block_barrier(1, &n, line); return n; }
inline int __syncthreads_or(int x, int line = __builtin_LINE()) { return __syncthreads_count(x, line) != 0; }
inline int __syncthreads_and(int x, int line = __builtin_LINE()) { return __syncthreads_count(x == 0, line) == 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- Within a warp

inline void __syncwarp(unsigned mask = 0xffffffffu) { machine_warp(WARP_SYNC, mask, nullptr); }
template <class T> inline T machine_shuffle(unsigned mask, T x, int from) {
    MachineShuffle mine = {0, from};
    __builtin_memcpy(&mine.value, &x, sizeof x);
    machine_warp(WARP_SHUFFLE, mask, &mine);
    __builtin_memcpy(&x, &mine.value, sizeof x);
    return x;
}
inline int machine_lane() { return (int)(threadIdx.x % 32); }
// width: lanes in a group that shuffles by itself, a power of two
template <class T> inline T __shfl_sync(unsigned mask, T x, int lane, int width = 32) {
    return machine_shuffle(mask, x, (machine_lane() & ~(width - 1)) | (lane & (width - 1)));
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T x, int flip, int width = 32) {
    const int from = machine_lane() ^ flip;
    return machine_shuffle(mask, x, from / width <= machine_lane() / width ? from : -1);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
    const int from = machine_lane() - (int)by;
    return machine_shuffle(mask, x, from >= (machine_lane() & ~(width - 1)) ? from : -1);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
    const int from = machine_lane() + (int)by;
    return machine_shuffle(mask, x, from <= (machine_lane() | (width - 1)) ? from : -1);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
    MachineBallot mine = {x != 0};
    machine_warp(WARP_BALLOT, mask, &mine);
    return mine.votes;
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x == 0) == 0; }

// ---- Atomics: one thread runs at a time, so that plain code does; the machine is told, for its search for races.
template <class T, class F> inline T machine_exchange(T* at, F change) {
    T before;
    machine_atomic(&before, at, sizeof(T));
    const T after = change(before);
    machine_atomic(at, &after, sizeof(T));
    return before;
}
#define MACHINE_ATOMIC(name, type, expression) \
    inline type name(type* at, type x) { return machine_exchange(at, [x](type now) { return (type)(expression); }); }
#define MACHINE_ATOMICS(type) MACHINE_ATOMIC(atomicAdd, type, now + x) MACHINE_ATOMIC(atomicExch, type, x)
MACHINE_ATOMICS(int) MACHINE_ATOMICS(unsigned) MACHINE_ATOMICS(unsigned long long) MACHINE_ATOMICS(float)
MACHINE_ATOMIC(atomicAdd, double, now + x)
#define MACHINE_INTEGER_ATOMICS(type) \
    MACHINE_ATOMIC(atomicSub, type, now - x) \
    MACHINE_ATOMIC(atomicMax, type, now < x ? x : now) MACHINE_ATOMIC(atomicMin, type, x < now ? x : now) \
    MACHINE_ATOMIC(atomicOr, type, now | x) MACHINE_ATOMIC(atomicAnd, type, now & x) \
    inline type atomicCAS(type* at, type old, type x) { return machine_exchange(at, [old, x](type now) { return now == old ? x : now; }); }
MACHINE_INTEGER_ATOMICS(int) MACHINE_INTEGER_ATOMICS(unsigned)

// ---- The instructions that prelude.cuh otherwise writes in PTX
#define MACHINE_IS_BF16 (FORMAT == 2)
#define rounded_bits(x) (MACHINE_IS_BF16 ? machine_to_bf16(x) : machine_to_fp16(x))
#define value_of_bits(bits) (MACHINE_IS_BF16 ? __uint_as_float((unsigned)(bits) << 16) : machine_from_fp16(bits))
#define pack(low, high) machine_pack(MACHINE_IS_BF16, low, high)
inline unsigned machine_pack(bool bf16, float low, float high) {
    if (bf16) return machine_to_bf16(low) | (unsigned)machine_to_bf16(high) << 16;
    return machine_to_fp16(low) | (unsigned)machine_to_fp16(high) << 16;
}
#define mma(c, a, b) machine_mma(MACHINE_IS_BF16, c, a, b)
inline void machine_mma(int bf16, float c[4], const unsigned a[4], const unsigned b[2]) {
    MachineMma mine = {bf16, c, a, b};
    machine_warp(WARP_MMA, 0xffffffffu, &mine);
}
inline void machine_matrices(unsigned* result, const void* row, int count, bool transposed) {
    MachineMatrices mine = {result, row, count, transposed};
    machine_warp(WARP_MATRICES, 0xffffffffu, &mine);
}
inline void load_matrix_x4(unsigned r[4], const void* row) { machine_matrices(r, row, 4, false); }
inline void load_matrix_x2(unsigned r[2], const void* row) { machine_matrices(r, row, 2, false); }
inline void load_matrix_x4_transposed(unsigned r[4], const void* row) { machine_matrices(r, row, 4, true); }
inline void load_matrix_x2_transposed(unsigned r[2], const void* row) { machine_matrices(r, row, 2, true); }
inline void copy_async16(void* shared, const void* global, bool valid) { machine_copy_async16(shared, global, valid); }
inline void copy_commit() { machine_copy_commit(); }
template <int n> inline void copy_wait() { machine_copy_wait(n); }

// ---- For cuda_on_cpu.py: a kernel's parameter types as text, and a call of it with arguments out of memory.
template <class T> struct MachineType { static constexpr const char* name = "struct"; };
#define MACHINE_TYPE(type) template <> struct MachineType<type> { static constexpr const char* name = #type; };
MACHINE_TYPE(void) MACHINE_TYPE(bool) MACHINE_TYPE(char) MACHINE_TYPE(signed char) MACHINE_TYPE(unsigned char)
MACHINE_TYPE(short) MACHINE_TYPE(unsigned short) MACHINE_TYPE(int) MACHINE_TYPE(unsigned)
MACHINE_TYPE(long) MACHINE_TYPE(unsigned long) MACHINE_TYPE(long long) MACHINE_TYPE(unsigned long long)
MACHINE_TYPE(float) MACHINE_TYPE(double)
template <class T> struct MachineParameter : MachineType<T> { static constexpr const char* kind = ""; };
template <class T> struct MachineParameter<T*> : MachineType<T> { static constexpr const char* kind = "*"; };
template <class T> struct MachineParameter<const T*> : MachineType<T> { static constexpr const char* kind = "const *"; };
template <int... i> struct MachineIndices {};
template <class... P> struct MachineKernel {
    static void describe(void (*word)(const char*, const char*)) { (word(MachineParameter<P>::kind, MachineParameter<P>::name), ...); }
    template <int... i> __attribute__((no_sanitize("thread")))      // reads the arguments, which are nobody's array
    static void call(void (*kernel)(P...), void** arguments, MachineIndices<i...>) { kernel(*(P*)arguments[i]...); }
};
template <int n, int... i> struct MachineCount : MachineCount<n - 1, n - 1, i...> {};
template <int... i> struct MachineCount<0, i...> { using indices = MachineIndices<i...>; };
template <class... P> void machine_describe(void (*)(P...), void (*word)(const char*, const char*)) { MachineKernel<P...>::describe(word); }
template <class... P> void machine_call(void (*kernel)(P...), void** arguments) {
    MachineKernel<P...>::call(kernel, arguments, typename MachineCount<sizeof...(P)>::indices());
}
#endif
