// The CUDA implementation of the operators that bindings.cpp defines. A library of its own: it needs symbols that only
// a CUDA build of torch has (aoti_torch_get_current_cuda_stream), and would not load under any other.
#include <tuple>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../op_params.h"
#include "launch.h"

namespace igrpo {
namespace {

using torch::stable::accelerator::DeviceGuard;

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

Tensor new_grad(const Tensor& logits) {
  return torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)});
}

std::tuple<Tensor, Tensor, Tensor> row_stats(Tensor logits, Tensor index, MaybeTensor mask, double logit_scale,
                                             double softcap, double temperature) {
  const Rows rows = rows_of(logits, index, mask, logit_scale, softcap, temperature);
  const DeviceGuard guard(logits.get_device_index());
  RowOutputs out(logits, rows.n);
  if (rows.n > 0) cuda::row_stats(rows, out.stats(), stream_of(logits));
  return {out.logps, out.entropy, out.norm};
}

void run_row_grad(const Rows& rows, const Tensor& logits, const Tensor& logps, const Tensor& entropy,
                  const Tensor& norm, const Tensor& grad_logps, const MaybeTensor& grad_entropy) {
  const RowStats stats{floats(logps, logits, rows.n), floats(entropy, logits, rows.n), floats(norm, logits, 2 * rows.n)};
  const RowGradients g{floats(grad_logps, logits, rows.n), floats(grad_entropy, logits, rows.n)};
  const DeviceGuard guard(logits.get_device_index());
  if (rows.n > 0) cuda::row_grad(rows, stats, g, stream_of(logits));
}

Tensor row_grad(Tensor logits, Tensor index, MaybeTensor mask, Tensor logps, Tensor entropy, Tensor norm,
                Tensor grad_logps, MaybeTensor grad_entropy, double logit_scale, double softcap, double temperature) {
  const Rows rows = rows_of(logits, index, mask, logit_scale, softcap, temperature);
  Tensor grad = new_grad(logits);
  run_row_grad(with_grad(rows, grad), logits, logps, entropy, norm, grad_logps, grad_entropy);
  return grad;
}

void row_grad_(Tensor logits, Tensor index, MaybeTensor mask, Tensor logps, Tensor entropy, Tensor norm,
               Tensor grad_logps, MaybeTensor grad_entropy, double logit_scale, double softcap, double temperature) {
  const Rows rows = rows_of(logits, index, mask, logit_scale, softcap, temperature);
  run_row_grad(with_grad(rows, logits), logits, logps, entropy, norm, grad_logps, grad_entropy);
}

TokenOutputs run_token_loss(const Rows& rows, const Tensor& logits, const TokenArguments& arguments) {
  TokenOutputs out(logits, rows.n);
  const TokenConstants constants = arguments.constants(logits, rows.n, out.grad_logps);
  const DeviceGuard guard(logits.get_device_index());
  if (rows.n > 0) cuda::token_loss(rows, out.stats(), constants, stream_of(logits));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> token_loss(Tensor logits, Tensor index, MaybeTensor mask, Tensor advantages,
                                                      Tensor loss_weight, MaybeTensor old_logps, MaybeTensor ref_logps,
                                                      MaybeTensor sampler, MaybeTensor grad_entropy,
                                                      std::vector<double> objective, double logit_scale,
                                                      double softcap, double temperature) {
  const Rows rows = rows_of(logits, index, mask, logit_scale, softcap, temperature);
  Tensor grad = new_grad(logits);
  const TokenOutputs out = run_token_loss(
      with_grad(rows, grad), logits, {advantages, loss_weight, old_logps, ref_logps, sampler, grad_entropy, objective});
  return {out.logps, out.entropy, out.grad_logps, grad};
}

std::tuple<Tensor, Tensor, Tensor> token_loss_(Tensor logits, Tensor index, MaybeTensor mask, Tensor advantages,
                                               Tensor loss_weight, MaybeTensor old_logps, MaybeTensor ref_logps,
                                               MaybeTensor sampler, MaybeTensor grad_entropy,
                                               std::vector<double> objective, double logit_scale, double softcap,
                                               double temperature) {
  const Rows rows = rows_of(logits, index, mask, logit_scale, softcap, temperature);
  const TokenOutputs out =
      run_token_loss(with_grad(rows, logits), logits,
                     {advantages, loss_weight, old_logps, ref_logps, sampler, grad_entropy, objective});
  return {out.logps, out.entropy, out.grad_logps};
}

void scale_(Tensor grad, Tensor factor) {
  const Rows rows = with_grad(memory_of(grad), grad);
  const float* f = floats(factor, grad, 1);
  const DeviceGuard guard(grad.get_device_index());
  if (rows.n > 0 && rows.vocab > 0) cuda::scale(rows, f, stream_of(grad));
}

std::string cuda_source_hash() { return IGRPO_SOURCE_HASH; }

}  // namespace
}  // namespace igrpo

STABLE_TORCH_LIBRARY_FRAGMENT(igrpo, m) { m.def("cuda_source_hash() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(igrpo, CompositeExplicitAutograd, m) {
  m.impl("cuda_source_hash", TORCH_BOX(&igrpo::cuda_source_hash));
}

STABLE_TORCH_LIBRARY_IMPL(igrpo, CUDA, m) {
  m.impl("row_stats", TORCH_BOX(&igrpo::row_stats));
  m.impl("row_grad", TORCH_BOX(&igrpo::row_grad));
  m.impl("row_grad_", TORCH_BOX(&igrpo::row_grad_));
  m.impl("token_loss", TORCH_BOX(&igrpo::token_loss));
  m.impl("token_loss_", TORCH_BOX(&igrpo::token_loss_));
  m.impl("scale_", TORCH_BOX(&igrpo::scale_));
}
