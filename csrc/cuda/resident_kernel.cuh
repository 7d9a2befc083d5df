// Token-level loss, one row per block: the row stays in shared memory and registers between its statistics and its
// gradient (A100: 160 KiB + 256 threads x 36 x 16 B = 304 KiB, V = 155,648 in bf16). What does not fit is read a second
// time, from L2 most likely. Without shared memory (IGRPO_CUDA_PLAN=two_pass) the registers alone hold 144 KiB of it.
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

constexpr int kResidentGranules = 4;  // of a thread in one trip
static_assert(kRegisterGranules % kResidentGranules == 0);

// Shared between the thread that knows a row's result and all others.
struct RowBroadcast {
  float4 scratch[kResidentThreads / kWarp];
  RowResult row;
  float x_target;
};

template <class T>
__device__ __forceinline__ void prefetch_granule(const RowSpan<T>& span, uint4* shared, int g) {
  if (g < span.granules) __pipeline_memcpy_async(shared + g, span.x_granules() + g, 16);
}

// Granules beyond the row count nothing: `beyond` is -inf, or +inf where a large logit is an unlikely one.
template <class T>
__device__ __forceinline__ void load_granules(const RowSpan<T>& span, int first_slot, const uint4& beyond,
                                              uint4 (&kept)[kRegisterGranules]) {
#pragma unroll
  for (int j = 0; j < kRegisterGranules; ++j) {
    const int g = (first_slot + j) * kResidentThreads + threadIdx.x;
    kept[j] = g < span.granules ? __ldcs(span.x_granules() + g) : beyond;
  }
}

// Granules g, g + kResidentThreads, ... as far as the row goes.
template <int kMany, class T>
__device__ __forceinline__ void store_granules(const RowSpan<T>& span, int g, const uint4 (&bits)[kMany]) {
  if (g + (kMany - 1) * kResidentThreads < span.granules) {
    span.template store<kResidentThreads>(g, bits);
  } else {
#pragma unroll
    for (int i = 0; i < kMany; ++i) {
      if (g + i * kResidentThreads < span.granules) span.store(g + i * kResidentThreads, bits[i]);
    }
  }
}

// Statistics of the row: what is resident, then what is not, then head and tail.
template <bool kRising, class T, bool kSoftcap>
__device__ __forceinline__ Sums resident_sums(const RowSpan<T>& span, const uint4* shared, int shared_slots,
                                              const uint4 (&kept)[kRegisterGranules],
                                              const Transform<T, kSoftcap>& transform) {
  RunningSums<T, kSoftcap> sums(transform);
  const int on_chip = (shared_slots + kRegisterGranules) * kResidentThreads;
  add_granules<kRising, kResidentGranules, kResidentThreads>(min(span.granules, shared_slots * kResidentThreads), sums,
                                                             [&](int g) { return shared[g]; });
  // With a cap an infinite logit counts like any other.
  constexpr int kNow = kSoftcap ? 1 : kResidentGranules;
#pragma unroll
  for (int j = 0; j < kRegisterGranules; j += kNow) {
    uint4 bits[kNow];
#pragma unroll
    for (int i = 0; i < kNow; ++i) bits[i] = kept[j + i];
    if (!kSoftcap || (shared_slots + j) * kResidentThreads + threadIdx.x < span.granules) {
      sums.template add_granules<kRising>(bits);
    }
  }
  add_granules<kRising, kResidentGranules, kResidentThreads>(
      span.granules - on_chip, sums, [&](int g) { return __ldcg(span.x_granules() + on_chip + g); });
  const bool has_edge = threadIdx.x < span.edges();
  if (has_edge) sums.add_one(static_cast<float>(span.x[span.edge_column(threadIdx.x)]));
  const float all = sums.s.x + sums.s.y;  // NaN if a logit is, which no maximum shows
  // All at the limit, and what lies beyond the row was counted with them.
  if (!kSoftcap && sums.m <= -transform.limit && all == all) {
    const int own = (span.granules - static_cast<int>(threadIdx.x) + kResidentThreads - 1) / kResidentThreads;
    const float d = transform.exact_distance(kRising ? -transform.limit : transform.limit, sums.center);
    sums.s = {exp2_flushed(d) * static_cast<float>(max(own, 0) * Pack<T>::kCount + has_edge), 0.0f};
    sums.t = {sums.s.x * d, 0.0f};
  }
  return sums.sums();
}

