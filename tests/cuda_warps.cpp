// What the lanes of a warp do together. Each hands over a record and waits; when the last one that the operation names has come, it is
// carried out for all of them at once. Also the numbers that tensor cores work on: fp16 and bf16, to and from fp32.
#include "cuda_machine.h"

// ---- 16-bit numbers
static float from_bf16(unsigned bits) { const uint32_t u = bits << 16; float x; memcpy(&x, &u, 4); return x; }

extern "C" unsigned short machine_to_bf16(float x) {      // round to nearest, ties to even, on the bits
    uint32_t u;
    memcpy(&u, &x, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return 0x7fff;      // the NaN that cvt.rn.bf16 makes
    return (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

extern "C" float machine_from_fp16(unsigned short bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    uint32_t u;
    if (exponent == 31) u = sign | 0x7f800000 | fraction << 13;
    else if (exponent) u = sign | (exponent + 112) << 23 | fraction << 13;
    else if (!fraction) u = sign;
    else {      // subnormal: fraction·2⁻²⁴, an ordinary number in fp32
        const unsigned shift = (unsigned)__builtin_clz(fraction) - 21;
        u = sign | (113 - shift) << 23 | ((fraction << shift & 1023) << 13);
    }
    float x;
    memcpy(&x, &u, 4);
    return x;
}

extern "C" unsigned short machine_to_fp16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const unsigned sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return 0x7fff;
    if (u >= 0x477ff000) return (unsigned short)(sign | 0x7c00);      // from 65520 on: infinity
    if (u < 0x33000000) return (unsigned short)sign;                  // below 2⁻²⁵: zero
    unsigned drop = 13, value = u - (112u << 23);                     // bits to lose; exponent and fraction with fp16's bias
    if (u < 0x38800000) drop = 126 - (u >> 23), value = (u & 0x7fffff) | 0x800000;      // subnormal: a multiple of 2⁻²⁴
    const unsigned half = 1u << (drop - 1), rest = value & ((1u << drop) - 1);
    value >>= drop;
    if (rest > half || (rest == half && (value & 1))) value++;
    return (unsigned short)(sign | value);
}

// ---- Tensor cores
static void matrix_product(void** records) {      // fragments of m16n8k16 as PTX lays them out over the lanes
    float a[16][16], b[16][8];
    const bool bf16 = ((MachineMma*)records[0])->bf16;
    auto value = [bf16](unsigned word, int upper) {
        const unsigned bits = upper ? word >> 16 : word & 0xffff;
        return bf16 ? from_bf16(bits) : machine_from_fp16((unsigned short)bits);
    };
    for (int lane = 0; lane < 32; lane++) {
        const MachineMma& m = *(MachineMma*)records[lane];
        const int group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 2; k++) a[group + i % 2 * 8][pair + i / 2 * 8 + k] = value(m.a[i], k);
        for (int i = 0; i < 2; i++)
            for (int k = 0; k < 2; k++) b[pair + i * 8 + k][group] = value(m.b[i], k);
    }
    for (int lane = 0; lane < 32; lane++) {
        float* c = ((MachineMma*)records[lane])->c;
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            c[i] += sum;
        }
    }
}

static void load_matrices(void** records, address place) {
    const MachineMatrices& first = *(MachineMatrices*)records[0];
    unsigned short rows[32][8];
    for (int lane = 0; lane < first.count * 8; lane++) {
        const void* row = ((MachineMatrices*)records[lane])->row;
        access((address)row, 16, MATRIX, place, (unsigned)lane);
        memcpy(rows[lane], row, 16);
    }
    for (int lane = 0; lane < 32; lane++) {
        const MachineMatrices& m = *(MachineMatrices*)records[lane];
        for (int i = 0; i < first.count; i++) {
            const int row = lane / 4, column = lane % 4 * 2;
            m.result[i] = m.transposed ? rows[i * 8 + column][row] | (unsigned)rows[i * 8 + column + 1][row] << 16
                                       : rows[i * 8 + row][column] | (unsigned)rows[i * 8 + row][column + 1] << 16;
        }
    }
}

// ---- Operations

// If all lanes that the operation names have come, carry it out and let them go. Returns whether it was.
static bool finish_warp_operation(unsigned t) {
    const Thread& mine = machine.threads[t];
    const unsigned first = t & ~31u, warp = t / 32, lanes = mine.mask & ~machine.gone[warp];
    if (lanes & ~machine.arrived[warp]) return false;
    void* records[32] = {};
    for (unsigned i = 0; i < 32; i++) {
        if (!(lanes >> i & 1)) continue;
        const Thread& other = machine.threads[first + i];
        if (other.operation != mine.operation || other.mask != mine.mask)
            fail("lanes of one warp wait for each other at different operations: {%lx} and {%lx}", PLACE(mine.at), PLACE(other.at));
        records[i] = other.record;
    }
    if (mine.operation >= WARP_MMA && lanes != ALL_LANES) fail("mma and ldmatrix need all 32 lanes at {%lx}", PLACE(mine.at));
    unsigned long long before[32];
    unsigned votes = 0;
    for (unsigned i = 0; i < 32; i++) {
        if (!(lanes >> i & 1)) continue;
        if (mine.operation == WARP_SHUFFLE) before[i] = ((MachineShuffle*)records[i])->value;
        if (mine.operation == WARP_BALLOT) votes |= ((MachineBallot*)records[i])->votes << i;
    }
    if (mine.operation == WARP_SYNC && (lanes | machine.gone[warp]) == ALL_LANES) machine.warp_clock[warp]++;
    if (mine.operation == WARP_MMA) matrix_product(records);
    if (mine.operation == WARP_MATRICES) load_matrices(records, mine.at);
    machine.arrived[warp] &= ~lanes;
    for (unsigned i = 0; i < 32; i++) {
        if (!(lanes >> i & 1)) continue;
        if (mine.operation == WARP_SHUFFLE) {
            MachineShuffle& shuffle = *(MachineShuffle*)records[i];
            if (shuffle.from >= 0 && shuffle.from < 32) {
                if (!(lanes >> shuffle.from & 1))
                    fail("a shuffle reads lane %d, which takes no part, at {%lx}", shuffle.from, PLACE(mine.at));
                shuffle.value = before[shuffle.from];
            }
        }
        if (mine.operation == WARP_BALLOT) ((MachineBallot*)records[i])->votes = votes;
        make_ready(first + i);
    }
    return true;
}

extern "C" void machine_warp(int operation, unsigned mask, void* record) {
    Thread& me = machine.threads[machine.current];
    me.state = AT_WARP_OPERATION, me.operation = operation, me.mask = mask, me.record = record, me.at = CALLER;
    if (!(mask >> machine.current % 32 & 1)) fail("a lane that the mask does not name takes part at {%lx}", PLACE(me.at));
    machine.arrived[machine.current / 32] |= 1u << machine.current % 32;
    finish_warp_operation(machine.current);
    next_fiber();
}

void lane_is_gone(unsigned t) {
    machine.gone[t / 32] |= 1u << t % 32;
    for (unsigned i = t & ~31u; i < (t | 31u) + 1 && i < machine.count; i++)
        if (machine.threads[i].state == AT_WARP_OPERATION && finish_warp_operation(i)) break;
}
