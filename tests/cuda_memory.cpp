// Every access to memory: is it in bounds, does it race, what does it cost?
//
// g++ -fsanitize=thread puts a call (__tsan_read4(address) and so on) before every access to memory that others could see, and leaves it
// to a library what to do with it. Here is that library.
//
// Bounds. An access must lie in one of the launch's arrays or in the block's shared memory, at an address divisible by its size.
//
// Races. Two accesses of two threads to the same place race when one of them is a write and nothing orders them. A block barrier orders
// what is before it and what is after it; __syncwarp of all lanes does so within its warp; nothing orders two blocks. Shuffles, votes,
// mma and ldmatrix exchange registers and order no memory, as CUDA's documentation has it. For every two bytes there is a cell that
// remembers who wrote last and who has read since, and when: how many barriers the block, and how many the warp, had passed by then.
//
// Traffic, where it is asked for. What the lanes of a warp do by one instruction is one request. It costs, in global memory, the 32-byte
// sectors that it touches; in shared memory, passes over the 32 banks of 4 bytes: lanes that want different words of one bank wait for
// each other. 8-byte accesses go in two halves of the warp, 16-byte ones (and the matrices of ldmatrix) in quarters.
//
// Not modelled: a __syncwarp of some lanes orders nothing here; what __threadfence is good for; single bytes are not searched for races.
#include <algorithm>
#include <dlfcn.h>
#include <map>
#include <set>
#include <sys/mman.h>
#include <tuple>
#include "cuda_machine.h"

struct Cell {
    uint32_t write_block, write_warp, read_block, read_warp;      // barriers passed at the last write, the last read; block 0: never
    uint32_t write_at, read_at;                                   // where in the code
    uint16_t writer, reader;                                      // a thread; a reader may also be a warp or more
    uint8_t atomic, in_flight;                                    // the write was atomic; it is a copy that has not been waited for
};
static const unsigned A_WARP = 2048, SEVERAL_WARPS = 4094, SEVERAL_BLOCKS = 4095;      // reader: A_WARP + w, lanes of warp w
struct Region { address begin, end; Cell* cells; bool global; };
static std::vector<Region> regions;
static Region* last_region;

// ---- The memory that a launch may touch
void* zeros(size_t bytes) { return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0); }
static size_t cells_for(address bytes) { return sizeof(Cell) * (bytes / 2 + 1); }

void open_memory(const Array* arrays, unsigned count) {
    static Cell *static_cells, *dynamic_cells;      // kept: clocks only go forward, so that an old entry is known as old
    const address begin = (address)__start_cuda_shared, end = (address)__stop_cuda_shared, dynamic = (address)machine.dynamic;
    if (!static_cells) static_cells = (Cell*)zeros(cells_for(end - begin)), dynamic_cells = (Cell*)zeros(cells_for(DYNAMIC));
    regions = {{begin, end, static_cells, false}, {dynamic, dynamic + machine.dynamic_bytes, dynamic_cells, false}};
    for (unsigned i = 0; i < count; i++) {
        const Array& array = arrays[i];
        regions.push_back({array.begin, array.begin + array.bytes, (Cell*)zeros(cells_for(array.bytes)), true});
    }
    last_region = nullptr;
}

void close_memory() {
    for (Region& region : regions)
        if (region.global) munmap(region.cells, cells_for(region.end - region.begin));
}

static Region* region_of(address at) {
    if (last_region && at >= last_region->begin && at < last_region->end) return last_region;
    for (Region& region : regions)
        if (at >= region.begin && at < region.end) return last_region = &region;
    return nullptr;
}

// ---- Traffic
struct Traffic { uint64_t place, kind, global, requests, units, ideal; };      // units: sectors or passes; ideal: the fewest
struct Request { unsigned bytes; std::vector<std::pair<unsigned, address>> lanes; };
static std::map<std::tuple<unsigned, unsigned long, int, bool, unsigned>, Request> requests;      // by warp, place, kind, global, turn
static std::map<std::tuple<unsigned, unsigned long, int, bool>, unsigned> turns;                  // by thread, place, kind, global
static std::map<std::tuple<unsigned long, int, bool>, Traffic> traffic;                           // by place, kind, global
static std::set<address> read_sectors, written_sectors;

static void note(address at, unsigned bytes, Kind kind, unsigned long place, bool global, unsigned thread) {
    const unsigned turn = turns[{thread, place, kind, global}]++;
    Request& request = requests[{thread / 32, place, kind, global, turn}];
    request.bytes = bytes;
    request.lanes.push_back({thread % 32, at});
    if (!global) return;
    for (address sector = at / 32; sector <= (at + bytes - 1) / 32; sector++) {
        if (kind != WRITE) read_sectors.insert(sector);
        if (kind == WRITE || kind == ATOMIC) written_sectors.insert(sector);
    }
}

