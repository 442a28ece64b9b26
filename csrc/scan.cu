// The forward scan, and the walks that differ little from it: states and adjoint states of chunks.
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
