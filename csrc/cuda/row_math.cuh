// Device arithmetic of one row: granules of 16 bytes, the running sums of a softmax, and the gradient of an element.
// The equations are those of csrc/cpu/rows.h; sums are merged in an order that V and the launch plan fix.
//
// Distances from the maximum are in units of ln 2, so that an exp is one instruction and its scale part of the
// subtraction. What that flushes to zero: probabilities below 2^-126 of the row's largest, and gradients below 2^-126.
#pragma once

#include <cfloat>
#include <type_traits>

#include "../params.h"
#include "../token_objective.h"
#include "fast_math.cuh"

namespace igrpo::cuda {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.69314718055994531f;

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xFF800000); }
__device__ __forceinline__ float quiet_nan() { return __int_as_float(0x7FC00000); }

// 16 bytes of logits.
template <class T>
struct Pack {
  static constexpr int kCount = 16 / sizeof(T), kPairs = kCount / 2;

  __device__ static void unpack(const uint4& bits, Two (&x)[kPairs]) {
    x[0] = Word<T>::split(bits.x);
    x[1] = Word<T>::split(bits.y);
    x[2] = Word<T>::split(bits.z);
    x[3] = Word<T>::split(bits.w);
  }
  __device__ static uint4 pack(const Two (&x)[kPairs]) {
    return {Word<T>::join(x[0]), Word<T>::join(x[1]), Word<T>::join(x[2]), Word<T>::join(x[3])};
  }
  // The largest logit of kMany granules, NaN left out; with kRising = false that of their negatives.
  template <bool kRising, int kMany>
  __device__ static float top(const uint4 (&bits)[kMany]) {
    const auto larger = [](uint32_t a, uint32_t b) {
      return kRising ? Word<T>::larger(a, b) : Word<T>::smaller(a, b);
    };
    uint32_t all = bits[0].x;
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      const uint32_t left = larger(bits[i].x, bits[i].y), right = larger(bits[i].z, bits[i].w);
      all = i == 0 ? larger(left, right) : larger(all, larger(left, right));
    }
    const Two x = Word<T>::split(all);
    return kRising ? fmaxf(x.x, x.y) : -fminf(x.x, x.y);
  }
  __device__ static uint4 bounded(const uint4& a, float limit) {
    const uint32_t low = Word<T>::join({-limit, -limit}), high = Word<T>::join({limit, limit});
    return {Word<T>::bounded(a.x, low, high), Word<T>::bounded(a.y, low, high), Word<T>::bounded(a.z, low, high),
            Word<T>::bounded(a.w, low, high)};
  }
};

template <>
struct Pack<float> {
  static constexpr int kCount = 4, kPairs = 2;

  __device__ static void unpack(const uint4& bits, Two (&x)[kPairs]) {
    x[0] = {__int_as_float(bits.x), __int_as_float(bits.y)};
    x[1] = {__int_as_float(bits.z), __int_as_float(bits.w)};
  }
  __device__ static uint4 pack(const Two (&x)[kPairs]) {
    return {bits_of(x[0].x), bits_of(x[0].y), bits_of(x[1].x), bits_of(x[1].y)};
  }
  template <bool kRising, int kMany>
  __device__ static float top(const uint4 (&bits)[kMany]) {
    float all = negative_infinity();
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      Two x[kPairs];
      unpack(bits[i], x);
#pragma unroll
      for (const Two& pair : x) all = fmaxf(all, kRising ? fmaxf(pair.x, pair.y) : -fminf(pair.x, pair.y));
    }
    return all;
  }
  __device__ static uint4 bounded(const uint4& a, float limit) {
    Two x[kPairs];
    unpack(a, x);
#pragma unroll
    for (Two& pair : x) {
      pair = {igrpo::cuda::bounded(pair.x, -limit, limit), igrpo::cuda::bounded(pair.y, -limit, limit)};
    }
    return pack(x);
  }

 private:
  __device__ static uint32_t bits_of(float x) { return static_cast<uint32_t>(__float_as_int(x)); }
};

