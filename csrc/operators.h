// The operators, once for every device: their arguments become the structs of params.h with every check in one order
// (dtypes, layout, shapes, device), and a Backend walks the rows.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "token_objective.h"

namespace igrpo {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType logits_dtype(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return DType::kFloat16;
    default:
      IGRPO_UNREACHABLE("logits must be float32, bfloat16 or float16");
  }
}

// The memory of (outer, inner, V) values with contiguous columns.
inline Rows memory_of(const Tensor& logits) {
  Rows rows{};
  rows.dtype = logits_dtype(logits);
  IGRPO_CHECK(logits.dim() == 3, "logits must be (outer, inner, V), they have ", logits.dim(), " dimensions");
  IGRPO_CHECK(logits.size(2) == 1 || logits.stride(2) == 1, "the columns of logits must be contiguous");
  rows.logits = logits.data_ptr();
  rows.n = logits.size(0) * logits.size(1);
  rows.vocab = logits.size(2);
  rows.inner = logits.size(1) > 0 ? logits.size(1) : 1;
  rows.logits_stride_outer = logits.stride(0);
  rows.logits_stride_inner = logits.stride(1);
  return rows;
}

inline float* floats(const Tensor& x, const Tensor& like, int64_t count) {
  IGRPO_CHECK_DTYPE(x, Float);
  IGRPO_CHECK_VECTOR(x, count, like);
  return static_cast<float*>(x.data_ptr());
}

inline const float* floats(const MaybeTensor& x, const Tensor& like, int64_t count) {
  return x.has_value() ? floats(*x, like, count) : nullptr;
}

// Rows of logits with what is known of each; the gradient is set by with_grad.
inline Rows rows_of(const Tensor& logits, const Tensor& index, const MaybeTensor& mask, double logit_scale,
                    double softcap, double temperature, const MaybeTensor& temperatures) {
  Rows rows = memory_of(logits);
  IGRPO_CHECK_DTYPE(index, Long);
  IGRPO_CHECK_VECTOR(index, rows.n, logits);
  if (mask.has_value()) {
    IGRPO_CHECK_DTYPE(*mask, Bool);
    IGRPO_CHECK_VECTOR(*mask, rows.n, logits);
    rows.mask = static_cast<const bool*>(mask->data_ptr());
  }
  rows.index = static_cast<const int64_t*>(index.data_ptr());
  rows.temperatures = floats(temperatures, logits, rows.n);
  rows.transform = {static_cast<float>(logit_scale), static_cast<float>(softcap), static_cast<float>(temperature)};
  return rows;
}

inline Rows with_grad(Rows rows, const Tensor& grad) {
  rows.grad = grad.data_ptr();
  rows.grad_stride_outer = grad.stride(0);
  rows.grad_stride_inner = grad.stride(1);
  return rows;
}

inline Tensor new_floats(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, torch::headeronly::ScalarType::Float);
}

// The objective's numbers travel as one list, in the order of ObjectiveParams (`objective_numbers` in
// igrpo_kernels/compiled_rows.py writes it).
inline ObjectiveParams objective_of(const std::vector<double>& x) {
  IGRPO_CHECK(x.size() == 12, "the objective has 12 numbers, got ", x.size());
  const auto number = [&](size_t i) { return static_cast<float>(x[i]); };
  const auto choice = [&](size_t i) { return static_cast<int32_t>(x[i]); };
  IGRPO_CHECK(choice(0) >= 0 && choice(0) < kPolicyTerms, "policy term ", choice(0), " is unknown; there are ",
              kPolicyTermNames);
  IGRPO_CHECK(choice(1) >= 1 && choice(1) <= 3, "KL estimator k", choice(1), " is unknown; there are k1 k2 k3");
  return {choice(0), choice(1), choice(2), number(3), number(4), number(5), number(6), number(7),
          number(8), number(9), number(10), number(11)};
}

struct RowOutputs {
  Tensor logps, entropy, norm;

  explicit RowOutputs(const Tensor& logits, int64_t n)
      : logps(new_floats(logits, {n})), entropy(new_floats(logits, {n})), norm(new_floats(logits, {2, n})) {}
  RowStats stats() const {
    return {static_cast<float*>(logps.data_ptr()), static_cast<float*>(entropy.data_ptr()),
            static_cast<float*>(norm.data_ptr())};
  }
};

// Backend: what a device does with rows whose arguments were checked. `like` is the logits' tensor.
//   Tensor new_grad(like)                            uninitialised, contiguous
//   void row_stats(like, rows, RowStats)             writes the statistics
//   void row_grad(like, rows, RowStats, RowGradients)
//   void token_loss(like, rows, RowStats, TokenConstants)
template <class Backend>
struct Operators {
  static std::tuple<Tensor, Tensor, Tensor> row_stats(Tensor logits, Tensor index, MaybeTensor mask, double logit_scale,
                                                      double softcap, double temperature, MaybeTensor temperatures) {
    const Rows rows = rows_of(logits, index, mask, logit_scale, softcap, temperature, temperatures);
    const RowOutputs out(logits, rows.n);
    Backend::row_stats(logits, rows, out.stats());
    return {out.logps, out.entropy, out.norm};
  }

