#include "launch.h"

#include <stdexcept>

namespace igrpo::cuda {

void row_stats(const Rows& rows, const RowStats& out, void* stream) {
  switch (rows.dtype) {
    case DType::kFloat32: return row_stats_of<DType::kFloat32>(rows, out, stream);
    case DType::kBFloat16: return row_stats_of<DType::kBFloat16>(rows, out, stream);
    case DType::kFloat16: return row_stats_of<DType::kFloat16>(rows, out, stream);
  }
  throw std::logic_error("unreachable: unknown dtype");
}

void row_grad(const Rows& rows, const RowStats& stats, const RowGradients& g, void* stream) {
  switch (rows.dtype) {
    case DType::kFloat32: return row_grad_of<DType::kFloat32>(rows, stats, g, stream);
    case DType::kBFloat16: return row_grad_of<DType::kBFloat16>(rows, stats, g, stream);
    case DType::kFloat16: return row_grad_of<DType::kFloat16>(rows, stats, g, stream);
  }
  throw std::logic_error("unreachable: unknown dtype");
}

void token_loss(const Rows& rows, const RowStats& out, const TokenConstants& constants, void* stream) {
  switch (rows.dtype) {
    case DType::kFloat32: return token_loss_of<DType::kFloat32>(rows, out, constants, stream);
    case DType::kBFloat16: return token_loss_of<DType::kBFloat16>(rows, out, constants, stream);
    case DType::kFloat16: return token_loss_of<DType::kFloat16>(rows, out, constants, stream);
  }
  throw std::logic_error("unreachable: unknown dtype");
}

void scale(const Rows& rows, const float* factor, void* stream) {
  switch (rows.dtype) {
    case DType::kFloat32: return scale_of<DType::kFloat32>(rows, factor, stream);
    case DType::kBFloat16: return scale_of<DType::kBFloat16>(rows, factor, stream);
    case DType::kFloat16: return scale_of<DType::kFloat16>(rows, factor, stream);
  }
  throw std::logic_error("unreachable: unknown dtype");
}

}  // namespace igrpo::cuda
