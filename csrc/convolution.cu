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
// With a state: where the input lies that a direction visited so many steps before the first one.
template <typename T> DEV T *earlier(T *rows, const Args &p, int dir, int b, int channel, int steps) {
    return rows + (((size_t)dir * p.B + b) * HALO + HALO - steps) * CHANNELS + channel;
}
// Which direction came by a place outside of the sequence, and how many steps before its first. Unless there is an order,
// both go along in one walk, the second from its other end.
DEV int direction_outside(int dir, int place) { return ORDERED ? dir : place >= 0; }
DEV int steps_outside(const Args &p, int place) { return place < 0 ? -place : place - p.L + 1; }
// The input at a place of a walk of direction `dir`, of which the one inside of the sequence lies at `inside`.
DEV few_t load_input(const Args &p, const io_t *inside, int dir, int b, int channel, int place) {
    if (place >= 0 && place < p.L) return load_few(inside, true);
    const int steps = steps_outside(p, place);
    const bool exists = STATEFUL && steps <= HALO && !(ORDERED && place >= 0);
    return load_few(exists ? earlier(p.before, p, direction_outside(dir, place), b, channel, steps) : inside, exists);
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
#if STATEFUL
        const io_t *at = ORDERED ? x + (long long)token * 2 * CHANNELS : x_now + i * 2 * CHANNELS;
        return load_input(p, at, dir, b, channel, start + done + i);
#else
        return load_few(ORDERED ? x + (long long)token * 2 * CHANNELS : x_now + i * 2 * CHANNELS, exists);
#endif
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
#if STATEFUL
    if (p.after && start + RUN >= p.L)  // the last run
#pragma unroll
        for (int d = 0; d < WALKED; d++)
            for (int back = 1; back <= HALO; back++) {
                const int step = p.L - back, place = ORDERED || !d ? step : back - 1;
                const io_t *at = x + (long long)(step < 0 ? 0 : token_at(p, dir, place)) * 2 * CHANNELS;
                *(few_t *)earlier(p.after, p, dir + d, b, channel, back) = load_input(p, at, dir, b, channel, place);
            }
#endif
}
#endif

#if defined(CONV_BACKWARD_KERNEL) || defined(PROJ_CONV_BACKWARD_KERNEL)
// What a walk of the backward pass has in registers, round robin: of both windows, the newest is an input; for
// direction 0 the gradient there, for direction 1 that at the oldest. And its sums, the gradients of taps and bias.
struct Gradients {
    float window[K][CV], dy[WALKED][K][CV], d_weight[WALKED][K + 1][CV];

    __device__ __forceinline__ Gradients() {
#pragma unroll
        for (int c = 0; c < CV; c++)
#pragma unroll
            for (int k = 0; k <= K; k++)
#pragma unroll
                for (int d = 0; d < WALKED; d++) {
                    d_weight[d][k][c] = 0.f;
                    if (k < K) dy[d][k][c] = window[k][c] = 0.f;
                }
    }
    // The next input is in window[j]; du are the gradients of what the SiLU gave. Counted are those of this run: those
    // of neighbouring runs are counted there.
    __device__ __forceinline__ void add(const Taps &taps, int j, const float du[WALKED][CV], bool first, bool second) {
#pragma unroll
        for (int d = 0; d < WALKED; d++)
#pragma unroll
            for (int c = 0; c < CV; c++) {
                float y = taps.sum(d, c, window, j), gate = sigmoid(y);
                dy[d][j][c] = du[d][c] * gate * fmaf(y, 1.f - gate, 1.f);
                float counted = (d ? second : first) ? dy[d][j][c] : 0.f;
#pragma unroll
                for (int k = 0; k < K; k++)
                    d_weight[d][k][c] = fmaf(counted, window[taps.slot(d, j, k)][c], d_weight[d][k][c]);
                d_weight[d][K][c] += counted;
            }
    }
    // Adds the gradient of the oldest input: of direction 0 from the outputs it and the K - 1 after it went into, of
    // direction 1 from those it and the K - 1 before it went into.
    __device__ __forceinline__ void of_input(float dx[CV], const Taps &taps, int j) const {
#pragma unroll
        for (int c = 0; c < CV; c++)
#pragma unroll
            for (int k = 0; k < K; k++)
#pragma unroll
                for (int d = 0; d < WALKED; d++)
                    dx[c] = fmaf(taps.weight[d][HALO - k][c], dy[d][taps.slot(d, j, k)][c], dx[c]);
    }
    __device__ __forceinline__ void store(const Args &p, int dir, int channel) const {
#pragma unroll
        for (int d = 0; d < WALKED; d++) {
            const size_t part = (size_t)blockIdx.z * gridDim.y + blockIdx.y;
            float *to = p.dvec + (part * 2 + dir + d) * (K + 1) * CHANNELS + channel;
#pragma unroll
            for (int k = 0; k <= K; k++)
#pragma unroll
                for (int c = 0; c < CV; c++) to[k * CHANNELS + c] = d_weight[d][k][c];
        }
    }
};
#endif