// z from x in units of ln 2. Logits beyond ±limit count as ±limit, but for infinite maxima: no product overflows.
// tanh(y) = 1 - 2r and its derivative 4(r - r²), r = 1 / (1 + e^2y): absolute error 2e-7, for logits of 16 bits.
template <class T, bool kSoftcap>
struct Transform {
  static constexpr bool kFastTanh = kSoftcap && sizeof(T) == 2;
  float inner, outer, gain, limit;

  __device__ explicit Transform(const LogitTransform& t) : Transform(t, t.temperature) {}
  __device__ explicit Transform(const float4& x) : inner(x.x), outer(x.y), gain(x.z), limit(x.w) {}
  __device__ Transform(const LogitTransform& t, float temperature)
      : inner(kSoftcap ? t.logit_scale / t.softcap : t.logit_scale / temperature * kLog2e),
        outer(t.softcap / temperature * kLog2e),
        gain(t.logit_scale / temperature) {
    // A power of two, so that its product is exact; up to it, the rounding of a maximum moves no distance by 16.
    const float power = exp2f(floorf(28.0f - log2f(fabsf(inner))));
    limit = kSoftcap ? FLT_MAX : std::is_same_v<T, __half> ? fminf(65504.0f, power) : power;
  }
  __device__ float4 numbers() const { return make_float4(inner, outer, gain, limit); }
  __device__ bool rising() const { return gain > 0.0f; }
  __device__ float operator()(float x) const { return kSoftcap ? tanhf(x * inner) * outer : bounded(x) * inner; }
  __device__ float slope(float x) const {
    if constexpr (!kSoftcap) return gain;
    const float y = tanhf(x * inner);
    return (1.0f - y * y) * gain;
  }
  // z - center as precisely as fp32 allows.
  __device__ float exact_distance(float x, float center) const {
    return kSoftcap ? (*this)(x) - center : fmaf(isinf(x) ? x : bounded(x), inner, -center);
  }
  // z of the logit ±top.
  __device__ float center_of(float top) const { return (*this)(rising() ? top : -top); }
  __device__ float bounded(float x) const { return igrpo::cuda::bounded(x, -limit, limit); }
  // What a distance may be computed from.
  __device__ uint4 bounded(const uint4& bits) const { return kSoftcap ? bits : Pack<T>::bounded(bits, limit); }

  // z - center; `slopes` becomes dz/dx / gain, or a quarter of it with kFastTanh.
  __device__ Two distance(Two x, float center, Two& slopes) const {
    if constexpr (kFastTanh) {
      const float twice = 2.0f * kLog2e * inner;
      const Two y = mul(x, {twice, twice});
      const Two u = add({exp2_flushed(y.x), exp2_flushed(y.y)}, {1.0f, 1.0f});
      const Two r = {reciprocal(u.x), reciprocal(u.y)};
      slopes = fma(r, {-r.x, -r.y}, r);
      return fma(r, {-2.0f * outer, -2.0f * outer}, {outer - center, outer - center});
    } else if constexpr (kSoftcap) {
      const Two y = {tanhf(x.x * inner), tanhf(x.y * inner)};
      slopes = fma(y, {-y.x, -y.y}, {1.0f, 1.0f});
      return fma(y, {outer, outer}, {-center, -center});
    } else {
      return fma(x, {inner, inner}, {-center, -center});
    }
  }
};

// m = max of ±x, center = its z, s = sum 2^(z - center), t = sum 2^(z - center)·(z - center)
struct Sums {
  float m, center, s, t;

  // Every distance shrinks by the same step when the reference point rises.
  __device__ void rescale(float top, float center_of_top) {
    const float step = center - center_of_top, factor = exp2_flushed(step);
    t = factor * fmaf(s, step, t);
    s *= factor;
    m = top;
    center = center_of_top;
  }
};

// The sums of one thread while it walks over its granules: of even and of odd columns.
template <class T, bool kSoftcap>
struct RunningSums {
  const Transform<T, kSoftcap>& transform;
  float m, center;
  Two s{0.0f, 0.0f}, t{0.0f, 0.0f};

