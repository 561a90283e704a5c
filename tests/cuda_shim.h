// CUDA on one core of a CPU, for the tests: every thread of a block is a fiber, which runs until it waits for others.
// Warps and blocks wait as on a GPU; `backwards` turns the order of the threads, so that a missing barrier shows.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__

struct Three { unsigned int x = 0, y = 0, z = 0; };
struct uint2 { unsigned int x, y; };
struct uint4 { unsigned int x, y, z, w; };
static Three threadIdx, blockIdx, blockDim, gridDim;
alignas(16) unsigned long long shared[1 << 15]; // "extern __shared__" finds it

template <class T> T __ldg(const T *from) {
    if ((size_t)from % sizeof(T)) abort(); // a GPU would end the run
    return *from;
}
inline float __int_as_float(unsigned int bits) { float value; memcpy(&value, &bits, 4); return value; }
inline double __longlong_as_double(long long bits) { double value; memcpy(&value, &bits, 8); return value; }
template <class T, class U> T atomicAdd(T *at, U more) { T old = *at; *at += more; return old; }
inline int atomicMin(int *at, int value) { int old = *at; *at = std::min(old, value); return old; }

// begun by setcontext, and left and entered by jumps, which ask nothing of the system
struct Fiber { ucontext_t context; jmp_buf place; std::vector<char> stack; bool begun, done; };
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static int current;
static void (*body)(void *);
static void *body_of;

struct Barrier { int expected = 0, arrived = 0, generation = 0; };
static Barrier block_barrier, warp_barriers[32];
static unsigned long long lanes[1024];

inline void wait(Barrier &barrier) {
    const int generation = barrier.generation;
    if (++barrier.arrived == barrier.expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else
        while (barrier.generation == generation)
            if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}
inline void __syncthreads() { wait(block_barrier); }

template <class T> T __shfl_down_sync(unsigned int, T value, int step) {
    const int thread = threadIdx.x, from = thread % 32 + step < 32 ? thread + step : thread;
    memcpy(lanes + thread, &value, sizeof(T));
    wait(warp_barriers[thread / 32]);
    memcpy(&value, lanes + from, sizeof(T));
    wait(warp_barriers[thread / 32]);
    return value;
}

static void enter() {
    body(body_of);
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

static void go_on(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}

static void run_block(int threads, bool backwards) {
    if ((int)fibers.size() < threads) fibers.resize(threads);
    block_barrier = {threads, 0, 0};
    for (auto &barrier : warp_barriers) barrier = {32, 0, 0};
    std::fill(shared, shared + (1 << 15), 0xdeadbeefdeadbeefull); // what another block left
    for (int t = 0; t < threads; ++t) {
        Fiber &fiber = fibers[t];
        fiber.begun = fiber.done = false;
        fiber.stack.resize(1 << 16);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, enter, 0);
    }
    for (int left = threads; left;) {
        left = 0;
        for (int k = 0; k < threads; ++k) {
            current = backwards ? threads - 1 - k : k;
            if (fibers[current].done) continue;
            threadIdx.x = current;
            go_on(fibers[current]);
            left += !fibers[current].done;
        }
    }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void **values, std::index_sequence<I...>) {
    kernel(*reinterpret_cast<std::remove_reference_t<A> *>(values[I])...);
}

// A launch: `values` point to the arguments
template <class... A> void launch(void (*kernel)(A...), void **values, unsigned int grid, int block, bool backwards) {
    struct Work { void (*kernel)(A...); void **values; } work = {kernel, values};
    body_of = &work;
    body = [](void *of) { auto w = static_cast<Work *>(of); call(w->kernel, w->values, std::index_sequence_for<A...>{}); };
    gridDim.x = grid;
    blockDim.x = block;
#ifdef __SSE__
    const unsigned int before = _mm_getcsr();
    _mm_setcsr(before | 0x8040); // subnormal numbers are 0, as with -ftz=true, which cupy compiles with
#endif
    for (unsigned int b = 0; b < grid; ++b) {
        blockIdx.x = backwards ? grid - 1 - b : b;
        run_block(block, backwards);
    }
#ifdef __SSE__
    _mm_setcsr(before);
#endif
}
#define KERNEL(name) \
    extern "C" void launch_##name(void **values, unsigned int grid, int block, int backwards) { \
        launch(name, values, grid, block, backwards != 0); \
    }
