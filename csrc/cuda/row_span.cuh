// Where one row lies in memory: a head before the first 16-byte boundary, whole 16-byte granules, and a tail.
// No alignment is assumed; head and tail hold at most 2·(16 / sizeof(T) - 1) elements together, one per thread.
#pragma once

#include "row_math.cuh"

namespace igrpo::cuda {

template <class T>
struct RowSpan {
  static constexpr int kCount = Pack<T>::kCount;

  const T* x;          // logits of this row
  T* y;                // gradient of this row; nullptr = statistics only
  int vocab;
  int head;            // elements before the first aligned granule
  int granules;        // aligned 16-byte granules
  bool same_alignment;  // y's granules coincide with x's

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

  __device__ void store(int granule, const uint4& bits) const {
    T* to = y + head + granule * kCount;
    if (same_alignment) {
      __stcs(reinterpret_cast<uint4*>(to), bits);  // not read again by this kernel
      return;
    }
    T values[kCount];
    memcpy(values, &bits, sizeof values);
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = values[i];
  }
};

template <class T>
__device__ void fill_row(const RowSpan<T>& span, float value) {
  float values[Pack<T>::kCount];
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) values[i] = value;
  const uint4 bits = Pack<T>::pack(values);
  for (int g = threadIdx.x; g < span.granules; g += blockDim.x) span.store(g, bits);
  if (threadIdx.x < span.edges()) span.y[span.edge_column(threadIdx.x)] = static_cast<T>(value);
}

template <class T, bool kSoftcap>
__device__ __forceinline__ void add_granule(const uint4& bits, const Transform<kSoftcap>& transform, Sums& sums) {
  float z[Pack<T>::kCount];
  Pack<T>::unpack(bits, z);
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) z[i] = transform(z[i]);
  sums.add(z);
}

template <class T, bool kEntropy, bool kSoftcap>
__device__ __forceinline__ uint4 grad_granule(const uint4& bits, const RowResult& row,
                                              const Transform<kSoftcap>& transform) {
  float x[Pack<T>::kCount];
  Pack<T>::unpack(bits, x);
#pragma unroll
  for (int i = 0; i < Pack<T>::kCount; ++i) x[i] = grad_of<kEntropy>(x[i], row, transform);
  return Pack<T>::pack(x);
}

__device__ __forceinline__ bool masked_out(const Rows& rows, int64_t r) {
  return rows.mask != nullptr && !rows.mask[r];
}

}  // namespace igrpo::cuda
