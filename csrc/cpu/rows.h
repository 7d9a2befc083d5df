// The row kernels. Included by rows_avx512.cpp, rows_avx2.cpp and rows_portable.cpp, which differ in their flags only.
//
//   m = max z,  s = sum exp(z - m),  t = sum exp(z - m)·(z - m)
//   logp = z_target - m - log s      H = log s - t / s
//   dloss/dz_v = g_l·([v = target] - p_v) - g_H·p_v·(log p_v + H),   p_v = exp(z_v - m - log s)
//
// A row is read in blocks that stay in the L1 cache: the block's maximum first, then its sums against the running
// maximum. The order of every addition depends on V and the vector width only, never on other rows or on threads.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace {

using igrpo::LogitTransform;
using igrpo::RowGradients;
using igrpo::Rows;
using igrpo::RowStats;
using igrpo::TokenConstants;

constexpr int64_t kBlock = 1024;
constexpr int64_t kStep = 2 * kLanes;  // two independent chains hide the latency of the sums
const float kInf = __builtin_inff();
const float kNaN = __builtin_nanf("");

// z from x; `slope` is dz/dx.
template <bool kSoftcap>
struct Transform {
  Transform(const Rows& rows, int64_t r)
      : Transform(rows.transform, rows.temperatures == nullptr ? rows.transform.temperature : rows.temperatures[r]) {}
  Transform(const LogitTransform& t, float temperature)
      : inner(kSoftcap ? t.logit_scale / t.softcap : t.logit_scale / temperature),
        outer(t.softcap / temperature),
        gain(t.logit_scale / temperature) {}

  vf operator()(vf x) const { return kSoftcap ? tanh_v(x * inner) * outer : x * inner; }
  vf slope(vf x) const {
    if (!kSoftcap) return splat(gain);
    const vf y = tanh_v(x * inner);
    return (1.0f - y * y) * gain;
  }

  float inner, outer, gain;
};

// V is rarely a multiple of the lanes: the last vector is filled from a padded copy.
template <class T>
vf load_tail(const typename T::Storage* x, int64_t count) {
  typename T::Storage padded[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = x[i];
  return T::load(padded);
}

template <class T>
void store_tail(typename T::Storage* y, vf v, int64_t count) {
  typename T::Storage padded[kLanes];
  T::store(padded, v);
  for (int64_t i = 0; i < count; ++i) y[i] = padded[i];
}

vf pad_tail(vf z, int64_t count, float fill) {
  for (int64_t i = count; i < kLanes; ++i) z[i] = fill;
  return z;
}

struct Sums {
  float m = -kInf, s = 0.0f, t = 0.0f;

  // A column of -inf has z - m = -inf; the clamp makes its product 0·(-88) instead of NaN.
  static void add(vf z, float center, vf& s, vf& t) {
    const vf d = at_least(z - center, splat(-88.0f));
    const vf e = exp_v(d);
    s += e;
    t += e * d;
  }

  // Moves the reference point from m to the new maximum: every z - m shrinks by the same step.
  void rescale(float maximum) {
    const float step = m - maximum, factor = s == 0.0f ? 0.0f : __builtin_expf(step);
    t = s == 0.0f ? 0.0f : factor * (t + s * step);
    s *= factor;
    m = maximum;
  }
};

// Folds z[0, count) of one block into `sums`; count is a multiple of kLanes (padded with -inf).
void add_block(const float* z, int64_t count, float block_max, Sums& sums) {
  if (block_max > sums.m) sums.rescale(block_max);
  const float center = sums.m == -kInf ? 0.0f : sums.m;
  vf s0 = {}, s1 = {}, t0 = {}, t1 = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    Sums::add(Float32::load(z + i), center, s0, t0);
    Sums::add(Float32::load(z + i + kLanes), center, s1, t1);
  }
  if (i < count) Sums::add(Float32::load(z + i), center, s0, t0);
  sums.s += sum_of(s0 + s1);
  sums.t += sum_of(t0 + t1);
}

template <class T, class Z>
Sums reduce_row(const typename T::Storage* x, int64_t vocab, const Z& transform) {
  alignas(64) float z[kBlock];
  Sums sums;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t count = vocab - begin < kBlock ? vocab - begin : kBlock;
    vf m0 = splat(-kInf), m1 = m0;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      const vf a = transform(T::load(x + begin + i)), b = transform(T::load(x + begin + i + kLanes));
      Float32::store(z + i, a);
      Float32::store(z + i + kLanes, b);
      m0 = max2(m0, a);
      m1 = max2(m1, b);
    }
    for (; i < count; i += kLanes) {
      const int64_t left = count - i;
      vf a = left >= kLanes ? transform(T::load(x + begin + i)) : transform(load_tail<T>(x + begin + i, left));
      a = pad_tail(a, left, -kInf);
      Float32::store(z + i, a);
      m0 = max2(m0, a);
    }
    add_block(z, i, max_of(max2(m0, m1)), sums);
  }
  return sums;
}

