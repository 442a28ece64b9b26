// Backward of the scan. A warp walks its tiles against the visits: it recomputes the states of 8 tokens from the state
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