#ifdef CONV_BACKWARD_KERNEL
// Adds the gradients of both directions at each token. p.mode 1: direction 0 alone; 2: direction 1 along p.order, on
// top of what direction 0 left.
extern "C" __global__ void __launch_bounds__(CONV_THREADS, IO ? 10 : 7) conv_backward(const Args p) {
    const int channel = (blockIdx.x * CONV_THREADS + threadIdx.x) * CV, b = blockIdx.z;
    const int dir = ORDERED && p.mode == 2, start = blockIdx.y * RUN;
    if (channel >= CHANNELS) return;
    const Taps taps(p, dir, channel);
    Gradients found;
    const long long row = (long long)b * p.L + start - HALO;
    const io_t *x_now = p.xz + row * 2 * CHANNELS + channel;
    const io_t *du_now = p.du + ((long long)dir * p.B * p.L + row) * CHANNELS + channel;
    io_t *dx_now = p.out + row * 2 * CHANNELS + channel;
    const long long other = (long long)p.B * p.L * CHANNELS - HALO * CHANNELS;  // from one direction's gradient on
    few_t ahead[K], du_ahead[WALKED][K];  // the next K inputs and gradients are under way while these are used
    // From the place `start` + `done` on: the outputs that this run's inputs go into, and this run's own.
    int done = -HALO, outputs = min(p.L - start, RUN + HALO) + HALO, own = min(p.L - start, RUN) + HALO;
    // With a state, the first run also has the inputs before the sequence, and the last those after it.
    const int first = STATEFUL && start == 0 ? 0 : HALO, more = STATEFUL && !ORDERED && start + RUN >= p.L ? HALO : 0;
    // How far a token lies from where the pointers are, in tokens.
    auto away = [&](int i) { return ORDERED ? token_at(p, dir, start + done + i) - start - done : i; };
    auto load = [&](int i) {
        const int j = i % K, token = away(i);
        const io_t *at = x_now + (long long)token * 2 * CHANNELS;
        ahead[j] = STATEFUL ? load_input(p, at, dir, b, channel, start + done + i)
                            : load_few(at, outputs > i && (i >= K || start + done + i >= 0));
#pragma unroll
        for (int d = 0; d < WALKED; d++) {
            bool exists = (d ? own > i - HALO && start + done + i >= HALO : outputs > i) && (i >= K || done + i >= 0);
            du_ahead[d][j] = load_few(du_now + d * other + (long long)token * CHANNELS, exists);
        }
    };
#pragma unroll
    for (int j = 0; j < K; j++) load(j);
#pragma unroll 1
    for (; own > -HALO - more; done += K, outputs -= K, own -= K) {
#pragma unroll
        for (int j = 0; j < K; j++) {
            float du[WALKED][CV];
            unpack(found.window[j], ahead[j]);
#pragma unroll
            for (int d = 0; d < WALKED; d++) unpack(du[d], du_ahead[d][j]);
            load(K + j);
            found.add(taps, j, du, own > j, done >= HALO - j);
            if (done < first - j || own <= j - HALO - more) continue;
            float dx[CV];
            io_t *to = dx_now + (long long)away(j - HALO) * 2 * CHANNELS;
            const int place = start + done + j - HALO;
            const bool outside = STATEFUL && (place < 0 || place >= p.L);
            if (outside) to = earlier(p.after, p, direction_outside(dir, place), b, channel, steps_outside(p, place));
            unpack(dx, load_few(to, ORDERED && p.mode == 2 && !outside));
            found.of_input(dx, taps, j);
            store_few(to, dx);
        }
        x_now += K * 2 * CHANNELS, du_now += K * CHANNELS, dx_now += K * 2 * CHANNELS;
    }
    found.store(p, dir, channel);
}
#endif

