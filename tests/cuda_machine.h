// The state of the machine that runs kernels on the CPU, shared by its parts:
//   cuda_machine.cpp   threads as fibers, the block's barrier, a launch
//   cuda_warps.cpp     what the lanes of a warp do together: shuffles, votes, tensor cores; 16-bit numbers
//   cuda_memory.cpp    every access to memory: bounds, races, traffic; atomics and asynchronous copies
#pragma once
#define MACHINE_ITSELF
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>
#include "cuda_on_cpu.h"

typedef uintptr_t address;
static const unsigned MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / 32;
static const unsigned STACK = 64 << 10, DYNAMIC = 227 << 10;      // bytes: of a thread's stack, of shared memory at most
static const unsigned ALL_LANES = 0xffffffffu;

enum State { READY, AT_BLOCK_BARRIER, AT_WARP_OPERATION, DONE };
struct Copy { char* to; const char* from; bool valid; unsigned group; };      // an asynchronous one that is under way
struct Thread {
    void* stack_pointer;
    State state;
    int operation; unsigned mask; void* record;      // at a warp operation
    int how, line; int* value;                       // at the block's barrier
    address at;                                      // where in the code it waits
    unsigned groups;                                 // of asynchronous copies, committed
    std::vector<Copy> copies;
};

struct Machine {
    Thread threads[MOST_THREADS];
    unsigned count, alive, waiting, current;                          // of the threads: all, not done, at the barrier; the one running
    unsigned ready[MOST_THREADS], ready_count;                        // those that can go on
    unsigned arrived[MOST_WARPS], gone[MOST_WARPS];                   // lanes of each warp: at a warp operation; done, or never there
    uint32_t block_clock, block_start, warp_clock[MOST_WARPS];        // barriers passed: the block's, with each block's start; each warp's
    dim3 block, grid_size;
    void (*kernel)(void**); void** arguments;
    unsigned char* dynamic; unsigned dynamic_bytes;                   // shared memory whose size the launch gives
    char* stacks;
    address code;                                                     // where this module is loaded
    uint64_t random;
    bool running, counting;
    char error[2000];
};
extern Machine machine;
extern char __start_cuda_shared[], __stop_cuda_shared[];      // the linker's: the static shared memory of this module

// An error ends the launch: the fibers are left where they are. "{%lx}" of a PLACE stands for a line of the source, which Python looks up.
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char* format, ...);
#define PLACE(at) (unsigned long)((at) - machine.code)
#define CALLER (address)__builtin_return_address(0)

void make_ready(unsigned thread);
void next_fiber();                       // leave the current one, which waits or is done
void lane_is_gone(unsigned thread);      // its warp need not wait for it any more

enum Kind { READ, WRITE, ATOMIC, COPY, MATRIX };      // MATRIX: a read by the whole warp, of the row that one lane names
void access(address at, unsigned bytes, Kind kind, address place, unsigned lane, bool any_address = false);
struct Array { address begin, bytes; };
void open_memory(const Array* arrays, unsigned count);
void close_memory();
void* zeros(size_t bytes);      // fresh memory, whose pages cost nothing before they are touched
void count_block();      // the block is done: add its traffic up
