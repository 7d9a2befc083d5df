// The device code of csrc/cuda, compiled for the emulator; called through ctypes.
#include "cluster_kernel.cuh"
#include "resident_kernel.cuh"
#include "stream_kernels.cuh"

using namespace igrpo;
using namespace igrpo::cuda;

template <class F>
static void with_type(const Rows& rows, F f) {
  const bool cap = rows.transform.softcap > 0.0f;
  switch (rows.dtype) {
    case DType::kFloat32: return cap ? f(float{}, std::true_type{}) : f(float{}, std::false_type{});
    case DType::kBFloat16: return cap ? f(__nv_bfloat16{}, std::true_type{}) : f(__nv_bfloat16{}, std::false_type{});
    case DType::kFloat16: return cap ? f(__half{}, std::true_type{}) : f(__half{}, std::false_type{});
  }
}

extern "C" {

void configure(bool lazy, bool reversed) {
  emulator::lazy = lazy;
  emulator::reversed = reversed;
}

void run_row_stats(const Rows* rows, const RowStats* out, unsigned grid) {
  with_type(*rows, [&]<class T, class Cap>(T, Cap) {
    emulator::launch(grid, kStreamThreads, 1, 0, [&] { row_stats_kernel<T, Cap::value>(*rows, *out); });
  });
}

void run_row_grad(const Rows* rows, const RowStats* stats, const RowGradients* g, unsigned grid) {
  with_type(*rows, [&]<class T, class Cap>(T, Cap) {
    emulator::launch(grid, kStreamThreads, 1, 0, [&] { row_grad_kernel<T, Cap::value>(*rows, *stats, *g); });
  });
}

void run_scale(const Rows* rows, const float* factor, unsigned grid) {
  with_type(*rows, [&]<class T, class Cap>(T, Cap) {
    emulator::launch(grid, kStreamThreads, 1, 0, [&] { scale_kernel<T>(*rows, factor); });
  });
}

void run_resident(const Rows* rows, const RowStats* out, const TokenConstants* c, unsigned grid, int slots) {
  with_type(*rows, [&]<class T, class Cap>(T, Cap) {
    emulator::launch(grid, kResidentThreads, 1, 16u * kResidentThreads * slots,
                     [&] { token_loss_resident_kernel<T, Cap::value>(*rows, *out, *c, slots); });
  });
}

void run_cluster(const Rows* rows, const RowStats* out, const TokenConstants* c, unsigned clusters, int size,
                 int buffers) {
  with_type(*rows, [&]<class T, class Cap>(T, Cap) {
    const int granules = static_cast<int>(rows->vocab) / Pack<T>::kCount + 1;
    const ClusterPlan plan{size, (granules + size - 1) / size, buffers};
    const auto kernel = rows->temperatures == nullptr ? token_loss_cluster_kernel<T, Cap::value, false>
                                                      : token_loss_cluster_kernel<T, Cap::value, true>;
    emulator::launch(clusters * size, kClusterThreads, size, 16u * plan.slice_granules * buffers,
                     [&] { kernel(*rows, *out, *c, plan); });
  });
}

}