#ifdef PROJ_CONV_BACKWARD_KERNEL
// The same for 16-bit activations in aligned rows, both directions in one walk. `du` is here the gradient from the
// scan alone; what comes back through the projection, dproj x_proj_weight, is worked out on the way. That is a
// tensor-core product of 16 channels (rows) and 8 tokens (columns): the weight is the left factor, which stays in
// registers, dproj the right one. Lane (g, q) = (lane / 4, lane % 4) gets the sums of rows g and g + 8 at the columns
// 2q and 2q + 1. These are called channels 2g and 2g + 1 and two neighbouring tokens of the q-th of four runs, so that
// each lane walks along a run of its own and has in registers what it needs. Inputs come through shared memory, K
// places of each run a stage, a few stages ahead.
#define RUNS 4
#define BLOCK_CHANNELS (CONV_BACKWARD_THREADS / 32 * 16)
#define STAGES 4
#define CONV_BACKWARD_BLOCKS 3  // on a multiprocessor: caps registers
#define WORDS ((PROJ + 7) / 8)  // of two values, that a lane takes of a row of dproj
// Values from row to row and from run to run: lanes that read at the same time meet no bank twice.
#define PROJ_ROW ((4 * WORDS + 15) / 32 * 64 + 32)
#define PROJ_RUN (K * PROJ_ROW + 16)
#define CHANNELS_RUN (K * BLOCK_CHANNELS + 16)
#define STAGE (RUNS * (3 * CHANNELS_RUN + 2 * PROJ_RUN))  // x, du of both directions, dproj of both
static_assert(IO && VEC && !ORDERED && PROJ % 2 == 0 && RUNS * K == 16, "otherwise `conv_backward`");
#define CONV_BACKWARD_SHARED (STAGES * STAGE * (int)sizeof(io_t))

// Of a row of dproj, where the i-th word of lane q lies: it reads four, two or one at once. The sums do not mind the
// order of their terms, if the weight has the same.
DEV constexpr int together(int i) { return i < WORDS / 4 * 4 ? 4 : i < WORDS / 2 * 2 ? 2 : 1; }
DEV constexpr int word_of(int i, int q) { return (i / together(i) * 4 + q) * together(i) + i % together(i); }

// What a thread copies of each stage: of one row, 16 bytes of channels, and some of dproj.
struct Copies {
    static const int LANES = BLOCK_CHANNELS / 8, PIECE = PROJ % 8 == 0 ? 8 : PROJ % 4 == 0 ? 4 : 2;
    const io_t *x, *du, *dproj;
    int start, place, last;  // of the run; of the newest input in the next stage; of direction 1's gradients
    int channel;
    int to, to_dproj;
    bool exists;

