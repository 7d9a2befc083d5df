// Launchers: the plan of a launch, and the launch. Included by one source per dtype.
#pragma once

#include <stdexcept>
#include <string>

#include "cluster_kernel.cuh"
#include "launch.h"
#include "plan.h"
#include "resident_kernel.cuh"
#include "stream_kernels.cuh"

#define IGRPO_CUDA_CHECK(expression) ::igrpo::cuda::check_cuda((expression), __FILE__, __LINE__, #expression)

namespace igrpo::cuda {

inline void check_cuda(cudaError_t error, const char* file, int line, const char* expression) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + expression + ": " +
                           cudaGetErrorString(error));
}

struct Device {
  int multiprocessors, major, shared_per_block, shared_per_multiprocessor;
};

inline Device current_device() {
  int id = 0;
  Device device{};
  IGRPO_CUDA_CHECK(cudaGetDevice(&id));
  IGRPO_CUDA_CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, id));
  IGRPO_CUDA_CHECK(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, id));
  IGRPO_CUDA_CHECK(cudaDeviceGetAttribute(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, id));
  IGRPO_CUDA_CHECK(
      cudaDeviceGetAttribute(&device.shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id));
  return device;
}

inline unsigned grid_of(const Rows& rows, int blocks) {
  return static_cast<unsigned>(rows.n < blocks ? rows.n : blocks);
}

// Bulk stores need the gradient's granules to coincide with the logits' in every row.
template <class T>
bool granules_coincide(const Rows& rows) {
  const auto skew = [](uint64_t bytes) { return bytes % 16 == 0; };
  return skew(reinterpret_cast<uintptr_t>(rows.logits) - reinterpret_cast<uintptr_t>(rows.grad)) &&
         skew(sizeof(T) * static_cast<uint64_t>(rows.logits_stride_outer - rows.grad_stride_outer)) &&
         skew(sizeof(T) * static_cast<uint64_t>(rows.logits_stride_inner - rows.grad_stride_inner));
}

// The smallest cluster whose blocks fit twice on a multiprocessor with two rows in flight each, else once.
// cluster = 0: no plan, the row is too long.
template <class T>
ClusterPlan cluster_plan(const Rows& rows, const Device& device) {
  const int64_t granules = rows.vocab / Pack<T>::kCount + 1;
  const int64_t fixed = sizeof(ClusterShared) + 1024;  // 1 KiB of every block belongs to the system
  for (const int64_t per_block : {device.shared_per_multiprocessor / 2 - fixed, device.shared_per_block - fixed}) {
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      const int64_t slice = (granules + cluster - 1) / cluster;
      const int64_t buffers = per_block / (16 * slice);
      if (buffers >= 2) {
        return {cluster, static_cast<int>(slice), static_cast<int>(buffers < kMaxBuffers ? buffers : kMaxBuffers)};
      }
    }
  }
  return {0, 0, 0};
}

template <class T, bool kSoftcap, bool kTempered>
void launch_cluster(const Rows& rows, const RowStats& out, const TokenConstants& constants, const ClusterPlan& plan,
                    const Device& device, cudaStream_t stream) {
  const auto kernel = token_loss_cluster_kernel<T, kSoftcap, kTempered>;
  const int shared = 16 * plan.slice_granules * plan.buffers;
  IGRPO_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = plan.cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(kClusterThreads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  // Persistent: as many clusters as the device holds at once. The count never changes a row's result.
  config.gridDim = dim3(plan.cluster * device.multiprocessors);
  int clusters = 0;
  IGRPO_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
  if (clusters < 1) throw std::runtime_error("no cluster of this size fits on the device");
  config.gridDim = dim3(plan.cluster * grid_of(rows, clusters));
  IGRPO_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, rows, out, constants, plan));
}

template <class T, bool kSoftcap>
void launch_resident(const Rows& rows, const RowStats& out, const TokenConstants& constants, const Device& device,
                     bool on_chip, cudaStream_t stream) {
  const auto kernel = token_loss_resident_kernel<T, kSoftcap>;
  const int64_t slot_bytes = 16 * kResidentThreads;
  const int64_t row_slots = (rows.vocab / Pack<T>::kCount + kResidentThreads) / kResidentThreads;
  const int64_t room = (device.shared_per_block - static_cast<int64_t>(sizeof(RowBroadcast)) - 1024) / slot_bytes;
  const int64_t slots = on_chip ? (row_slots < room ? row_slots : room) : 0;
  const int shared = static_cast<int>(slots * slot_bytes);
  IGRPO_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  kernel<<<grid_of(rows, device.multiprocessors), kResidentThreads, shared, stream>>>(rows, out, constants,
                                                                                      static_cast<int>(slots));
  IGRPO_CUDA_CHECK(cudaGetLastError());
}

