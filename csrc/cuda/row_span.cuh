// Where one row lies in memory: a head before the first 16-byte boundary, whole 16-byte granules, and a tail.
// No alignment is assumed; head and tail hold at most 2·(16 / sizeof(T) - 1) elements together, one per thread.
#pragma once

#include "row_math.cuh"

namespace igrpo::cuda {

// A row as another thread found it: two 64-bit divisions and a remainder, which only one needs to do.
struct RowPlace {
  const void* x;
  void* y;
  int head, granules, target;  // target = -1: outside [0, V)
  bool masked;
};

template <class T>
struct RowSpan {
  static constexpr int kCount = Pack<T>::kCount;

  const T* x;          // logits of this row
  T* y;                // gradient of this row; nullptr = statistics only
  int vocab;
  int head;            // elements before the first aligned granule
  int granules;        // aligned 16-byte granules
  bool same_alignment;  // y's granules coincide with x's

  // What one thread found out for all.
  __device__ RowSpan(const RowPlace& place, int V)
      : x(static_cast<const T*>(place.x)),
        y(static_cast<T*>(place.y)),
        vocab(V),
        head(place.head),
        granules(place.granules),
        same_alignment(true) {}
  __device__ RowSpan(const Rows& rows, int64_t r) : vocab(static_cast<int>(rows.vocab)) {
    const int64_t outer = r / rows.inner, inner = r % rows.inner;
    x = static_cast<const T*>(rows.logits) + outer * rows.logits_stride_outer + inner * rows.logits_stride_inner;
    y = rows.grad == nullptr
            ? nullptr
            : static_cast<T*>(rows.grad) + outer * rows.grad_stride_outer + inner * rows.grad_stride_inner;
    const unsigned skew = static_cast<unsigned>(reinterpret_cast<uintptr_t>(x) % 16) / sizeof(T);
    head = min(vocab, static_cast<int>((kCount - skew) % kCount));
    granules = (vocab - head) / kCount;
    same_alignment = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(y)) % 16 == 0;
  }

  __device__ int edges() const { return vocab - granules * kCount; }
  // Column of edge element j: the head's first, then the tail's.
  __device__ int edge_column(int j) const { return j < head ? j : granules * kCount + j; }
  __device__ const uint4* x_granules() const { return reinterpret_cast<const uint4*>(x + head); }

  // Granules `granule`, `granule` + kStride, ...
  template <int kStride, int kMany>
  __device__ void store(int granule, const uint4 (&bits)[kMany]) const {
    if (same_alignment) {
      uint4* to = reinterpret_cast<uint4*>(y + head) + granule;
#pragma unroll
      for (int i = 0; i < kMany; ++i) __stcs(to + i * kStride, bits[i]);  // not read again by this kernel
      return;
    }
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      T values[kCount], *to = y + head + (granule + i * kStride) * kCount;
      memcpy(values, &bits[i], sizeof values);
#pragma unroll
      for (int j = 0; j < kCount; ++j) to[j] = values[j];
    }
  }
  __device__ void store(int granule, const uint4& bits) const {
    const uint4 one[1] = {bits};
    store<0>(granule, one);
  }
};

template <class T>
__device__ uint4 granule_of(float value) {
  Two values[Pack<T>::kPairs];
#pragma unroll
  for (Two& pair : values) pair = {value, value};
  return Pack<T>::pack(values);
}

template <class T>
__device__ void fill_row(const RowSpan<T>& span, float value) {
  const uint4 bits = granule_of<T>(value);
  for (int g = threadIdx.x; g < span.granules; g += blockDim.x) span.store(g, bits);
  if (threadIdx.x < span.edges()) span.y[span.edge_column(threadIdx.x)] = static_cast<T>(value);
}

// The granules of one thread among `count`: handle<kMany>(g) takes g, g + kThreads, ...
template <int kMany, int kThreads, class Handle>
__device__ __forceinline__ void walk(int count, Handle handle) {
  int g = threadIdx.x;
#pragma unroll 1
  for (; g + (kMany - 1) * kThreads < count; g += kMany * kThreads) handle.template operator()<kMany>(g);
#pragma unroll 1
  for (; g < count; g += kThreads) handle.template operator()<1>(g);
}

template <bool kRising, int kMany, int kThreads, class T, bool kSoftcap, class Load>
__device__ __forceinline__ void add_granules(int count, RunningSums<T, kSoftcap>& sums, Load load) {
  walk<kMany, kThreads>(count, [&]<int kNow>(int g) {
    uint4 bits[kNow];
#pragma unroll
    for (int i = 0; i < kNow; ++i) bits[i] = load(g + i * kThreads);
    sums.template add_granules<kRising>(bits);
  });
}

__device__ __forceinline__ bool masked_out(const Rows& rows, int64_t r) {
  return rows.mask != nullptr && !rows.mask[r];
}

}  // namespace igrpo::cuda