template <class T, class Z>
float transformed_at(const typename T::Storage* x, const Z& transform) {
  return transform(load_tail<T>(x, 1))[0];
}

struct Row {
  int64_t r, target;
  bool target_in_vocab;
  float logp, entropy, max, log_sum;
};

template <class T, class Z>
Row measure_row(const typename T::Storage* x, int64_t r, const Rows& rows, const Z& transform) {
  const Sums sums = reduce_row<T>(x, rows.vocab, transform);
  // A NaN logit shows in the sum and not in the maximum: beside nothing but -inf the row is no shard without a share.
  const float max = sums.s == sums.s ? sums.m : kNaN;
  Row row{r, rows.index[r], false, kNaN, kNaN, max, __builtin_logf(sums.s)};
  // A row of -inf only has no distribution: NaN, as PyTorch answers.
  if (sums.m == -kInf) row.log_sum = kNaN;
  row.entropy = row.log_sum - sums.t / sums.s;
  row.target_in_vocab = row.target >= 0 && row.target < rows.vocab;
  if (row.target_in_vocab) row.logp = transformed_at<T>(x + row.target, transform) - row.max - row.log_sum;
  return row;
}

void write_stats(const Row& row, int64_t n, const RowStats& out) {
  out.logps[row.r] = row.logp;
  out.entropy[row.r] = row.entropy;
  out.norm[row.r] = row.max;
  out.norm[n + row.r] = row.log_sum;
}

void write_masked(int64_t r, int64_t n, const RowStats& out) {
  out.logps[r] = out.entropy[r] = out.norm[r] = out.norm[n + r] = 0.0f;
}

// dloss/dx of columns whose logits are x, the target's +g_l left out.
template <bool kEntropy, class Z>
vf grad_of(vf x, const Row& row, float g_logp, float g_entropy, const Z& transform) {
  const vf log_p = (transform(x) - row.max) - row.log_sum;
  const vf p = exp_v(log_p);
  // Where p = 0 the bracket may be infinite; the clamp keeps the product 0.
  const vf inner = kEntropy ? g_logp + g_entropy * (at_least(log_p, splat(-88.0f)) + row.entropy) : splat(g_logp);
  return -(p * inner) * transform.slope(x);
}

template <class T, bool kEntropy, class Z>
void write_grad(const typename T::Storage* x, typename T::Storage* y, const Row& row, int64_t vocab, float g_logp,
                float g_entropy, const Z& transform) {
  // Kept from before the loop, which may overwrite x: in place x and y are the same memory.
  const vf x_target = load_tail<T>(x + row.target, 1);
  int64_t i = 0;
  for (; i + kStep <= vocab; i += kStep) {
    const vf a = grad_of<kEntropy>(T::load(x + i), row, g_logp, g_entropy, transform);
    const vf b = grad_of<kEntropy>(T::load(x + i + kLanes), row, g_logp, g_entropy, transform);
    T::store(y + i, a);
    T::store(y + i + kLanes, b);
  }
  for (; i < vocab; i += kLanes) {
    const int64_t left = vocab - i < kLanes ? vocab - i : kLanes;
    store_tail<T>(y + i, grad_of<kEntropy>(load_tail<T>(x + i, left), row, g_logp, g_entropy, transform), left);
  }
  // 1 - p as -expm1(log p): no second rounding where p is close to 1.
  const float p = __builtin_expf(row.logp), not_p = -__builtin_expm1f(row.logp);
  const float entropy_part = kEntropy && p > 0.0f ? g_entropy * p * (row.logp + row.entropy) : 0.0f;
  const vf at_target = splat(g_logp * not_p - entropy_part) * transform.slope(x_target);
  store_tail<T>(y + row.target, at_target, 1);
}

template <class T>
void fill_row(typename T::Storage* y, int64_t vocab, float value) {
  typename T::Storage pattern[kLanes];
  T::store(pattern, splat(value));
  for (int64_t i = 0; i < vocab; ++i) y[i] = pattern[0];
}

