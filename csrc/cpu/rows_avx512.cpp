#include "rows.h"

namespace igrpo::cpu {

const Kernels& avx512_kernels() {
  static const Kernels table{"avx512", row_stats, row_grad, token_loss};
  return table;
}

}  // namespace igrpo::cpu
