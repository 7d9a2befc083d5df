// Token-level loss on sm_90 and later: a cluster of blocks holds one row in its shared memory, a slice per block.
//
//   copy engine   row i+1, i+2 -> ring buffers ........................... row i -> global memory
//   threads       wait for row i -> slice's sums -> DSMEM exchange -> gradient over the slice, in shared memory
//
// A logit crosses HBM twice, once in each direction: 4 bytes in bf16. The copy engine moves whole slices, so loads of
// the following rows and the store of the last one are in flight while the threads compute. Head and tail, which do not
// fill a 16-byte granule, go through rank 0's threads.
#pragma once

#include <cooperative_groups.h>

#include "bulk_copy.cuh"
#include "row_span.cuh"

namespace igrpo::cuda {

constexpr int kClusterThreads = 256;
constexpr int kClusterWarps = kClusterThreads / kWarp;
constexpr int kMaxCluster = 8;
constexpr int kMaxBuffers = 4;
constexpr int kClusterGranules = 4;  // of a thread in one trip

struct ClusterPlan {
  int cluster;         // blocks per row
  int slice_granules;  // 16-byte granules per block
  int buffers;         // rows in flight per block
};

// Static shared memory of a block.
struct ClusterShared {
  // Every warp's sums, by block; alternating, so that one cluster barrier per row is enough.
  float4 parts[2][kMaxCluster * kClusterWarps];
  uint64_t full[kMaxBuffers];  // a slice has arrived
  RowPlace places[kMaxBuffers];
  RowConstants constants[kMaxBuffers];
  float x_target[kMaxBuffers];
  float4 transforms[kMaxBuffers];  // of rows with their own temperature
  RowSlope slope;
  bool silent;  // no gradient
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// This block's part of a row.
template <class T>
struct Slice {
  RowSpan<T> span;
  int first, count;  // granules

