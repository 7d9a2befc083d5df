#include "launch.cuh"

IGRPO_INSTANTIATE(DType::kFloat16, __half)
