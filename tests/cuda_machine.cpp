// The machine that runs kernels on the CPU: threads, the block's barrier, a launch.
//
// Each thread of a block is a fiber with a stack of its own; one runs at a time, until it has to wait for others, and then a random one
// of those that can go on is next. Blocks run one after another in random order. What order it is, the seed says.
#include <cstdarg>
#include <dlfcn.h>
#include "cuda_machine.h"

Machine machine;
static char always_there __attribute__((section("cuda_shared"), used));      // else the linker may find no such section

static unsigned random_below(unsigned n) {
    machine.random = machine.random * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((machine.random >> 33) % n);
}

// ---- Going from one fiber to another
#if defined(__x86_64__) && !defined(MACHINE_PORTABLE)

extern "C" void machine_switch(void** save, void* load);      // swapcontext does the same and asks the kernel each time
asm(".text\nmachine_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\nmov %rsp, (%rdi)\n"
    "mov %rsi, %rsp\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
static void* main_stack;
static void new_fiber(unsigned t, void (*run)()) {
    void** top = (void**)(machine.stacks + (size_t)(t + 1) * STACK);
    top[-2] = (void*)run;      // where machine_switch returns to, with six registers to restore below
    machine.threads[t].stack_pointer = top - 8;
}
static void go(unsigned from, unsigned to) { machine_switch(&machine.threads[from].stack_pointer, machine.threads[to].stack_pointer); }
static void go_home(unsigned from) { machine_switch(&machine.threads[from].stack_pointer, main_stack); }
static void start(unsigned to) { machine_switch(&main_stack, machine.threads[to].stack_pointer); }

#else
#include <ucontext.h>

static ucontext_t contexts[MOST_THREADS], main_context;
static void new_fiber(unsigned t, void (*run)()) {
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = machine.stacks + (size_t)t * STACK;
    contexts[t].uc_stack.ss_size = STACK;
    contexts[t].uc_link = nullptr;
    makecontext(&contexts[t], run, 0);
}
static void go(unsigned from, unsigned to) { swapcontext(&contexts[from], &contexts[to]); }
static void go_home(unsigned from) { swapcontext(&contexts[from], &main_context); }
static void start(unsigned to) { swapcontext(&main_context, &contexts[to]); }

#endif

// Kernels are compiled with -ftz=true: numbers below 2⁻¹²⁶ become 0, here too where the processor can.
#if defined(__x86_64__)
static unsigned flush_denormals() {
    const unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040);
    return before;
}
static void restore_denormals(unsigned before) { __builtin_ia32_ldmxcsr(before); }
#else
static unsigned flush_denormals() { return 0; }
static void restore_denormals(unsigned) {}
#endif

void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    const dim3 b = machine.block;
    const int n = snprintf(machine.error, sizeof machine.error, "block (%u, %u, %u), thread %u: ", b.x, b.y, b.z, machine.current);
    vsnprintf(machine.error + n, sizeof machine.error - (size_t)n, format, list);
    va_end(list);
    go_home(machine.current);
    abort();
}

void make_ready(unsigned t) {
    machine.threads[t].state = READY;
    machine.ready[machine.ready_count++] = t;
}

void next_fiber() {
    const unsigned from = machine.current;
    if (!machine.ready_count) go_home(from);
    const unsigned i = random_below(machine.ready_count), to = machine.ready[i];
    machine.ready[i] = machine.ready[--machine.ready_count];
    machine.current = to;      // whoever comes back to `from` sets it again
    if (to != from) go(from, to);
}

// ---- The block's barrier
static void release_block() {
    int sum = 0;
    Thread* first = nullptr;
    for (unsigned t = 0; t < machine.count; t++) {
        Thread& thread = machine.threads[t];
        if (thread.state != AT_BLOCK_BARRIER) continue;
        if (!first) first = &thread;
        if (thread.how != first->how || thread.line != first->line)
            fail("threads of the block wait at different barriers: {%lx} and {%lx}", PLACE(first->at), PLACE(thread.at));
        if (thread.how) sum += *thread.value;
    }
    for (unsigned t = 0; t < machine.count; t++) {
        Thread& thread = machine.threads[t];
        if (thread.state != AT_BLOCK_BARRIER) continue;
        if (thread.how) *thread.value = sum;
        make_ready(t);
    }
    machine.waiting = 0;
    machine.block_clock++;
}

