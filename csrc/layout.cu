// A product of up to three tensors (B, channels, tokens) of any strides, written with any strides: between other codes'
// layout, channels before tokens, and ours.
#include "primitives.cuh"

// Options: what becomes of the second tensor, z, before it is multiplied, 0 if there is none; whether there is a third.
#ifndef OF_Z
#define OF_Z 0
#endif
#define SILU 1
#define SILU_SLOPE 2
#ifndef GRAD
#define GRAD 0
#endif
#ifndef BY_TOKENS
#define BY_TOKENS 0  // in what is written, tokens lie closest together in memory
#endif
#ifndef TURNED
#define TURNED X_TURNED  // the tensors in which it is the other way round
#endif
#define X_TURNED 1
#define Z_TURNED 2
#define GRAD_TURNED 4
#ifndef PAIRED
#define PAIRED 1  // channels are even, and two that lie side by side in memory can be accessed at once
#endif

#define LAYOUT_THREADS 256
#define LAYOUT_SIDE 64  // tokens and channels of a tile
#define LINE (LAYOUT_SIDE + 1)
#define PER_THREAD (LAYOUT_SIDE * LAYOUT_SIDE / 2 / LAYOUT_THREADS)

// `LayoutArguments` in selective_scan_interface.py; a test compares the two. A tensor and its strides.
struct Strided {
    const io_t *at;
    long long batch, channel, token;
};
struct LayoutArgs {
    Strided to, x, z, grad;
    int channels, tokens;
};

DEV float of_z(float z) {
    const float gate = sigmoid(z);
    return OF_Z == SILU ? z * gate : gate * fmaf(z, 1.f - gate, 1.f);
}

// The elements of a thread, pairs of channels: down a column of the tile, so that the lanes of a warp lie side by side,
// BY_TOKEN along the tokens, or along the channels.
template <bool BY_TOKEN> struct Column {
    static const int SIDE = BY_TOKEN ? LAYOUT_SIDE : LAYOUT_SIDE / 2, STEP = LAYOUT_THREADS / SIDE;
    static const int DOWN = BY_TOKEN ? STEP * LINE : STEP;  // in the tile, [pair][token]
    int channel, token, count;                              // of them, so many exist
    float2 *place;

    __device__ __forceinline__ Column(const LayoutArgs &p, float2 *tile) {
        const int fast = threadIdx.x % SIDE, slow = threadIdx.x / SIDE;
        const int pair = BY_TOKEN ? slow : fast, row = BY_TOKEN ? fast : slow;
        channel = blockIdx.y * LAYOUT_SIDE + 2 * pair, token = blockIdx.x * LAYOUT_SIDE + row;
        const int left = BY_TOKEN ? (p.channels - channel + 1) / 2 : p.tokens - token;
        const bool some = BY_TOKEN ? token < p.tokens : channel < p.channels;
        count = some ? min(PER_THREAD, (left + STEP - 1) / STEP) : 0;
        place = tile + pair * LINE + row;
    }
    __device__ __forceinline__ io_t *first(const Strided &t) const {
        return (io_t *)t.at + blockIdx.z * t.batch + channel * t.channel + token * t.token;
    }
    static __device__ __forceinline__ long long next(const Strided &t) {
        return BY_TOKEN ? 2 * STEP * t.channel : STEP * t.token;
    }
    __device__ __forceinline__ bool has_second(const LayoutArgs &p, int i) const {
        return PAIRED || channel + (BY_TOKEN ? 2 * STEP * i : 0) + 1 < p.channels;
    }
    template <bool Z>
    __device__ __forceinline__ void multiply(float2 *v, const LayoutArgs &p, const Strided &t) const {
        const io_t *at = first(t);
        const long long step = next(t);
        float2 read[PER_THREAD];
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++, at += step) {
            read[i] = make_float2(0.f, 0.f);
            if (i >= count) continue;
            if (PAIRED && !BY_TOKEN) read[i] = load2(at);
            else {
                read[i].x = value(*at);
                if (has_second(p, i)) read[i].y = value(at[t.channel]);
            }
        }
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++)
            v[i].x *= Z ? of_z(read[i].x) : read[i].x, v[i].y *= Z ? of_z(read[i].y) : read[i].y;
    }
    // Multiplies v by the tensors that lie this way.
    __device__ __forceinline__ void multiply_all(float2 *v, const LayoutArgs &p) const {
        const int here = BY_TOKEN == BY_TOKENS ? ~TURNED : TURNED;
        if (here & X_TURNED) multiply<false>(v, p, p.x);
        if (OF_Z && here & Z_TURNED) multiply<true>(v, p, p.z);
        if (GRAD && here & GRAD_TURNED) multiply<false>(v, p, p.grad);
    }
    __device__ __forceinline__ void store(const float2 *v, const LayoutArgs &p) const {
        io_t *to = first(p.to);
        const long long step = next(p.to);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++, to += step) {
            if (i >= count) continue;
            if (PAIRED && !BY_TOKEN) store2(to, v[i].x, v[i].y);
            else {
                to[0] = stored(v[i].x);
                if (has_second(p, i)) to[p.to.channel] = stored(v[i].y);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS) layout(const LayoutArgs p) {
    extern __shared__ __align__(16) char shared[];
    float2 *tile = (float2 *)shared, v[PER_THREAD];
#pragma unroll
    for (int i = 0; i < PER_THREAD; i++) v[i] = make_float2(1.f, 1.f);
    const Column<BY_TOKENS> own(p, tile);
    if (TURNED) {  // read along its own lines, and turned in shared memory
        const Column<!BY_TOKENS> other(p, tile);
        other.multiply_all(v, p);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) other.place[i * other.DOWN] = v[i];
        barrier(0, LAYOUT_THREADS);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) v[i] = own.place[i * own.DOWN];
    }
    own.multiply_all(v, p);
    own.store(v, p);
}
