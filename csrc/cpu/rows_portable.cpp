#include "rows.h"

namespace igrpo::cpu {

const Kernels& portable_kernels() {
  static const Kernels table{"portable", row_stats, row_grad, token_loss};
  return table;
}

}  // namespace igrpo::cpu