    __device__ __forceinline__ Copies(const Args &p, int begin) {
        const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, run = row / K, token = row % K;
        channel = blockIdx.x * BLOCK_CHANNELS + lane * 8;
        start = begin + run * p.chunk, place = start - HALO + token, last = min(start + p.chunk, p.L) + HALO;
        const long long at = (long long)blockIdx.z * p.L + place;
        x = p.xz + at * 2 * CHANNELS + channel, du = p.du + at * CHANNELS + channel;
        dproj = p.dproj + at * PROJ + lane * PIECE;
        to = run * CHANNELS_RUN + token * BLOCK_CHANNELS + lane * 8;
        to_dproj = RUNS * 3 * CHANNELS_RUN + run * PROJ_RUN + token * PROJ_ROW + lane * PIECE;
        exists = channel < CHANNELS;
    }
    // Into a stage. Direction 1's gradients are at the oldest input. Those that only neighbouring runs need stay away.
    __device__ __forceinline__ void next(const Args &p, io_t *stage) {
        if (STATEFUL && !(place >= 0 && place < p.L)) {
            const int steps = steps_outside(p, place);
            const bool some = exists && steps <= HALO;
            const io_t *at = earlier(p.before, p, direction_outside(0, place), blockIdx.z, channel, steps);
            copy_async<16>(stage + to, some ? at : p.before, some);
        } else copy_async<16>(stage + to, x, exists && place >= 0 && place < p.L);
        const long long tokens = (long long)p.B * p.L - HALO;
#pragma unroll
        for (int d = 0; d < 2; d++) {
            const bool some = d ? place >= max(start, HALO) && place < last : place >= start && place < p.L;
            copy_async<16>(stage + (1 + d) * RUNS * CHANNELS_RUN + to, du + d * tokens * CHANNELS, exists && some);
#pragma unroll
            for (int i = 0; i < WORDS * 8; i += LANES * PIECE)
                if (i + threadIdx.x % LANES * PIECE < WORDS * 8)  // zeros where the words outnumber the row
                    copy_async<2 * PIECE>(stage + d * RUNS * PROJ_RUN + to_dproj + i, dproj + d * tokens * PROJ + i,
                                          some && i + threadIdx.x % LANES * PIECE < PROJ);
        }
        place += K, x += K * 2 * CHANNELS, du += K * CHANNELS, dproj += K * PROJ;
    }
};

// Of x_proj_weight, a warp's 16 channels as left factors.
struct Projection {
    u32 words[2][2 * WORDS];

    __device__ __forceinline__ Projection(const Args &p, int q, int channel) {
#pragma unroll
        for (int d = 0; d < 2; d++)
#pragma unroll
            for (int i = 0; i < WORDS; i++) {
                const int n = 2 * word_of(i, q);
                const io_t *at = p.x_w + ((size_t)d * PROJ + n) * CHANNELS + channel;
#pragma unroll
                for (int c = 0; c < 2; c++)
                    words[d][2 * i + c] = n < PROJ ? (u32)at[c] | (u32)at[CHANNELS + c] << 16 : 0u;
            }
    }
    // Adds the product with eight tokens, of which the lane has a row of dproj.
    __device__ __forceinline__ void add(float sum[4], int d, const io_t *row, int q) const {
        u32 right[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i += together(i)) {
            const u32 *at = (const u32 *)row + word_of(i, q);
            if (together(i) == 4) {
                uint4 v = *(const uint4 *)at;
                right[i] = v.x, right[i + 1] = v.y, right[i + 2] = v.z, right[i + 3] = v.w;
            } else if (together(i) == 2) {
                uint2 v = *(const uint2 *)at;
                right[i] = v.x, right[i + 1] = v.y;
            } else right[i] = *at;
        }
#pragma unroll
        for (int i = 0; i < WORDS; i += 2) {
            if (i + 1 < WORDS) mma_k16(sum, words[d] + 2 * i, right[i], right[i + 1]);
            else mma_k8(sum, words[d] + 2 * i, right[i]);
        }
    }
};

