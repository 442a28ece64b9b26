// The selective scan alone, in float32 and plain instructions, for GPUs without the tensor cores' bfloat16 and without
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