static void cost(const Request& request, bool global, Traffic& sum) {
    const unsigned grain = global ? 32 : 4, together = global || request.bytes <= 4 ? 32 : request.bytes <= 8 ? 16 : 8;
    for (unsigned first = 0; first < 32; first += together) {
        std::set<address> pieces, bytes;
        for (auto [lane, at] : request.lanes) {
            if (lane < first || lane >= first + together) continue;
            for (unsigned i = 0; i < request.bytes; i++) pieces.insert((at + i) / grain), bytes.insert(at + i);
        }
        if (pieces.empty()) continue;
        unsigned per_bank[32] = {}, passes = 0;
        for (address word : pieces) passes = std::max(passes, ++per_bank[word % 32]);
        sum.units += global ? pieces.size() : passes;
        sum.ideal += global ? (bytes.size() + 31) / 32 : (pieces.size() + 31) / 32;
    }
    sum.requests++;
}

void count_block() {
    for (auto& [key, request] : requests) {
        const auto [warp, place, kind, global, turn] = key;
        Traffic& sum = traffic[{place, kind, global}];
        sum.place = place, sum.kind = (uint64_t)kind, sum.global = global;
        cost(request, global, sum);
    }
    requests.clear();
    turns.clear();
}

// The traffic since the last call: returns the number of lines, of which it writes at most `room`; bytes: read, written, each place once.
extern "C" __attribute__((visibility("default"))) unsigned machine_traffic(Traffic* lines, unsigned room, uint64_t bytes[2]) {
    unsigned n = 0;
    for (auto& [key, line] : traffic)
        if (n++ < room) lines[n - 1] = line;
    bytes[0] = read_sectors.size() * 32, bytes[1] = written_sectors.size() * 32;
    if (n <= room) traffic.clear(), read_sectors.clear(), written_sectors.clear();
    return n;
}

// ---- Races
static bool ordered(uint32_t block, uint32_t warp, unsigned who, unsigned me, bool global) {      // was that before what happens now?
    if (!block) return true;
    if (who == SEVERAL_BLOCKS) return false;
    if (block < machine.block_start) return !global;      // another block's
    if (who == me || block < machine.block_clock) return true;
    const unsigned my_warp = machine.current / 32, its_warp = who >= A_WARP ? who - A_WARP : who / 32;
    return who != SEVERAL_WARPS && its_warp == my_warp && warp < machine.warp_clock[my_warp];
}

static const char* doing[] = {"read", "write", "atomic operation", "asynchronous copy", "ldmatrix"};

__attribute__((noreturn)) static void race(const Cell& cell, bool with_write, const Region& region, address at, Kind kind, address place) {
    const unsigned who = with_write ? cell.writer : cell.reader, when = with_write ? cell.write_block : cell.read_block;
    char other[40];
    if (who >= SEVERAL_WARPS) snprintf(other, sizeof other, who == SEVERAL_WARPS ? "several warps" : "several blocks");
    else snprintf(other, sizeof other, who >= A_WARP ? "lanes of warp %u" : "thread %u", who >= A_WARP ? who - A_WARP : who);
    const char* did = !with_write ? "read" : cell.in_flight ? "asynchronous copy, not yet waited for," : "written";
    const bool elsewhere = when < machine.block_start && who != SEVERAL_BLOCKS;
    fail("race on byte %ld of %s memory: %s at {%lx}; %s by %s%s at {%lx}, and no barrier in between", (long)(at - region.begin),
         region.global ? "global" : "shared", doing[kind], PLACE(place), did, other, elsewhere ? " of another block" : "",
         (unsigned long)(with_write ? cell.write_at : cell.read_at));
}

static void note_read(Cell& cell, unsigned me, bool global, address place) {      // unordered readers add up
    const unsigned warp = machine.current / 32, its_warp = cell.reader >= A_WARP ? cell.reader - A_WARP : cell.reader / 32;
    unsigned reader = me;
    if (global && cell.read_block && (cell.read_block < machine.block_start || cell.reader == SEVERAL_BLOCKS)) reader = SEVERAL_BLOCKS;
    else if (cell.read_block == machine.block_clock && cell.reader != me) {
        if (cell.reader == SEVERAL_WARPS || its_warp != warp) reader = SEVERAL_WARPS;
        else if (cell.read_warp == machine.warp_clock[warp]) reader = A_WARP + warp;
    }
    cell.reader = (uint16_t)reader, cell.read_at = (uint32_t)PLACE(place);
    cell.read_block = machine.block_clock, cell.read_warp = machine.warp_clock[warp];
}

static void note_write(Cell& cell, Kind kind, address place) {      // reads so far were before it: forget them
    cell.writer = (uint16_t)machine.current, cell.write_at = (uint32_t)PLACE(place);
    cell.write_block = machine.block_clock, cell.write_warp = machine.warp_clock[machine.current / 32];
    cell.atomic = kind == ATOMIC, cell.in_flight = kind == COPY, cell.read_block = 0;
}