  static void row_grad_into(Tensor grad, Tensor logits, Tensor index, MaybeTensor mask, Tensor logps, Tensor entropy,
                            Tensor norm, Tensor grad_logps, MaybeTensor grad_entropy, double logit_scale,
                            double softcap, double temperature, MaybeTensor temperatures) {
    const Rows rows = with_grad(rows_of(logits, index, mask, logit_scale, softcap, temperature, temperatures), grad);
    const RowStats stats{floats(logps, logits, rows.n), floats(entropy, logits, rows.n),
                         floats(norm, logits, 2 * rows.n)};
    const RowGradients g{floats(grad_logps, logits, rows.n), floats(grad_entropy, logits, rows.n)};
    Backend::row_grad(logits, rows, stats, g);
  }

  static Tensor row_grad(Tensor logits, Tensor index, MaybeTensor mask, Tensor logps, Tensor entropy, Tensor norm,
                         Tensor grad_logps, MaybeTensor grad_entropy, double logit_scale, double softcap,
                         double temperature, MaybeTensor temperatures) {
    memory_of(logits);  // its checks come before the allocation
    Tensor grad = Backend::new_grad(logits);
    row_grad_into(grad, logits, index, mask, logps, entropy, norm, grad_logps, grad_entropy, logit_scale, softcap,
                  temperature, temperatures);
    return grad;
  }

  static void row_grad_(Tensor logits, Tensor index, MaybeTensor mask, Tensor logps, Tensor entropy, Tensor norm,
                        Tensor grad_logps, MaybeTensor grad_entropy, double logit_scale, double softcap,
                        double temperature, MaybeTensor temperatures) {
    row_grad_into(logits, logits, index, mask, logps, entropy, norm, grad_logps, grad_entropy, logit_scale, softcap,
                  temperature, temperatures);
  }

  static std::tuple<Tensor, Tensor, Tensor> token_loss_into(
      Tensor grad, Tensor logits, Tensor index, MaybeTensor mask, Tensor advantages, Tensor loss_weight,
      MaybeTensor old_logps, MaybeTensor ref_logps, MaybeTensor sampler, MaybeTensor grad_entropy,
      MaybeTensor centre, MaybeTensor nll_weights, std::vector<double> objective, double logit_scale, double softcap,
      double temperature, MaybeTensor temperatures) {
    const Rows rows = with_grad(rows_of(logits, index, mask, logit_scale, softcap, temperature, temperatures), grad);
    const int64_t n = rows.n;
    const RowOutputs out(logits, n);
    const Tensor grad_logps = new_floats(logits, {n});
    const TokenConstants constants{floats(advantages, logits, n), floats(loss_weight, logits, n),
                                   floats(old_logps, logits, n),  floats(ref_logps, logits, n),
                                   floats(sampler, logits, n),    floats(grad_entropy, logits, n),
                                   floats(centre, logits, n),     floats(nll_weights, logits, n),
                                   floats(grad_logps, logits, n), objective_of(objective)};
    IGRPO_CHECK(constants.objective.beta == 0.0f || ref_logps.has_value(), "beta != 0 needs ref_logps");
    IGRPO_CHECK(constants.objective.kl_tau == 0.0f || centre.has_value(), "kl_tau != 0 needs centre");
    Backend::token_loss(logits, rows, out.stats(), constants);
    return {out.logps, out.entropy, grad_logps};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss(
      Tensor logits, Tensor index, MaybeTensor mask, Tensor advantages, Tensor loss_weight, MaybeTensor old_logps,
      MaybeTensor ref_logps, MaybeTensor sampler, MaybeTensor grad_entropy, MaybeTensor centre,
      MaybeTensor nll_weights, std::vector<double> objective, double logit_scale, double softcap, double temperature,
      MaybeTensor temperatures) {
    memory_of(logits);
    Tensor grad = Backend::new_grad(logits);
    return std::tuple_cat(
        token_loss_into(grad, logits, index, mask, advantages, loss_weight, old_logps, ref_logps, sampler,
                        grad_entropy, centre, nll_weights, objective, logit_scale, softcap, temperature, temperatures),
        std::make_tuple(grad));
  }

  static std::tuple<Tensor, Tensor, Tensor> token_loss_(
      Tensor logits, Tensor index, MaybeTensor mask, Tensor advantages, Tensor loss_weight, MaybeTensor old_logps,
      MaybeTensor ref_logps, MaybeTensor sampler, MaybeTensor grad_entropy, MaybeTensor centre,
      MaybeTensor nll_weights, std::vector<double> objective, double logit_scale, double softcap, double temperature,
      MaybeTensor temperatures) {
    return token_loss_into(logits, logits, index, mask, advantages, loss_weight, old_logps, ref_logps, sampler,
                           grad_entropy, centre, nll_weights, objective, logit_scale, softcap, temperature, temperatures);
  }

  template <class Library>
  static void bind(Library& m) {
    m.impl("row_stats", TORCH_BOX(&Operators::row_stats));
    m.impl("row_grad", TORCH_BOX(&Operators::row_grad));
    m.impl("row_grad_", TORCH_BOX(&Operators::row_grad_));
    m.impl("token_loss", TORCH_BOX(&Operators::token_loss));
    m.impl("token_loss_", TORCH_BOX(&Operators::token_loss_));
  }
};

}  // namespace igrpo
