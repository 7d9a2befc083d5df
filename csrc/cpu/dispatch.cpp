#include <cstdlib>
#include <cstring>

#include "../token_objective.h"
#include "kernels.h"

namespace igrpo::cpu {

float token_coefficient(float logp, int64_t row, const TokenConstants& constants) {
  return row_coefficient(logp, row_constants(row, constants), constants);
}

// Read at every call, so that one process can compare the instruction sets.
static bool wanted(const Kernels& kernels) {
  const char* name = std::getenv("IGRPO_CPU_CAPABILITY");
  return name == nullptr || *name == '\0' || std::strcmp(name, kernels.name) == 0;
}

const Kernels& kernels() {
#if defined(IGRPO_X86_64)
  static const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && wanted(avx512_kernels())) return avx512_kernels();
  if (avx2 && wanted(avx2_kernels())) return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace igrpo::cpu