extern "C" __global__ void __launch_bounds__(CONV_BACKWARD_THREADS, CONV_BACKWARD_BLOCKS)
    proj_conv_backward(const Args p) {
    extern __shared__ __align__(16) char shared[];
    io_t *stages = (io_t *)shared;
    const int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, in_block = threadIdx.x / 32 * 16 + 2 * g;
    const int begin = blockIdx.y * RUNS * p.chunk, start = begin + q * p.chunk;
    const int channel = blockIdx.x * BLOCK_CHANNELS + in_block, some_channel = min(channel, CHANNELS - 2);
    // The first run is the longest.
    const int count = (min(p.chunk, p.L - begin) + (STATEFUL ? 3 : 2) * HALO + K - 1) / K;
    Copies copies(p, begin);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < count) copies.next(p, stages + i * STAGE);
        copy_commit();
    }
    const Taps taps(p, 0, some_channel);
    const Projection projection(p, q, some_channel);
    Gradients found;
    // From the place `start` + `done` on, this run's own.
    int done = -HALO, own = (channel < CHANNELS ? min(p.L - start, p.chunk) : 0) + HALO;
    // As in `conv_backward`: from where on, and how many more.
    const bool exists = STATEFUL && channel < CHANNELS && start < p.L;
    const int first = exists && start == 0 ? 0 : HALO, more = exists && start + p.chunk >= p.L ? HALO : 0;
    io_t *dx_now = p.out + ((long long)blockIdx.z * p.L + start - 2 * HALO) * 2 * CHANNELS + channel;
    const int mine = q * CHANNELS_RUN + in_block;
    const int column = RUNS * 3 * CHANNELS_RUN + (g >> 1) * PROJ_RUN + (g & 1) * PROJ_ROW;
#pragma unroll 1
    for (int i = 0; i < count; i++, done += K, own -= K) {
        copy_wait<STAGES - 2>();
        barrier(1, CONV_BACKWARD_THREADS);  // the stage is complete, and the one before it read
        if (i + STAGES - 1 < count) copies.next(p, stages + (i + STAGES - 1) % STAGES * STAGE);
        copy_commit();
        const io_t *stage = stages + i % STAGES * STAGE, *x = stage + mine, *dproj = stage + column;
#pragma unroll
        for (int pair = 0; pair < K; pair += 2) {
            float sum[2][4];  // of two channels, each at two tokens
#pragma unroll
            for (int d = 0; d < 2; d++) {
                const io_t *du = x + (1 + d) * RUNS * CHANNELS_RUN + pair * BLOCK_CHANNELS;
                float2 now = load2(du), next = load2(du + BLOCK_CHANNELS);
                sum[d][0] = now.x, sum[d][1] = next.x, sum[d][2] = now.y, sum[d][3] = next.y;
                projection.add(sum[d], d, dproj + d * RUNS * PROJ_RUN + pair * PROJ_ROW, q);
            }
#pragma unroll
            for (int e = 0; e < 2; e++, dx_now += 2 * CHANNELS) {
                const int j = pair + e;
                const float du[2][CV] = {{sum[0][e], sum[0][2 + e]}, {sum[1][e], sum[1][2 + e]}};
                unpack(found.window[j], *(const few_t *)(x + j * BLOCK_CHANNELS));
                found.add(taps, j, du, own > j, done >= HALO - j);
                float dx[CV] = {};
                found.of_input(dx, taps, j);
#if STATEFUL
                const int place = start + done + j - HALO;
                io_t *to = dx_now;
                if (place < 0 || place >= p.L) {
                    const int steps = steps_outside(p, place);
                    to = earlier(p.after, p, direction_outside(0, place), blockIdx.z, channel, steps);
                }
                if (done >= first - j && own > j - HALO - more) store_few(to, dx);
#else
                if (done >= HALO - j && own > j - HALO) store_few(dx_now, dx);
#endif
            }
        }
    }
    // The sums of the four runs.
#pragma unroll
    for (int d = 0; d < 2; d++)
#pragma unroll
        for (int k = 0; k <= K; k++)
#pragma unroll
            for (int c = 0; c < CV; c++)
#pragma unroll
                for (int mask = 1; mask < RUNS; mask *= 2)
                    found.d_weight[d][k][c] += exchange(found.d_weight[d][k][c], mask);
    if (q == 0 && channel < CHANNELS) found.store(p, 0, channel);
}
#endif
