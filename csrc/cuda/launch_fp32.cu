#include "launch.cuh"

IGRPO_INSTANTIATE(DType::kFloat32, float)