// Gradient of every slot; each resident slot is refilled from `next` right after it was stored.
template <bool kFolded, class T, bool kSoftcap>
__device__ __forceinline__ void resident_grad(const RowSpan<T>& span, const RowSpan<T>& next, bool has_next,
                                              uint4* shared, int shared_slots, uint4 (&kept)[kRegisterGranules],
                                              const uint4& beyond, const RowSlope& slope,
                                              const Transform<T, kSoftcap>& transform) {
  const int on_chip = (shared_slots + kRegisterGranules) * kResidentThreads;
  walk<kResidentGranules, kResidentThreads>(span.granules - on_chip, [&]<int kNow>(int g) {
    uint4 bits[kNow];
#pragma unroll
    for (int i = 0; i < kNow; ++i) bits[i] = __ldcg(span.x_granules() + on_chip + g + i * kResidentThreads);
#pragma unroll
    for (int i = 0; i < kNow; ++i) bits[i] = grad_granule<kFolded>(bits[i], slope, transform);
    span.template store<kResidentThreads>(on_chip + g, bits);
  });
  if (threadIdx.x < span.edges()) {
    const int column = span.edge_column(threadIdx.x);
    span.y[column] = grad_of_one(span.x[column], slope, transform);
  }
#pragma unroll
  for (int j = 0; j < kRegisterGranules; j += kResidentGranules) {
    uint4 bits[kResidentGranules];
#pragma unroll
    for (int i = 0; i < kResidentGranules; ++i) bits[i] = grad_granule<kFolded>(kept[j + i], slope, transform);
    store_granules(span, (shared_slots + j) * kResidentThreads + threadIdx.x, bits);
  }
  if (has_next) load_granules(next, shared_slots, beyond, kept);
  // The next row may have a granule more.
  const int held = min(max(span.granules, next.granules), shared_slots * kResidentThreads);
  walk<kResidentGranules, kResidentThreads>(held, [&]<int kNow>(int g) {
    uint4 bits[kNow];
#pragma unroll
    for (int i = 0; i < kNow; ++i) bits[i] = grad_granule<kFolded>(shared[g + i * kResidentThreads], slope, transform);
    store_granules(span, g, bits);
    if (has_next) {
#pragma unroll
      for (int i = 0; i < kNow; ++i) prefetch_granule(next, shared, g + i * kResidentThreads);
    }
  });
}

template <class T>
__device__ __forceinline__ void load_row(const RowSpan<T>& span, uint4* shared, int shared_slots, const uint4& beyond,
                                         uint4 (&kept)[kRegisterGranules]) {
#pragma unroll 1
  for (int k = 0; k < shared_slots; ++k) prefetch_granule(span, shared, k * kResidentThreads + threadIdx.x);
  load_granules(span, shared_slots, beyond, kept);
}

template <class T, bool kSoftcap>
__global__ void __launch_bounds__(kResidentThreads, 1)
    token_loss_resident_kernel(const __grid_constant__ Rows rows, const __grid_constant__ RowStats out,
                               const __grid_constant__ TokenConstants constants, int shared_slots) {
  extern __shared__ uint4 shared[];
  __shared__ RowBroadcast known;
  Transform<T, kSoftcap> transform(rows.transform);
  const uint4 beyond = granule_of<T>(transform.rising() ? negative_infinity() : -negative_infinity());
  uint4 kept[kRegisterGranules];
#pragma unroll
  for (uint4& granule : kept) granule = beyond;
  bool loaded = false;  // whether this row was requested while the row before it was written
  RowSpan<T> span(rows, blockIdx.x);
  for (int64_t r = blockIdx.x; r < rows.n; r += gridDim.x) {
    const int64_t following = r + gridDim.x;
    const bool has_next = following < rows.n && !masked_out(rows, following);
    const RowSpan<T> next(rows, following < rows.n ? following : r);
    if (masked_out(rows, r)) {
      if (threadIdx.x == 0) {
        write_masked_stats(r, rows.n, out);
        constants.grad_logps[r] = 0.0f;
      }
      fill_row(span, 0.0f);
      loaded = false;
      span = next;
      continue;
    }
    if (!loaded) load_row(span, shared, shared_slots, beyond, kept);
    if (rows.temperatures != nullptr) transform = Transform<T, kSoftcap>(rows.transform, rows.temperatures[r]);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    const Sums mine = transform.rising() ? resident_sums<true>(span, shared, shared_slots, kept, transform)
                                         : resident_sums<false>(span, shared, shared_slots, kept, transform);
    const Sums sums = merge_block<kResidentThreads>(mine, known.scratch, transform);
    const int64_t target = rows.index[r];
    const bool in_vocab = target >= 0 && target < rows.vocab;
    if (threadIdx.x == 0) {
      known.x_target = in_vocab ? static_cast<float>(span.x[target]) : 0.0f;
      RowResult row = row_result(sums, known.x_target, in_vocab, transform);
      const RowConstants constants_of_row = row_constants(r, constants);
      row.grad_logp = row_coefficient(row.logp, constants_of_row, constants);
      row.grad_entropy = constants_of_row.grad_entropy;
      write_stats(row, r, rows.n, out);
      constants.grad_logps[r] = row.grad_logp;
      known.row = row;
    }
    __syncthreads();
    const RowResult row = known.row;
    if (!in_vocab || (row.grad_logp == 0.0f && row.grad_entropy == 0.0f)) {
      fill_row(span, in_vocab ? 0.0f : quiet_nan());
      if (has_next) load_row(next, shared, shared_slots, beyond, kept);
    } else {
      const RowSlope slope(row, transform);
      if (slope.folded) {
        resident_grad<true>(span, next, has_next, shared, shared_slots, kept, beyond, slope, transform);
      } else {
        resident_grad<false>(span, next, has_next, shared, shared_slots, kept, beyond, slope, transform);
      }
      __syncthreads();  // the target's own value replaces what its granule stored
      if (threadIdx.x == 0) span.y[target] = grad_at_target<T>(known.x_target, row, transform);
    }
    __syncthreads();  // `known` is free again
    loaded = has_next;
    span = next;
  }
}

}  // namespace igrpo::cuda
