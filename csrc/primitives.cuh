// What all kernels share: the options they are compiled for, their arguments, single instructions, typed loads and
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
