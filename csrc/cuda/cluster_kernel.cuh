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

constexpr int kClusterThreads = 512;
constexpr int kMaxCluster = 8;
constexpr int kMaxBuffers = 4;
// Granules in flight per thread; tanh leaves no registers for a second one.
template <bool kSoftcap>
constexpr int kUnroll = kSoftcap ? 1 : 2;

struct ClusterPlan {
  int cluster;         // blocks per row
  int slice_granules;  // 16-byte granules per block
  int buffers;         // rows in flight per block
};

// Static shared memory of a block.
struct ClusterShared {
  uint64_t full[kMaxBuffers];      // a slice has arrived
  float3 parts[2][kMaxCluster];    // every block's sums; alternating, so that one cluster barrier per row is enough
  float3 scratch[kClusterThreads / kWarp];
  RowConstants constants[kMaxBuffers];
  float x_target[kMaxBuffers];
  RowResult row;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// This block's part of a row.
template <class T>
struct Slice {
  RowSpan<T> span;
  int first, count;  // granules

  __device__ Slice(const Rows& rows, int64_t r, int rank, int slice_granules)
      : span(rows, r), first(rank * slice_granules), count(max(0, min(slice_granules, span.granules - first))) {}
  __device__ bool holds(int column) const {
    return column >= span.head + first * Pack<T>::kCount && column < span.head + (first + count) * Pack<T>::kCount;
  }
  __device__ int offset(int column) const { return column - span.head - first * Pack<T>::kCount; }
};

// Requests row r into a ring buffer; nothing for a masked row. Called by whole warps 0 and 1.
template <class T>
__device__ void request_row(const Rows& rows, const TokenConstants& constants, int64_t r, int rank, int slice_granules,
                            ClusterShared& shared, int buffer, uint4* slices) {
  if (r >= rows.n || masked_out(rows, r)) return;
  const Slice<T> slice(rows, r, rank, slice_granules);
  if (threadIdx.x == 0) {
    bulk_stores_read();  // the store of the row that used this buffer
    barrier_expect(&shared.full[buffer], slice.count * 16u);
    if (slice.count > 0) {
      bulk_load(slices + buffer * slice_granules, slice.span.x_granules() + slice.first, slice.count * 16u,
                &shared.full[buffer]);
    }
  }
  if (threadIdx.x == kWarp) {  // another warp: its loads take as long as a DRAM access
    const int64_t target = rows.index[r];
    shared.constants[buffer] = row_constants(r, constants);
    shared.x_target[buffer] = target >= 0 && target < rows.vocab ? static_cast<float>(slice.span.x[target]) : 0.0f;
  }
}

template <class T, bool kSoftcap>
__device__ Sums slice_sums(const Slice<T>& slice, const uint4* granules, int rank, const Transform<kSoftcap>& transform) {
  Sums sums;
#pragma unroll kUnroll<kSoftcap>
  for (int g = threadIdx.x; g < slice.count; g += kClusterThreads) add_granule<T>(granules[g], transform, sums);
  if (rank == 0 && threadIdx.x < slice.span.edges()) {
    const float z[1] = {transform(static_cast<float>(slice.span.x[slice.span.edge_column(threadIdx.x)]))};
    sums.add(z);
  }
  return sums;
}

// The gradient replaces the slice in shared memory; rank 0 writes head and tail.
template <class T, bool kEntropy, bool kSoftcap>
__device__ void slice_grad(const Slice<T>& slice, uint4* granules, int rank, const RowResult& row,
                           const Transform<kSoftcap>& transform) {
#pragma unroll kUnroll<kSoftcap>
  for (int g = threadIdx.x; g < slice.count; g += kClusterThreads) {
    granules[g] = grad_granule<T, kEntropy>(granules[g], row, transform);
  }
  if (rank == 0 && threadIdx.x < slice.span.edges()) {
    const int column = slice.span.edge_column(threadIdx.x);
    slice.span.y[column] = static_cast<T>(grad_of<kEntropy>(static_cast<float>(slice.span.x[column]), row, transform));
  }
}

template <class T>
__device__ void fill_slice(const Slice<T>& slice, int rank, float value) {
  float values[Pack<T>::kCount];
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) values[i] = value;
  const uint4 bits = Pack<T>::pack(values);
  for (int g = threadIdx.x; g < slice.count; g += kClusterThreads) slice.span.store(slice.first + g, bits);
  if (rank == 0 && threadIdx.x < slice.span.edges()) {
    slice.span.y[slice.span.edge_column(threadIdx.x)] = static_cast<T>(value);
  }
}