  __device__ explicit RunningSums(const Transform<T, kSoftcap>& how)
      : transform(how), m(negative_infinity()), center(how.center_of(m)) {}

  __device__ void raise(float top) {
    const float to = transform.center_of(top), step = center - to, factor = exp2_flushed(step);
    t = mul({factor, factor}, fma(s, {step, step}, t));
    s = mul({factor, factor}, s);
    m = top;
    center = to;
  }
  __device__ void add_pair(Two x) {
    Two slopes;
    const Two d = transform.distance(x, center, slopes), e = {exp2_flushed(d.x), exp2_flushed(d.y)};
    s = add(s, e);
    t = fma(e, d, t);
  }
  template <bool kRising, int kMany>
  __device__ void add_granules(const uint4 (&bits)[kMany]) {
    const float top = Pack<T>::template top<kRising>(bits);
    if (top > m) raise(top);
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      Two x[Pack<T>::kPairs];
      Pack<T>::unpack(transform.bounded(bits[i]), x);
#pragma unroll
      for (const Two& pair : x) add_pair(pair);
    }
  }
  __device__ void add_one(float x) {
    const float top = transform.rising() ? x : -x;
    if (top > m) raise(top);
    Two slopes;
    const float d = transform.distance({transform.bounded(x), 0.0f}, center, slopes).x, e = exp2_flushed(d);
    s.x += e;
    t.x = fmaf(e, d, t.x);
  }
  __device__ Sums sums() const { return {m, center, s.x + s.y, t.x + t.y}; }
};

// Merges kEach sums of every lane over groups of kLanes, in a fixed butterfly: the same tree for every row. Every lane
// gets the result.
template <int kLanes, int kEach, class Transform>
__device__ __forceinline__ Sums merge_lanes(Sums (&x)[kEach], const Transform& transform) {
  float top = x[0].m;
#pragma unroll
  for (int i = 1; i < kEach; ++i) top = fmaxf(top, x[i].m);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, offset));
  const float center = transform.center_of(top);
#pragma unroll
  for (Sums& one : x) one.rescale(top, center);
#pragma unroll
  for (int i = 1; i < kEach; ++i) {
    x[0].s += x[i].s;
    x[0].t += x[i].t;
  }
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x[0].s += __shfl_xor_sync(0xFFFFFFFFu, x[0].s, offset);
    x[0].t += __shfl_xor_sync(0xFFFFFFFFu, x[0].t, offset);
  }
  return x[0];
}

// What a warp leaves for another: one 16-byte store.
__device__ __forceinline__ float4 as_float4(const Sums& x) { return make_float4(x.m, x.center, x.s, x.t); }
__device__ __forceinline__ Sums as_sums(const float4& x) { return {x.x, x.y, x.z, x.w}; }

template <class Transform>
__device__ __forceinline__ Sums merge_warp(Sums x, const Transform& transform) {
  Sums one[1] = {x};
  return merge_lanes<kWarp>(one, transform);
}

// The block's sums, valid in warp 0. `scratch` holds one entry per warp and is free again after the caller's next
// __syncthreads.
template <int kThreads, class Transform>
__device__ __forceinline__ Sums merge_block(Sums x, float4* scratch, const Transform& transform) {
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp;
  x = merge_warp(x, transform);
  if (lane == 0) scratch[threadIdx.x / kWarp] = as_float4(x);
  __syncthreads();
  if (threadIdx.x >= kWarp) return x;
  Sums part[1] = {as_sums(scratch[lane % kWarps])};
  return merge_lanes<kWarps>(part, transform);
}

// Everything the gradient of a row needs; max in nats.
struct RowResult {
  float max, log_sum, logp, entropy, grad_logp, grad_entropy;
};

