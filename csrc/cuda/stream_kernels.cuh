// Kernels that read a row from global memory: statistics (2 B per bf16 logit), and the gradient of measured rows (4 B).
// Sequence-level losses are these two with the objective between them.
#pragma once

#include "row_span.cuh"

namespace igrpo::cuda {

constexpr int kStreamThreads = 512;
constexpr int kStreamGranules = 4;  // of a thread in one trip

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kStreamThreads, 2)
    row_stats_kernel(const __grid_constant__ Rows rows, const __grid_constant__ RowStats out) {
  __shared__ float4 scratch[kStreamThreads / kWarp];
  Transform<T, kSoftcap> transform(rows.transform);
  for (int64_t r = blockIdx.x; r < rows.n; r += gridDim.x) {
    if (masked_out(rows, r)) {
      if (threadIdx.x == 0) write_masked_stats(r, rows.n, out);
      continue;
    }
    if (rows.temperatures != nullptr) transform = Transform<T, kSoftcap>(rows.transform, rows.temperatures[r]);
    const RowSpan<T> span(rows, r);
    RunningSums<T, kSoftcap> running(transform);
    const auto load = [&](int g) { return __ldcs(span.x_granules() + g); };
    if (transform.rising()) {
      add_granules<true, kStreamGranules, kStreamThreads>(span.granules, running, load);
    } else {
      add_granules<false, kStreamGranules, kStreamThreads>(span.granules, running, load);
    }
    if (threadIdx.x < span.edges()) running.add_one(static_cast<float>(span.x[span.edge_column(threadIdx.x)]));
    const Sums sums = merge_block<kStreamThreads>(running.sums(), scratch, transform);
    if (threadIdx.x == 0) {
      const int64_t target = rows.index[r];
      const bool in_vocab = target >= 0 && target < rows.vocab;
      const float x_target = in_vocab ? static_cast<float>(span.x[target]) : 0.0f;
      write_stats(row_result(sums, x_target, in_vocab, transform), r, rows.n, out);
    }
    __syncthreads();  // scratch is free again
  }
}

template <bool kFolded, class T, bool kSoftcap>
__device__ void stream_grad(const RowSpan<T>& span, const RowSlope& slope, const Transform<T, kSoftcap>& transform) {
  walk<kStreamGranules / 2, kStreamThreads>(span.granules, [&]<int kNow>(int g) {
    uint4 bits[kNow];
#pragma unroll
    for (int i = 0; i < kNow; ++i) bits[i] = __ldcs(span.x_granules() + g + i * kStreamThreads);
#pragma unroll
    for (int i = 0; i < kNow; ++i) bits[i] = grad_granule<kFolded>(bits[i], slope, transform);
    span.template store<kStreamThreads>(g, bits);
  });
}

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kStreamThreads, 2)
    row_grad_kernel(const __grid_constant__ Rows rows, const __grid_constant__ RowStats stats,
                    const __grid_constant__ RowGradients g) {
  Transform<T, kSoftcap> transform(rows.transform);
  for (int64_t r = blockIdx.x; r < rows.n; r += gridDim.x) {
    const RowSpan<T> span(rows, r);
    const int64_t target = rows.index[r];
    const RowResult row{stats.norm[r],    stats.norm[rows.n + r],
                        stats.logps[r],   stats.entropy[r],
                        g.logps[r],       g.entropy == nullptr ? 0.0f : g.entropy[r]};
    const bool in_vocab = target >= 0 && target < rows.vocab, silent = row.grad_logp == 0.0f && row.grad_entropy == 0.0f;
    if (masked_out(rows, r) || (silent && in_vocab)) {
      fill_row(span, 0.0f);
      continue;
    }
    if (!in_vocab) {
      fill_row(span, quiet_nan());
      continue;
    }
    if (rows.temperatures != nullptr) transform = Transform<T, kSoftcap>(rows.transform, rows.temperatures[r]);
    const RowSlope slope(row, transform);
    const float x_target = static_cast<float>(span.x[target]);
    __syncthreads();  // in place, the target's logit must be read before anyone overwrites it
    if (slope.folded) {
      stream_grad<true>(span, slope, transform);
    } else {
      stream_grad<false>(span, slope, transform);
    }
    if (threadIdx.x < span.edges()) {
      const int column = span.edge_column(threadIdx.x);
      span.y[column] = grad_of_one(span.x[column], slope, transform);
    }
    __syncthreads();  // the target's own value replaces what its granule stored
    if (threadIdx.x == 0) span.y[target] = grad_at_target<T>(x_target, row, transform);
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
      Two x[Pack<T>::kPairs];
      Pack<T>::unpack(__ldcs(span.x_granules() + g), x);
#pragma unroll
      for (Two& pair : x) pair = mul(pair, {f, f});
      span.store(g, Pack<T>::pack(x));
    }
    if (threadIdx.x < span.edges()) {
      const int column = span.edge_column(threadIdx.x);
      span.y[column] = static_cast<T>(static_cast<float>(span.x[column]) * f);
    }
  }
}

}  // namespace igrpo::cuda
