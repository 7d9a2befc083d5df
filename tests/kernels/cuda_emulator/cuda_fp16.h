#pragma once
#include "cuda_runtime.h"

using __half = _Float16;
