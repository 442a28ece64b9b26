// RMSNorm of the float32 residual stream, out in the type of the weights: one launch instead of three. With an update,
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
