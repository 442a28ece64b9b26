// Depthwise causal convolution and SiLU. A thread walks over RUN places for CV channels. Unless there is an order,
// both directions go along in one walk, since they look at the same K tokens: with the newest of these the forward
// direction ends its window, with the oldest the backward one.
#include "primitives.cuh"

#define HALO (K - 1)
#define WALKED (ORDERED ? 1 : 2)  // directions in one walk
#define CV (VEC ? CONV_CHANNELS : 1)
#if !VEC
typedef io_t few_t;
#elif IO == 0
typedef float2 few_t;
#else
typedef u32 few_t;
#endif

DEV void unpack(float to[CV], few_t v) {
#if !VEC
    to[0] = value(v);
#else
    float2 two = load2((const io_t *)&v);
    to[0] = two.x, to[CV - 1] = two.y;
#endif
}
DEV few_t load_few(const io_t *from, bool exists) {
    few_t none = {};
    return exists ? *(const few_t *)from : none;
}
DEV void store_few(io_t *to, const float from[CV]) {
    if (CV == 2) store2(to, from[0], from[CV - 1]);
    else to[0] = stored(from[0]);
}
// The token that direction `dir` meets at a place, if it exists.
DEV int token_at(const Args &p, int dir, int place) {
    // Looked up: all threads of a block want the same, and to work it out takes as long as the convolution.
    return ORDERED && dir && place >= 0 && place < p.L ? (int)p.order[place] : place;
}
struct Taps {
    float weight[WALKED][K][CV], bias[WALKED][CV];

    __device__ __forceinline__ Taps(const Args &p, int dir, int channel, float scale = 1.f) {
#pragma unroll
        for (int d = 0; d < WALKED; d++)
#pragma unroll
            for (int c = 0; c < CV; c++) {
                size_t at = (size_t)(dir + d) * CHANNELS + channel + c;
                bias[d][c] = scale * parameter(p.conv_b, at);
#pragma unroll
                for (int k = 0; k < K; k++) weight[d][k][c] = scale * parameter(p.conv_w, at * K + k);
            }
    }
    // Of a window whose newest token lies at `newest`, round robin: of direction d the K tokens from its first on.
    static __device__ __forceinline__ int slot(int d, int newest, int k) {
        return (d ? newest - k + K : newest + 1 + k) % K;
    }
    __device__ __forceinline__ float sum(int d, int c, const float window[K][CV], int newest) const {
        float y = bias[d][c];
#pragma unroll
        for (int k = 0; k < K; k++) y = fmaf(weight[d][k][c], window[slot(d, newest, k)][c], y);
        return y;
    }
};

#ifdef CONV_KERNEL
#define SCALE (EXACT ? 1.f : LOG2E)  // of the taps: spares the exponential of the SiLU a product
DEV float silu_of_scaled(float y) {
#if EXACT
    return y * sigmoid(y);
#else
    return y * rcp(fmaf(LOG2E, ex2(-y), LOG2E));
#endif
}
extern "C" __global__ void __launch_bounds__(CONV_THREADS, !IO ? 12 : ORDERED ? 16 : 20) conv(const Args p) {
    const int groups = (CHANNELS + CV - 1) / CV, at = blockIdx.x * CONV_THREADS + threadIdx.x;
    const int dir = at / groups, channel = at % groups * CV, b = blockIdx.z, start = blockIdx.y * RUN;
    if (dir >= 2 / WALKED) return;
    const Taps taps(p, dir, channel, SCALE);
    float window[K][CV];
    few_t ahead[K];  // the next K inputs are under way while these are used
    const io_t *x = p.xz + (size_t)b * p.L * 2 * CHANNELS + channel, *x_now = x + (long long)start * 2 * CHANNELS;
    io_t *u = (io_t *)p.u + ((size_t)dir * p.B + b) * p.L * CHANNELS + channel;
    io_t *u_now = u + (long long)start * CHANNELS;
    // From one direction's output on to the other's in the same step.
    const long long other = (long long)p.B * p.L * CHANNELS - HALO * CHANNELS;
    // Pointers advance and the places left are counted down, so that nothing is left to work out at a step.
    int done = 0, inputs = p.L - start, outputs = min(inputs, RUN);
    // Along an order, tokens are looked up well before they are wanted: those of the inputs that are under way, and the
    // next.
    int token_ahead[K], token_after[K];
    auto load = [&](int i, int token, bool exists) {
        return load_few(ORDERED ? x + (long long)token * 2 * CHANNELS : x_now + i * 2 * CHANNELS, exists);
    };
#pragma unroll
    for (int k = 0; k < HALO; k++)
        unpack(window[k], load(k - HALO, token_at(p, dir, start + k - HALO), start + k - HALO >= 0));
#pragma unroll
    for (int j = 0; j < K; j++) {
        token_ahead[j] = token_at(p, dir, start + j), token_after[j] = token_at(p, dir, start + K + j);
        ahead[j] = load(j, token_ahead[j], inputs > j);
    }
#pragma unroll 1
    for (; outputs > -HALO * (WALKED - 1); done += K, inputs -= K, outputs -= K) {
#pragma unroll
        for (int j = 0; j < K; j++) {
            const int newest = (j + HALO) % K;
            unpack(window[newest], ahead[j]);
            ahead[j] = load(K + j, token_after[j], inputs > K + j);
            const int token = token_ahead[j];
            token_ahead[j] = token_after[j];
            token_after[j] = token_at(p, dir, start + done + 2 * K + j);
#pragma unroll
            for (int d = 0; d < WALKED; d++) {
                float y[CV];
#pragma unroll
                for (int c = 0; c < CV; c++) y[c] = silu_of_scaled(taps.sum(d, c, window, newest));
                if (outputs <= j - d * HALO || done < d * HALO - j) continue;
                if (ORDERED) store_few(u + (long long)token * CHANNELS, y);
                else store_few(u_now + d * other + j * CHANNELS, y);
            }
        }
        x_now += K * 2 * CHANNELS, u_now += K * CHANNELS;
    }
}
#endif

