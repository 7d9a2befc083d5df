#include "launch.cuh"

IGRPO_INSTANTIATE(DType::kBFloat16, __nv_bfloat16)
