// A walk: one warp, one direction, 16 M channels, tiles of 16 tokens. Tiles are aligned in the sequence (for a general
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