extern "C" {
void machine_block_barrier(int how, int* value, int line) {
    Thread& me = machine.threads[machine.current];
    me.state = AT_BLOCK_BARRIER, me.how = how, me.value = value, me.line = line, me.at = CALLER;
    if (++machine.waiting == machine.alive) release_block();
    next_fiber();
}

dim3 machine_thread() { return {machine.current, 0, 0}; }
dim3 machine_block() { return machine.block; }
dim3 machine_block_size() { return {machine.count, 1, 1}; }
dim3 machine_grid_size() { return machine.grid_size; }
unsigned char* machine_dynamic_shared() { return machine.dynamic; }
}

// ---- A launch
static void run_thread() {
    machine.kernel(machine.arguments);
    const unsigned t = machine.current;
    machine.threads[t].state = DONE;
    machine.threads[t].copies.clear();
    machine.alive--;
    lane_is_gone(t);
    if (machine.alive && machine.waiting == machine.alive) release_block();
    next_fiber();
}

static void tell_who_waits() {
    address barrier = machine.code, operation = machine.code;
    for (unsigned t = 0; t < machine.count; t++) {
        if (machine.threads[t].state == AT_BLOCK_BARRIER) barrier = machine.threads[t].at;
        if (machine.threads[t].state == AT_WARP_OPERATION) operation = machine.threads[t].at;
    }
    snprintf(machine.error, sizeof machine.error,
             "block (%u, %u, %u): nobody can go on: some threads wait for the block at {%lx}, some for their warp at {%lx}",
             machine.block.x, machine.block.y, machine.block.z, PLACE(barrier), PLACE(operation));
}

static void run_block() {
    machine.block_start = ++machine.block_clock;
    machine.alive = machine.count;
    machine.waiting = machine.ready_count = 0;
    memset(__start_cuda_shared, 0xff, (size_t)(__stop_cuda_shared - __start_cuda_shared));      // NaN, in every format
    memset(machine.dynamic, 0xff, machine.dynamic_bytes);
    for (unsigned w = 0; w < MOST_WARPS; w++) machine.arrived[w] = 0, machine.gone[w] = ALL_LANES;
    for (unsigned t = 0; t < machine.count; t++) {
        machine.gone[t / 32] &= ~(1u << t % 32);
        machine.threads[t].groups = 0;
        machine.threads[t].copies.clear();
        new_fiber(t, run_thread);
        make_ready(t);
    }
    machine.current = machine.ready[--machine.ready_count];
    start(machine.current);      // comes back when no thread can go on
    if (machine.alive && !machine.error[0]) tell_who_waits();
    if (machine.counting) count_block();
}

static void set_up() {
    Dl_info info;
    dladdr((void*)set_up, &info);
    machine.code = (address)info.dli_fbase;
    machine.stacks = (char*)zeros((size_t)MOST_THREADS * STACK);
    machine.dynamic = (unsigned char*)zeros(DYNAMIC + 64) + 16;      // divisible by 16 and by no more: kernels may not count on more
}

extern "C" {
__attribute__((visibility("default"))) unsigned machine_static_shared() { return (unsigned)(__stop_cuda_shared - __start_cuda_shared - 1); }

// Run a kernel. Returns null, or what went wrong.
__attribute__((visibility("default"))) const char* machine_launch(
    void (*kernel)(void**), void** arguments, const unsigned grid[3], unsigned threads, unsigned dynamic_bytes, const Array* arrays,
    unsigned array_count, uint64_t seed, int counting) {
    if (!machine.stacks) set_up();
    machine.kernel = kernel, machine.arguments = arguments, machine.count = threads, machine.dynamic_bytes = dynamic_bytes;
    machine.grid_size = {grid[0], grid[1], grid[2]};
    machine.counting = counting;
    machine.random = seed * 0x9e3779b97f4a7c15ull + 1;
    machine.error[0] = 0;
    open_memory(arrays, array_count);
    const unsigned blocks = grid[0] * grid[1] * grid[2];
    std::vector<unsigned> order(blocks);
    for (unsigned i = 0; i < blocks; i++) {
        const unsigned j = random_below(i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    const unsigned before = flush_denormals();
    machine.running = true;
    for (unsigned b = 0; b < blocks && !machine.error[0]; b++) {
        machine.block = {order[b] % grid[0], order[b] / grid[0] % grid[1], order[b] / grid[0] / grid[1]};
        run_block();
    }
    machine.running = false;
    restore_denormals(before);
    close_memory();
    return machine.error[0] ? machine.error : nullptr;
}
}