  __device__ Slice(const RowSpan<T>& row, int rank, int slice_granules)
      : span(row), first(rank * slice_granules), count(max(0, min(slice_granules, span.granules - first))) {}
  __device__ bool holds(int column) const {
    return column >= span.head + first * Pack<T>::kCount && column < span.head + (first + count) * Pack<T>::kCount;
  }
  __device__ int offset(int column) const { return column - span.head - first * Pack<T>::kCount; }
};

// Requests row r into a ring buffer, and notes where it lies; a masked row is not loaded. Two threads work, of different
// warps: the second one's loads take as long as a DRAM access.
template <class T, bool kSoftcap, bool kTempered>
__device__ void request_row(const Rows& rows, const TokenConstants& constants, int64_t r, int rank, int slice_granules,
                            ClusterShared& shared, int buffer, uint4* slices) {
  if (threadIdx.x % kWarp != 0 || threadIdx.x > kWarp || r >= rows.n) return;
  const bool masked = masked_out(rows, r);
  const Slice<T> slice(RowSpan<T>(rows, r), rank, slice_granules);
  if (threadIdx.x == 0) {
    if (masked) return;
    bulk_stores_read();  // the store of the row that used this buffer
    barrier_expect(&shared.full[buffer], slice.count * 16u);
    if (slice.count > 0) {
      bulk_load(slices + buffer * slice_granules, slice.span.x_granules() + slice.first, slice.count * 16u,
                &shared.full[buffer]);
    }
    return;
  }
  const int64_t target = masked ? -1 : rows.index[r];
  const bool in_vocab = target >= 0 && target < rows.vocab;
  shared.places[buffer] = {slice.span.x, slice.span.y, slice.span.head, slice.span.granules,
                           in_vocab ? static_cast<int>(target) : -1, masked};
  shared.constants[buffer] = row_constants(r, constants);
  if constexpr (kTempered) {
    shared.transforms[buffer] = Transform<T, kSoftcap>(rows.transform, rows.temperatures[r]).numbers();
  }
  shared.x_target[buffer] = in_vocab ? static_cast<float>(slice.span.x[target]) : 0.0f;
}

template <class T, bool kSoftcap>
__device__ Sums slice_sums(const Slice<T>& slice, const uint4* granules, int rank,
                           const Transform<T, kSoftcap>& transform) {
  RunningSums<T, kSoftcap> sums(transform);
  const auto load = [&](int g) { return granules[g]; };
  if (transform.rising()) {
    add_granules<true, kClusterGranules, kClusterThreads>(slice.count, sums, load);
  } else {
    add_granules<false, kClusterGranules, kClusterThreads>(slice.count, sums, load);
  }
  if (rank == 0 && threadIdx.x < slice.span.edges()) {
    sums.add_one(static_cast<float>(slice.span.x[slice.span.edge_column(threadIdx.x)]));
  }
  return sums.sums();
}

// The gradient replaces the slice in shared memory.
template <bool kFolded, class T, bool kSoftcap>
__device__ void slice_grad(int count, uint4* granules, const RowSlope& slope, const Transform<T, kSoftcap>& transform) {
  walk<kClusterGranules, kClusterThreads>(count, [&]<int kNow>(int g) {
    uint4 bits[kNow];
#pragma unroll
    for (int i = 0; i < kNow; ++i) bits[i] = granules[g + i * kClusterThreads];
#pragma unroll
    for (int i = 0; i < kNow; ++i) granules[g + i * kClusterThreads] = grad_granule<kFolded>(bits[i], slope, transform);
  });
}

template <class T>
__device__ void fill_slice(const Slice<T>& slice, int rank, float value) {
  const uint4 bits = granule_of<T>(value);
  for (int g = threadIdx.x; g < slice.count; g += kClusterThreads) slice.span.store(slice.first + g, bits);
  if (rank == 0 && threadIdx.x < slice.span.edges()) {
    slice.span.y[slice.span.edge_column(threadIdx.x)] = static_cast<T>(value);
  }
}

// Gradient of this block's slice, from shared memory to global memory; head and tail are rank 0's. Thread 0 alone knows
// `at_target`.
template <class T, bool kSoftcap>
__device__ void finish_slice(const Slice<T>& slice, uint4* granules, int rank, int target, const ClusterShared& shared,
                             T at_target, const Transform<T, kSoftcap>& transform) {
  if (shared.silent) {
    fill_slice(slice, rank, target >= 0 ? 0.0f : quiet_nan());
    return;
  }
  const RowSlope slope = shared.slope;
  if (slope.folded) {
    slice_grad<true>(slice.count, granules, slope, transform);
  } else {
    slice_grad<false>(slice.count, granules, slope, transform);
  }
  if (rank == 0 && threadIdx.x < slice.span.edges()) {
    const int column = slice.span.edge_column(threadIdx.x);
    slice.span.y[column] = grad_of_one(slice.span.x[column], slope, transform);
  }
  fence_for_bulk_copies();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (slice.holds(target)) {
    reinterpret_cast<T*>(granules)[slice.offset(target)] = at_target;
    fence_for_bulk_copies();
  } else if (rank == 0 && (target < slice.span.head || target >= slice.span.head + slice.span.granules * Pack<T>::kCount)) {
    slice.span.y[target] = at_target;
  }
  if (slice.count > 0) {
    bulk_store(slice.span.y + slice.span.head + slice.first * Pack<T>::kCount, granules, slice.count * 16u);
  }
}

// Every warp's sums to every block of the cluster: lane p writes to block p.
template <class Cluster>
__device__ __forceinline__ void publish_sums(const Cluster& cluster, float4* parts, int rank, const Sums& sums) {
  const int peer = threadIdx.x % kWarp;
  if (peer < static_cast<int>(cluster.num_blocks())) {
    *cluster.map_shared_rank(parts + rank * kClusterWarps + threadIdx.x / kWarp, peer) = as_float4(sums);
  }
}

// The row's sums from those of all warps, in every lane of a warp: in the same order in every block, so bit-identical.
template <class Transform>
__device__ __forceinline__ Sums gather_sums(const float4* parts, const Transform& transform) {
  constexpr int kEach = kMaxCluster * kClusterWarps / kWarp;
  Sums each[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) each[i] = as_sums(parts[i * kWarp + threadIdx.x % kWarp]);
  return merge_lanes<kWarp>(each, transform);
}

// Warp 0, once it has the row's sums: publishes the row's slope, writes its statistics; the target's gradient.
template <class T, bool kSoftcap>
__device__ T conclude_row(const Sums& sums, const Rows& rows, const RowStats& out, const TokenConstants& constants,
                          int64_t r, int rank, int target, int buffer, ClusterShared& shared,
                          const Transform<T, kSoftcap>& transform) {
  const float x_target = shared.x_target[buffer];
  const RowConstants& known = shared.constants[buffer];
  RowResult row = row_result(sums, x_target, target >= 0, transform);
  row.grad_logp = row_coefficient(row.logp, known, constants);
  row.grad_entropy = known.grad_entropy;
  if (threadIdx.x == 0) {
    shared.slope = RowSlope(row, transform);
    shared.silent = target < 0 || (row.grad_logp == 0.0f && row.grad_entropy == 0.0f);
    if (rank == 0) {
      write_stats(row, r, rows.n, out);
      constants.grad_logps[r] = row.grad_logp;
    }
  }
  return grad_at_target<T>(x_target, row, transform);
}

#endif  // sm_90

// kTempered: rows.temperatures are there. Else nothing of a row's transform is left to its loop.
template <class T, bool kSoftcap, bool kTempered = false>
__global__ void __launch_bounds__(kClusterThreads, 2)
    token_loss_cluster_kernel(const __grid_constant__ Rows rows, const __grid_constant__ RowStats out,
                              const __grid_constant__ TokenConstants constants, const __grid_constant__ ClusterPlan plan) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  extern __shared__ __align__(128) uint4 slices[];
  __shared__ ClusterShared shared;
  const cg::cluster_group cluster = cg::this_cluster();
  const int rank = static_cast<int>(cluster.block_rank());
  const int64_t clusters = gridDim.x / plan.cluster;
  const Transform<T, kSoftcap> common(rows.transform);
  if (threadIdx.x == 0) {
    for (int b = 0; b < plan.buffers; ++b) barrier_init(&shared.full[b]);
    barrier_init_fence();
  }
  // Blocks that the cluster does not have leave nothing, whatever a row's temperature.
  for (int i = threadIdx.x; i < 2 * kMaxCluster * kClusterWarps; i += kClusterThreads) {
    (&shared.parts[0][0])[i] = make_float4(negative_infinity(), -FLT_MAX, 0.0f, 0.0f);
  }
  cluster.sync();

