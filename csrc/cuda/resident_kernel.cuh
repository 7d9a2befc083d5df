// Token-level loss, one row per block: the row stays in shared memory and registers between its statistics and its
// gradient (A100: 160 KiB + 256 threads x 36 x 16 B = 304 KiB, V = 155,648 in bf16). What does not fit is read a second
// time, from L2 most likely: with no resident part at all this is the two-pass fallback.
//
//   granule of thread i, slot k = k·threads + i
//   slots [0, shared)             cp.async into shared memory, only ever touched by their own thread: no barrier needed
//   slots [shared, + registers)   registers
//   slots beyond                  global memory, twice
//
// Rolling prefetch: as soon as a slot's gradient has been stored, the same slot of the block's next row is requested,
// so loads never wait for the end of a row.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "row_span.cuh"

namespace igrpo::cuda {

constexpr int kResidentThreads = 256;
// A thread may have 255 registers and its arithmetic needs about 70, whatever the number of threads: few threads leave
// more of the register file to the row than many. Each granule takes 4.
constexpr int kRegisterGranules = 36;

// Shared between the thread that knows a row's result and all others.
struct RowBroadcast {
  float3 scratch[kResidentThreads / kWarp];
  RowResult row;
  float x_target;
};

template <class T>
__device__ __forceinline__ void prefetch_slot(const RowSpan<T>& span, uint4* shared, int slot) {
  const int g = slot * kResidentThreads + threadIdx.x;
  if (g < span.granules) __pipeline_memcpy_async(shared + g, span.x_granules() + g, 16);
}

template <class T>
__device__ __forceinline__ uint4 load_granule(const RowSpan<T>& span, int slot) {
  const int g = slot * kResidentThreads + threadIdx.x;
  return g < span.granules ? __ldcs(span.x_granules() + g) : uint4{};
}

// Statistics of the row: what is resident, then what is not, then head and tail.
template <class T, bool kSoftcap>
__device__ Sums resident_sums(const RowSpan<T>& span, const uint4* shared, int shared_slots,
                              const uint4 (&kept)[kRegisterGranules], const Transform<kSoftcap>& transform) {
  Sums sums;
#pragma unroll 1
  for (int k = 0; k < shared_slots; ++k) {
    const int g = k * kResidentThreads + threadIdx.x;
    if (g < span.granules) add_granule<T>(shared[g], transform, sums);
  }
#pragma unroll
  for (int j = 0; j < kRegisterGranules; ++j) {
    if ((shared_slots + j) * kResidentThreads + threadIdx.x < span.granules) add_granule<T>(kept[j], transform, sums);
  }
#pragma unroll 1
  for (int g = (shared_slots + kRegisterGranules) * kResidentThreads + threadIdx.x; g < span.granules;
       g += kResidentThreads) {
    add_granule<T>(*(span.x_granules() + g), transform, sums);
  }
  if (threadIdx.x < span.edges()) {
    const float z[1] = {transform(static_cast<float>(span.x[span.edge_column(threadIdx.x)]))};
    sums.add(z);
  }
  return sums;
}

// Gradient of every slot; each resident slot is refilled from `next` right after it was stored.
template <class T, bool kEntropy, bool kSoftcap>
__device__ void resident_grad(const RowSpan<T>& span, const RowSpan<T>& next, bool has_next, uint4* shared,
                              int shared_slots, uint4 (&kept)[kRegisterGranules], const RowResult& row,
                              const Transform<kSoftcap>& transform) {
#pragma unroll 1
  for (int g = (shared_slots + kRegisterGranules) * kResidentThreads + threadIdx.x; g < span.granules;
       g += kResidentThreads) {
    span.store(g, grad_granule<T, kEntropy>(*(span.x_granules() + g), row, transform));
  }
  if (threadIdx.x < span.edges()) {
    const int column = span.edge_column(threadIdx.x);
    span.y[column] = static_cast<T>(grad_of<kEntropy>(static_cast<float>(span.x[column]), row, transform));
  }
#pragma unroll
  for (int j = 0; j < kRegisterGranules; ++j) {
    const int g = (shared_slots + j) * kResidentThreads + threadIdx.x;
    if (g < span.granules) span.store(g, grad_granule<T, kEntropy>(kept[j], row, transform));
    if (has_next) kept[j] = load_granule(next, shared_slots + j);
  }
#pragma unroll 1
  for (int k = 0; k < shared_slots; ++k) {
    const int g = k * kResidentThreads + threadIdx.x;
    if (g < span.granules) span.store(g, grad_granule<T, kEntropy>(shared[g], row, transform));
    if (has_next) prefetch_slot(next, shared, k);
  }
}

template <class T, bool kSoftcap>
__device__ void finish_resident_row(const RowSpan<T>& span, const RowSpan<T>& next, bool has_next, uint4* shared,
                                    int shared_slots, uint4 (&kept)[kRegisterGranules], const RowBroadcast& known,
                                    int64_t target, const Transform<kSoftcap>& transform) {
  const RowResult& row = known.row;
  const bool in_vocab = target >= 0 && target < span.vocab;
  if (!in_vocab || (row.grad_logp == 0.0f && row.grad_entropy == 0.0f)) {
    fill_row(span, in_vocab ? 0.0f : quiet_nan());
    if (!has_next) return;
#pragma unroll 1
    for (int k = 0; k < shared_slots; ++k) prefetch_slot(next, shared, k);
#pragma unroll
    for (int j = 0; j < kRegisterGranules; ++j) kept[j] = load_granule(next, shared_slots + j);
    return;
  }
  if (row.grad_entropy == 0.0f) {
    resident_grad<T, false>(span, next, has_next, shared, shared_slots, kept, row, transform);
  } else {
    resident_grad<T, true>(span, next, has_next, shared, shared_slots, kept, row, transform);
  }
  __syncthreads();  // the target's own value replaces what its granule stored
  if (threadIdx.x == 0) span.y[target] = static_cast<T>(grad_at_target(known.x_target, row, transform));
}


template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kResidentThreads, 1)
    token_loss_resident_kernel(const __grid_constant__ Rows rows, const __grid_constant__ RowStats out,
                               const __grid_constant__ TokenConstants constants, int shared_slots) {
  extern __shared__ uint4 shared[];
  __shared__ RowBroadcast known;
  const Transform<kSoftcap> transform(rows.transform);
  uint4 kept[kRegisterGranules] = {};
  bool loaded = false;  // whether this row was prefetched while the row before it was written
  for (int64_t r = blockIdx.x; r < rows.n; r += gridDim.x) {
    const RowSpan<T> span(rows, r);
    if (masked_out(rows, r)) {
      if (threadIdx.x == 0) {
        write_masked_stats(r, rows.n, out);
        constants.grad_logps[r] = 0.0f;
      }
      fill_row(span, 0.0f);
      loaded = false;
      continue;
    }
    if (!loaded) {
  #pragma unroll 1
    for (int k = 0; k < shared_slots; ++k) prefetch_slot(span, shared, k);
#pragma unroll
      for (int j = 0; j < kRegisterGranules; ++j) kept[j] = load_granule(span, shared_slots + j);
    }
    __pipeline_commit();
    __pipeline_wait_prior(0);
    const Sums sums =
        merge_block(resident_sums<T>(span, shared, shared_slots, kept, transform), known.scratch);
    const int64_t target = rows.index[r];
    if (threadIdx.x == 0) {
      const bool in_vocab = target >= 0 && target < rows.vocab;
      known.x_target = in_vocab ? static_cast<float>(span.x[target]) : 0.0f;
      RowResult row = row_result(sums, transform(known.x_target), in_vocab);
      const RowConstants known_of_row = row_constants(r, constants);
      row.grad_logp = row_coefficient(row.logp, known_of_row, constants);
      row.grad_entropy = known_of_row.grad_entropy;
      write_stats(row, r, rows.n, out);
      constants.grad_logps[r] = row.grad_logp;
      known.row = row;
    }
    __syncthreads();
    const int64_t following = r + gridDim.x;
    loaded = following < rows.n && !masked_out(rows, following);
    const RowSpan<T> next(rows, loaded ? following : r);
    finish_resident_row(span, next, loaded, shared, shared_slots, kept, known, target, transform);
    __syncthreads();  // `known` is free again
  }
}

}  // namespace igrpo::cuda