template <class T, bool kSoftcap>
void launch_token_loss(const Rows& rows, const RowStats& out, const TokenConstants& constants, cudaStream_t stream) {
  const Device device = current_device();
  const ClusterPlan cluster = cluster_plan<T>(rows, device);
  const char* against_cluster = device.major < 9         ? "the device is older than sm_90"
                                : cluster.cluster == 0   ? "a row is longer than a cluster's shared memory"
                                : !granules_coincide<T>(rows) ? "logits and gradient start on different 16 bytes"
                                                              : nullptr;
  const Plan plan = choose_plan(against_cluster);
  if (plan == Plan::cluster) {
    const bool tempered = rows.temperatures != nullptr;
    const auto launch = tempered ? launch_cluster<T, kSoftcap, true> : launch_cluster<T, kSoftcap, false>;
    launch(rows, out, constants, cluster, device, stream);
  } else {
    launch_resident<T, kSoftcap>(rows, out, constants, device, plan == Plan::resident, stream);
  }
}

template <class T, bool kSoftcap>
void launch_row_stats(const Rows& rows, const RowStats& out, cudaStream_t stream) {
  const unsigned grid = grid_of(rows, 4 * current_device().multiprocessors);
  row_stats_kernel<T, kSoftcap><<<grid, kStreamThreads, 0, stream>>>(rows, out);
  IGRPO_CUDA_CHECK(cudaGetLastError());
}

template <class T, bool kSoftcap>
void launch_row_grad(const Rows& rows, const RowStats& stats, const RowGradients& g, cudaStream_t stream) {
  const unsigned grid = grid_of(rows, 4 * current_device().multiprocessors);
  row_grad_kernel<T, kSoftcap><<<grid, kStreamThreads, 0, stream>>>(rows, stats, g);
  IGRPO_CUDA_CHECK(cudaGetLastError());
}

template <class T>
void launch_scale(const Rows& rows, const float* factor, cudaStream_t stream) {
  const unsigned grid = grid_of(rows, 4 * current_device().multiprocessors);
  scale_kernel<T><<<grid, kStreamThreads, 0, stream>>>(rows, factor);
  IGRPO_CUDA_CHECK(cudaGetLastError());
}

}  // namespace igrpo::cuda

// The instantiations of one dtype.
#define IGRPO_INSTANTIATE(kDtype, T)                                                                                 \
  namespace igrpo::cuda {                                                                                            \
  template <>                                                                                                        \
  void row_stats_of<kDtype>(const Rows& rows, const RowStats& out, void* stream) {                                   \
    const auto launch = rows.transform.softcap > 0.0f ? launch_row_stats<T, true> : launch_row_stats<T, false>;      \
    launch(rows, out, static_cast<cudaStream_t>(stream));                                                            \
  }                                                                                                                  \
  template <>                                                                                                        \
  void row_grad_of<kDtype>(const Rows& rows, const RowStats& stats, const RowGradients& g, void* stream) {           \
    const auto launch = rows.transform.softcap > 0.0f ? launch_row_grad<T, true> : launch_row_grad<T, false>;        \
    launch(rows, stats, g, static_cast<cudaStream_t>(stream));                                                       \
  }                                                                                                                  \
  template <>                                                                                                        \
  void token_loss_of<kDtype>(const Rows& rows, const RowStats& out, const TokenConstants& constants, void* stream) { \
    const auto launch = rows.transform.softcap > 0.0f ? launch_token_loss<T, true> : launch_token_loss<T, false>;    \
    launch(rows, out, constants, static_cast<cudaStream_t>(stream));                                                 \
  }                                                                                                                  \
  template <>                                                                                                        \
  void scale_of<kDtype>(const Rows& rows, const float* factor, void* stream) {                                       \
    launch_scale<T>(rows, factor, static_cast<cudaStream_t>(stream));                                                \
  }                                                                                                                  \
  }