#ifdef CONV_BACKWARD_KERNEL
// Adds the gradients of both directions at each token. p.mode 1: direction 0 alone; 2: direction 1 along p.order, on
// top of what direction 0 left.
extern "C" __global__ void __launch_bounds__(CONV_THREADS, IO ? 10 : 7) conv_backward(const Args p) {
    const int channel = (blockIdx.x * CONV_THREADS + threadIdx.x) * CV, b = blockIdx.z;
    const int dir = ORDERED && p.mode == 2, start = blockIdx.y * RUN;
    if (channel >= CHANNELS) return;
    const Taps taps(p, dir, channel);
    // Of both windows, the newest: an input; for direction 0 the gradient there, for direction 1 that at the oldest.
    float window[K][CV], dy[WALKED][K][CV], d_weight[WALKED][K + 1][CV];
#pragma unroll
    for (int c = 0; c < CV; c++)
#pragma unroll
        for (int k = 0; k <= K; k++)
#pragma unroll
            for (int d = 0; d < WALKED; d++) {
                d_weight[d][k][c] = 0.f;
                if (k < K) dy[d][k][c] = window[k][c] = 0.f;
            }
    const long long row = (long long)b * p.L + start - HALO;
    const io_t *x_now = p.xz + row * 2 * CHANNELS + channel;
    const io_t *du_now = p.du + ((long long)dir * p.B * p.L + row) * CHANNELS + channel;
    io_t *dx_now = p.out + row * 2 * CHANNELS + channel;
    const long long other = (long long)p.B * p.L * CHANNELS - HALO * CHANNELS;  // from one direction's gradient on
    few_t ahead[K], du_ahead[WALKED][K];  // the next K inputs and gradients are under way while these are used
    // From the place `start` + `done` on: the outputs that this run's inputs go into, and this run's own.
    int done = -HALO, outputs = min(p.L - start, RUN + HALO) + HALO, own = min(p.L - start, RUN) + HALO;
    // How far a token lies from where the pointers are, in tokens.
    auto away = [&](int i) { return ORDERED ? token_at(p, dir, start + done + i) - start - done : i; };
    auto load = [&](int i) {
        const int j = i % K, token = away(i);
        ahead[j] = load_few(x_now + (long long)token * 2 * CHANNELS, outputs > i && (i >= K || start + done + i >= 0));
#pragma unroll
        for (int d = 0; d < WALKED; d++) {
            bool exists = (d ? own > i - HALO && start + done + i >= HALO : outputs > i) && (i >= K || done + i >= 0);
            du_ahead[d][j] = load_few(du_now + d * other + (long long)token * CHANNELS, exists);
        }
    };
#pragma unroll
    for (int j = 0; j < K; j++) load(j);
#pragma unroll 1
    for (; own > -HALO; done += K, outputs -= K, own -= K) {
#pragma unroll
        for (int j = 0; j < K; j++) {
            float du[WALKED][CV];
            unpack(window[j], ahead[j]);
#pragma unroll
            for (int d = 0; d < WALKED; d++) unpack(du[d], du_ahead[d][j]);
            load(K + j);
#pragma unroll
            for (int d = 0; d < WALKED; d++)
#pragma unroll
                for (int c = 0; c < CV; c++) {
                    float y = taps.sum(d, c, window, j), gate = sigmoid(y);
                    dy[d][j][c] = du[d][c] * gate * fmaf(y, 1.f - gate, 1.f);
                    // Those of neighbouring runs are counted there.
                    float counted = (d ? done >= HALO - j : own > j) ? dy[d][j][c] : 0.f;
#pragma unroll
                    for (int k = 0; k < K; k++)
                        d_weight[d][k][c] = fmaf(counted, window[taps.slot(d, j, k)][c], d_weight[d][k][c]);
                    d_weight[d][K][c] += counted;
                }
            // The gradient of the oldest input: of direction 0 from the outputs it and the K - 1 after it went into,
            // of direction 1 from those it and the K - 1 before it went into.
            if (done < HALO - j || own <= j - HALO) continue;
            float dx[CV];
            io_t *to = dx_now + (long long)away(j - HALO) * 2 * CHANNELS;
            unpack(dx, load_few(to, ORDERED && p.mode == 2));
#pragma unroll
            for (int c = 0; c < CV; c++)
#pragma unroll
                for (int k = 0; k < K; k++)
#pragma unroll
                    for (int d = 0; d < WALKED; d++)
                        dx[c] = fmaf(taps.weight[d][HALO - k][c], dy[d][taps.slot(d, j, k)][c], dx[c]);
            store_few(to, dx);
        }
        x_now += K * 2 * CHANNELS, du_now += K * CHANNELS, dx_now += K * 2 * CHANNELS;
    }
#pragma unroll
    for (int d = 0; d < WALKED; d++) {
        float *to = p.dvec + (((size_t)b * gridDim.y + blockIdx.y) * 2 + dir + d) * (K + 1) * CHANNELS + channel;
#pragma unroll
        for (int k = 0; k <= K; k++)
#pragma unroll
            for (int c = 0; c < CV; c++) to[k * CHANNELS + c] = d_weight[d][k][c];
    }
}
#endif
