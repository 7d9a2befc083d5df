// Kernels that read a row from global memory: statistics (2 B per bf16 logit), and the gradient of measured rows (4 B).
// Sequence-level losses are these two with the objective between them.
#pragma once

#include "row_span.cuh"

namespace igrpo::cuda {

constexpr int kStreamThreads = 512;

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kStreamThreads, 2)
    row_stats_kernel(const __grid_constant__ Rows rows, const __grid_constant__ RowStats out) {
  __shared__ float3 scratch[kStreamThreads / kWarp];
  const Transform<kSoftcap> transform(rows.transform);
  for (int64_t r = blockIdx.x; r < rows.n; r += gridDim.x) {
    if (masked_out(rows, r)) {
      if (threadIdx.x == 0) write_masked_stats(r, rows.n, out);
      continue;
    }
    const RowSpan<T> span(rows, r);
    Sums sums;
#pragma unroll 4
    for (int g = threadIdx.x; g < span.granules; g += kStreamThreads) {
      add_granule<T>(__ldcs(span.x_granules() + g), transform, sums);
    }
    if (threadIdx.x < span.edges()) {
      const float z[1] = {transform(static_cast<float>(span.x[span.edge_column(threadIdx.x)]))};
      sums.add(z);
    }
    sums = merge_block(sums, scratch);
    if (threadIdx.x == 0) {
      const int64_t target = rows.index[r];
      const bool in_vocab = target >= 0 && target < rows.vocab;
      const float z_target = in_vocab ? transform(static_cast<float>(span.x[target])) : 0.0f;
      write_stats(row_result(sums, z_target, in_vocab), r, rows.n, out);
    }
    __syncthreads();  // scratch is free again
  }
}

template <class T, bool kEntropy, bool kSoftcap>
__device__ void stream_grad(const RowSpan<T>& span, const RowResult& row, int64_t target,
                            const Transform<kSoftcap>& transform) {
  const float x_target = static_cast<float>(span.x[target]);
  __syncthreads();  // in place, the target's logit must be read before anyone overwrites it
#pragma unroll 2
  for (int g = threadIdx.x; g < span.granules; g += blockDim.x) {
    span.store(g, grad_granule<T, kEntropy>(__ldcs(span.x_granules() + g), row, transform));
  }
  if (threadIdx.x < span.edges()) {
    const int column = span.edge_column(threadIdx.x);
    span.y[column] = static_cast<T>(grad_of<kEntropy>(static_cast<float>(span.x[column]), row, transform));
  }
  __syncthreads();  // the target's own value replaces what its granule stored
  if (threadIdx.x == 0) span.y[target] = static_cast<T>(grad_at_target(x_target, row, transform));
}

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kStreamThreads, 2)
    row_grad_kernel(const __grid_constant__ Rows rows, const __grid_constant__ RowStats stats,
                    const __grid_constant__ RowGradients g) {
  const Transform<kSoftcap> transform(rows.transform);
  for (int64_t r = blockIdx.x; r < rows.n; r += gridDim.x) {
    const RowSpan<T> span(rows, r);
    const int64_t target = rows.index[r];
    const RowResult row{stats.norm[r],    stats.norm[rows.n + r],
                        stats.logps[r],   stats.entropy[r],
                        g.logps[r],       g.entropy == nullptr ? 0.0f : g.entropy[r]};
    if (masked_out(rows, r) || (row.grad_logp == 0.0f && row.grad_entropy == 0.0f && target >= 0 && target < rows.vocab)) {
      fill_row(span, 0.0f);
    } else if (target < 0 || target >= rows.vocab) {
      fill_row(span, quiet_nan());
    } else if (row.grad_entropy == 0.0f) {
      stream_grad<T, false>(span, row, target, transform);
    } else {
      stream_grad<T, true>(span, row, target, transform);
    }
  }
}

// grad *= factor. The factor is nearly always 1, and only the device knows: then nothing is touched.
template <class T>
__global__ void __launch_bounds__(kStreamThreads, 2)
    scale_kernel(const __grid_constant__ Rows rows, const float* factor) {  // factor: [1]
  const float f = *factor;
  if (f == 1.0f) return;
  for (int64_t r = blockIdx.x; r < rows.n; r += gridDim.x) {
    const RowSpan<T> span(rows, r);
    for (int g = threadIdx.x; g < span.granules; g += kStreamThreads) {
      float x[Pack<T>::kCount];
      Pack<T>::unpack(__ldcs(span.x_granules() + g), x);
#pragma unroll
      for (int i = 0; i < Pack<T>::kCount; ++i) x[i] *= f;
      span.store(g, Pack<T>::pack(x));
    }
    if (threadIdx.x < span.edges()) {
      const int column = span.edge_column(threadIdx.x);
      span.y[column] = static_cast<T>(static_cast<float>(span.x[column]) * f);
    }
  }
}

}  // namespace igrpo::cuda
