// A product of up to three tensors (B, channels, tokens) of any strides, written with any strides: between other codes'
// layout, channels before tokens, and ours.
#include "primitives.cuh"

#define LAYOUT_THREADS 256
#define LAYOUT_SIDE 64  // tokens and channels of a tile
#define PER_THREAD (LAYOUT_SIDE * LAYOUT_SIDE / LAYOUT_THREADS)

// What becomes of the second tensor, z, before it is multiplied.
#define SILU 1
#define SILU_SLOPE 2

// `LayoutArguments` in selective_scan_interface.py; a test compares the two. A tensor and its strides; it may be null.
struct Strided {
    const io_t *at;
    long long batch, channel, token;
};
struct LayoutArgs {
    Strided to, x, z, grad;
    int channels, tokens, of_z;
};

extern "C" __global__ void __launch_bounds__(LAYOUT_THREADS) layout(const LayoutArgs p) {
    extern __shared__ __align__(16) char shared[];
    float *tile = (float *)shared;  // [channel][token], a line a value longer, so that columns meet all banks
    const int first_channel = blockIdx.y * LAYOUT_SIDE, first_token = blockIdx.x * LAYOUT_SIDE;
    const bool along_tokens = p.to.token <= p.to.channel;
    // What lies the other way round is read first, along its own lines, and turned in shared memory.
    bool turned = false;
#pragma unroll
    for (int last = 0; last < 2; last++) {
        const bool by_token = along_tokens == (last == 1);
        bool some = last;
        float v[PER_THREAD];
        auto element = [&](int i, int &channel, int &token) {
            const int at = threadIdx.x + i * LAYOUT_THREADS, fast = at % LAYOUT_SIDE, slow = at / LAYOUT_SIDE;
            channel = by_token ? slow : fast, token = by_token ? fast : slow;
            return first_channel + channel < p.channels && first_token + token < p.tokens;
        };
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) v[i] = 1.f;
        auto multiply = [&](const Strided &from, int of_z) {
            if (!from.at || (from.token <= from.channel) != by_token) return;
            const io_t *start = from.at + blockIdx.z * from.batch;
            start += first_channel * from.channel + first_token * from.token;
            io_t read[PER_THREAD];
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
                int channel, token;
                const bool exists = element(i, channel, token);
                read[i] = exists ? start[channel * from.channel + token * from.token] : (io_t)0;
            }
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
                const float x = value(read[i]);
                const float gate = of_z ? sigmoid(x) : 0.f;
                v[i] *= of_z == SILU ? x * gate : of_z == SILU_SLOPE ? gate * fmaf(x, 1.f - gate, 1.f) : x;
            }
            some = true;
        };
        multiply(p.x, 0);
        multiply(p.z, p.of_z);
        multiply(p.grad, 0);
        if (!last && !some) continue;
        if (last && turned) barrier(0, LAYOUT_THREADS);
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) {
            int channel, token;
            const bool exists = element(i, channel, token);
            float &place = tile[channel * (LAYOUT_SIDE + 1) + token];
            if (!last) place = v[i];
            else if (exists) {
                io_t *to = (io_t *)p.to.at + blockIdx.z * p.to.batch + (first_channel + channel) * p.to.channel +
                           (first_token + token) * p.to.token;
                *to = stored(turned ? v[i] * place : v[i]);
            }
        }
        turned = true;
    }
}
