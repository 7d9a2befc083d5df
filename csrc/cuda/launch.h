// What the binding calls: one function per operator, for any dtype; `stream` is a cudaStream_t. A failed launch throws
// std::runtime_error with file, line and CUDA's words.
#pragma once

#include "../params.h"

namespace igrpo::cuda {

void row_stats(const Rows& rows, const RowStats& out, void* stream);
void row_grad(const Rows& rows, const RowStats& stats, const RowGradients& g, void* stream);
// The row stays on chip where this device and this V allow it; IGRPO_CUDA_PLAN=cluster|resident|two_pass forces one.
void token_loss(const Rows& rows, const RowStats& out, const TokenConstants& constants, void* stream);
// rows.grad *= *factor, in place (rows.logits is the same memory); factor: [1] on the device.
void scale(const Rows& rows, const float* factor, void* stream);

// One dtype's instantiations, each in its own source so that they compile in parallel.
template <DType kDtype>
void row_stats_of(const Rows& rows, const RowStats& out, void* stream);
template <DType kDtype>
void row_grad_of(const Rows& rows, const RowStats& stats, const RowGradients& g, void* stream);
template <DType kDtype>
void token_loss_of(const Rows& rows, const RowStats& out, const TokenConstants& constants, void* stream);
template <DType kDtype>
void scale_of(const Rows& rows, const float* factor, void* stream);

}  // namespace igrpo::cuda