  const int64_t first_row = blockIdx.x / plan.cluster;
  for (int b = 0; b + 1 < plan.buffers; ++b) {
    request_row<T, kSoftcap, kTempered>(rows, constants, first_row + b * clusters, rank, plan.slice_granules, shared, b, slices);
  }
  __syncthreads();

  uint32_t phases = 0;  // bit b: parity of buffer b's next arrival
  int buffer = 0, exchange = 0;
  for (int64_t r = first_row; r < rows.n; r += clusters) {
    const RowPlace place = shared.places[buffer];
    const auto transform = kTempered ? Transform<T, kSoftcap>(shared.transforms[buffer]) : common;
    const Slice<T> slice(RowSpan<T>(place, static_cast<int>(rows.vocab)), rank, plan.slice_granules);
    uint4* granules = slices + buffer * plan.slice_granules;
    if (!place.masked) {
      barrier_wait(&shared.full[buffer], (phases >> buffer) & 1u);
      phases ^= 1u << buffer;
      const Sums sums = merge_warp(slice_sums(slice, granules, rank, transform), transform);
      publish_sums(cluster, shared.parts[exchange], rank, sums);
    }
    // The buffer of the row before this one: its threads are done with it since that row's last __syncthreads.
    const int refill = buffer == 0 ? plan.buffers - 1 : buffer - 1;
    request_row<T, kSoftcap, kTempered>(rows, constants, r + (plan.buffers - 1) * clusters, rank, plan.slice_granules, shared, refill, slices);
    if (place.masked) {
      if (rank == 0 && threadIdx.x == 0) {
        write_masked_stats(r, rows.n, out);
        constants.grad_logps[r] = 0.0f;
      }
      fill_slice(slice, rank, 0.0f);
    } else {
      cluster.sync();
      T at_target{};
      if (threadIdx.x < kWarp) {
        const Sums sums = gather_sums(shared.parts[exchange], transform);
        at_target = conclude_row(sums, rows, out, constants, r, rank, place.target, buffer, shared, transform);
      }
      __syncthreads();
      finish_slice(slice, granules, rank, place.target, shared, at_target, transform);
      exchange ^= 1;
    }
    __syncthreads();  // every thread is done with this row's shared values
    buffer = buffer + 1 == plan.buffers ? 0 : buffer + 1;
  }
  if (threadIdx.x == 0) bulk_stores_done();
  cluster.sync();  // no block leaves while another may still write into its shared memory
#endif
}

}  // namespace igrpo::cuda
