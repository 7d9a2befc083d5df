// The operators' schemas, and their CPU implementation. _C_cuda adds a CUDA implementation to the same schemas.
#include <sys/mman.h>

#include <tuple>

#include "cpu/kernels.h"
#include "op_params.h"

namespace igrpo {
namespace {

// Threads get whole rows, so no result depends on their number. A tiny job is not worth waking them.
template <class F>
void for_rows(const Rows& rows, const F& f) {
  constexpr int64_t kLogitsPerThread = 32768;
  const int64_t grain = kLogitsPerThread / (rows.vocab > 0 ? rows.vocab : 1) + 1;
  const cpu::Kernels& kernels = cpu::kernels();
  torch::stable::parallel_for(0, rows.n, grain, [&](int64_t begin, int64_t end) { f(kernels, begin, end); });
}

// A fresh gradient is hundreds of megabytes of untouched pages. Asking for 2 MiB ones saves most of the page faults.
Tensor new_grad(const Tensor& logits) {
  Tensor grad = torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)});
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(grad.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(grad.numel()) * grad.element_size();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  // Only advice: where it is refused nothing changes but the time.
  if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> row_stats(Tensor logits, Tensor index, MaybeTensor mask, double logit_scale,
                                             double softcap, double temperature) {
  const Rows rows = rows_of(logits, index, mask, logit_scale, softcap, temperature);
  RowOutputs out(logits, rows.n);
  const RowStats stats = out.stats();
  for_rows(rows, [&](const cpu::Kernels& k, int64_t begin, int64_t end) { k.row_stats(rows, stats, begin, end); });
  return {out.logps, out.entropy, out.norm};
}

void run_row_grad(const Rows& rows, const Tensor& logits, const Tensor& logps, const Tensor& entropy,
                  const Tensor& norm, const Tensor& grad_logps, const MaybeTensor& grad_entropy) {
  const RowStats stats{floats(logps, logits, rows.n), floats(entropy, logits, rows.n), floats(norm, logits, 2 * rows.n)};
  const RowGradients g{floats(grad_logps, logits, rows.n), floats(grad_entropy, logits, rows.n)};
  for_rows(rows, [&](const cpu::Kernels& k, int64_t begin, int64_t end) { k.row_grad(rows, stats, g, begin, end); });
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
  const RowStats stats = out.stats();
  const TokenConstants c = arguments.constants(logits, rows.n, out.grad_logps);
  for_rows(rows, [&](const cpu::Kernels& k, int64_t begin, int64_t end) { k.token_loss(rows, stats, c, begin, end); });
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

std::string cpu_capability() { return cpu::kernels().name; }

std::string source_hash() { return IGRPO_SOURCE_HASH; }

}  // namespace
}  // namespace igrpo

#define IGRPO_TRANSFORM "float logit_scale, float softcap, float temperature"
#define IGRPO_ROWS "Tensor index, Tensor? mask"
#define IGRPO_STATS "Tensor logps, Tensor entropy, Tensor norm, Tensor grad_logps, Tensor? grad_entropy"
#define IGRPO_CONSTANTS                                                                                       \
  "Tensor advantages, Tensor loss_weight, Tensor? old_logps, Tensor? ref_logps, Tensor? sampler, Tensor? grad_entropy, " \
  "float[] objective"

STABLE_TORCH_LIBRARY_FRAGMENT(igrpo, m) {
  m.def("row_stats(Tensor logits, " IGRPO_ROWS ", " IGRPO_TRANSFORM ") -> (Tensor, Tensor, Tensor)");
  m.def("row_grad(Tensor logits, " IGRPO_ROWS ", " IGRPO_STATS ", " IGRPO_TRANSFORM ") -> Tensor");
  m.def("row_grad_(Tensor(a!) logits, " IGRPO_ROWS ", " IGRPO_STATS ", " IGRPO_TRANSFORM ") -> ()");
  m.def("token_loss(Tensor logits, " IGRPO_ROWS ", " IGRPO_CONSTANTS ", " IGRPO_TRANSFORM
        ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("token_loss_(Tensor(a!) logits, " IGRPO_ROWS ", " IGRPO_CONSTANTS ", " IGRPO_TRANSFORM
        ") -> (Tensor, Tensor, Tensor)");
  m.def("scale_(Tensor(a!) grad, Tensor factor) -> ()");  // CUDA only: on the CPU the factor can simply be looked at
  m.def("cpu_capability() -> str");
  m.def("source_hash() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(igrpo, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&igrpo::row_stats));
  m.impl("row_grad", TORCH_BOX(&igrpo::row_grad));
  m.impl("row_grad_", TORCH_BOX(&igrpo::row_grad_));
  m.impl("token_loss", TORCH_BOX(&igrpo::token_loss));
  m.impl("token_loss_", TORCH_BOX(&igrpo::token_loss_));
}

STABLE_TORCH_LIBRARY_IMPL(igrpo, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&igrpo::cpu_capability));
  m.impl("source_hash", TORCH_BOX(&igrpo::source_hash));
}
