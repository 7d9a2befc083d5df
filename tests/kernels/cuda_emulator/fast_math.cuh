// Stands in for csrc/cuda/fast_math.cuh: the same words in C++, with the C library's exp2.
#pragma once
#include <cfloat>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace igrpo::cuda {

inline float exp2_flushed(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;
}
inline float reciprocal(float x) { return 1.0f / x; }

struct Two {
  float x, y;
};
inline Two fma(Two a, Two b, Two c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
inline Two add(Two a, Two b) { return {a.x + b.x, a.y + b.y}; }
inline Two mul(Two a, Two b) { return {a.x * b.x, a.y * b.y}; }

inline float bounded(float x, float low, float high) { return x != x ? x : fminf(fmaxf(x, low), high); }

template <class T>
struct Word {
  static Two split(uint32_t a) {
    T pair[2];
    std::memcpy(pair, &a, 4);
    return {static_cast<float>(pair[0]), static_cast<float>(pair[1])};
  }
  static uint32_t join(Two x) {
    const T pair[2] = {static_cast<T>(x.x), static_cast<T>(x.y)};
    uint32_t a;
    std::memcpy(&a, pair, 4);
    return a;
  }
  static uint32_t larger(uint32_t a, uint32_t b) {
    const Two x = split(a), y = split(b);
    return join({fmaxf(x.x, y.x), fmaxf(x.y, y.y)});
  }
  static uint32_t smaller(uint32_t a, uint32_t b) {
    const Two x = split(a), y = split(b);
    return join({fminf(x.x, y.x), fminf(x.y, y.y)});
  }
  static uint32_t bounded(uint32_t a, uint32_t low, uint32_t high) {
    const Two x = split(a), l = split(low), h = split(high);
    return join({igrpo::cuda::bounded(x.x, l.x, h.x), igrpo::cuda::bounded(x.y, l.y, h.y)});
  }
};

}  // namespace igrpo::cuda
