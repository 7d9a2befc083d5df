#include "rows.h"

namespace igrpo::cpu {

const Kernels& avx2_kernels() {
  static const Kernels table{"avx2", row_stats, row_grad, token_loss};
  return table;
}

}  // namespace igrpo::cpu
