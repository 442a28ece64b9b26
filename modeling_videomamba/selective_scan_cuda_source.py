# GENERATED from the files of csrc/ by csrc/embed.py: change those, and run it again.
SOURCES = {
    "convolution.cu": r"""// Depthwise causal convolution and SiLU. A thread walks over RUN places for CV channels. Unless there is an order,
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
""",
    "layout.cu": r"""// A product of up to three tensors (B, channels, tokens) of any strides, written with any strides: between other codes'
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
""",
    "norm.cu": r"""// RMSNorm of the float32 residual stream, out in the type of the weights: one launch instead of three. With an update,
// of that type too, it is added first, and the sum is left as well. A warp takes a row of CHANNELS values, a multiple of
// four, and keeps it in registers.
#include "primitives.cuh"

#define NORM_ROUNDS ((CHANNELS + 127) / 128)  // of four values a lane

// `NormArguments` in rms_norm_cuda.py; a test compares the two.
struct NormArgs {
    const float *x;
    const void *weight;
    io_t *out;
    const io_t *update;  // or null
    float *sum;
    long long rows;
    float eps;
};

extern "C" __global__ void rms_norm(const NormArgs p) {
    const int lane = threadIdx.x & 31;
    const long long row = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= p.rows) return;
    const float *x = p.x + row * CHANNELS;
    float v[NORM_ROUNDS][4], sum = 0.f;
#pragma unroll
    for (int i = 0; i < NORM_ROUNDS; i++) {
        const int at = i * 128 + lane * 4;
        if (CHANNELS % 128 && at >= CHANNELS) break;
        load_vector<4>(v[i], x + at);
        if (p.update) {
            float more[4];
            unpack4(more, p.update + row * CHANNELS + at);
#pragma unroll
            for (int e = 0; e < 4; e++) v[i][e] += more[e];
            store_vector<4>(p.sum + row * CHANNELS + at, v[i]);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) sum = fmaf(v[i][e], v[i][e], sum);
    }
#pragma unroll
    for (int mask = 16; mask; mask /= 2) sum += exchange(sum, mask);
    const float scale = rsqrtf(sum / CHANNELS + p.eps);
#pragma unroll
    for (int i = 0; i < NORM_ROUNDS; i++) {
        const int at = i * 128 + lane * 4;
        if (CHANNELS % 128 && at >= CHANNELS) break;
#pragma unroll
        for (int e = 0; e < 4; e++) v[i][e] *= scale * parameter(p.weight, at + e);
        store4(p.out + row * CHANNELS + at, v[i], 4);
    }
}
""",
    "primitives.cuh": r"""// What all kernels share: the options they are compiled for, their arguments, single instructions, typed loads and
// stores, the softplus and its kin.
#pragma once

// Python reads these from here.
#define TILE 16                    // tokens a warp takes at a time
#define CONV_THREADS 64            // of a block of the convolution
#define CONV_BACKWARD_THREADS 128  // of a block of its backward pass, if the projection's goes along
#define CONV_CHANNELS 2            // that a thread of the convolution takes, if rows are aligned

// Options, given as -DNAME=value. The defaults are those of VideoMamba-S in bfloat16, so that an editor or a plain
// `nvcc -arch=sm_90 -cubin -DSCAN_KERNEL scan.cu` sees a whole program.
#ifndef IO
#define IO 2  // type of activations: 0 float, 1 half, 2 bfloat16
#endif
#ifndef PT
#define PT 2  // type of parameters, likewise
#endif
#ifndef CHANNELS
#define CHANNELS 768
#endif
#ifndef N
#define N 16  // states
#endif
#ifndef R
#define R 24  // time-step rank; 0: the scan alone, see `PLAIN`
#endif
#ifndef COMMON
#define COMMON 0  // of the scan alone: both halves of the channels have the same B and C
#endif
#ifndef SOFTPLUS
#define SOFTPLUS 1  // of the scan alone: Δ is the softplus of what is given
#endif
#ifndef K
#define K 4  // taps of the convolution
#endif
#ifndef VEC
#define VEC 1  // rows of channels are aligned for 16-byte access
#endif
#ifndef BLOCKS
#define BLOCKS 1  // of 16 channels a warp
#endif
#ifndef W
#define W 1  // warps a direction
#endif
#ifndef BUFFERS
#define BUFFERS 2  // for what the warps of a direction add up: with one, they wait for each other once more
#endif
#ifndef SPLIT
#define SPLIT 0  // each of them is two, which share the channels and have half of the states
#endif
#ifndef MINBLOCKS
#define MINBLOCKS 1  // thread blocks that must fit a multiprocessor: caps registers
#endif
#ifndef ORDERED
#define ORDERED 0  // the backward direction follows an order other than the full reversal: see `visited`
#endif
#ifndef JOINED
#define JOINED 0  // the scan itself passes states between the few chunks there are
#endif
#ifndef KEEP
#define KEEP 0  // the scan keeps the state before every 8 tokens
#endif
#ifndef STATEFUL
#define STATEFUL 0  // each direction begins with a state, and leaves the one it ends with
#endif
#ifndef RUN  // places a thread of the convolution takes; with the K - 1 it walks further, a multiple of K = 4
#define RUN 61
#endif
#ifndef WIDE
#define WIDE 0  // a sequence has 4 GiB or more: 64-bit offsets
#endif
#ifndef TF32
#define TF32 0  // of float activations: the tensor cores' precision is enough
#endif

#define EXACT (IO == 0 && !TF32)
// The scan alone: Δ and A are given, and there is no gate. The halves of the channels take the places of the directions,
// and both are walked forward. CHANNELS is those of a half; a row has both.
#define PLAIN (R == 0)
#define ROW_OF_CHANNELS (PLAIN ? 2 * CHANNELS : CHANNELS)
#define DEV static __device__ __forceinline__
#define NT ((N + 7) / 8)
#define PROJ (R + 2 * N)
#define BLOCK_THREADS (W * 64 * (SPLIT + 1))
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
// The tensor cores cut off what tf32 has no bits for: on average ln 2 / 2 units in the last place of 1. This factor
// makes good for it in one instruction, where rounding takes four.
#define TF32_LOSS 1.000338f

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
#if IO == 0
typedef float io_t, kept_t;
#else
typedef u16 io_t, kept_t;  // activations, and the states that the adjoint walk starts from
#endif

// `KernelArguments` in selective_scan_cuda_runtime.py; a test compares the two. Of the scan alone, (B, L, 2 CHANNELS): xz
// is the input, u what is given for Δ, out the output; and a_log is A.
struct Args {
    const io_t *xz, *u, *proj, *dout;
    const void *conv_w, *conv_b, *dt_w, *dt_b, *a_log, *skip;
    const long long *order;
    io_t *out, *du, *ddelta, *y;
    float *states, *sums;
    kept_t *sub;
    float *adjoint, *da, *dvec, *d_dt_w;
    void *partial;  // gradients of the projection, from the channels of a thread block
    int B, L;
    int mode;           // of `conv_backward` along an order: 1 + the direction; of others: `ADJOINTS`, `WHOLE_PART`
    int chunk, chunks;  // tokens in one, and how many; of `proj_conv_backward`: places that a lane takes
    int turn;           // -1: all chunks at once; otherwise they take turns, the last first: whose turn it is
    int span;           // chunks in a turn
    int kept;           // tokens between the states that the scan keeps; 0: none
    // The order of the backward direction: 0 is any, in `order`; else tokens are `frames` frames of `frame` tokens.
    int reversal;
    int frames, frame;
    int class_token;          // index of a token that belongs to no frame; -1: none
    u32 frame_inverse;        // 2^32 / frame, rounded up: divides by multiplication
    const io_t *x_w, *dproj;  // of `proj_conv_backward`: x_proj_weight, and the gradient of the projection
    // With a state: what the walk starts with and leaves, [dir][b][channel][state], and the inputs of the convolution
    // before the first step and those after the last, [dir][b][K - 1][channel], the latest visited last. On the way back
    // gradients: of what was left; of what it started with, and of `before`. `start` may be null, which is zero.
    const float *start;
    float *end, *total;  // total: with WHOLE_PART, sums of Δ, [dir][b][channel]
    const io_t *before;
    io_t *after;
};
// Bits of `mode`. Of `pass_states`: adjoint states. Of `ends`, `adjoint`: also of the chunk that is walked last; and of
// `pass_states`: what the part ends with from zero, and nothing is passed yet.
#define ADJOINTS 1
#define WHOLE_PART 2
#define SPATIAL 1   // frame by frame, each from its last token on
#define TEMPORAL 2  // the last frame first, each from its first token on

#ifndef EMULATED
DEV float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEV float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEV float half_to_float(u16 v) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(v));
    return y;
}
DEV u16 float_to_half(float v) {
    u16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(v));
    return y;
}
DEV u16 float_to_bf16(float v) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(v));
    return y;
}
DEV u32 pack_half(float a, float b) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
    return y;
}
DEV u32 pack_half_finite(float a, float b) {
    u32 y;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
    return y;
}
DEV u32 pack_bf16(float a, float b) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(b), "f"(a));
    return y;
}
// d (16x8) += a (16x4) b (4x8); tf32 operands, of which the hardware reads the upper 19 bits.
DEV void mma_tf32_k4(float *d, float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)));
}
DEV float round_tf32(float v) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(v));
    return __uint_as_float(y);
}
// d (16x8) += a (16x16 or 16x8) b, in 16-bit types.
#define MMA_K16(TYPE)                                                                                         \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
        "{%0,%1,%2,%3};"                                                                                      \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
#define MMA_K8(TYPE)                                                                                              \
    asm("mma.sync.aligned.m16n8k8.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(b))
DEV void mma_half_k16(float *d, const u32 *a, u32 b0, u32 b1) { MMA_K16("f16"); }
DEV void mma_half_k8(float *d, const u32 *a, u32 b) { MMA_K8("f16"); }
DEV void mma_bf16_k16(float *d, const u32 *a, u32 b0, u32 b1) { MMA_K16("bf16"); }
DEV void mma_bf16_k8(float *d, const u32 *a, u32 b) { MMA_K8("bf16"); }
// Of an 8x8 matrix of 16-bit values, a row in four lanes: its transpose.
DEV u32 transpose(u32 v) {
    u32 y;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(v));
    return y;
}
template <int BYTES> DEV void copy_async(void *to, const void *from, bool valid) {
    u32 address = (u32)__cvta_generic_to_shared(to), bytes = valid ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(BYTES), "r"(bytes)
                     : "memory");
}
DEV void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEV void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
DEV void barrier(int which, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(which), "r"(threads) : "memory"); }
DEV void sync_warp() { __syncwarp(); }
// The same in all lanes of a warp: the compiler, told so, keeps it and what follows from it in uniform registers.
DEV int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }
DEV void keep_in_register(int &v) { asm("" : "+r"(v)); }
DEV float exchange(float v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
#endif

// In the type of activations; of float ones in float16, which is as precise as tf32.
DEV u32 pack16(float a, float b) {
    return IO == 0 ? pack_half_finite(a, b) : IO == 1 ? pack_half(a, b) : pack_bf16(a, b);
}
DEV void mma_k16(float *d, const u32 *a, u32 b0, u32 b1) {
    IO == 2 ? mma_bf16_k16(d, a, b0, b1) : mma_half_k16(d, a, b0, b1);
}
DEV void mma_k8(float *d, const u32 *a, u32 b) { IO == 2 ? mma_bf16_k8(d, a, b) : mma_half_k8(d, a, b); }
DEV float load16(u16 v, bool half) { return half ? half_to_float(v) : __uint_as_float((u32)v << 16); }
#if IO == 0
DEV float value(float v) { return v; }
DEV io_t stored(float v) { return v; }
#else
DEV float value(u16 v) { return load16(v, IO == 1); }
DEV io_t stored(float v) { return IO == 1 ? float_to_half(v) : float_to_bf16(v); }
#endif
// Four states as they are kept, in the type of activations; those over float16's range count as its last.
DEV void store_kept(kept_t *to, const float *from) {
#if IO == 0
    *(float4 *)to = make_float4(from[0], from[1], from[2], from[3]);
#else
    u32 low = IO == 1 ? pack_half_finite(from[0], from[1]) : pack_bf16(from[0], from[1]);
    u32 high = IO == 1 ? pack_half_finite(from[2], from[3]) : pack_bf16(from[2], from[3]);
    *(u64 *)to = low | (u64)high << 32;
#endif
}
DEV float parameter(const void *p, size_t i) {
#if PT == 0
    return ((const float *)p)[i];
#else
    return load16(((const u16 *)p)[i], PT == 1);
#endif
}
// Two neighbours at an even place.
DEV float2 load2(const io_t *p) {
#if IO == 0
    return *(const float2 *)p;
#elif IO == 1
    u32 v = *(const u32 *)p;
    return make_float2(half_to_float((u16)v), half_to_float((u16)(v >> 16)));
#else
    u32 v = *(const u32 *)p;
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#endif
}
DEV void store2(io_t *p, float a, float b) {
#if IO == 0
    *(float2 *)p = make_float2(a, b);
#else
    *(u32 *)p = pack16(a, b);
#endif
}
// Four neighbours at a multiple of four.
DEV void unpack4(float *to, const io_t *from) {
#if IO == 0
    float4 v = *(const float4 *)from;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
#else
    uint2 v = *(const uint2 *)from;
    to[0] = value((u16)v.x), to[1] = value((u16)(v.x >> 16));
    to[2] = value((u16)v.y), to[3] = value((u16)(v.y >> 16));
#endif
}
DEV void store4(io_t *to, const float *from, int left) {
    if (VEC) {
        if (left <= 0) return;
#if IO == 0
        *(float4 *)to = make_float4(from[0], from[1], from[2], from[3]);
#else
        // As a `uint2`, the compiler sometimes makes two stores of it.
        *(u64 *)to = pack16(from[0], from[1]) | (u64)pack16(from[2], from[3]) << 32;
#endif
    } else {
#pragma unroll
        for (int e = 0; e < 4; e++)
            if (e < left) to[e] = stored(from[e]);
    }
}
// As many of four neighbours as there are.
DEV void load_few4(float *to, const io_t *from, int left) {
    if (VEC) unpack4(to, from);
    else
        for (int e = 0; e < 4; e++) to[e] = e < left ? value(from[e]) : 0.f;
}
template <int COUNT> DEV void load_vector(float *to, const float *from) {
    if (COUNT == 2) {
        float2 v = *(const float2 *)from;
        to[0] = v.x, to[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4) {
            float4 v = *(const float4 *)(from + i);
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    }
}
template <int COUNT> DEV void store_vector(float *to, const float *from) {
    if (COUNT == 2) *(float2 *)to = make_float2(from[0], from[1]);
    else {
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
            *(float4 *)(to + i) = make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
}

// As precise as exp2f, but for results below 2^-126, which become zero.
DEV float decay(float delta, float a) { return ex2(delta * a); }
// The same on the multiply-add units: 2^n by the exponent, 2^f for |f| <= 1/2 by a polynomial of relative error 1.5e-5
// in 1 - 2^f, so that slow decays stay as slow.
DEV float polynomial_decay(float delta, float a) {
    const float x = fmaxf(delta * a, -126.f), magic = 12582912.f, shifted = x + magic, f = x - (shifted - magic);
    float p = fmaf(fmaf(0.00967605f, f, 0.05583833f), f, 0.24022168f);
    p = fmaf(fmaf(p, f, 0.69313673f), f, 1.f);
    return __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
}
DEV float softplus(float v) {
#if EXACT
    return v > 20.f ? v : log1pf(expf(v));
#else
    // max(v, 0) + log1p(e^-|v|), log1p(t) / t by a polynomial of relative error 5.7e-5: small steps stay accurate.
    float t = ex2(fabsf(v) * -LOG2E);
    float p = fmaf(fmaf(0.04134728f, t, -0.15742719f), t, 0.30630095f);
    p = fmaf(fmaf(p, t, -0.49697782f), t, 0.99994328f);
    return fmaf(p, t, fmaxf(v, 0.f));
#endif
}
DEV float sigmoid(float v) {
#if EXACT
    return 1.f / (1.f + expf(-v));
#else
    return rcp(1.f + ex2(v * -LOG2E));
#endif
}
// Half of it, in as many instructions.
DEV float half_sigmoid(float v) {
#if EXACT
    return 0.5f * sigmoid(v);
#else
    return rcp(fmaf(2.f, ex2(v * -LOG2E), 2.f));
#endif
}
// Derivative of the softplus, from its value.
DEV float softplus_slope(float delta) {
#if EXACT
    return -expm1f(-delta);
#else
    float series = delta * fmaf(delta, fmaf(delta, 0.16666667f, -0.5f), 1.f);
    return delta < 0.03125f ? series : 1.f - ex2(delta * -LOG2E);
#endif
}

// The token that the backward direction visits at a step, if it exists.
DEV int visited(const Args &p, int step) {
    if (!p.reversal) return (int)p.order[step];
    int patch = step;
    if (p.class_token >= 0) {  // visited at its mirrored place
        const int mirrored = p.L - 1 - p.class_token;
        if (step == mirrored) return p.class_token;
        patch -= step > mirrored;
    }
    const int row = patch - (int)__umulhi((u32)patch, p.frame_inverse) * p.frame;
    patch = p.reversal == SPATIAL ? patch + p.frame - 1 - 2 * row : p.frames * p.frame - p.frame - patch + 2 * row;
    return patch + (p.class_token >= 0 && patch >= p.class_token);
}
""",
    "scan.cu": r"""// The forward scan, and the walks that differ little from it: states and adjoint states of chunks.
#include "walk.cuh"

// Kinds of walk. SCAN: outputs, and the states before every p.kept tokens or, with KEEP, every 8. STATES: the state
// before every 8 tokens, from p.states. ENDS: the state a chunk ends with, from zero. ADJOINT: the adjoint state that a
// chunk passes back, from zero; u is then the gradient of the ungated output.
#define SCAN 0
#define STATES 1
#define ENDS 2
#define ADJOINT 3

// Bytes of shared memory of a warp.
#define FORWARD_SHARED(M, KIND)                                                                 \
    (2 * (PROJ_TILE + TILE * ROW(M) * (int)sizeof(io_t)) + TILE * (16 * M + 4) * 4 +            \
     (KIND == SCAN || PLAIN ? 2 * TILE * ROW(M) * (int)sizeof(io_t) : 0) + STEP_SIZE_BYTES(M) + \
     2 * SPLIT * TILE * (16 * M + 4) * 4)

// Without outputs to make, the multiply-add units are idle where the special-function unit is not: of a lane's decays
// they take every fourth, of ENDS and ADJOINT, where more instructions compete, every eighth.
template <int KIND> DEV bool by_polynomial(int group, int e) {
    return KIND != SCAN && e == 3 && (KIND == STATES || group % 2);
}

// The state a chunk starts with, from those that the chunks before it end with from zero. A few are asked for at once:
// one after the other, each would wait for memory.
template <int M, int GROUPS> DEV void join_chunks(const Args &p, const Walk &w, float h[M][GROUPS][4],
                                                  const float a[M][GROUPS][4], int first_group, int left) {
    const int S = 2 * M, FEW = GROUPS * M > 4 ? 1 : 4 / (GROUPS * M);
    const int before = w.reversed ? p.chunks - 1 - w.chunk : w.chunk;
    for (int first = 0; first < before; first += FEW) {
        float end[FEW][M][GROUPS][4] = {}, sum[FEW][S] = {};
#pragma unroll
        for (int f = 0; f < FEW; f++) {
            if (first + f >= before) continue;
            const int k = w.reversed ? p.chunks - 1 - first - f : first + f;
            load_states<M, GROUPS>(end[f], fragment<M>(p.states, p, w, p.chunks, k) + first_group * 128, w);
            const float *sums = p.sums + ((size_t)(w.dir * p.B + w.b) * p.chunks + k) * CHANNELS + w.channel + w.g * S;
#pragma unroll
            for (int s = 0; s < S; s++)
                if (w.g * S + s < left) sum[f][s] = sums[s];
        }
#pragma unroll
        for (int f = 0; f < FEW; f++)
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int nt = 0; nt < GROUPS; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        h[i][nt][e] =
                            fmaf(h[i][nt][e], decay(sum[f][2 * i + (e >> 1)], a[i][nt][e]), end[f][i][nt][e]);
    }
}

template <int M, int KIND> DEV void walk_forward(const Args &p) {
    const int LD = 16 * M + 4, S = 2 * M, LU = ROW(M), GROUPS = NT / (SPLIT + 1);  // of eight states
    extern __shared__ __align__(16) char shared[];
    Walk w = Walk::start(p, M);
    if (KIND == ADJOINT) w.reversed = !w.reversed;
    const bool walked_last = w.chunk == (w.reversed ? 0 : p.chunks - 1);
    // Nobody here starts from where the last chunk ends.
    if ((KIND == ENDS || KIND == ADJOINT) && walked_last && !(STATEFUL && p.mode & WHOLE_PART)) return;
    const bool meeting = KIND == SCAN && !ORDERED;
    if (KIND == STATES && w.tiles <= 0) return;
    if (w.channel >= CHANNELS) {
        if (meeting) barrier(1, BLOCK_THREADS);
        return;
    }
    const int g = w.g, q = w.q, lane = w.lane, left = CHANNELS % (16 * M) ? CHANNELS - w.channel : 16 * M;
    const int U_TILE = TILE * LU * sizeof(io_t), STAGE = PROJ_TILE + U_TILE;
    char *mine = shared + w.team * FORWARD_SHARED(M, KIND);
    float *delta = (float *)(mine + 2 * STAGE);
    io_t *gate = (io_t *)(delta + TILE * LD), *before = gate + TILE * LU;  // of SCAN; PLAIN: two stages of given Δ
    float *ys = SPLIT ? (float *)(before + TILE * LU) : delta;  // of each half; or Δ gives its place to the outputs
    const io_t *proj_rows = p.proj + ((size_t)(COMMON ? 0 : w.dir) * p.B * p.L + w.row) * PROJ;
    const io_t *u_rows =
        PLAIN ? (KIND == ADJOINT ? p.dout : p.xz) + half_row(w)
              : p.u + ((size_t)(KIND == ADJOINT ? 0 : w.dir) * p.B * p.L + w.row) * CHANNELS + w.channel;
    const io_t *given_rows = p.u + half_row(w);
    const io_t *z_rows = p.xz + (w.row * 2 + 1) * CHANNELS + w.channel;
    // Along an order the directions meet anywhere: each leaves its outputs in the place of its inputs, for `gate`.
    io_t *out_rows = PLAIN ? p.out + half_row(w) : ORDERED ? (io_t *)u_rows : p.out + w.row * CHANNELS + w.channel;

    const int first_group = w.half * GROUPS;
    float a[M][GROUPS][4], h[M][GROUPS][4], total[S];
    load_A<M, GROUPS>(p, w, a, first_group);
    StepSize<M> step_size;
    step_size.load(p, w, mine + FORWARD_SHARED(M, KIND) - STEP_SIZE_BYTES(M));
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int nt = 0; nt < GROUPS; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) h[i][nt][e] = 0.f;
#pragma unroll
    for (int s = 0; s < S; s++) total[s] = 0.f;
    if (STATEFUL && KIND == SCAN && (JOINED || p.chunks == 1)) load_start<M, GROUPS>(h, p, w, first_group);
    if (JOINED && KIND == SCAN) join_chunks<M, GROUPS>(p, w, h, a, first_group, left);
    else if ((KIND == SCAN && p.chunks > 1) || (KIND == STATES && (STATEFUL || p.chunks > 1)))
        load_states<M, GROUPS>(h, fragment<M>(p.states, p, w, p.chunks, w.chunk) + first_group * 128, w);
    // The next part of which the state before is stored, and where; SCAN: the place that this is at.
    const int way = w.reversed ? -1 : 1;
    int part = 0, keep_at = -1;
    const bool keeping = KIND == STATES || (KIND == SCAN && KEEP);
    if (keeping) part = w.begin(0) / 8 + w.reversed;
    if (KIND == SCAN && !KEEP && p.kept) keep_at = w.begin(0), part = keep_at / p.kept;
    kept_t *sub_at = keeping ? fragment<M>(p.sub, p, w, sub_parts(p), part - w.base / 8) + first_group * 128 : 0;
    const int four = lane % (4 * M) * 4, here = left - four;  // channels of this lane in the epilogue
    const int ROUNDS = M * 2, PER = 8 / M;
    Row row(w);
    row.keep();
    float skip[4], in_step[4];
    u32 out_step[4];
#pragma unroll
    for (int j = 0; j < 4; j++) in_step[j] = q == j, out_step[j] = g >> 1 == j ? ~0u : 0;
#pragma unroll
    for (int e = 0; e < 4; e++)
        skip[e] = KIND == SCAN && e < here ? parameter(p.skip, (size_t)w.dir * CHANNELS + w.channel + four + e) : 0.f;

    // Where a tile begins, and its stage in shared memory.
    int begin = w.begin(-1), now = STAGE;
    for (int tile = -1; tile < w.tiles; tile++, begin += way * TILE, now = STAGE - now) {
        if (SPLIT) {  // what the next copies overwrite has been read by both halves
            copy_wait<0>();
            w.sync();
        }
        auto fetch = [&] {
            if (tile + 1 < w.tiles) {
                char *stage = mine + STAGE - now;
                const int next = begin + way * TILE;
                load_row<PROJ, PROJ, PROJ, PROJ_PIECE>((io_t *)stage, proj_rows, PROJ, w, row, next);
                auto load_channels = [&](io_t *to, const io_t *rows) {
                    load_row<16 * M, LU, ROW_OF_CHANNELS, CHANNEL_PIECE>(to, rows, left, w, row, next);
                };
                load_channels((io_t *)(stage + PROJ_TILE), u_rows);
                if (PLAIN) load_channels(now ? gate : before, given_rows);
            }
            copy_commit();
        };
        if (!SPLIT || tile < 0) fetch();
        if (tile < 0) continue;
        if (KIND == SCAN && begin == keep_at) {
            float *to = fragment<M>(p.states, p, w, (p.L + p.kept - 1) / p.kept, part);
            store_states<M, GROUPS>(to + first_group * 128, h, w);
            part += way;
            keep_at = part * p.kept + (w.reversed ? p.kept - TILE : 0);
        }
        // The first direction to come by a token leaves its output; the second adds its own, and gates.
        const bool second = meeting && (2 * tile > w.tiles - 1 || (2 * tile == w.tiles - 1 && w.dir));
        if (meeting && w.dir && tile == w.tiles / 2) barrier(1, BLOCK_THREADS);
        if (second) {
            load_row<16 * M, LU, 2 * CHANNELS, CHANNEL_PIECE>(gate, z_rows, left, w, row, begin);
            load_row<16 * M, LU, CHANNELS, CHANNEL_PIECE>(before, out_rows, left, w, row, begin);
        }
        if (KIND == SCAN) copy_commit();
        if (SPLIT) fetch();
        else {
            copy_wait<KIND == SCAN ? 2 : 1>();
            sync_warp();
        }
        const io_t *proj = (io_t *)(mine + now), *u = (io_t *)(mine + now + PROJ_TILE);
        step_size.apply(p, w, begin, proj, delta, now ? before : gate);
        w.sync();
        const int in_at = KIND == ADJOINT ? R + N : R;
        // Unrolled, the loop outgrows the instruction cache; rolled, it wants its addresses ready.
        constexpr int UNROLL = KIND == STATES ? 2 : 1;
        const io_t *b_at = proj + q * PROJ + in_at + first_group * 8, *c_at = proj + (g >> 1) * PROJ + first_group * 8;
        const io_t *u_at = u + q * LU + g * S;
        float *d_at = delta + g * S, *y_at = ys + w.half * TILE * LD + g * S;
#pragma unroll UNROLL
        for (int t4 = 0; t4 < TILE; t4 += 4) {
            if (keeping && t4 % 8 == 0) {
                if (part * 8 < p.L) keep_states<M, GROUPS>(sub_at, h, w);
                part += way, sub_at += way * STATES_OF_PART;
            }
#if EXACT
            float sum[4][S];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float step[S], v[S], b[GROUPS][2], c[GROUPS][2];
                load_vector<S>(step, d_at + j * LD);
                load_channels_of_lane<S>(v, u_at + (j - q) * LU);
#pragma unroll
                for (int nt = 0; nt < GROUPS; nt++) {
                    projected2(b[nt], proj, t4 + j, in_at, nt * 8 + 2 * q);
                    if (KIND == SCAN) projected2(c[nt], proj, t4 + j, R + N, nt * 8 + 2 * q);
                }
#pragma unroll
                for (int s = 0; s < S; s++) {
                    if (KIND != ADJOINT) v[s] *= step[s];
                    sum[j][s] = 0.f, total[s] += step[s];
#pragma unroll
                    for (int nt = 0; nt < GROUPS; nt++)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            float &state = h[s / 2][nt][(s & 1) * 2 + e];
                            float factor = decay(step[s], a[s / 2][nt][(s & 1) * 2 + e]), in = v[s] * b[nt][e];
                            state = KIND == ADJOINT ? (state + in) * factor : fmaf(state, factor, in);
                            if (KIND == SCAN) sum[j][s] = fmaf(state, c[nt][e], sum[j][s]);
                        }
                }
            }
            if (KIND == SCAN) {
                // Over the four lanes of a channel; lane q is left with the sum of step q.
                float y[S];
#pragma unroll
                for (int s = 0; s < S; s++) {
                    float two[2];
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        float mine = q & 2 ? sum[j + 2][s] : sum[j][s], other = q & 2 ? sum[j][s] : sum[j + 2][s];
                        two[j] = mine + exchange(other, 2);
                    }
                    y[s] = (q & 1 ? two[1] : two[0]) + exchange(q & 1 ? two[0] : two[1], 1);
                }
                sync_warp();  // Δ of these steps is used up
                store_vector<S>(y_at + q * LD, y);
            }
#else
            float b[GROUPS], in[S], step[S], sum[M][4], factor[M][GROUPS][4];
            u32 c[GROUPS];
            load_vector<S>(step, d_at + q * LD);
            load_channels_of_lane<S>(in, u_at);
#pragma unroll
            for (int s = 0; s < S; s++) in[s] *= KIND == ADJOINT ? TF32_LOSS : step[s] * TF32_LOSS;
#pragma unroll
            for (int nt = 0; nt < GROUPS; nt++) {
                b[nt] = projected(b_at, 0, 0, nt * 8 + g);
                c[nt] = KIND == SCAN ? projected_half2(c_at, 0, R + N, nt * 8 + 2 * q) : 0;
            }
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[i][e] = 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float d[S];
                load_vector<S>(d, d_at + j * LD);
                if (KIND == ENDS || KIND == ADJOINT)
#pragma unroll
                    for (int s = 0; s < S; s++) total[s] += d[s];
#pragma unroll
                for (int i = 0; i < M; i++)
#pragma unroll
                    for (int nt = 0; nt < GROUPS; nt++)
#pragma unroll
                        for (int e = 0; e < 4; e++)
                            factor[i][nt][e] = by_polynomial<KIND>(nt, e)
                                                   ? polynomial_decay(d[2 * i + (e >> 1)], a[i][nt][e])
                                                   : decay(d[2 * i + (e >> 1)], a[i][nt][e]);
#pragma unroll
                for (int i = 0; i < M; i++)
#pragma unroll
                    for (int nt = 0; nt < GROUPS; nt++) {
                        float *x = h[i][nt], now = b[nt] * in_step[j];
                        if (KIND == ADJOINT) mma_tf32_k4(x, in[2 * i], in[2 * i + 1], now);
#pragma unroll
                        for (int e = 0; e < 4; e++) x[e] *= factor[i][nt][e];
                        if (KIND != ADJOINT) mma_tf32_k4(x, in[2 * i], in[2 * i + 1], now);
                    }
                if (KIND == SCAN)
#pragma unroll
                    for (int i = 0; i < M; i++) contract_states<GROUPS>(sum[i], h[i], c, out_step[j]);
            }
            if (KIND == SCAN) {
                if (!SPLIT) sync_warp();  // Δ of these steps is used up
                float y[S];
#pragma unroll
                for (int i = 0; i < M; i++) y[2 * i] = sum[i][0], y[2 * i + 1] = sum[i][2];
                store_vector<S>(y_at + q * LD, y);
            }
#endif
            b_at += 4 * PROJ, c_at += 4 * PROJ, u_at += 4 * LU, d_at += 4 * LD, y_at += 4 * LD;
        }
        if (KIND == SCAN) {
            copy_wait<SPLIT>();
            w.sync();
            // Of the four rounds of 32 channels, two at a time: all four want registers of a seventh block.
#pragma unroll 2
            for (int k = 0; k < ROUNDS / (SPLIT + 1); k++) {
                int r = (k + w.half) * PER + lane / (4 * M), place = w.place(begin, r);
                float x[4], y[4], more[4];
                unpack4(x, u + r * LU + four);
                load_vector<4>(y, ys + r * LD + four);
                if (SPLIT) load_vector<4>(more, ys + (TILE + r) * LD + four);
#pragma unroll
                for (int e = 0; e < 4; e++) y[e] = fmaf(skip[e], x[e], SPLIT ? y[e] + more[e] : y[e]);
                if (second) {
                    float z[4], other[4];
                    unpack4(z, gate + r * LU + four);
                    unpack4(other, before + r * LU + four);
#pragma unroll
                    for (int e = 0; e < 4; e++) y[e] = (y[e] + other[e]) * z[e] * half_sigmoid(z[e]);
                }
                if (place < w.last) store4(cell(out_rows, w.token(place), ROW_OF_CHANNELS, four), y, here);
            }
            if (meeting && !w.dir && tile == (w.tiles - 1) / 2) barrier(1, BLOCK_THREADS);
        }
        sync_warp();
    }
    if (STATEFUL && KIND == SCAN && walked_last) store_end<M, GROUPS>(h, p, w, first_group);
    if (KIND == ENDS || KIND == ADJOINT) {
        store_states<M, GROUPS>(fragment<M>(KIND == ADJOINT ? p.adjoint : p.states, p, w, p.chunks, w.chunk), h, w);
        if (q == 0)
            for (int s = 0; s < S; s++)
                if (g * S + s < left)
                    p.sums[((size_t)(w.dir * p.B + w.b) * p.chunks + w.chunk) * CHANNELS + w.channel + g * S + s] =
                        total[s];
    }
}

#ifdef SCAN_KERNEL
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MINBLOCKS) scan(const Args p) {
    walk_forward<BLOCKS, SCAN>(p);
}
#endif
#ifdef STATES_KERNEL
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MINBLOCKS) states(const Args p) {
    walk_forward<BLOCKS, STATES>(p);
}
#endif
#ifdef ENDS_KERNEL
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MINBLOCKS) ends(const Args p) {
    walk_forward<BLOCKS, ENDS>(p);
}
#endif
#ifdef ADJOINT_KERNEL
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MINBLOCKS) adjoint(const Args p) {
    walk_forward<BLOCKS, ADJOINT>(p);
}
#endif

#ifdef PASS_STATES_KERNEL
// Passes states between chunks: what each ends with, from zero, becomes what it starts with. A thread a state;
// ADJOINTS: p.adjoint instead of p.states, against the walk. WHOLE_PART: they stay as they are, and what all end with
// and the sums of Δ are written.
extern "C" __global__ void pass_states(const Args p) {
    int blocks = (CHANNELS + 15) / 16;
    int i = blockIdx.x * blockDim.x + threadIdx.x, per = blocks * NT * 128;
    if (i >= per) return;
    int b = blockIdx.y, dir = blockIdx.z;
    int lane = i / 4 % 32, e = i % 4, nt = i / 128 % NT;
    int channel = i / (128 * NT) * 16 + lane / 4 * 2 + (e >> 1), n = nt * 8 + 2 * (lane % 4) + (e & 1);
    const bool exists = channel < CHANNELS && n < N;  // others become zero
#if PLAIN
    float a = exists ? rate(p, ((size_t)dir * CHANNELS + channel) * N + n) : 0.f, h = 0.f;
#else
    float a = exists ? -expf(parameter(p.a_log, ((size_t)dir * CHANNELS + channel) * N + n)) * LOG2E : 0.f, h = 0.f;
#endif
    const int adjoints = STATEFUL ? p.mode & ADJOINTS : p.mode;
    const bool whole = STATEFUL && p.mode & WHOLE_PART;
    bool down = (dir && !ORDERED) != (adjoints == 1);
    float *states = (adjoints ? p.adjoint : p.states) + (size_t)(dir * p.B + b) * p.chunks * per + i;
    const size_t row = (size_t)(dir * p.B + b) * CHANNELS + channel;
    float total = 0.f;
    if (STATEFUL && !whole && exists && p.start) h = p.start[row * N + n];
    const float *sums = p.sums + (size_t)(dir * p.B + b) * p.chunks * CHANNELS + channel;
    // A few are asked for at once: one after the other, each would wait for memory.
    const int FEW = 16;
    auto chunk_at = [&](int k) -> size_t { return down ? p.chunks - 1 - k : k; };
    for (int first = 0; first < p.chunks; first += FEW) {
        float end[FEW], factor[FEW];
#pragma unroll
        for (int i = 0; i < FEW; i++) {
            const int k = first + i;
            const size_t chunk = chunk_at(k);
            const bool wanted = exists && k + !whole < p.chunks;
            end[i] = wanted ? states[chunk * per] : 0.f;
            factor[i] = wanted ? exp2f(a * sums[chunk * CHANNELS]) : whole ? 1.f : 0.f;
            if (whole && wanted) total += sums[chunk * CHANNELS];
        }
#pragma unroll
        for (int i = 0; i < FEW; i++) {
            const int k = first + i;
            if (k < p.chunks && !whole) states[chunk_at(k) * per] = h;
            h = fmaf(h, factor[i], end[i]);
        }
    }
    if (whole && exists) {
        p.end[row * N + n] = h;
        if (n == 0 && p.total) p.total[row] = total;
    }
}
#endif

#ifdef GATE_KERNEL
// Along an order: adds the outputs that the directions left in `u`, and gates. A thread takes four channels of a row.
extern "C" __global__ void gate(const Args p) {
    const int fours = (CHANNELS + 3) / 4;
    const size_t rows = (size_t)p.B * p.L, at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = at / fours;
    const int four = at % fours * 4, here = CHANNELS - four;
    if (row >= rows) return;
    float y[4], other[4], z[4];
    load_few4(y, p.u + row * CHANNELS + four, here);
    load_few4(other, p.u + (rows + row) * CHANNELS + four, here);
    load_few4(z, p.xz + (2 * row + 1) * CHANNELS + four, here);
#pragma unroll
    for (int e = 0; e < 4; e++) y[e] = (y[e] + other[e]) * z[e] * half_sigmoid(z[e]);
    store4(p.out + row * CHANNELS + four, y, here);
}
#endif
#ifdef GATE_BACKWARD_KERNEL
// Along an order: the directions left their ungated outputs in the gate's half of `out` and in `y`. These become the
// gradient of the gate, and what `out_proj` took.
extern "C" __global__ void gate_backward(const Args p) {
    const int fours = (CHANNELS + 3) / 4;
    const size_t rows = (size_t)p.B * p.L, at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = at / fours;
    const int four = at % fours * 4, here = CHANNELS - four;
    if (row >= rows) return;
    io_t *dz = p.out + (2 * row + 1) * CHANNELS + four, *gated = p.y + row * CHANNELS + four;
    float y[4], other[4], z[4], dout[4];
    load_few4(y, dz, here);
    load_few4(other, gated, here);
    load_few4(z, p.xz + (2 * row + 1) * CHANNELS + four, here);
    load_few4(dout, p.dout + row * CHANNELS + four, here);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        float gate = sigmoid(z[e]), mean = 0.5f * (y[e] + other[e]) * gate;
        y[e] = mean * dout[e] * fmaf(z[e], 1.f - gate, 1.f);
        other[e] = mean * z[e];
    }
    store4(dz, y, here);
    store4(gated, other, here);
}
#endif
#ifdef UNGATE_KERNEL
// The gradient of the ungated outputs, p.y, from that of the gated ones.
extern "C" __global__ void ungate(const Args p) {
    const int fours = (CHANNELS + 3) / 4;
    const size_t rows = (size_t)p.B * p.L, at = (size_t)blockIdx.x * blockDim.x + threadIdx.x, row = at / fours;
    const int four = at % fours * 4, here = CHANNELS - four;
    if (row >= rows) return;
    float y[4], z[4];
    load_few4(y, p.dout + row * CHANNELS + four, here);
    load_few4(z, p.xz + (2 * row + 1) * CHANNELS + four, here);
#pragma unroll
    for (int e = 0; e < 4; e++) y[e] *= z[e] * half_sigmoid(z[e]);
    store4(p.y + row * CHANNELS + four, y, here);
}
#endif
""",
    "scan_backward.cu": r"""// Backward of the scan. A warp walks its tiles against the visits: it recomputes the states of 8 tokens from the state
// before them, keeps them in registers, and takes the adjoint λ = ∂/∂h back through them:
//     λ_k = C_k ∂y_k + exp(Δ_{k+1} A) λ_{k+1}
#include "walk.cuh"

// Shared memory of a warp, and of all warps of a direction: these share the projection, and what they sum over their
// channels.
#define BACKWARD_SHARED                                                                       \
    (6 * TILE * 16 * (int)sizeof(io_t) + 5 * TILE * 20 * 4 + NT * 128 * (int)sizeof(kept_t) + \
     TILE * 16 * (int)sizeof(io_t) + 1536 + STEP_SIZE_BYTES(1) + (EXACT ? NT * 512 : EIGHTS * 512))
#define SUMS_OF_WARP (NT * 128 + 128)  // words: the gradients of B and C of a tile, and those of its Δ
#define BACKWARD_TEAM_SHARED (2 * PROJ_TILE + (EXACT ? 0 : BUFFERS * W * SUMS_OF_WARP * 4))

// Of the gradients of B and C, one a thread block; but in float32, one that also holds the time step's gradient.
#if IO == 2
typedef u16 partial_t;
#else
typedef float partial_t;
#endif
#if EXACT
#define PARTIAL (2 * N)
#else
#define PARTIAL PROJ
#endif
DEV void store_partial(partial_t *to, const float *two, bool both) {
#if IO == 2
    const u32 word = pack_bf16(two[0], two[1]);
    if (PROJ % 2 == 0 && R % 2 == 0 && N % 2 == 0) *(u32 *)to = word;
    else {
        to[0] = (u16)word;
        if (both) to[1] = (u16)(word >> 16);
    }
#else
    to[0] = two[0];
    if (both) to[1] = two[1];
#endif
}
// A tile of the projection, by all warps that share it.
DEV void load_projection(io_t *to, const io_t *from, const Walk &w, int begin, int thread, int threads) {
    const int PER = PROJ_PIECE / sizeof(io_t), PIECES = PROJ / PER;
    for (int i = thread; i < TILE * PIECES; i += threads) {
        const int row = i / PIECES, column = i % PIECES * PER, place = w.place(begin, row);
        const bool valid = place < w.last;
        const io_t *source = cell(from, w.token(place), PROJ, column);
        if (PROJ_PIECE >= 4) copy_async<(PROJ_PIECE < 4 ? 4 : PROJ_PIECE)>(to + row * PROJ + column, source, valid);
        else to[row * PROJ + column] = valid ? source[0] : (io_t)0;
    }
}
// Of eight tokens, the last so many's decays are kept for the way back: as many as registers are left for.
#ifndef KEPT_DECAYS
#define KEPT_DECAYS 2
#endif
#define DECAY_OF(k) ((k) < 8 - KEPT_DECAYS ? 0 : (k) - 8 + KEPT_DECAYS)
// A lane's states or adjoint states in bfloat16.
DEV void pack_states(u32 words[NT][2], const float x[NT][4]) {
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
        words[nt][0] = pack_bf16(x[nt][0], x[nt][1]), words[nt][1] = pack_bf16(x[nt][2], x[nt][3]);
}
// Adds the outer products of a step's vectors over its states, x, and over the channels: rows are states, column j is
// filled from what lanes (j, 0..3) have in `factor`, the values of channels 4q, 4q + 2 and 4q + 1, 4q + 3.
DEV void outer_product(float d[(NT + 1) / 2][4], const u32 x[NT][2], u32 factor0, u32 factor1) {
#pragma unroll
    for (int nt = 0; nt < NT; nt += 2) {
        const u32 *more = x[nt + 1 < NT ? nt + 1 : 0];
        u32 a[4] = {transpose(x[nt][0]), 0, transpose(x[nt][1]), 0};
        if (nt + 1 < NT) a[1] = transpose(more[0]), a[3] = transpose(more[1]);
        mma_bf16_k16(d[nt / 2], a, factor0, factor1);
    }
}
// `contract_states` of states in bfloat16, with a factor in bfloat16.
DEV void contract_words(float *sum, const u32 x[NT][2], const u32 *factor, u32 mask) {
#pragma unroll
    for (int nt = 0; nt < NT; nt += 2) {
        const int more = nt + 1 < NT ? nt + 1 : 0;
        u32 rows[4] = {x[nt][0], x[nt][1], x[more][0], x[more][1]};
        if (nt + 1 < NT) mma_bf16_k16(sum, rows, factor[nt] & mask, factor[more] & mask);
        else mma_bf16_k8(sum, rows, factor[nt] & mask);
    }
}
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MINBLOCKS) backward(const Args p) {
    const int LD = 20, S = 2;
    extern __shared__ __align__(16) char shared[];
    Walk w = Walk::start(p, 1);
    // In turns, the directions come by different chunks, but for the turn in the middle of an odd number.
    const bool meeting = !ORDERED && (p.turn < 0 || 2 * p.turn == p.chunks - 1);
    if (w.channel >= CHANNELS) {
        if (meeting) barrier(1, BLOCK_THREADS);
        return;
    }
    const int g = w.g, q = w.q, lane = w.lane, left = CHANNELS % 16 ? CHANNELS - w.channel : 16;
    const int U_TILE = TILE * 16 * sizeof(io_t), STAGE = 3 * U_TILE;
    char *mine = shared + w.team * BACKWARD_SHARED;
    char *ours = shared + 2 * W * BACKWARD_SHARED + w.dir * BACKWARD_TEAM_SHARED;
    // The warps of this direction, and which of them this is.
    const int teams = CHANNELS % (16 * W) ? min(W, (CHANNELS - (int)blockIdx.x * W * 16 + 15) / 16) : W;
    const int team = w.team >> 1;
    float *delta = (float *)(mine + 2 * STAGE), *dy = delta + TILE * LD, *dx = dy + TILE * LD, *ds = dx + TILE * LD,
          *ys = ds + TILE * LD;
    kept_t *saved = (kept_t *)(ys + TILE * LD);
    io_t *before = (io_t *)(saved + NT * 128);
    // Of this lane's four channels in the epilogue: D, the gradient of D, that of the bias of Δ.
    float *skip_at = (float *)((char *)before + U_TILE) + lane * 4;
    float *d_skip_at = skip_at + 128, *d_bias_at = skip_at + 256;
    StepSize<1> step_size;
    step_size.load(p, w, (char *)before + U_TILE + 1536);
    // Exactly: sums over channels. Otherwise the gradient of dt_proj's weight: of the channels 2g and 2g + 1, the ranks
    // 8k + 2q and 8k + 2q + 1.
    float *sums = (float *)((char *)before + U_TILE + 1536 + STEP_SIZE_BYTES(1));
    const io_t *proj_rows = p.proj + ((size_t)(COMMON ? 0 : w.dir) * p.B * p.L + w.row) * PROJ;
    const size_t rows = PLAIN ? half_row(w) : ((size_t)w.dir * p.B * p.L + w.row) * CHANNELS + w.channel;
    const io_t *dout_rows = p.dout + (PLAIN ? rows : w.row * CHANNELS + w.channel);
    // Of the scan alone, what is given for Δ takes the gate's place.
    const io_t *z_rows = PLAIN ? p.u + rows : p.xz + (w.row * 2 + 1) * CHANNELS + w.channel;
    io_t *dz_rows = p.out + (w.row * 2 + 1) * CHANNELS + w.channel;
    // [dir][block of 16 W channels][b][place]
    const int places = p.turn < 0 ? p.L : p.chunk;
    partial_t *partial =
        (partial_t *)p.partial + ((((size_t)w.dir * gridDim.x + blockIdx.x) * p.B + w.b) * places - w.base) * PARTIAL;

    float a[1][NT][4], states[1][NT][4], (&lambda)[NT][4] = states[0], da[1][NT][4];
    load_A<1, NT>(p, w, a);
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int e = 0; e < 4; e++) lambda[nt][e] = da[0][nt][e] = 0.f;
    auto passed = [&] { return fragment<1>(p.adjoint, p, w, p.turn < 0 ? p.chunks : 1, p.turn < 0 ? w.chunk : 0); };
    if (STATEFUL && (p.chunks == 1 || p.turn == 0)) load_start<1, NT>(states, p, w);
    else if (p.chunks > 1 && p.turn != 0) load_states<1, NT>(states, passed(), w);
    auto fetch_states = [&](int part) {
        if (part * 8 >= p.L) return;
        const kept_t *from = fragment<1>(p.sub, p, w, sub_parts(p), part - w.base / 8);
#pragma unroll
        for (int nt = 0; nt < NT; nt++)
            copy_async<4 * sizeof(kept_t)>(saved + (nt * 32 + lane) * 4, from + nt * 128, true);
    };
    const int four = lane % 4 * 4, here = left - four;
    for (int e = 0; e < 4; e++) {
        d_skip_at[e] = d_bias_at[e] = 0.f;
        skip_at[e] = e < here ? parameter(p.skip, (size_t)w.dir * CHANNELS + w.channel + four + e) : 0.f;
    }
    auto part_of = [&](int i, int t8) { return (w.begin(w.tiles - 1 - i) + (w.reversed ? 8 - t8 : t8)) / 8; };
    auto load_stage = [&](int i) {
        const Row row(w);
        const int from = w.begin(w.tiles - 1 - i);
        char *stage = mine + (i & 1) * STAGE;
        io_t *tile = (io_t *)stage;
        load_row<16, 16, ROW_OF_CHANNELS, CHANNEL_PIECE>(tile, (PLAIN ? p.xz : p.u) + rows, left, w, row, from);
        load_row<16, 16, ROW_OF_CHANNELS, CHANNEL_PIECE>(tile + TILE * 16, dout_rows, left, w, row, from);
        load_row<16, 16, 2 * CHANNELS, CHANNEL_PIECE>(tile + TILE * 32, z_rows, left, w, row, from);
        load_projection((io_t *)(ours + (i & 1) * PROJ_TILE), proj_rows, w, from, team * 32 + lane, teams * 32);
    };
#if !EXACT
    for (int k = 0; k < EIGHTS * 4; k++) sums[k * 32 + lane] = 0.f;
    const u32 one = g >> 1 != q ? 0 : g & 1 ? 0x3f800000 : 0x3f80;  // of the identity, in bfloat16
    // Of tile i, sums over the channels of all these warps: a warp takes a few groups of eight columns.
    auto sum_channels = [&](int i) {
        const u32 *words = (const u32 *)(ours + 2 * PROJ_TILE) + (BUFFERS > 1 ? i & 1 : 0) * W * SUMS_OF_WARP;
        for (int column = team; column < 2 * NT + EIGHTS; column += teams) {
            float sum[4] = {0.f, 0.f, 0.f, 0.f};
            const int k = column - 2 * NT;
            if (k < 0) {
                const u32 a[4] = {one, 0, 0, one}, *from = words + (column * 32 + lane) * 2;
#pragma unroll
                for (int other = 0; other < teams; other++, from += SUMS_OF_WARP)
                    mma_bf16_k16(sum, a, from[0], from[1]);
            } else {
                const u32 *from = words + NT * 128 + lane * 4;
                const u32 *even = step_size.weight - 2 * team * (BACKWARD_SHARED / 4) + lane * 4 + k / 4 * 128 + k % 4;
                const int odd = (EIGHTS + k) / 4 * 128 + (EIGHTS + k) % 4 - k / 4 * 128 - k % 4;
#pragma unroll
                for (int other = 0; other < teams; other++, from += SUMS_OF_WARP, even += 2 * (BACKWARD_SHARED / 4)) {
                    const uint4 v = *(const uint4 *)from;
                    const u32 a[4] = {v.x, v.z, v.y, v.w};
                    mma_k16(sum, a, transpose(even[0]), transpose(even[odd]));
                }
            }
            const int first = k < 0 ? R + column / NT * N : 0, n = (k < 0 ? column % NT : k) * 8 + 2 * q;
            const int count = k < 0 ? N : R;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int place = w.place(w.begin(w.tiles - 1 - i), 8 * half + g);
                if (place >= w.last || n >= count) continue;
                store_partial(partial + (size_t)place * PROJ + first + n, sum + 2 * half, n + 1 < count);
            }
        }
    };
#endif
    float in_step[4];
#pragma unroll
    for (int j = 0; j < 4; j++) in_step[j] = q == j;
    load_stage(0);
    fetch_states(part_of(0, 8));
    copy_commit();

    for (int i = 0; i < w.tiles; i++) {
        copy_wait<0>();
        barrier(2 + w.dir, teams * 32);
#if !EXACT
        if (i) sum_channels(i - 1);
        if (BUFFERS == 1) barrier(2 + w.dir, teams * 32);
        u32 *words = (u32 *)(ours + 2 * PROJ_TILE) + ((BUFFERS > 1 ? i & 1 : 0) * W + team) * SUMS_OF_WARP;
#endif
        const int begin = w.begin(w.tiles - 1 - i);
        const bool second = ORDERED    ? false
                            : !meeting ? 2 * p.turn > p.chunks - 1
                                       : 2 * i > w.tiles - 1 || (2 * i == w.tiles - 1 && w.dir);
        if (meeting && w.dir && i == w.tiles / 2) barrier(1, BLOCK_THREADS);
        if (second) load_row<16, 16, 2 * CHANNELS, CHANNEL_PIECE>(before, dz_rows, left, w, Row(w), begin);
        char *stage = mine + (i & 1) * STAGE;
        const io_t *proj = (io_t *)(ours + (i & 1) * PROJ_TILE), *u = (io_t *)stage;
        const io_t *dout = u + TILE * 16, *z = dout + TILE * 16;
        step_size.apply(p, w, begin, proj, delta, z);
        sync_warp();
#pragma unroll
        for (int k = 0; k < 2; k++) {
            float vo[4], vz[4], vu[4], step[4];
            int row = k * 8 + lane / 4, at = row * 16 + four;
            unpack4(vo, dout + at);
            unpack4(vz, z + at);
            unpack4(vu, u + at);
            load_vector<4>(step, delta + row * LD + four);
#pragma unroll
            for (int e = 0; e < 4; e++) vo[e] *= PLAIN ? 1.f : vz[e] * half_sigmoid(vz[e]), vu[e] *= step[e];
            store_vector<4>(dy + row * LD + four, vo);
            store_vector<4>(dx + row * LD + four, vu);
        }
        sync_warp();
#pragma unroll 1
        for (int t8 = 8; t8 >= 0; t8 -= 8) {
            const bool valid = part_of(i, t8) < (p.L + 7) / 8;
            float h[NT][4], decayed[8][NT][4];  // state, and before what each of the 8 tokens adds to it
            if (t8 == 0) copy_wait<0>();
#pragma unroll
            for (int nt = 0; nt < NT; nt++) unpack4(h[nt], saved + (nt * 32 + lane) * 4);
            sync_warp();
            if (t8 == 8) {
                fetch_states(part_of(i, 0));
                if (i + 1 < w.tiles) load_stage(i + 1);
            } else if (i + 1 < w.tiles) fetch_states(part_of(i + 1, 8));
            copy_commit();
            if (!valid) {
#if !EXACT
                for (int column = 0; column < 2 * NT; column++) words[(column * 32 + lane) * 2 + t8 / 8] = 0;
#endif
                continue;
            }
            const io_t *proj_at = proj + t8 * PROJ;
            float *delta_at = delta + t8 * LD + g * S, *dy_at = dy + t8 * LD + g * S, *dx_at = dx + t8 * LD + g * S;
            float *ds_at = ds + t8 * LD + g * S, *ys_at = ys + t8 * LD + g * S;
#if EXACT
#pragma unroll
            for (int k = 0; k < 8; k++) {
                float sum[S] = {0.f, 0.f};
#pragma unroll
                for (int nt = 0; nt < NT; nt++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int n = nt * 8 + 2 * q + (e & 1);
                        decayed[k][nt][e] = h[nt][e] * decay(delta_at[k * LD + (e >> 1)], a[0][nt][e]);
                        h[nt][e] = fmaf(dx_at[k * LD + (e >> 1)], projected(proj_at, k, R, n), decayed[k][nt][e]);
                        sum[e >> 1] = fmaf(h[nt][e], projected(proj_at, k, R + N, n), sum[e >> 1]);
                    }
#pragma unroll
                for (int s = 0; s < S; s++) {
                    sum[s] += exchange(sum[s], 1);
                    sum[s] += exchange(sum[s], 2);
                }
                if (q == 0) store_vector<S>(ys_at + k * LD, sum);
            }
#pragma unroll
            for (int k = 7; k >= 0; k--) {
                float sx[S] = {0.f, 0.f}, ss[S] = {0.f, 0.f};
#pragma unroll
                for (int nt = 0; nt < NT; nt++) {
                    float part_b[2] = {0.f, 0.f}, part_c[2] = {0.f, 0.f};
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int n = nt * 8 + 2 * q + (e & 1);
                        float &l = lambda[nt][e], dyv = dy_at[k * LD + (e >> 1)], step = delta_at[k * LD + (e >> 1)];
                        float in = dx_at[k * LD + (e >> 1)], b = projected(proj_at, k, R, n);
                        l = fmaf(dyv, projected(proj_at, k, R + N, n), l);
                        sx[e >> 1] = fmaf(l, b, sx[e >> 1]);
                        part_b[e & 1] = fmaf(in, l, part_b[e & 1]);
                        part_c[e & 1] = fmaf(dyv, fmaf(in, b, decayed[k][nt][e]), part_c[e & 1]);
                        float v = l * decayed[k][nt][e];
                        l *= decay(step, a[0][nt][e]);
                        da[0][nt][e] = fmaf(v, step, da[0][nt][e]);
                        ss[e >> 1] = fmaf(v, a[0][nt][e], ss[e >> 1]);
                    }
                    store_vector<2>(sums + (nt * 32 + lane) * 2, part_b);
                    store_vector<2>(sums + NT * 64 + (nt * 32 + lane) * 2, part_c);
                }
#pragma unroll
                for (int s = 0; s < S; s++) {
                    sx[s] += exchange(sx[s], 1), ss[s] += exchange(ss[s], 1);
                    sx[s] += exchange(sx[s], 2), ss[s] += exchange(ss[s], 2);
                }
                sync_warp();
                if (q == 0) store_vector<S>(dx_at + k * LD, sx), store_vector<S>(ds_at + k * LD, ss);
                int place = w.place(begin, t8 + k);
                for (int v = lane; v < 2 * N; v += 32) {  // over the channels: over g
                    const float *from = sums + v / N * NT * 64 + v % N / 8 * 64 + v % N % 8;
                    float sum = 0.f;
                    for (int c = 0; c < 8; c++) sum += from[c * 8];
                    if (place < w.last) partial[(size_t)place * 2 * N + v] = stored(sum);
                }
                sync_warp();
            }
#else
            // Gradients of B (0) and C (1): rows of `sums` are states, columns the 8 steps.
            auto store_sums = [&](int kind, float sums[(NT + 1) / 2][4]) {
#pragma unroll
                for (int nt = 0; nt < NT; nt++)
                    words[((kind * NT + nt) * 32 + lane) * 2 + t8 / 8] =
                        pack_bf16(sums[nt / 2][2 * (nt & 1)], sums[nt / 2][2 * (nt & 1) + 1]);
            };
            float dc[(NT + 1) / 2][4], v[4], decays[KEPT_DECAYS][NT][4];
#pragma unroll
            for (int i = 0; i < (NT + 1) / 2; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) dc[i][e] = 0.f;
            load_vector<4>(v, dy + (t8 + g) * LD + 4 * q);
            const u32 dy0 = pack_bf16(v[0], v[2]), dy1 = pack_bf16(v[1], v[3]);
            const io_t *down = proj_at + q * PROJ + R, *across = proj_at + (g >> 1) * PROJ + R;
#pragma unroll
            for (int t4 = 0; t4 < 8; t4 += 4) {
                float b[NT], in[S], sum[4] = {0.f, 0.f, 0.f, 0.f};
                u32 c[NT];
                load_vector<S>(in, dx_at + (t4 + q) * LD);
                in[0] = round_tf32(in[0]), in[1] = round_tf32(in[1]);
#pragma unroll
                for (int nt = 0; nt < NT; nt++) {
                    c[nt] = IO == 2 ? projected_pair(across, t4, N, nt * 8 + 2 * q)
                                    : projected_half2(across, t4, N, nt * 8 + 2 * q);
                    b[nt] = projected(down, t4, 0, nt * 8 + g);
                }
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int k = t4 + j;
                    float d[S];
                    load_vector<S>(d, delta_at + k * LD);
#pragma unroll
                    for (int nt = 0; nt < NT; nt++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const float factor = decay(d[e >> 1], a[0][nt][e]);
                            decayed[k][nt][e] = h[nt][e] *= factor;
                            if (k >= 8 - KEPT_DECAYS) decays[DECAY_OF(k)][nt][e] = factor;
                        }
                        mma_tf32_k4(h[nt], in[0], in[1], b[nt] * in_step[j]);
                    }
                    const u32 mask = g >> 1 == j ? ~0u : 0;
                    u32 words[NT][2];
                    pack_states(words, h);
                    if (IO == 2) contract_words(sum, words, c, mask);
                    else contract_states<NT>(sum, h, c, mask);
                    outer_product(dc, words, g == k ? dy0 : 0, g == k ? dy1 : 0);
                }
                float y[S] = {sum[0], sum[2]};
                store_vector<S>(ys_at + (t4 + q) * LD, y);
            }
            store_sums(1, dc);
            float s[4] = {0.f, 0.f, 0.f, 0.f}, db[(NT + 1) / 2][4];
#pragma unroll
            for (int i = 0; i < (NT + 1) / 2; i++)
#pragma unroll
                for (int e = 0; e < 4; e++) db[i][e] = 0.f;
            load_vector<4>(v, dx + (t8 + g) * LD + 4 * q);
            const u32 dx0 = pack_bf16(v[0], v[2]), dx1 = pack_bf16(v[1], v[3]);
            sync_warp();
#pragma unroll
            for (int t4 = 4; t4 >= 0; t4 -= 4) {
                float b[NT], c[NT], in[S], low[4] = {0.f, 0.f, 0.f, 0.f}, high[4] = {0.f, 0.f, 0.f, 0.f};
                load_vector<S>(in, dy_at + (t4 + q) * LD);
                in[0] = round_tf32(in[0]), in[1] = round_tf32(in[1]);
#pragma unroll
                for (int nt = 0; nt < NT; nt++) {
                    b[nt] = projected(across, t4, 0, nt * 8 + 2 * q + (g & 1));
                    c[nt] = projected(down, t4, N, nt * 8 + g);
                }
#pragma unroll
                for (int j = 3; j >= 0; j--) {
                    const int k = t4 + j;
                    const bool now = g == k;
                    float d[S], ss[S] = {0.f, 0.f};
                    load_vector<S>(d, delta_at + k * LD);
#pragma unroll
                    for (int nt = 0; nt < NT; nt++) {
                        mma_tf32_k4(lambda[nt], in[0], in[1], c[nt] * in_step[j]);
                        contract_adjoints(low, high, lambda[nt], g >> 1 == j ? b[nt] : 0.f);
                    }
                    u32 words[NT][2];
                    pack_states(words, lambda);
                    outer_product(db, words, now ? dx0 : 0, now ? dx1 : 0);
#pragma unroll
                    for (int nt = 0; nt < NT; nt++)
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            float &l = lambda[nt][e], v = l * decayed[k][nt][e];
                            da[0][nt][e] = fmaf(v, d[e >> 1], da[0][nt][e]);
                            ss[e >> 1] = fmaf(v, a[0][nt][e], ss[e >> 1]);
                            l *= k >= 8 - KEPT_DECAYS ? decays[DECAY_OF(k)][nt][e] : decay(d[e >> 1], a[0][nt][e]);
                        }
                    mma_tf32_k4(s, ss[0], ss[1], now ? 1.f : 0.f);
                }
                float x[S] = {low[0] + low[3], high[0] + high[3]};
                store_vector<S>(dx_at + (t4 + q) * LD, x);
            }
            float first[S] = {s[0], s[2]}, other[S] = {s[1], s[3]};
            store_vector<S>(ds_at + 2 * q * LD, first);
            store_vector<S>(ds_at + (2 * q + 1) * LD, other);
            store_sums(0, db);
#endif
        }
        sync_warp();
        // Not unrolled: one of the seven rearrangements that the search found, see docs/kernels.md.
#pragma unroll 1
        for (int k = 0; k < 2; k++) {
            int row = 8 * k + lane / 4, at = row * 16 + four, from = row * LD + four, place = w.place(begin, row);
            float vo[4], vz[4], vu[4], step[4], vdy[4], vdx[4], vds[4], vy[4], r_du[4], r_dd[4];
            float skip[4], d_skip[4], d_bias[4];
            unpack4(vu, u + at);
            load_vector<4>(step, delta + from);
            load_vector<4>(vdy, dy + from);
            load_vector<4>(vdx, dx + from);
            load_vector<4>(vds, ds + from);
            load_vector<4>(vy, ys + from);
#if !EXACT
            u32 *slopes = words + NT * 128 + lane * 4 + 2 * k;  // of Δ, as a left factor's words of this half
            if (place >= w.last) slopes[0] = slopes[1] = 0;
#endif
            if (place >= w.last) continue;
            const int token = w.token(place);
            load_vector<4>(skip, skip_at);
            load_vector<4>(d_skip, d_skip_at);
            load_vector<4>(d_bias, d_bias_at);
#pragma unroll
            for (int e = 0; e < 4; e++) {
                r_dd[e] = fmaf(vdx[e], vu[e], vds[e] * LN2) * (SOFTPLUS ? softplus_slope(step[e]) : 1.f);
                r_du[e] = fmaf(vdx[e], step[e], skip[e] * vdy[e]);
                d_skip[e] = fmaf(vdy[e], vu[e], d_skip[e]);
                d_bias[e] += r_dd[e];
                vy[e] = fmaf(skip[e], vu[e], vy[e]);
            }
            store_vector<4>(d_skip_at, d_skip);
            store_vector<4>(d_bias_at, d_bias);
            if (second) {
                float other[4];
                unpack4(vo, dout + at);
                unpack4(vz, z + at);
                unpack4(other, before + at);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float gate = sigmoid(vz[e]), mean = 0.5f * (vy[e] + other[e]) * gate;
                    vy[e] = mean * vo[e] * fmaf(vz[e], 1.f - gate, 1.f);
                    other[e] = mean * vz[e];
                }
                if (p.y) store4(cell(p.y + w.row * CHANNELS + w.channel, token, CHANNELS, four), other, here);
            }
            store4(cell(p.du + rows, token, ROW_OF_CHANNELS, four), r_du, here);
#if EXACT || PLAIN
            store4(cell(p.ddelta + rows, token, ROW_OF_CHANNELS, four), r_dd, here);
#endif
#if PLAIN
            continue;  // there is no gate
#endif
#if !EXACT
            slopes[0] = pack16(r_dd[0], r_dd[2]), slopes[1] = pack16(r_dd[1], r_dd[3]);
#endif
            // Along an order, each direction its own, for `gate_backward`.
            if (ORDERED && w.dir) store4(cell(p.y + w.row * CHANNELS + w.channel, token, CHANNELS, four), vy, here);
            else store4(cell(dz_rows, token, 2 * CHANNELS, four), vy, here);
        }
        if (meeting && !w.dir && i == (w.tiles - 1) / 2) barrier(1, BLOCK_THREADS);
        sync_warp();
#if !EXACT
        const uint4 v = *(const uint4 *)(words + NT * 128 + lane * 4);
        const u32 rows_of_channels[4] = {transpose(v.x), transpose(v.y), transpose(v.z), transpose(v.w)};
#pragma unroll
        for (int k = 0; k < EIGHTS; k++) {
            float sum[4];
            load_vector<4>(sum, sums + (k * 32 + lane) * 4);
            u32 low = ranks(proj + g * PROJ, 8 * k + 2 * q), high = ranks(proj + (g + 8) * PROJ, 8 * k + 2 * q);
            mma_k16(sum, rows_of_channels, transpose(low), transpose(high));
            store_vector<4>(sums + (k * 32 + lane) * 4, sum);
        }
#endif
    }
#if !EXACT
    barrier(2 + w.dir, teams * 32);
    sum_channels(w.tiles - 1);
#endif
    const size_t walk = (size_t)(w.dir * p.B + w.b) * p.chunks + w.chunk;
#if !EXACT
    for (int k = 0; k < EIGHTS; k++)
        for (int e = 0; e < 4; e++) {
            const int c = 2 * g + (e >> 1), r = 8 * k + 2 * q + (e & 1);
            if (c < left && r < R) p.d_dt_w[(walk * CHANNELS + w.channel + c) * R + r] = sums[(k * 32 + lane) * 4 + e];
        }
#endif
#pragma unroll
    for (int nt = 0; nt < NT; nt++)
#pragma unroll
        for (int e = 0; e < 4; e++) da[0][nt][e] *= PLAIN ? 1.f : a[0][nt][e] * LN2;
    store_states<1, NT>(fragment<1>(p.da, p, w, p.chunks, w.chunk), da, w);
    if (p.turn >= 0) store_states<1, NT>(passed(), states, w);
    if (STATEFUL && w.chunk == (w.reversed ? p.chunks - 1 : 0)) store_end<1, NT>(states, p, w);
    float d_skip[4], d_bias[4];
    load_vector<4>(d_skip, d_skip_at);
    load_vector<4>(d_bias, d_bias_at);
#pragma unroll
    for (int e = 0; e < 4; e++)
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
            d_skip[e] += exchange(d_skip[e], mask);
            d_bias[e] += exchange(d_bias[e], mask);
        }
    if (lane < 4)
        for (int e = 0; e < 4; e++)
            if (e < here) {
                float *to = p.dvec + walk * 2 * CHANNELS + w.channel + four + e;
                to[0] = d_skip[e], to[CHANNELS] = d_bias[e];
            }
}
""",
    "simt.cu": r"""// The selective scan alone, in float32 and plain instructions, for GPUs without the tensor cores' bfloat16 and without
// asynchronous copies (compute capability below 8.0). Convolution and projections are PyTorch's.
//
// Four lanes share a channel and have a quarter of its states each; a warp takes 8 channels, a block 32. The length is
// cut into `spans` side by side: first each span is walked from a zero state, for what it ends with, then the ends are
// passed on, then all spans are walked from the right state. One span is walked once.
#include "primitives.cuh"

#define SIMT_CHUNK 16                // tokens between the states that the forward pass keeps for the backward pass
#define SIMT_CHANNELS 32             // of a block
#define Q ((N + 3) / 4)              // states a lane
#define PAIRS ((2 * Q + 7) / 8 * 8)  // values a lane sums over channels, of B's and C's gradients; a multiple of 8

// `SimtArguments` in selective_scan_cuda_simt.py; a test compares the two. Letters: G groups, B sequences, L tokens, E
// channels, S spans.
struct SimtArgs {
    const float *u, *delta, *grad;  // (G, B, L, E)
    const float *A;                 // (G, E, N), negative
    const float *B, *C;             // (G, B, L, N)
    float *y, *du, *ddelta;         // (G, B, L, E)
    float *ends;                    // (G, B, S, E, N): what spans end with, and after `simt_pass` what they begin with
    float *sums;                    // (G, B, S, E): of delta
    float *kept;                    // (G, B, ceil(L / SIMT_CHUNK), E, N), or null
    float *dA;                      // (G, B, S, E, N)
    float *dBC;                     // (G, B, ceil(E / SIMT_CHANNELS), L, 2 N)
    int groups, batch, length, channels, span, spans, adjoint;
    // With a state, (G, B, E, N): what the walk starts with, or null for zero, and what it leaves. One span starts with
    // what `ends` holds, if it is given. On the way back, gradients.
    const float *start;
    float *end;
};

#define MEMBER __device__ __forceinline__

// A lane's place in the work, and its channel's rows.
struct Lane {
    int channel, first, span, begin, end;
    bool exists;
    size_t sequence;  // group * batch + sequence
    float A[Q];       // times log2(e)

    MEMBER Lane(const SimtArgs &p) {
        channel = blockIdx.x * SIMT_CHANNELS + threadIdx.x / 4;
        first = threadIdx.x % 4 * Q;
        exists = channel < p.channels;
        span = blockIdx.y, begin = span * p.span, end = min(begin + p.span, p.length);
        sequence = blockIdx.z;
        const size_t group = sequence / p.batch;
        load_states(A, p.A + (group * p.channels + channel) * N);
        for (int n = 0; n < Q; n++) A[n] *= LOG2E;
    }
    // Its quarter of a row of N states; zero where there are no more, or no such channel.
    MEMBER void load_states(float to[Q], const float *row, bool some = true) const {
#pragma unroll
        for (int n = 0; n < Q; n++) to[n] = some && exists && first + n < N ? row[first + n] : 0.f;
    }
    MEMBER void store_states(float *row, const float from[Q]) const {
#pragma unroll
        for (int n = 0; n < Q; n++)
            if (exists && first + n < N) row[first + n] = from[n];
    }
    MEMBER size_t at(const SimtArgs &p, int token) const {
        return (sequence * p.length + token) * p.channels + channel;
    }
    MEMBER float load(const float *from, const SimtArgs &p, int token) const {
        return exists && token < end ? from[at(p, token)] : 0.f;
    }
    MEMBER size_t row(const SimtArgs &p, int index, int count) const {
        return ((sequence * count + index) * p.channels + channel) * N;
    }
};
// Over the four lanes of a channel.
DEV float sum_of_states(float v) {
    v += exchange(v, 1);
    return v + exchange(v, 2);
}

#ifdef SIMT_ENDS_KERNEL
// What a span ends with from a zero state; of the adjoint, what it hands to the span before it.
extern "C" __global__ void simt_ends(const SimtArgs p) {
    const Lane w(p);
    const float *matrix = (p.adjoint ? p.C : p.B) + w.sequence * p.length * N;
    float state[Q] = {}, sum = 0.f;
    for (int tile = 0; tile < w.end - w.begin; tile += 4) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = p.adjoint ? w.end - 1 - tile - i : w.begin + tile + i;
            const bool some = token >= w.begin && token < w.end;
            const float delta = some ? w.load(p.delta, p, token) : 0.f;
            const float x = some ? w.load(p.adjoint ? p.grad : p.u, p, token) : 0.f;
            float row[Q];
            w.load_states(row, matrix + (size_t)token * N, some);
            sum += delta;
#pragma unroll
            for (int n = 0; n < Q; n++) {
                if (p.adjoint) state[n] = decay(delta, w.A[n]) * fmaf(x, row[n], state[n]);
                else state[n] = fmaf(decay(delta, w.A[n]), state[n], delta * x * row[n]);
            }
        }
    }
    w.store_states(p.ends + w.row(p, w.span, p.spans), state);
    if (w.exists && w.first == 0) p.sums[(w.sequence * p.spans + w.span) * p.channels + w.channel] = sum;
}
#endif

#ifdef SIMT_PASS_KERNEL
// A thread passes one state through all spans.
extern "C" __global__ void simt_pass(const SimtArgs p) {
    const size_t one = (size_t)p.channels * N, state = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
    if (state >= one) return;
    const size_t sequence = blockIdx.y;
    const float a = p.A[sequence / p.batch * one + state] * LOG2E;
    float before = STATEFUL && p.start ? p.start[sequence * one + state] : 0.f;
    for (int i = 0; i < p.spans; i++) {
        const size_t span = sequence * p.spans + (p.adjoint ? p.spans - 1 - i : i);
        float *end = p.ends + span * one + state;
        const float after = fmaf(decay(p.sums[span * p.channels + state / N], a), before, *end);
        *end = before, before = after;
    }
}
#endif

#ifdef SIMT_SCAN_KERNEL
extern "C" __global__ void simt_scan(const SimtArgs p) {
    const Lane w(p);
    const float *B = p.B + w.sequence * p.length * N, *C = p.C + w.sequence * p.length * N;
    const int chunks = (p.length + SIMT_CHUNK - 1) / SIMT_CHUNK;
    float state[Q];
    w.load_states(state, p.ends + w.row(p, w.span, p.spans), STATEFUL ? p.ends != nullptr : p.spans > 1);
    for (int tile = w.begin; tile < w.end; tile += 4) {
        if (p.kept && tile % SIMT_CHUNK == 0) w.store_states(p.kept + w.row(p, tile / SIMT_CHUNK, chunks), state);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = tile + i;
            const float delta = w.load(p.delta, p, token), x = delta * w.load(p.u, p, token);
            float b[Q], c[Q], y = 0.f;
            w.load_states(b, B + (size_t)token * N, token < w.end);
            w.load_states(c, C + (size_t)token * N, token < w.end);
#pragma unroll
            for (int n = 0; n < Q; n++) {
                state[n] = fmaf(decay(delta, w.A[n]), state[n], x * b[n]);
                y = fmaf(c[n], state[n], y);
            }
            y = sum_of_states(y);
            if (w.first == 0 && w.exists && token < w.end) p.y[w.at(p, token)] = y;
        }
    }
    if (STATEFUL && w.span == p.spans - 1) w.store_states(p.end + w.row(p, 0, 1), state);
}
#endif

#ifdef SIMT_BACKWARD_KERNEL
#define WARPS (SIMT_CHANNELS / 8)
#define SIMT_SHARED (WARPS * SIMT_CHUNK * 4 * PAIRS * 4)  // bytes

// Of `PAIRS` values a lane, the sums over the 8 channels of a warp: lane 4 j + q gets those with index j modulo 8 of
// the lanes q, q + 4, ... At each exchange a lane gives half of its values away and takes the other half's sums.
DEV void sum_of_channels(float sums[PAIRS / 8], float values[PAIRS]) {
#pragma unroll
    for (int eight = 0; eight < PAIRS / 8; eight++) {
        float *v = values + 8 * eight;
#pragma unroll
        for (int half = 4; half; half /= 2) {
            const bool upper = threadIdx.x & 4 * half;
#pragma unroll
            for (int i = 0; i < half; i++) {
                const float given = exchange(upper ? v[i] : v[i + half], 4 * half);
                v[i] = (upper ? v[i + half] : v[i]) + given;
            }
        }
        sums[eight] = v[0];
    }
}

// Chunk by chunk from the last to the first: the states again, from the one that was kept, then the adjoint walk.
extern "C" __global__ void simt_backward(const SimtArgs p) {
#ifndef EMULATED
    extern __shared__ __align__(16) char shared[];
#endif
    float *sums = (float *)shared;  // of each warp, over its channels: (WARPS, SIMT_CHUNK, PAIRS / 8, 32)
    const Lane w(p);
    const float *B = p.B + w.sequence * p.length * N, *C = p.C + w.sequence * p.length * N;
    const int chunks = (p.length + SIMT_CHUNK - 1) / SIMT_CHUNK, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float *dBC = p.dBC + (w.sequence * gridDim.x + blockIdx.x) * p.length * 2 * N;
    float adjoint[Q], dA[Q] = {};
    w.load_states(adjoint, p.ends + w.row(p, w.span, p.spans), STATEFUL ? p.ends != nullptr : p.spans > 1);
    for (int chunk = (w.end - 1) / SIMT_CHUNK; chunk * SIMT_CHUNK >= w.begin; chunk--) {
        const int begin = chunk * SIMT_CHUNK;
        float before[SIMT_CHUNK + 1][Q];  // [i]: the state before the chunk's token i
        w.load_states(before[0], p.kept + w.row(p, chunk, chunks));
#pragma unroll
        for (int i = 0; i < SIMT_CHUNK; i++) {
            const float delta = w.load(p.delta, p, begin + i), x = delta * w.load(p.u, p, begin + i);
            float b[Q];
            w.load_states(b, B + (size_t)(begin + i) * N, begin + i < w.end);
#pragma unroll
            for (int n = 0; n < Q; n++) before[i + 1][n] = fmaf(decay(delta, w.A[n]), before[i][n], x * b[n]);
        }
#pragma unroll
        for (int i = SIMT_CHUNK - 1; i >= 0; i--) {
            const int token = begin + i;
            const float delta = w.load(p.delta, p, token), u = w.load(p.u, p, token);
            const float grad = w.load(p.grad, p, token);
            float b[Q], c[Q], pairs[PAIRS] = {}, dx = 0.f, ddelta = 0.f;
            w.load_states(b, B + (size_t)token * N, token < w.end);
            w.load_states(c, C + (size_t)token * N, token < w.end);
#pragma unroll
            for (int n = 0; n < Q; n++) {
                adjoint[n] = fmaf(grad, c[n], adjoint[n]);
                pairs[n] = adjoint[n] * delta * u;
                pairs[Q + n] = before[i + 1][n] * grad;
                dx = fmaf(adjoint[n], b[n], dx);
                adjoint[n] *= decay(delta, w.A[n]);
                const float through_decay = adjoint[n] * before[i][n];  // to delta * A
                ddelta = fmaf(through_decay, w.A[n] * LN2, ddelta);
                dA[n] = fmaf(through_decay, delta, dA[n]);
            }
            dx = sum_of_states(dx), ddelta = sum_of_states(ddelta);
            if (w.first == 0 && w.exists && token < w.end) {
                p.du[w.at(p, token)] = dx * delta;
                p.ddelta[w.at(p, token)] = fmaf(dx, u, ddelta);
            }
            float mine[PAIRS / 8];
            sum_of_channels(mine, pairs);
#pragma unroll
            for (int eight = 0; eight < PAIRS / 8; eight++)
                sums[((warp * SIMT_CHUNK + i) * (PAIRS / 8) + eight) * 32 + lane] = mine[eight];
        }
        barrier(0, 4 * SIMT_CHANNELS);
        const int values = SIMT_CHUNK * (PAIRS / 8) * 32;
        for (int v = threadIdx.x; v < values; v += 4 * SIMT_CHANNELS) {
            float sum = 0.f;
#pragma unroll
            for (int i = 0; i < WARPS; i++) sum += sums[i * values + v];
            const int token = begin + v / (PAIRS / 8 * 32), pair = v / 32 % (PAIRS / 8) * 8 + v % 32 / 4;
            const int state = v % 4 * Q + pair % Q;
            if (token < w.end && pair < 2 * Q && state < N) dBC[(size_t)token * 2 * N + pair / Q * N + state] = sum;
        }
        barrier(0, 4 * SIMT_CHANNELS);
    }
    w.store_states(p.dA + w.row(p, w.span, p.spans), dA);
    if (STATEFUL && w.span == 0) w.store_states(p.end + w.row(p, 0, 1), adjoint);
}
#endif
""",
    "walk.cuh": r"""// A walk: one warp, one direction, 16 M channels, tiles of 16 tokens. Tiles are aligned in the sequence (for a general
// order: in the steps), so both directions of a chunk meet at a tile border.
// A warp holds its states as the tensor cores hold a 16x8 result: lane (g, q) = (lane / 4, lane % 4) has the channels
// g S to g S + S - 1 of the warp's, S = 2M, and of each group of 8 states the states 2q and 2q + 1. Rows g and g + 8
// of the i-th result are the channels g S + 2i and g S + 2i + 1.

#pragma once
#include "primitives.cuh"

struct Walk {
    int lane, g, q, dir, half, team, b, channel, chunk, first, last, tiles;
    int base;  // first place of the turn
    bool reversed;
    const Args *args;
    size_t row;  // of token 0 of this sequence among all B L rows

    static __device__ __forceinline__ Walk start(const Args &p, int m) {
        Walk w;
        w.args = &p;
        w.lane = threadIdx.x & 31, w.g = w.lane >> 2, w.q = w.lane & 3;
        int warp = uniform(threadIdx.x >> 5);
        w.half = SPLIT ? warp & 1 : 0, w.team = warp >> SPLIT;
        w.dir = w.team & 1;
        w.channel = (blockIdx.x * W + (w.team >> 1)) * 16 * m;
        w.b = blockIdx.z;
        w.reversed = w.dir && !ORDERED;
        int turns = (p.chunks + p.span - 1) / p.span;
        int before = p.turn < 0 ? 0 : (w.reversed ? p.turn : turns - 1 - p.turn) * p.span;
        w.base = before * p.chunk;
        w.chunk = before + blockIdx.y;
        w.first = w.chunk * p.chunk;
        w.last = min(w.first + p.chunk, p.L);
        w.tiles = (w.last - w.first + TILE - 1) / TILE;
        w.row = (size_t)w.b * p.L;
        return w;
    }
    // For all that share the channels.
    __device__ __forceinline__ void sync() const {
        if (SPLIT) barrier(2 + team, 64);
        else sync_warp();
    }
    // Where tile i lies, the place of its step r, and the token there, if the place is before `last`.
    __device__ __forceinline__ int begin(int i) const { return first + (reversed ? tiles - 1 - i : i) * TILE; }
    __device__ __forceinline__ int place(int begin, int r) const { return begin + (reversed ? TILE - 1 - r : r); }
    __device__ __forceinline__ int token(int place) const {
        if (ORDERED && !PLAIN && dir) return place < last ? visited(*args, place) : 0;
        return place;
    }
};

// Column `column` of row `row`. Within a sequence of less than 4 GiB, 32 bits are enough for the offset in bytes.
template <typename T> DEV T *cell(T *rows, u32 row, u32 stride, u32 column) {
#if WIDE
    return rows + (u64)row * stride + column;
#else
    return (T *)((u64)rows + (row * stride + column) * (u32)sizeof(T));
#endif
}

// What a lane copies of each tile: of one row, a few pieces.
#define LANES_OF_ROW (SPLIT ? 4 : 2)
struct Row {
    int number, piece, place;  // in the tile; the first of the pieces; where it lies from the tile's first place on
    __device__ __forceinline__ Row(const Walk &w) {
        number = SPLIT ? w.half * (TILE / 2) + w.lane / 4 : w.lane / 2, piece = w.lane % LANES_OF_ROW;
        place = w.place(0, number);
    }
    // Where registers are left, the compiler need not work them out again for every tile.
    __device__ __forceinline__ void keep() {
        keep_in_register(number);
        keep_in_register(piece);
        keep_in_register(place);
    }
};
// Rows that do not exist and columns past `left` become zero. Rows lie STRIDE values apart, in shared memory SPACING.
template <int COLUMNS, int SPACING, int STRIDE, int BYTES>
DEV void load_row(io_t *to, const io_t *from, int left, const Walk &w, const Row &row, int begin) {
    const int PER = BYTES / sizeof(io_t), PIECES = COLUMNS / PER;
    int place = begin + row.place;
    bool exists = place < w.last;
    const io_t *source = cell(from, w.token(place), STRIDE, row.piece * PER);
    to += row.number * SPACING + row.piece * PER;
#pragma unroll
    for (int i = 0; i < PIECES; i += LANES_OF_ROW) {
        if (i + LANES_OF_ROW > PIECES && i + row.piece >= PIECES) break;
        bool valid = exists && (i + row.piece) * PER < left;
        if (BYTES >= 4) copy_async<(BYTES < 4 ? 4 : BYTES)>(to + i * PER, source + i * PER, valid);
        else to[i * PER] = valid ? source[i * PER] : (io_t)0;
    }
}
#define PROJ_BYTES (PROJ * sizeof(io_t))
#define PROJ_PIECE (PROJ_BYTES % 16 == 0 ? 16 : PROJ_BYTES % 8 == 0 ? 8 : PROJ_BYTES % 4 == 0 ? 4 : 2)
#define CHANNEL_PIECE (VEC ? 16 : (int)sizeof(io_t) == 4 ? 4 : 2)
// A tile of channels in shared memory: values from row to row (32 channels: so that lanes of four rows meet no bank
// twice), and bytes of a tile of the projection.
#define ROW(M) (16 * M + (M > 1 ? 16 : 0))
#define PROJ_TILE ((TILE * PROJ * (int)sizeof(io_t) + 15) / 16 * 16)
// Two values, or one and zero, as 16-bit operands of the tensor cores.
DEV u32 pair16(const io_t *p) {
#if IO == 0
    return pack_half_finite(p[0], p[1]);
#else
    return (u32)p[0] | (u32)p[1] << 16;
#endif
}
DEV u32 single16(const io_t *p) {
#if IO == 0
    return pack_half_finite(p[0], 0.f);
#else
    return p[0];
#endif
}

// Of a token's projection, the ranks r and r + 1 of the time step, r being even; those that do not exist are zero.
DEV u32 ranks(const io_t *token, int r) {
    const io_t *at = token + r;
    if (IO && PROJ % 2 == 0 && R % 2 == 0) return R % 8 == 0 || r < R ? *(const u32 *)at : 0u;
    return r + 1 < R ? pair16(at) : r < R ? single16(at) : 0u;
}

// What makes Δ of a warp's channels: dt_proj's rows as the tensor cores want a right factor, 8 ranks a word, and bias.
#define EIGHTS ((R + 7) / 8)
#define WORDS(M) ((2 * M * EIGHTS + 3) / 4 * 4)
// Exactly: dt_proj's rows as they are, each padded to RANKS and four values more, so that rows meet different banks.
#define RANKS ((R + 3) / 4 * 4)
#define STEP_SIZE_BYTES(M) (EXACT ? 16 * M * (RANKS + 4) * 4 : WORDS(M) * 128 + 128 * M)

template <int M> struct StepSize {
    u32 *weight;  // [four words][lane][4]; if the warp is split, [word][lane]
    float *bias;  // [q][slot s][4]: elements e and e + 2 for channel (2q + e) S + s, as a lane holds the sum
    static constexpr int LINE = RANKS + 4;  // exactly: of a channel, weights and then the bias

    __device__ __forceinline__ void load(const Args &p, const Walk &w, char *to) {
        weight = (u32 *)to, bias = (float *)(to + WORDS(M) * 128);
#if EXACT
        for (int i = w.lane; i < 16 * M * LINE; i += 32) {
            int r = i % LINE;
            size_t at = (size_t)w.dir * CHANNELS + min(w.channel + i / LINE, CHANNELS - 1);
            ((float *)to)[i] = r < R ? parameter(p.dt_w, at * R + r) : r == RANKS ? parameter(p.dt_b, at) : 0.f;
        }
#else
        const int S = 2 * M;
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int k = 0; k < EIGHTS; k++) {
                int r = 8 * k + 2 * w.q, word = s * EIGHTS + k;
                size_t at = ((size_t)w.dir * CHANNELS + min(w.channel + w.g * S + s, CHANNELS - 1)) * R + r;
                weight[SPLIT ? word * 32 + w.lane : (word / 4 * 32 + w.lane) * 4 + word % 4] =
                    pack16(r < R ? parameter(p.dt_w, at) : 0.f, r + 1 < R ? parameter(p.dt_w, at + 1) : 0.f);
            }
        for (int c = w.lane; c < 16 * M; c += 32) {
            float v = w.channel + c < CHANNELS ? parameter(p.dt_b, (size_t)w.dir * CHANNELS + w.channel + c) : 0.f;
            float *at = bias + (c / (2 * S) * S + c % S) * 4 + c / S % 2;
            at[0] = at[2] = v;
        }
#endif
        sync_warp();
    }
    // Δ of a tile: softplus(time_step dt_proj' + bias), or of the scan alone, of a tile that is `given`, and the bias;
    // into delta[t][channel]. Steps past the end get a Δ too; their inputs and the gradients that come back to them are
    // zero.
    // If the warp is split, half of the channels in each. With a state, which they would change, steps past the end get
    // zero.
    __device__ __forceinline__ void apply(const Args &p, const Walk &w, int begin, const io_t *proj, float *delta,
                                          const io_t *given) const {
        const int LD = 16 * M + 4, S = 2 * M;
        const int g = w.g, q = w.q, COUNT = S / (SPLIT + 1), first = w.half * COUNT;  // slots of channels
        float acc[COUNT][4];
#if EXACT
        const float *lines = (const float *)weight + 2 * q * S * LINE;
#pragma unroll
        for (int s = 0; s < S; s++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[s][e] = lines[((e & 1) * S + s) * LINE + RANKS];
#pragma unroll
        for (int r = 0; r < R; r += 4) {
            float x[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const io_t *at = proj + (g + 8 * half) * PROJ + r;
                if (PROJ % 4 == 0 && r + 4 <= R) unpack4(x[half], at);
                else
                    for (int i = 0; i < 4; i++) x[half][i] = r + i < R ? value(at[i]) : 0.f;
            }
#pragma unroll
            for (int s = 0; s < S; s++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    float weights[4];
                    load_vector<4>(weights, lines + ((e & 1) * S + s) * LINE + r);
#pragma unroll
                    for (int i = 0; i < 4; i++) acc[s][e] = fmaf(x[e >> 1][i], weights[i], acc[s][e]);
                }
        }
#else
        u32 words[EIGHTS ? WORDS(M) : 1];
        if (SPLIT) {
#pragma unroll
            for (int i = 0; i < COUNT * EIGHTS; i++) words[i] = weight[(first * EIGHTS + i) * 32 + w.lane];
        } else {
#pragma unroll
            for (int i = 0; i < WORDS(M); i += 4) {
                uint4 v = *(const uint4 *)(weight + (i * 8 + w.lane) * 4);
                words[i] = v.x, words[i + 1] = v.y, words[i + 2] = v.z, words[i + 3] = v.w;
            }
        }
#pragma unroll
        for (int s = 0; s < COUNT; s++) load_vector<4>(acc[s], bias + (q * S + first + s) * 4);
#pragma unroll
        for (int k = 0; k < EIGHTS; k += 2) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                a[i] = k + (i >> 1) < EIGHTS ? ranks(proj + (g + 8 * (i & 1)) * PROJ, 8 * (k + (i >> 1)) + 2 * q) : 0u;
            }
#pragma unroll
            for (int s = 0; s < COUNT; s++) {
                if (k + 1 < EIGHTS) mma_k16(acc[s], a, words[s * EIGHTS + k], words[s * EIGHTS + k + 1]);
                else mma_k8(acc[s], a, words[s * EIGHTS + k]);
            }
        }
#endif
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float v[2 * S], *to = delta + (g + 8 * half) * LD + 2 * q * S + first;
            const bool past = STATEFUL && w.place(begin, g + 8 * half) >= w.last;
#pragma unroll
            for (int s = 0; s < COUNT; s++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &step = acc[s][2 * half + e];
                    if (PLAIN) step += value(given[(g + 8 * half) * ROW(M) + (2 * q + e) * S + first + s]);
                    v[e * S + s] = past ? 0.f : SOFTPLUS ? softplus(step) : step;
                }
            if (!SPLIT) store_vector<2 * S>(to, v);
            else
                for (int s = 0; s < COUNT; s++) to[s] = v[s], to[S + s] = v[S + s];
        }
    }
};

// A of a state, which is given or -exp(a_log), for powers of two.
DEV float rate(const Args &p, size_t at) {
    return (PLAIN ? parameter(p.a_log, at) : -expf(parameter(p.a_log, at))) * LOG2E;
}
// The row of a half of the channels, of the scan alone.
DEV size_t half_row(const Walk &w) { return w.row * 2 * CHANNELS + w.dir * CHANNELS + w.channel; }
// A of a lane's channels and states, from group FIRST of eight on.
template <int M, int COUNT> DEV void load_A(const Args &p, const Walk &w, float a[M][COUNT][4], int first = 0) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int nt = 0; nt < COUNT; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int channel = w.channel + w.g * 2 * M + 2 * i + (e >> 1), n = (first + nt) * 8 + 2 * w.q + (e & 1);
                bool valid = channel < CHANNELS && n < N;
                a[i][nt][e] = valid ? rate(p, ((size_t)w.dir * CHANNELS + channel) * N + n) : 0.f;
            }
}
// States lie in memory as the lanes of a walk over 16 channels hold them: [dir][b][part][block of 16][group of 8
// states][lane][4]. Where those of a lane lie, in a walk over 16 M channels; those of the i-th result 16 i further on.
#define STATES_OF_PART ((CHANNELS + 15) / 16 * NT * 128)
template <int M, typename T> DEV T *fragment(T *to, const Args &p, const Walk &w, int parts, int part) {
    size_t at = (size_t)(w.dir * p.B + w.b) * parts + part;
    return to + at * STATES_OF_PART + (w.channel / 16 + w.g * M / 8) * NT * 128 + (w.g * M % 8 * 4 + w.q) * 4;
}
template <int M, int COUNT> DEV void load_states(float h[M][COUNT][4], const float *from, const Walk &w) {
    if (M > 1 && w.channel + w.g * M / 8 * 16 >= CHANNELS) return;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int nt = 0; nt < COUNT; nt++) load_vector<4>(h[i][nt], from + nt * 128 + i * 16);
}
template <int M, int COUNT> DEV void store_states(float *to, const float h[M][COUNT][4], const Walk &w) {
    if (M > 1 && w.channel + w.g * M / 8 * 16 >= CHANNELS) return;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int nt = 0; nt < COUNT; nt++) store_vector<4>(to + nt * 128 + i * 16, h[i][nt]);
}
// What the walk starts with, and leaves: `Args`.
template <int M, int COUNT> DEV size_t place_of_state(const Args &p, const Walk &w, int first, int i, int nt, int e) {
    const int channel = w.channel + w.g * 2 * M + 2 * i + (e >> 1), n = (first + nt) * 8 + 2 * w.q + (e & 1);
    const bool exists = channel < CHANNELS && n < N;
    return exists ? ((size_t)(w.dir * p.B + w.b) * CHANNELS + channel) * N + n : ~(size_t)0;
}
template <int M, int COUNT> DEV void load_start(float h[M][COUNT][4], const Args &p, const Walk &w, int first = 0) {
    if (!p.start) return;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int nt = 0; nt < COUNT; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const size_t at = place_of_state<M, COUNT>(p, w, first, i, nt, e);
                h[i][nt][e] = ~at ? p.start[at] : 0.f;
            }
}
template <int M, int COUNT>
DEV void store_end(const float h[M][COUNT][4], const Args &p, const Walk &w, int first = 0) {
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int nt = 0; nt < COUNT; nt++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const size_t at = place_of_state<M, COUNT>(p, w, first, i, nt, e);
                if (~at) p.end[at] = h[i][nt][e];
            }
}
template <int M, int COUNT> DEV void keep_states(kept_t *to, const float h[M][COUNT][4], const Walk &w) {
    if (M > 1 && w.channel + w.g * M / 8 * 16 >= CHANNELS) return;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int nt = 0; nt < COUNT; nt++) store_kept(to + nt * 128 + i * 16, h[i][nt]);
}
// B or C (at `offset` of the projection) of a token and a state.
DEV float projected(const io_t *proj, int t, int offset, int n) {
    return N % 8 == 0 || n < N ? value(proj[t * PROJ + offset + n]) : 0.f;
}
// Of two neighbouring states, from an even one on.
DEV void projected2(float to[2], const io_t *proj, int t, int offset, int n) {
    if (PROJ % 2 == 0 && R % 2 == 0 && N % 8 == 0) {
        float2 v = load2(proj + t * PROJ + offset + n);
        to[0] = v.x, to[1] = v.y;
    } else to[0] = projected(proj, t, offset, n), to[1] = projected(proj, t, offset, n + 1);
}
// The same two in the type of activations, of float ones as float16; and as float16.
DEV u32 projected_pair(const io_t *proj, int t, int offset, int n) {
    const io_t *at = proj + t * PROJ + offset + n;
    if (N % 8 != 0 && n >= N) return 0;
    return IO && R % 2 == 0 && N % 2 == 0 ? *(const u32 *)at : N % 8 == 0 || n + 1 < N ? pair16(at) : single16(at);
}
DEV u32 projected_half2(const io_t *proj, int t, int offset, int n) {
    const u32 v = projected_pair(proj, t, offset, n);
    return IO != 2 ? v : pack_half_finite(load16((u16)v, false), load16((u16)(v >> 16), false));
}
// S neighbouring activations, at a multiple of S.
template <int S> DEV void load_channels_of_lane(float *to, const io_t *from) {
    if (S == 2) {
        float2 v = load2(from);
        to[0] = v.x, to[1] = v.y;
    } else unpack4(to, from);
}

// Contractions over the states at one step of four: a factor is let through in the lanes of its own step. After the
// four, lane (g, q) has the sums of step q.
// Of states h: as 16-bit values, float16 because it is as precise as tf32; states over 65504 count as that much. Lane
// (g, q) holds the factor of step g / 2, the states 2q and 2q + 1 of each group. Sums: of channel row g in sum[0], of
// row g + 8 in sum[2]; the other elements are by-products.
template <int COUNT> DEV void contract_states(float *sum, const float x[COUNT][4], const u32 *factor, u32 mask) {
#pragma unroll
    for (int nt = 0; nt < COUNT; nt += 2) {
        u32 rows[4] = {pack_half_finite(x[nt][0], x[nt][1]), pack_half_finite(x[nt][2], x[nt][3])};
        if (nt + 1 < COUNT) {
            const float *more = x[nt + 1 < COUNT ? nt + 1 : 0];
            rows[2] = pack_half_finite(more[0], more[1]), rows[3] = pack_half_finite(more[2], more[3]);
            mma_half_k16(sum, rows, factor[nt] & mask, factor[nt + 1 < COUNT ? nt + 1 : 0] & mask);
        } else mma_half_k8(sum, rows, factor[nt] & mask);
    }
}
// Of adjoint states, which as gradients may be too small for float16. Lane (g, q) holds the factor of step g / 2 and
// state 2q + g % 2 of a group. Sums: of channel row g in low[0] + low[3], of row g + 8 in high[0] + high[3].
DEV void contract_adjoints(float *low, float *high, const float *x, float factor) {
    mma_tf32_k4(low, x[0], x[1], factor);
    mma_tf32_k4(high, x[2], x[3], factor);
}

// The states before every 8 tokens of a turn: how many there is room for.
DEV int sub_parts(const Args &p) { return p.turn < 0 ? (p.L + 7) / 8 : p.chunk * p.span / 8; }
""",
}
