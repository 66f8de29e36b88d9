// What the kernels of one more token share: decode.cu and decode_attention.cu.

#define THREADS 128
#define WARPS (THREADS / 32)
#define STEP (4 + HEAD_WIDTH)      // ints a text of `steps`
#define UNROLL _Pragma("unroll")   // arrays in registers need indices that the compiler knows

// What one load moves: WIDE numbers. 16-bit ones stay in the words that they came in until they are used: taken apart at once, they would
// fill twice the registers, and the taking apart would wait for the load.
#if WIDE == 1 || FORMAT == FP32
struct __align__(WIDE * sizeof(number)) Piece { number at[WIDE]; };
__device__ __forceinline__ float number_of(const Piece& piece, int i) { return load(piece.at[i]); }
__device__ __forceinline__ Piece rounded(const float x[WIDE]) {
    Piece piece;
    UNROLL for (int i = 0; i < WIDE; i++) piece.at[i] = store(x[i]);
    return piece;
}
#else
struct __align__(16) Piece { unsigned words[WIDE / 2]; };
__device__ __forceinline__ float number_of(const Piece& piece, int i) { return i % 2 ? unpack_high(piece.words[i / 2]) : unpack_low(piece.words[i / 2]); }
__device__ __forceinline__ Piece rounded(const float x[WIDE]) {
    Piece piece;
    UNROLL for (int i = 0; i < WIDE; i += 2) piece.words[i / 2] = pack(x[i], x[i + 1]);
    return piece;
}
#endif
