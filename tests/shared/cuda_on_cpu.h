// Run CUDA kernels on a CPU, to compare their results without a GPU. This file is prepended to a .cu file, which is
// then compiled as C++.
//
// The threads of a block are fibres: each runs until it reaches a barrier or a shuffle, then the next one runs. They
// run in ascending or in descending order: a kernel that lacks a barrier has wrong results in one of the two. Shared
// memory is filled with NaN before each block. All threads of a warp have to reach the same barrier or shuffle.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __restrict__
#define __shared__ static __attribute__((section("shared_memory")))

extern "C" char __start_shared_memory[] __attribute__((weak)), __stop_shared_memory[] __attribute__((weak));

struct Dimensions {
    unsigned x = 0, y = 0, z = 0;
};
static Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace on_cpu {

constexpr unsigned WARP_SIZE = 32;
constexpr size_t STACK = 64 << 10;

struct Fibre {
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    bool started = false, done = false;
    int waits_at = 0;  // line of the barrier, or minus that of the shuffle
    unsigned exchanges = 0;
    uint64_t offered[2];  // to the other threads; two slots, since others read one while this thread writes the next
};

static std::vector<Fibre> fibres;
static jmp_buf scheduler;
static ucontext_t unused;
static void (*body)();

static Fibre& self() { return fibres[threadIdx.x]; }

static void yield() {
    if (_setjmp(self().context) == 0) {
        _longjmp(scheduler, 1);
    }
}

static void run_for_ever() {
    for (;;) {
        body();
        self().done = true;
        yield();
    }
}

static void resume(unsigned thread) {
    threadIdx.x = thread;
    if (_setjmp(scheduler) != 0) {
        return;
    }
    Fibre& fibre = fibres[thread];
    if (fibre.started) {
        _longjmp(fibre.context, 1);
    }
    fibre.started = true;
    if (!fibre.stack) {
        fibre.stack.reset(new char[STACK]);
    }
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fibre.stack.get();
    start.uc_stack.ss_size = STACK;
    start.uc_link = &unused;
    makecontext(&start, run_for_ever, 0);
    setcontext(&start);
}

// Return whether no thread waits for others of its warp: all are at a barrier, have ended, or are about to start.
static bool no_warp_is_inside() {
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
        if (!fibres[thread].done && fibres[thread].waits_at < 0) {
            return false;
        }
    }
    return true;
}

// Return an error message if the threads have stopped at different places; empty otherwise.
static std::string disagreement() {
    const bool barrier = no_warp_is_inside();
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
        const Fibre& fibre = fibres[thread];
        const Fibre& other = fibres[barrier ? 0 : thread / WARP_SIZE * WARP_SIZE];
        if (fibre.done != other.done || (!fibre.done && fibre.waits_at != other.waits_at)) {
            return "threads stop at different barriers, or some never get to one";
        }
    }
    return "";
}

static std::string run_block(bool reversed) {
    memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
        fibres[thread].done = false;
        fibres[thread].waits_at = 0;
        fibres[thread].exchanges = 0;
    }
    for (bool going = true; going;) {
        going = false;
        const bool all = no_warp_is_inside();  // otherwise the threads inside a warp continue
        for (unsigned i = 0; i < blockDim.x; ++i) {
            const unsigned thread = reversed ? blockDim.x - 1 - i : i;
            if (!fibres[thread].done && (all || fibres[thread].waits_at < 0)) {
                resume(thread);
            }
            going = going || !fibres[thread].done;
        }
        const std::string wrong = disagreement();
        if (!wrong.empty()) {
            fibres.clear();
            return wrong;
        }
    }
    return "";
}

// The arguments of the running kernel, with the types that it declares.
template <class... Types>
struct Launch {
    static inline void (*kernel)(Types...);
    static inline void** arguments;

    template <size_t... I>
    static void call(std::index_sequence<I...>) {
        kernel(*static_cast<Types*>(arguments[I])...);
    }

    static void call_all() { call(std::index_sequence_for<Types...>()); }
};

