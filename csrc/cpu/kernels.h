// The CPU row kernels: ranges of rows, one table of function pointers per instruction set.
#pragma once

#include "../params.h"

namespace igrpo::cpu {

struct Kernels {
  const char* name;
  // Statistics of rows [begin, end).
  void (*row_stats)(const Rows&, const RowStats&, int64_t begin, int64_t end);
  // Gradient of rows [begin, end) from their statistics and coefficients.
  void (*row_grad)(const Rows&, const RowStats&, const RowGradients&, int64_t begin, int64_t end);
  // Statistics, coefficient and gradient, row by row while the row is in cache.
  void (*token_loss)(const Rows&, const RowStats&, const TokenConstants&, int64_t begin, int64_t end);
};

const Kernels& portable_kernels();
#if defined(IGRPO_X86_64)
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
#endif

// The widest of them that this processor runs, or the one IGRPO_CPU_CAPABILITY (avx512, avx2, portable) names.
const Kernels& kernels();

// row_coefficient of token_objective.h, compiled once without wide instructions.
float token_coefficient(float logp, int64_t row, const TokenConstants& constants);

}  // namespace igrpo::cpu