template <class T, class Z>
void finish_row(const typename T::Storage* x, typename T::Storage* y, const Row& row, int64_t vocab, float g_logp,
                float g_entropy, const Z& transform) {
  if (!row.target_in_vocab) return fill_row<T>(y, vocab, kNaN);
  if (g_logp == 0.0f && g_entropy == 0.0f) return fill_row<T>(y, vocab, 0.0f);
  if (g_entropy == 0.0f) return write_grad<T, false>(x, y, row, vocab, g_logp, 0.0f, transform);
  write_grad<T, true>(x, y, row, vocab, g_logp, g_entropy, transform);
}

template <class T>
const typename T::Storage* logits_row(const Rows& rows, int64_t r) {
  return static_cast<const typename T::Storage*>(rows.logits) + r / rows.inner * rows.logits_stride_outer +
         r % rows.inner * rows.logits_stride_inner;
}

template <class T>
typename T::Storage* grad_row(const Rows& rows, int64_t r) {
  return static_cast<typename T::Storage*>(rows.grad) + r / rows.inner * rows.grad_stride_outer +
         r % rows.inner * rows.grad_stride_inner;
}

bool masked_out(const Rows& rows, int64_t r) { return rows.mask != nullptr && !rows.mask[r]; }

template <class T, bool kSoftcap>
struct RowLoops {
  static void stats(const Rows& rows, const RowStats& out, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (masked_out(rows, r)) {
        write_masked(r, rows.n, out);
      } else {
        write_stats(measure_row<T>(logits_row<T>(rows, r), r, rows, Transform<kSoftcap>(rows, r)), rows.n, out);
      }
    }
  }

  static void grad(const Rows& rows, const RowStats& stats, const RowGradients& g, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      typename T::Storage* y = grad_row<T>(rows, r);
      if (masked_out(rows, r)) {
        fill_row<T>(y, rows.vocab, 0.0f);
        continue;
      }
      const Transform<kSoftcap> transform(rows, r);
      const int64_t target = rows.index[r];
      const Row row{r,
                    target,
                    target >= 0 && target < rows.vocab,
                    stats.logps[r],
                    stats.entropy[r],
                    stats.norm[r],
                    stats.norm[rows.n + r]};
      finish_row<T>(logits_row<T>(rows, r), y, row, rows.vocab, g.logps[r], g.entropy ? g.entropy[r] : 0.0f, transform);
    }
  }

  static void token_loss(const Rows& rows, const RowStats& out, const TokenConstants& c, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      typename T::Storage* y = grad_row<T>(rows, r);
      if (masked_out(rows, r)) {
        write_masked(r, rows.n, out);
        c.grad_logps[r] = 0.0f;
        fill_row<T>(y, rows.vocab, 0.0f);
        continue;
      }
      const Transform<kSoftcap> transform(rows, r);
      const typename T::Storage* x = logits_row<T>(rows, r);
      const Row row = measure_row<T>(x, r, rows, transform);
      write_stats(row, rows.n, out);
      c.grad_logps[r] = igrpo::cpu::token_coefficient(row.logp, r, c);
      finish_row<T>(x, y, row, rows.vocab, c.grad_logps[r], c.grad_entropy ? c.grad_entropy[r] : 0.0f, transform);
    }
  }
};

// Calls f(RowLoops<T, softcap>{}) for the dtype and transform of `rows`.
template <class F>
void dispatch(const Rows& rows, const F& f) {
  const bool softcap = rows.transform.softcap > 0.0f;
  switch (rows.dtype) {
    case igrpo::DType::kFloat32:
      return softcap ? f(RowLoops<Float32, true>{}) : f(RowLoops<Float32, false>{});
    case igrpo::DType::kBFloat16:
      return softcap ? f(RowLoops<BFloat16, true>{}) : f(RowLoops<BFloat16, false>{});
    case igrpo::DType::kFloat16:
      return softcap ? f(RowLoops<Float16, true>{}) : f(RowLoops<Float16, false>{});
  }
}

void row_stats(const Rows& rows, const RowStats& out, int64_t begin, int64_t end) {
  dispatch(rows, [&](auto loops) { loops.stats(rows, out, begin, end); });
}

void row_grad(const Rows& rows, const RowStats& stats, const RowGradients& g, int64_t begin, int64_t end) {
  dispatch(rows, [&](auto loops) { loops.grad(rows, stats, g, begin, end); });
}

void token_loss(const Rows& rows, const RowStats& out, const TokenConstants& c, int64_t begin, int64_t end) {
  dispatch(rows, [&](auto loops) { loops.token_loss(rows, out, c, begin, end); });
}

}  // namespace