// Gradient of this block's slice, from shared memory to global memory.
template <class T, bool kSoftcap>
__device__ void finish_slice(const Slice<T>& slice, uint4* granules, int rank, int64_t target, float x_target,
                             const RowResult& row, const Transform<kSoftcap>& transform) {
  const bool in_vocab = target >= 0 && target < slice.span.vocab;
  if (!in_vocab || (row.grad_logp == 0.0f && row.grad_entropy == 0.0f)) {
    fill_slice(slice, rank, in_vocab ? 0.0f : quiet_nan());
    return;
  }
  if (row.grad_entropy == 0.0f) {
    slice_grad<T, false>(slice, granules, rank, row, transform);
  } else {
    slice_grad<T, true>(slice, granules, rank, row, transform);
  }
  fence_for_bulk_copies();
  __syncthreads();
  if (threadIdx.x != 0) return;
  const int column = static_cast<int>(target);
  const T at_target = static_cast<T>(grad_at_target(x_target, row, transform));
  if (slice.holds(column)) {
    reinterpret_cast<T*>(granules)[slice.offset(column)] = at_target;
    fence_for_bulk_copies();
  } else if (rank == 0 && (column < slice.span.head || column >= slice.span.head + slice.span.granules * Pack<T>::kCount)) {
    slice.span.y[column] = at_target;
  }
  if (slice.count > 0) {
    bulk_store(slice.span.y + slice.span.head + slice.first * Pack<T>::kCount, granules, slice.count * 16u);
  }
}

#endif  // sm_90

template <class T, bool kSoftcap>
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
  const Transform<kSoftcap> transform(rows.transform);
  if (threadIdx.x == 0) {
    for (int b = 0; b < plan.buffers; ++b) barrier_init(&shared.full[b]);
    barrier_init_fence();
  }
  cluster.sync();

  const int64_t first_row = blockIdx.x / plan.cluster;
  for (int b = 0; b + 1 < plan.buffers; ++b) {
    request_row<T>(rows, constants, first_row + b * clusters, rank, plan.slice_granules, shared, b, slices);
  }
  uint32_t phases = 0;  // bit b: parity of buffer b's next arrival
  int buffer = 0, exchange = 0;
  for (int64_t r = first_row; r < rows.n; r += clusters) {
    const Slice<T> slice(rows, r, rank, plan.slice_granules);
    const bool masked = masked_out(rows, r);
    uint4* granules = slices + buffer * plan.slice_granules;
    Sums sums;
    if (!masked) {
      barrier_wait(&shared.full[buffer], (phases >> buffer) & 1u);
      phases ^= 1u << buffer;
      sums = merge_block(slice_sums(slice, granules, rank, transform), shared.scratch);
    }
    // The buffer of the row before this one: its threads are done with it since that row's last __syncthreads.
    const int refill = (buffer + plan.buffers - 1) % plan.buffers;
    request_row<T>(rows, constants, r + (plan.buffers - 1) * clusters, rank, plan.slice_granules, shared, refill, slices);
    if (masked) {
      if (rank == 0 && threadIdx.x == 0) {
        write_masked_stats(r, rows.n, out);
        constants.grad_logps[r] = 0.0f;
      }
      fill_slice(slice, rank, 0.0f);
    } else {
      if (threadIdx.x == 0) {
        for (int peer = 0; peer < plan.cluster; ++peer) {
          *cluster.map_shared_rank(&shared.parts[exchange][rank], peer) = make_float3(sums.m, sums.s, sums.t);
        }
      }
      cluster.sync();
      const int64_t target = rows.index[r];
      if (threadIdx.x == 0) {
        Sums all;
        for (int peer = 0; peer < plan.cluster; ++peer) {  // in rank order in every block: bit-identical results
          const float3 part = shared.parts[exchange][peer];
          Sums other;
          other.m = part.x;
          other.s = part.y;
          other.t = part.z;
          all.merge(other);
        }
        const bool in_vocab = target >= 0 && target < rows.vocab;
        RowResult row = row_result(all, transform(shared.x_target[buffer]), in_vocab);
        row.grad_logp = row_coefficient(row.logp, shared.constants[buffer], constants);
        row.grad_entropy = shared.constants[buffer].grad_entropy;
        shared.row = row;
        if (rank == 0) {
          write_stats(row, r, rows.n, out);
          constants.grad_logps[r] = row.grad_logp;
        }
      }
      __syncthreads();
      finish_slice(slice, granules, rank, target, shared.x_target[buffer], shared.row, transform);
      exchange ^= 1;
    }
    __syncthreads();  // every thread is done with this row's shared values
    buffer = (buffer + 1) % plan.buffers;
  }
  if (threadIdx.x == 0) bulk_stores_done();
  cluster.sync();  // no block leaves while another may still write into its shared memory
#endif
}

}  // namespace igrpo::cuda
