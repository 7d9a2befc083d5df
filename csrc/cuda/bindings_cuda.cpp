// The CUDA implementation of the operators that bindings.cpp defines. A library of its own: it needs symbols that only
// a CUDA build of torch has (aoti_torch_get_current_cuda_stream), and would not load under any other.
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../operators.h"
#include "launch.h"

namespace igrpo {
namespace {

using torch::stable::accelerator::DeviceGuard;

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

struct Cuda {
  static Tensor new_grad(const Tensor& logits) {
    return torch::stable::new_empty(logits, {logits.size(0), logits.size(1), logits.size(2)});
  }

  static void row_stats(const Tensor& logits, const Rows& rows, const RowStats& out) {
    const DeviceGuard guard(logits.get_device_index());
    if (rows.n > 0) cuda::row_stats(rows, out, stream_of(logits));
  }

  static void row_grad(const Tensor& logits, const Rows& rows, const RowStats& stats, const RowGradients& g) {
    const DeviceGuard guard(logits.get_device_index());
    if (rows.n > 0) cuda::row_grad(rows, stats, g, stream_of(logits));
  }

  static void token_loss(const Tensor& logits, const Rows& rows, const RowStats& out, const TokenConstants& constants) {
    const DeviceGuard guard(logits.get_device_index());
    if (rows.n > 0) cuda::token_loss(rows, out, constants, stream_of(logits));
  }
};

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
  igrpo::Operators<igrpo::Cuda>::bind(m);
  m.impl("scale_", TORCH_BOX(&igrpo::scale_));
}
