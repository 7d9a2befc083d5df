// Device arithmetic of one row: 16-byte packs, the running sums of a softmax, and the gradient of an element.
// The equations are those of csrc/cpu/rows.h; sums are merged in an order that V and the launch plan fix.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "../params.h"
#include "../token_objective.h"

namespace igrpo::cuda {

constexpr int kWarp = 32;
constexpr float kMinLogP = -88.0f;  // exp below it is 0 in fp32

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xFF800000); }
__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7FC00000); }

// 16 bytes of logits as floats.
template <class T>
struct Pack {
  static constexpr int kCount = 16 / sizeof(T);

  __device__ static void unpack(const uint4& bits, float (&x)[kCount]) {
    T values[kCount];
    memcpy(values, &bits, sizeof values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = static_cast<float>(values[i]);
  }
  __device__ static uint4 pack(const float (&x)[kCount]) {
    T values[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<T>(x[i]);
    uint4 bits;
    memcpy(&bits, values, sizeof bits);
    return bits;
  }
};

// z from x, and dz/dx.
template <bool kSoftcap>
struct Transform {
  float inner, outer, gain;

  __device__ explicit Transform(const LogitTransform& t)
      : inner(kSoftcap ? t.logit_scale / t.softcap : t.logit_scale / t.temperature),
        outer(t.softcap / t.temperature),
        gain(t.logit_scale / t.temperature) {}
  __device__ float operator()(float x) const { return kSoftcap ? tanhf(x * inner) * outer : x * inner; }
  __device__ float slope(float x) const {
    if constexpr (!kSoftcap) return gain;
    const float y = tanhf(x * inner);
    return (1.0f - y * y) * gain;
  }
};

// m = max z, s = sum exp(z - m), t = sum exp(z - m)·(z - m)
struct Sums {
  float m, s, t;

  __device__ Sums() : m(negative_infinity()), s(0.0f), t(0.0f) {}

  // Every z - m shrinks by the same step when the reference point rises.
  __device__ void rescale(float maximum) {
    const float step = m - maximum, factor = s == 0.0f ? 0.0f : __expf(step);
    t = s == 0.0f ? 0.0f : factor * (t + s * step);
    s *= factor;
    m = maximum;
  }

  template <int kCount>
  __device__ void add(const float (&z)[kCount]) {
    float top = z[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) top = fmaxf(top, z[i]);
    if (top > m) rescale(top);
    const float center = m == negative_infinity() ? 0.0f : m;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float d = z[i] - center;
      // Written so that NaN goes through exp; -inf contributes exactly 0 to both sums.
      const float e = d < kMinLogP ? 0.0f : __expf(d);
      s += e;
      t += e * (d < kMinLogP ? 0.0f : d);
    }
  }

  __device__ void merge(Sums other) {
    if (other.m > m) rescale(other.m);
    if (m > other.m) other.rescale(m);
    s += other.s;
    t += other.t;
  }
};

// A fixed butterfly: the same tree for every row.
__device__ __forceinline__ Sums merge_warp(Sums x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    Sums other;
    other.m = __shfl_down_sync(0xFFFFFFFFu, x.m, offset);
    other.s = __shfl_down_sync(0xFFFFFFFFu, x.s, offset);
    other.t = __shfl_down_sync(0xFFFFFFFFu, x.t, offset);
    x.merge(other);
  }
  return x;
}

// The block's sums, valid in warp 0's lane 0. `scratch` holds one entry per warp and is free again after the caller's
// next __syncthreads.
__device__ __forceinline__ Sums merge_block(Sums x, float3* scratch) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  x = merge_warp(x);
  if (lane == 0) scratch[warp] = make_float3(x.m, x.s, x.t);
  __syncthreads();
  Sums all;
  if (warp == 0) {
    if (lane < warps) {
      const float3 part = scratch[lane];
      all.m = part.x;
      all.s = part.y;
      all.t = part.z;
    }
    all = merge_warp(all);
  }
  return all;
}

// Everything the gradient of a row needs.
struct RowResult {
  float max, log_sum, logp, entropy, grad_logp, grad_entropy;
};

__device__ __forceinline__ RowResult row_result(const Sums& sums, float z_target, bool target_in_vocab) {
  RowResult row{};
  row.max = sums.m;
  // A row of -inf only has no distribution: NaN, as PyTorch answers.
  row.log_sum = sums.m == negative_infinity() ? quiet_nan() : logf(sums.s);
  row.entropy = row.log_sum - sums.t / sums.s;
  row.logp = target_in_vocab ? z_target - row.max - row.log_sum : quiet_nan();
  return row;
}

__device__ __forceinline__ void write_stats(const RowResult& row, int64_t r, int64_t n, const RowStats& out) {
  out.logps[r] = row.logp;
  out.entropy[r] = row.entropy;
  out.norm[r] = row.max;
  out.norm[n + r] = row.log_sum;
}

__device__ __forceinline__ void write_masked_stats(int64_t r, int64_t n, const RowStats& out) {
  out.logps[r] = out.entropy[r] = out.norm[r] = out.norm[n + r] = 0.0f;
}

// dloss/dx of a column whose logit is x, the target's +g_l left out.
template <bool kEntropy, bool kSoftcap>
__device__ __forceinline__ float grad_of(float x, const RowResult& row, const Transform<kSoftcap>& transform) {
  const float log_p = transform(x) - row.max - row.log_sum;
  const float p = log_p < kMinLogP ? 0.0f : __expf(log_p);
  const float inner = kEntropy ? row.grad_logp + row.grad_entropy * (fmaxf(log_p, kMinLogP) + row.entropy) : row.grad_logp;
  return -(p * inner) * transform.slope(x);
}

template <bool kSoftcap>
__device__ __forceinline__ float grad_at_target(float x, const RowResult& row, const Transform<kSoftcap>& transform) {
  const float p = expf(row.logp), not_p = -expm1f(row.logp);
  const float entropy_part = p > 0.0f ? row.grad_entropy * p * (row.logp + row.entropy) : 0.0f;
  return (row.grad_logp * not_p - entropy_part) * transform.slope(x);
}

}  // namespace igrpo::cuda
