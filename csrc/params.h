// What a kernel launch is told, on the CPU and on a GPU: plain structs, no torch.
//
// n rows of V logits. A row is contiguous; rows sit at outer * stride_outer + inner * stride_inner elements, so a view
// such as logits[:, :-1] of a (B, T + 1, V) tensor is a valid input. Optional pointers are nullptr when absent.
#pragma once

#include <cstdint>

namespace igrpo {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// z = softcap * tanh(logit_scale * x / softcap) / temperature; softcap = 0 means no cap.
struct LogitTransform {
  float logit_scale;
  float softcap;
  float temperature;
};

// The numbers of a token-level loss (objective.py has the equations).
struct ObjectiveParams {
  int32_t term;    // PolicyTerm of token_objective.h
  int32_t kl;      // 1, 2, 3: the estimator k1, k2, k3
  int32_t bias_corrected_kl;
  float clip_low;
  float clip_high;
  float delta;      // +inf when off
  float dual_clip;  // +inf when off
  float beta;
  float sapo_temperature_pos;
  float sapo_temperature_neg;
  float kl_tau;
  float dro_beta;
};

// Where rows are and what is known of each.
struct Rows {
  const void* logits;    // [n, V] by strides, in `dtype`
  void* grad;            // [n, V] by strides, in `dtype`; may be `logits` itself, nullptr = statistics only
  const int64_t* index;  // [n] token ids; outside [0, V) the row becomes NaN
  const bool* mask;      // [n] optional; false = the row is not read: its outputs are 0
  const float* temperatures;  // [n] optional: each row's own, in place of the transform's
  int64_t n;
  int64_t vocab;  // V
  int64_t inner;  // rows per outer index: row r is (r / inner, r % inner)
  int64_t logits_stride_outer, logits_stride_inner;
  int64_t grad_stride_outer, grad_stride_inner;
  DType dtype;
  LogitTransform transform;
};

// What one row's logits are reduced to.
struct RowStats {
  float* logps;    // [n] log p[index]
  float* entropy;  // [n] nats
  float* norm;     // [2, n] max z, and log sum exp(z - max z)
};

// dloss/dlogp and dloss/dentropy of each row, when they are known before the launch.
struct RowGradients {
  const float* logps;    // [n]
  const float* entropy;  // [n] optional
};

// The constants of a token-level loss: with them a row's gradient is known as soon as its log-probability is.
struct TokenConstants {
  const float* advantages;    // [n]
  const float* loss_weight;   // [n] dloss / d(loss of this token)
  const float* old_logps;     // [n] optional; absent = the current log-probabilities
  const float* ref_logps;     // [n] optional; present iff beta != 0
  const float* sampler;       // [n] optional: sampler ratio
  const float* grad_entropy;  // [n] optional: dloss / dentropy
  const float* centre;        // [n] optional; present iff kl_tau != 0: the sampler's log-probabilities, NaN = unknown
  const float* nll_weights;   // [n] optional
  float* grad_logps;          // [n] output: the dloss/dlogp that was applied
  ObjectiveParams objective;
};

}  // namespace igrpo
