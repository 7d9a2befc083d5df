// dloss/dlogp of one token, given everything objective.py knows about it when the loss is token-level.
//
// This is the derivative of the Python objective written out by hand, shared by the CPU and the CUDA kernels, and
// compared with autograd's in tests/kernels/test_cpu_ops.py. The loss itself and its metrics stay in Python: they are
// sums over (n,) rows and cost nothing.
#pragma once

#include <cfloat>

#include "params.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define IGRPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <cmath>
#define IGRPO_HOST_DEVICE static inline
#endif

namespace igrpo {

// The policy terms of igrpo_kernels/losses.py whose slope is here; Python asks for this list to learn their codes.
#define IGRPO_POLICY_TERMS(X) X(clipped) X(cispo) X(sapo) X(dppo_tv) X(dppo_kl) X(topr) X(dro)

enum class PolicyTerm : int32_t {
#define IGRPO_ENUMERATOR(name) name,
  IGRPO_POLICY_TERMS(IGRPO_ENUMERATOR)
#undef IGRPO_ENUMERATOR
};

#define IGRPO_NAME(name) #name " "
constexpr char kPolicyTermNames[] = IGRPO_POLICY_TERMS(IGRPO_NAME);
#undef IGRPO_NAME

#define IGRPO_ONE(name) +1
constexpr int32_t kPolicyTerms = IGRPO_POLICY_TERMS(IGRPO_ONE);
#undef IGRPO_ONE

struct Token {
  float logp;       // l
  float old_logp;   // o
  float ref_logp;   // r, read when beta != 0
  float advantage;  // A
  float sampler;    // constant factor of the policy term
  float centre;     // what kl_tau pulls l to, read when kl_tau != 0
};

// d(surrogate)/dw of min(min(w, delta)·A, clip(w)·A) and its dual-clip floor. Bounds are inclusive and ties count
// half on each side, as PyTorch differentiates clamp, min and max.
IGRPO_HOST_DEVICE float surrogate_slope(float w, float a, const ObjectiveParams& p) {
  const bool inside = w >= p.clip_low && w <= p.clip_high;
  const float clipped = a * fminf(fmaxf(w, p.clip_low), p.clip_high);
  const float unclipped = a == 0.0f ? 0.0f : a * fminf(w, p.delta);
  const float unclipped_slope = w <= p.delta ? a : 0.0f;
  const float clipped_slope = inside ? a : 0.0f;
  float slope = 0.5f * (unclipped_slope + clipped_slope);
  if (unclipped < clipped) slope = unclipped_slope;
  if (unclipped > clipped) slope = clipped_slope;
  if (a < 0.0f && p.dual_clip <= FLT_MAX) {
    const float surrogate = fminf(unclipped, clipped), floor = p.dual_clip * a;
    if (surrogate < floor) slope = 0.0f;
    if (surrogate == floor) slope *= 0.5f;
  }
  return slope;
}

// d(sapo)/dw of -(4 / t) · sigmoid(t · (w - 1)) · A
IGRPO_HOST_DEVICE float sapo_slope(float w, float a, const ObjectiveParams& p) {
  const float t = a > 0.0f ? p.sapo_temperature_pos : p.sapo_temperature_neg;
  const float gate = 1.0f / (1.0f + expf(-t * (w - 1.0f)));
  return -4.0f * a * gate * (1.0f - gate);
}

// Whether a token's probability has moved too far the way its advantage pushes it.
IGRPO_HOST_DEVICE bool dppo_tv_leaves(const Token& t, const ObjectiveParams& p) {
  const float moved = expf(t.logp) - expf(t.old_logp);
  return (t.advantage > 0.0f && moved > p.clip_high) || (t.advantage < 0.0f && moved < p.clip_low);
}

IGRPO_HOST_DEVICE bool dppo_kl_leaves(const Token& t, const ObjectiveParams& p) {
  const float prob = expf(t.logp), mu = expf(t.old_logp), rest = fmaxf(1.0f - mu, 0.0f);
  const float kl = mu * (t.old_logp - t.logp) + rest * logf((rest + 1e-8f) / (fmaxf(1.0f - prob, 0.0f) + 1e-8f));
  return (t.advantage > 0.0f && prob > mu && kl > p.clip_high) ||
         (t.advantage < 0.0f && prob < mu && kl > -p.clip_low);
}

// d/dl of -stop_gradient(min(w, delta)) · A · l inside the trust region, 0 outside.
IGRPO_HOST_DEVICE float slope_inside(bool leaves, float w, const Token& t, const ObjectiveParams& p) {
  return leaves || t.advantage == 0.0f ? 0.0f : -fminf(w, p.delta) * t.advantage;
}

// dL/dl, where L = sampler · policy_term + beta · KL + kl_tau · (l - centre)². A factor of 0 beats an infinite ratio, as in objective.py.
IGRPO_HOST_DEVICE float token_loss_slope(const Token& t, const ObjectiveParams& p) {
  const float w = expf(t.logp - t.old_logp);
  if (w != w) return w;  // a NaN shows; fminf and fmaxf would drop it
  float through_w = 0.0f, direct = 0.0f;
  switch (static_cast<PolicyTerm>(p.term)) {  // the bindings refuse a code that is not in the list
    case PolicyTerm::clipped: through_w = -surrogate_slope(w, t.advantage, p); break;
    case PolicyTerm::cispo: direct = -fminf(fmaxf(w, p.clip_low), p.clip_high) * t.advantage; break;
    case PolicyTerm::sapo: through_w = sapo_slope(w, t.advantage, p); break;
    case PolicyTerm::dppo_tv: direct = slope_inside(dppo_tv_leaves(t, p), w, t, p); break;
    case PolicyTerm::dppo_kl: direct = slope_inside(dppo_kl_leaves(t, p), w, t, p); break;
    case PolicyTerm::topr: direct = -(t.advantage > 0.0f ? 1.0f : fminf(w, 1.0f)) * t.advantage; break;
    case PolicyTerm::dro: direct = p.dro_beta * (t.logp - t.old_logp) - t.advantage; break;
  }
  through_w = t.sampler == 0.0f ? 0.0f : through_w * t.sampler;
  direct = t.sampler == 0.0f ? 0.0f : direct * t.sampler;
  if (p.beta != 0.0f) {
    const float x = t.ref_logp - t.logp;
    const float e = p.kl == 3 ? expf(x) : 0.0f;
    const float kl = p.kl == 1 ? -x : p.kl == 2 ? 0.5f * x * x : e - x - 1.0f;
    const float kl_slope = p.kl == 1 ? 1.0f : p.kl == 2 ? -x : 1.0f - e;
    direct += p.beta * (p.bias_corrected_kl ? kl_slope * w : kl_slope);
    through_w += p.bias_corrected_kl ? p.beta * kl : 0.0f;
  }
  if (p.kl_tau != 0.0f && t.centre == t.centre) direct += 2.0f * p.kl_tau * (t.logp - t.centre);
  return direct + (through_w == 0.0f ? 0.0f : through_w * w);
}

// What row r's coefficient needs besides its log-probability. A kernel may load it long before.
struct RowConstants {
  float advantage, loss_weight, old_logp, ref_logp, sampler, grad_entropy, centre, nll_weight;
};

IGRPO_HOST_DEVICE RowConstants row_constants(int64_t r, const TokenConstants& c) {
  return {c.advantages[r],
          c.loss_weight[r],
          c.old_logps ? c.old_logps[r] : 0.0f,
          c.ref_logps ? c.ref_logps[r] : 0.0f,
          c.sampler ? c.sampler[r] : 1.0f,
          c.grad_entropy ? c.grad_entropy[r] : 0.0f,
          c.centre ? c.centre[r] : 0.0f,
          c.nll_weights ? c.nll_weights[r] : 0.0f};
}

// dloss/dlogp of a row. A NaN log-probability (bad target) poisons the row whatever the clip would have said; a weight of
// 0 takes a row's loss out.
IGRPO_HOST_DEVICE float row_coefficient(float logp, const RowConstants& row, const TokenConstants& c) {
  const Token token{logp, c.old_logps ? row.old_logp : logp, row.ref_logp, row.advantage, row.sampler, row.centre};
  if (logp != logp) return logp;
  const float slope = row.loss_weight == 0.0f ? 0.0f : row.loss_weight * token_loss_slope(token, c.objective);
  return slope - row.nll_weight;
}

}  // namespace igrpo