template <class T, bool kSoftcap>
__device__ __forceinline__ RowResult row_result(const Sums& sums, float x_target, bool target_in_vocab,
                                                const Transform<T, kSoftcap>& transform) {
  RowResult row{};
  // Columns of -inf alone, without a NaN: the exact maximum, by which vocab_parallel.py knows a shard without a share.
  const bool empty = !kSoftcap && sums.m == negative_infinity() && sums.s == sums.s;
  row.max = empty ? sums.m : sums.center * kLn2;
  // Rows of -inf only, or with +inf, have no distribution: NaN, as PyTorch answers. A cap makes them finite.
  row.log_sum = !kSoftcap && isinf(sums.m) ? quiet_nan() : logf(sums.s);
  row.entropy = row.log_sum - kLn2 * (sums.t / sums.s);
  row.logp = target_in_vocab ? kLn2 * transform.exact_distance(x_target, sums.center) - row.log_sum : quiet_nan();
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

// A row's constants of the gradient, the target's +g_l left out, d = z - max in units of ln 2:
//
//   dloss/dx = 2^d · (a + b·d) · dz/dx / gain           with an entropy bonus, for fp32 logits and beyond the limit
//            = ±2^(z - shift)  · dz/dx / gain            otherwise: log2 of |a| is part of the shift
struct RowSlope {
  float center, shift, a, b;
  uint32_t flip;  // the sign, of two results of 16 bits at once
  bool folded;

  RowSlope() = default;
  template <class T, bool kSoftcap>
  __device__ RowSlope(const RowResult& row, const Transform<T, kSoftcap>& transform) : center(row.max * kLog2e) {
    const float quarter = Transform<T, kSoftcap>::kFastTanh ? 4.0f : 1.0f, weight = quarter * transform.gain;
    const float scale = -weight * expf(-row.log_sum);
    a = scale * (row.grad_logp + row.grad_entropy * (row.entropy - row.log_sum));
    b = scale * (row.grad_entropy * kLn2);
    shift = center + row.log_sum * kLog2e - log2f(fabsf(weight * row.grad_logp));
    flip = weight * row.grad_logp > 0.0f ? 0x80008000u : 0u;
    folded = sizeof(T) == 2 && row.grad_entropy == 0.0f && 
             (kSoftcap || fabsf(center) < 0.9f * transform.limit * fabsf(transform.inner));
  }
};

template <bool kFolded, class T, bool kSoftcap>
__device__ __forceinline__ Two grad_of(Two x, const RowSlope& row, const Transform<T, kSoftcap>& transform) {
  Two slopes;
  const Two d = transform.distance(x, kFolded ? row.shift : row.center, slopes);
  Two grad = {exp2_flushed(d.x), exp2_flushed(d.y)};
  if constexpr (!kFolded) grad = mul(grad, fma({row.b, row.b}, d, {row.a, row.a}));
  if constexpr (kSoftcap) grad = mul(grad, slopes);
  return grad;
}

template <bool kFolded, class T, bool kSoftcap>
__device__ __forceinline__ uint4 grad_granule(const uint4& bits, const RowSlope& row,
                                              const Transform<T, kSoftcap>& transform) {
  Two x[Pack<T>::kPairs];
  Pack<T>::unpack(kFolded ? bits : transform.bounded(bits), x);
#pragma unroll
  for (Two& pair : x) pair = grad_of<kFolded>(pair, row, transform);
  const uint4 grad = Pack<T>::pack(x);
  if constexpr (!kFolded) return grad;
  return {grad.x ^ row.flip, grad.y ^ row.flip, grad.z ^ row.flip, grad.w ^ row.flip};
}

// Of one logit beside the granules.
template <class T, bool kSoftcap>
__device__ __forceinline__ T grad_of_one(T x, const RowSlope& row, const Transform<T, kSoftcap>& transform) {
  return static_cast<T>(grad_of<false>({transform.bounded(static_cast<float>(x)), 0.0f}, row, transform).x);
}

template <class T, bool kSoftcap>
__device__ __forceinline__ T grad_at_target(float x, const RowResult& row, const Transform<T, kSoftcap>& transform) {
  const float p = expf(row.logp), not_p = -expm1f(row.logp);
  const float entropy_part = p > 0.0f ? row.grad_entropy * p * (row.logp + row.entropy) : 0.0f;
  return static_cast<T>((row.grad_logp * not_p - entropy_part) * transform.slope(x));
}

}  // namespace igrpo::cuda
