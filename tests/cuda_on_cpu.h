// Runs the CUDA kernels of csrc/ on a CPU: threads are coroutines, blocks run one after the other.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <algorithm>
#include <deque>
#include <functional>
#include <vector>
#define EMULATED
#define __device__
#define __global__
#define __forceinline__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __shared__
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { int x, y, z; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
static unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static unsigned __float_as_uint(float v) { unsigned u; memcpy(&u, &v, 4); return u; }
using std::min;
using std::max;
static Index threadIdx, blockIdx, blockDim, gridDim;
char shared[1 << 18] __attribute__((aligned(16)));

struct Warp { int count = 0; unsigned generation = 0; float exchanged[32]; float a[32][2], b[32]; unsigned a16[32][4], b16[32][2]; };
// A coroutine that runs one thread after the other of those with its number; waiting: at a barrier.
struct Fiber { ucontext_t context; jmp_buf place; bool begun, done, waiting; std::vector<char> stack; };
static std::deque<Fiber> fibers;  // their contexts may not move
static std::vector<Warp> warps;
static int current;
struct Barrier { int count; unsigned generation; };
static Barrier barriers[16];
static jmp_buf scheduler;
// A jump keeps the signal mask, for which `swapcontext` would ask the system each time.
static void yield_() {
    if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}
static void resume(int t) {
    current = t, threadIdx = {t, 0, 0};
    if (_setjmp(scheduler)) return;
    if (fibers[t].begun) _longjmp(fibers[t].place, 1);
    fibers[t].begun = true;
    setcontext(&fibers[t].context);
}
static void sync_warp() {
    Warp &w = warps[current / 32];
    unsigned generation = w.generation;
    if (++w.count == 32) w.count = 0, w.generation++;
    else while (w.generation == generation) yield_();
}
static void barrier(int which, int threads) {
    unsigned generation = barriers[which].generation;
    if (++barriers[which].count == threads) barriers[which].count = 0, barriers[which].generation++;
    else while (barriers[which].generation == generation) fibers[current].waiting = true, yield_();
    fibers[current].waiting = false;
}
static float broadcast(float v, int lane) {
    Warp &w = warps[current / 32];
    w.exchanged[current % 32] = v;
    sync_warp();
    float other = w.exchanged[lane];
    sync_warp();
    return other;
}
static float exchange(float v, int mask) { return broadcast(v, (current % 32) ^ mask); }
static int uniform(int v) { return (int)broadcast((float)v, 0); }
static void keep_in_register(int &) {}
static float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? 0.f : x; }
static float ex2(float x) { return flush(std::exp2(x)); }
static float rsqrtf(float x) { return 1.f / std::sqrt(x); }
static float rcp(float x) { return 1.f / x; }
static float half_to_float(uint16_t v) { _Float16 h; memcpy(&h, &v, 2); return (float)h; }
static uint16_t float_to_half(float v) { _Float16 h = (_Float16)v; uint16_t u; memcpy(&u, &h, 2); return u; }
static uint16_t float_to_bf16(float v) { unsigned u = __float_as_uint(v); return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16); }
static unsigned pack_half(float a, float b) { return float_to_half(a) | (unsigned)float_to_half(b) << 16; }
static unsigned pack_bf16(float a, float b) { return float_to_bf16(a) | (unsigned)float_to_bf16(b) << 16; }
static unsigned pack_half_finite(float a, float b) {
    auto finite = [](float v) { return std::fmin(std::fmax(v, -65504.f), 65504.f); };
    return pack_half(finite(a), finite(b));
}
static float tf32(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }
static float round_tf32(float v) { return tf32(__uint_as_float(__float_as_uint(v) + 0x1000u)); }
// The operands of all lanes, then the product: a[row][k], b[k][column], k below 8 or 16 in the layout of the hardware.
template <typename A, typename B> static void multiply(float *d, int depth, A a, B b) {
    int lane = current % 32, g = lane / 4, q = lane % 4;
    sync_warp();
    for (int e = 0; e < 4; e++)
        for (int k = 0; k < depth; k++) d[e] += a(g + 8 * (e >> 1), k) * b(k, 2 * q + (e & 1));
    sync_warp();
}
static void mma_tf32_k4(float *d, float a0, float a1, float b) {
    Warp &w = warps[current / 32];
    int lane = current % 32;
    w.a[lane][0] = tf32(a0), w.a[lane][1] = tf32(a1), w.b[lane] = tf32(b);
    multiply(d, 4, [&](int row, int k) { return w.a[row % 8 * 4 + k][row / 8]; },
             [&](int k, int column) { return w.b[column * 4 + k]; });
}
static float half_of(unsigned v, int which, bool half) {
    uint16_t u = which ? v >> 16 : v;
    return half ? half_to_float(u) : __uint_as_float((unsigned)u << 16);
}
static void multiply16(float *d, const unsigned *a, unsigned b0, unsigned b1, int depth, bool half) {
    Warp &w = warps[current / 32];
    int lane = current % 32;
    for (int i = 0; i < depth / 4; i++) w.a16[lane][i] = a[i];
    w.b16[lane][0] = b0, w.b16[lane][1] = b1;
    multiply(d, depth, [&](int row, int k) {
        return half_of(w.a16[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k & 1, half); },
        [&](int k, int column) { return half_of(w.b16[column * 4 + k % 8 / 2][k / 8], k & 1, half); });
}
static void mma_half_k16(float *d, const unsigned *a, unsigned b0, unsigned b1) { multiply16(d, a, b0, b1, 16, true); }
static void mma_half_k8(float *d, const unsigned *a, unsigned b) { multiply16(d, a, b, 0, 8, true); }
static void mma_bf16_k16(float *d, const unsigned *a, unsigned b0, unsigned b1) { multiply16(d, a, b0, b1, 16, false); }
static void mma_bf16_k8(float *d, const unsigned *a, unsigned b) { multiply16(d, a, b, 0, 8, false); }
static unsigned transpose(unsigned v) {
    Warp &w = warps[current / 32];
    int lane = current % 32, g = lane / 4, q = lane % 4;
    w.b16[lane][0] = v;
    sync_warp();
    auto at = [&](int row, int column) { return w.b16[row * 4 + column / 2][0] >> 16 * (column & 1) & 0xffff; };
    unsigned y = at(2 * q, g) | at(2 * q + 1, g) << 16;
    sync_warp();
    return y;
}
template <int BYTES> static void copy_async(void *to, const void *from, bool valid) {
    if (((uintptr_t)to | (uintptr_t)from) % BYTES) { fprintf(stderr, "misaligned copy of %d bytes\n", BYTES); abort(); }
    if (valid) memcpy(to, from, BYTES); else memset(to, 0, BYTES);
}
static void copy_commit() {}
template <int PENDING> static void copy_wait() {}

static std::function<void()> kernel_;
static void run_threads() {
    for (;;) {
        kernel_();
        fibers[current].done = true;
        yield_();
    }
}
// A grid of x, y and z blocks, each of so many threads.
static void run_on_cpu(std::function<void()> kernel, int x, int y, int z, int threads) {
    kernel_ = kernel;
    gridDim = {x, y, z}, blockDim = {threads, 1, 1};
    for (int t = fibers.size(); t < threads; t++) {
        fibers.emplace_back();
        Fiber &fiber = fibers.back();
        fiber.begun = false;
        fiber.stack.resize(1 << 17);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, run_threads, 0);
    }
    for (int bz = 0; bz < z; bz++)
        for (int by = 0; by < y; by++)
            for (int bx = 0; bx < x; bx++) {
                blockIdx = {bx, by, bz};
                memset(shared, 0xff, sizeof shared);
                warps.assign((threads + 31) / 32, Warp());
                for (Barrier &b : barriers) b.count = 0;
                for (Fiber &fiber : fibers) fiber.done = fiber.waiting = false;
                // A warp runs until a barrier holds it, as far ahead of the others as it can; each round from the other end.
                for (int alive = threads, round = 0; alive; round++)
                    for (int i = 0; i < (int)warps.size(); i++) {
                        int first = (round % 2 ? (int)warps.size() - 1 - i : i) * 32, last = min(first + 32, threads);
                        for (bool runs = true; runs;) {
                            runs = false;
                            for (int t = first; t < last; t++)
                                if (!fibers[t].done) {
                                    resume(t);
                                    alive -= fibers[t].done;
                                    runs |= !fibers[t].done && !fibers[t].waiting;
                                }
                        }
                    }
            }
}