template <class... Types>
std::string launch(void (*kernel)(Types...), void** arguments, const std::vector<size_t>& sizes, unsigned blocks,
                   unsigned threads, bool reversed) {
    if (sizes != std::vector<size_t>{sizeof(Types)...}) {
        return "the arguments are not of the sizes that the kernel declares";
    }
    if (threads > 1024 || blocks == 0) {
        return "no GPU takes such a launch";
    }
    Launch<Types...>::kernel = kernel;
    Launch<Types...>::arguments = arguments;
    body = Launch<Types...>::call_all;
    gridDim.x = blocks;
    blockDim.x = threads;
    if (fibres.size() < threads) {
        fibres = std::vector<Fibre>(threads);
    }
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        const std::string wrong = run_block(reversed);
        if (!wrong.empty()) {
            return wrong;
        }
    }
    return "";
}

template <class Value>
Value exchanged(Value value, unsigned lane, int line) {
    static_assert(sizeof(Value) <= sizeof(uint64_t));
    Fibre& fibre = self();
    const unsigned warp = threadIdx.x / WARP_SIZE * WARP_SIZE, turn = fibre.exchanges++ % 2;
    memcpy(&fibre.offered[turn], &value, sizeof value);
    fibre.waits_at = -line;
    yield();
    memcpy(&value, &fibres[warp + lane].offered[turn], sizeof value);
    return value;
}

static void barrier(int line) {
    self().waits_at = line;
    yield();
}

static bool barrier_and(bool predicate, int line) {
    const unsigned turn = self().exchanges++ % 2;
    self().offered[turn] = predicate;
    barrier(line);
    bool all = true;
    for (unsigned thread = 0; thread < blockDim.x; ++thread) {
        all = all && fibres[thread].offered[turn];
    }
    return all;
}

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace on_cpu

#define __syncthreads() on_cpu::barrier(__LINE__)
#define __syncthreads_and(predicate) on_cpu::barrier_and(predicate, __LINE__)
#define __shfl_sync(mask, value, lane) on_cpu::exchanged(value, lane, __LINE__)
#define __shfl_xor_sync(mask, value, bits) on_cpu::exchanged(value, (threadIdx.x % 32) ^ (bits), __LINE__)
#define __shfl_up_sync(mask, value, distance)                                                                     \
    on_cpu::exchanged(value, threadIdx.x % 32 < unsigned(distance) ? threadIdx.x % 32 : threadIdx.x % 32 - distance, \
                      __LINE__)

static float __int_as_float(int bits) { return on_cpu::same_bits<float>(bits); }
static unsigned __float_as_uint(float value) { return on_cpu::same_bits<unsigned>(value); }
static float __ldg(const float* at) { return *at; }
static float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
// With the maximum error on a GPU: 2 units in the last place, up or down.
static float __fdividef(float a, float b) {
    const unsigned bits = on_cpu::same_bits<unsigned>(a / b);
    return on_cpu::same_bits<float>(bits + (on_cpu::same_bits<unsigned>(b) >> 13 & 1 ? 2 : -2));
}
static int max(int a, int b) { return a < b ? b : a; }
static int min(int a, int b) { return b < a ? b : a; }
static int atomicMax(int* at, int value) {
    const int old = *at;
    *at = max(old, value);
    return old;
}
using std::isnan;

// Round to the nearest half, ties to even.
static unsigned short half_bits(float value) {
    const unsigned all = on_cpu::same_bits<unsigned>(value), sign = all >> 16 & 0x8000, bits = all & 0x7fffffff;
    if (bits > 0x7f800000) {
        return sign | 0x7e00;
    }
    if (bits >= 0x477ff000) {  // 65520 rounds to infinity
        return sign | 0x7c00;
    }
    if (bits < 0x38800000) {  // under 2^-14: multiples of 2^-24
        return sign | unsigned(std::nearbyint(std::fabs(value) * 16777216.0f));
    }
    return sign | (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
}
