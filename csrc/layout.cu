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
    const int LINE = LAYOUT_SIDE + 1, STEP = LAYOUT_THREADS / LAYOUT_SIDE;
    const int channel = blockIdx.y * LAYOUT_SIDE, token = blockIdx.x * LAYOUT_SIDE;
    // A thread goes down one column of the tile, the lanes of a warp lie side by side in memory.
    const int fast = threadIdx.x % LAYOUT_SIDE, slow = threadIdx.x / LAYOUT_SIDE;
    const bool along_tokens = p.to.token <= p.to.channel;
    // What lies the other way round is read first, along its own lines, and turned in shared memory.
    bool turned = false;
#pragma unroll
    for (int last = 0; last < 2; last++) {
        const bool by_token = along_tokens == (last == 1);
        // So many of the thread's elements exist.
        const int left = by_token ? p.channels - channel : p.tokens - token;
        const bool some = fast < (by_token ? p.tokens - token : p.channels - channel);
        const int count = some ? min(PER_THREAD, (left - slow + STEP - 1) / STEP) : 0;
        auto first = [&](const Strided &t) {
            const io_t *corner = t.at + blockIdx.z * t.batch + channel * t.channel + token * t.token;
            return corner + fast * (by_token ? t.token : t.channel) + slow * (by_token ? t.channel : t.token);
        };
        auto step = [&](const Strided &t) { return STEP * (by_token ? t.channel : t.token); };
        bool read_some = false;
        float v[PER_THREAD];
#pragma unroll
        for (int i = 0; i < PER_THREAD; i++) v[i] = 1.f;
        auto multiply = [&](const Strided &t, int of_z) {
            if (!t.at || (t.token <= t.channel) != by_token) return;
            const io_t *at = first(t);
            const long long next = step(t);
            io_t read[PER_THREAD];
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++, at += next) read[i] = i < count ? *at : (io_t)0;
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) {
                const float x = value(read[i]), gate = of_z ? sigmoid(x) : 0.f;
                v[i] *= of_z == SILU ? x * gate : of_z == SILU_SLOPE ? gate * fmaf(x, 1.f - gate, 1.f) : x;
            }
            read_some = true;
        };
        multiply(p.x, 0);
        multiply(p.z, p.of_z);
        multiply(p.grad, 0);
        float *place = tile + (by_token ? slow * LINE + fast : fast * LINE + slow);
        const int down = STEP * (by_token ? LINE : 1);
        if (!last) {
            if (!read_some) continue;
            turned = true;
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++) place[i * down] = v[i];
            barrier(0, LAYOUT_THREADS);
        } else {
            io_t *to = (io_t *)first(p.to);
            const long long next = step(p.to);
#pragma unroll
            for (int i = 0; i < PER_THREAD; i++, to += next)
                if (i < count) *to = stored(turned ? v[i] * place[i * down] : v[i]);
        }
    }
}
