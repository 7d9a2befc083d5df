// The few instructions that C++ has no word for: exponentials, packed maxima and conversions of pairs of logits.
// Subnormal results of exp2_flushed are 0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace igrpo::cuda {

__device__ __forceinline__ float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two fp32 numbers: one instruction for both from sm_100 on.
struct Two {
  float x, y;
};

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
__device__ __forceinline__ uint64_t both(Two a) {
  uint64_t bits;
  asm("mov.b64 %0, {%1, %2};" : "=l"(bits) : "f"(a.x), "f"(a.y));
  return bits;
}
__device__ __forceinline__ Two apart(uint64_t bits) {
  Two a;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(a.x), "=f"(a.y) : "l"(bits));
  return a;
}
__device__ __forceinline__ Two fma(Two a, Two b, Two c) {
  uint64_t d;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(d) : "l"(both(a)), "l"(both(b)), "l"(both(c)));
  return apart(d);
}
__device__ __forceinline__ Two add(Two a, Two b) {
  uint64_t d;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(d) : "l"(both(a)), "l"(both(b)));
  return apart(d);
}
__device__ __forceinline__ Two mul(Two a, Two b) {
  uint64_t d;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(d) : "l"(both(a)), "l"(both(b)));
  return apart(d);
}
#else
__device__ __forceinline__ Two fma(Two a, Two b, Two c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
__device__ __forceinline__ Two add(Two a, Two b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ Two mul(Two a, Two b) { return {a.x * b.x, a.y * b.y}; }
#endif

// One 32-bit word of logits: two of 16 bits, or one fp32. larger and smaller prefer a number to NaN, bounded keeps NaN.
template <class T>
struct Word;

#define IGRPO_PACKED_WORD(T, kType, kLow, kHigh)                                                                 \
  template <>                                                                                                    \
  struct Word<T> {                                                                                               \
    __device__ static uint32_t larger(uint32_t a, uint32_t b) {                                                  \
      asm("max." kType "x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));                                             \
      return a;                                                                                                  \
    }                                                                                                            \
    __device__ static uint32_t smaller(uint32_t a, uint32_t b) {                                                 \
      asm("min." kType "x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(b));                                             \
      return a;                                                                                                  \
    }                                                                                                            \
    __device__ static uint32_t bounded(uint32_t a, uint32_t low, uint32_t high) {                                \
      asm("max.NaN." kType "x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(low));                                       \
      asm("min.NaN." kType "x2 %0, %1, %2;" : "=r"(a) : "r"(a), "r"(high));                                      \
      return a;                                                                                                  \
    }                                                                                                            \
    __device__ static Two split(uint32_t a) { return {kLow, kHigh}; }                                            \
    __device__ static uint32_t join(Two x) {                                                                     \
      uint32_t a;                                                                                                \
      asm("cvt.rn." kType "x2.f32 %0, %1, %2;" : "=r"(a) : "f"(x.y), "f"(x.x));                                  \
      return a;                                                                                                  \
    }                                                                                                            \
  };

IGRPO_PACKED_WORD(__nv_bfloat16, "bf16", __uint_as_float(a << 16), __uint_as_float(a & 0xFFFF0000u))
IGRPO_PACKED_WORD(__half, "f16", __half2float(__ushort_as_half(a & 0xFFFFu)), __half2float(__ushort_as_half(a >> 16)))
#undef IGRPO_PACKED_WORD

__device__ __forceinline__ float bounded(float x, float low, float high) {
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(high));
  return x;
}

}  // namespace igrpo::cuda