// ---- An access by the current thread (for MATRIX, by its whole warp, of the row that `lane` names)
void access(address at, unsigned bytes, Kind kind, address place, unsigned lane, bool any_address) {
    if (!machine.running || at - (address)machine.stacks < (address)MOST_THREADS * STACK) return;
    Region* region = region_of(at);
    if (!region) {
        Dl_info info;      // the module's own constants
        if (kind == READ && dladdr((void*)at, &info) && (address)info.dli_fbase == machine.code) return;
        fail("out of bounds: %s of %u bytes at {%lx}, outside every array and shared memory", doing[kind], bytes, PLACE(place));
    }
    if (at + bytes > region->end)
        fail("out of bounds: %s of %u bytes at {%lx}, beyond the end of an array", doing[kind], bytes, PLACE(place));
    if (!any_address && at % bytes)
        fail("misaligned: %s of %u bytes at {%lx}, at an address that is not divisible by %u", doing[kind], bytes, PLACE(place), bytes);
    if ((kind == MATRIX || kind == COPY) && region->global) fail("%s at {%lx}: not an address of shared memory", doing[kind], PLACE(place));
    if (machine.counting) note(at, bytes, kind, PLACE(place), region->global, (machine.current & ~31u) | lane);
    const unsigned me = kind == MATRIX ? A_WARP + machine.current / 32 : machine.current;
    Cell* cell = region->cells + (at - region->begin) / 2;
    for (Cell* end = cell + bytes / 2; cell < end; cell++) {      // none for a single byte: another thread may own the cell's other half
        const bool lands = kind == WRITE && cell->in_flight && cell->writer == machine.current;      // the copy waited for
        const bool in_flight = cell->in_flight && cell->write_block >= machine.block_start && !lands;
        const bool both_atomic = kind == ATOMIC && cell->atomic;
        if (in_flight || (!both_atomic && !ordered(cell->write_block, cell->write_warp, cell->writer, me, region->global)))
            race(*cell, true, *region, at, kind, place);
        if (kind == READ || kind == MATRIX) { note_read(*cell, me, region->global, place); continue; }
        if (!ordered(cell->read_block, cell->read_warp, cell->reader, me, region->global)) race(*cell, false, *region, at, kind, place);
        note_write(*cell, kind, place);
    }
}

extern "C" {
#define ACCESS(name, bytes, kind, any) void name(void* at) { access((address)at, bytes, kind, CALLER, machine.current % 32, any); }
#define ACCESSES(bytes) \
    ACCESS(__tsan_read##bytes, bytes, READ, false) ACCESS(__tsan_write##bytes, bytes, WRITE, false) \
    ACCESS(__tsan_volatile_read##bytes, bytes, READ, false) ACCESS(__tsan_volatile_write##bytes, bytes, WRITE, false) \
    ACCESS(__tsan_unaligned_read##bytes, bytes, READ, true) ACCESS(__tsan_unaligned_write##bytes, bytes, WRITE, true)
ACCESSES(1) ACCESSES(2) ACCESSES(4) ACCESSES(8) ACCESSES(16)
void __tsan_read_range(void* at, unsigned long bytes) { access((address)at, (unsigned)bytes, READ, CALLER, machine.current % 32, true); }
void __tsan_write_range(void* at, unsigned long bytes) { access((address)at, (unsigned)bytes, WRITE, CALLER, machine.current % 32, true); }
void __tsan_init() {}

void machine_atomic(void* to, const void* from, int bytes) {      // one of the two is the place, the other on the caller's stack
    const address place = CALLER;
    access((address)to, (unsigned)bytes, ATOMIC, place, machine.current % 32);
    const bool counting = machine.counting;
    machine.counting = false;      // an atomic operation reads and writes: it counts once
    access((address)from, (unsigned)bytes, ATOMIC, place, machine.current % 32);
    machine.counting = counting;
    memcpy(to, from, (size_t)bytes);
}

// ---- Asynchronous copies arrive at the latest moment that is allowed: when their thread waits for them.
void machine_copy_async16(void* to, const void* from, bool valid) {
    const address place = CALLER;
    Thread& me = machine.threads[machine.current];
    if (valid) {
        const Region* region = region_of((address)from);
        if (region && !region->global) fail("asynchronous copy at {%lx} from shared memory", PLACE(place));
        access((address)from, 16, READ, place, machine.current % 32);
    }
    access((address)to, 16, COPY, place, machine.current % 32);
    me.copies.push_back({(char*)to, (const char*)from, valid, me.groups});
}
void machine_copy_commit() { machine.threads[machine.current].groups++; }
void machine_copy_wait(int left) {
    const address place = CALLER;
    Thread& me = machine.threads[machine.current];
    const bool counting = machine.counting;
    machine.counting = false;      // it was counted when it set out
    std::vector<Copy> later;
    for (const Copy& copy : me.copies) {
        if (copy.group + (unsigned)left >= me.groups) { later.push_back(copy); continue; }
        if (copy.valid) memcpy(copy.to, copy.from, 16);
        else memset(copy.to, 0, 16);
        access((address)copy.to, 16, WRITE, place, machine.current % 32);
    }
    me.copies.swap(later);
    machine.counting = counting;
}
}
