// One vector type, three widths: GCC/Clang vector extensions, so the same source serves AVX-512, AVX2 and anything
// else. Each rows_*.cpp compiles this with its own flags; everything sits in an unnamed namespace and no standard
// header with inline code is included, so no wide instruction can leak into the other units through the linker.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__)
#define IGRPO_LANES 16
#elif defined(__AVX2__)
#define IGRPO_LANES 8
#else
#define IGRPO_LANES 4
#endif

namespace {

constexpr int kLanes = IGRPO_LANES;
typedef float vf __attribute__((vector_size(4 * IGRPO_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * IGRPO_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * IGRPO_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * IGRPO_LANES)));

#define IGRPO_INLINE static inline __attribute__((always_inline))

IGRPO_INLINE vf splat(float x) { return x - vf{}; }
IGRPO_INLINE vu splat_bits(uint32_t x) { return x - vu{}; }
IGRPO_INLINE vf select(vi condition, vf yes, vf no) { return condition ? yes : no; }
IGRPO_INLINE vu select(vi condition, vu yes, vu no) { return condition ? yes : no; }
// Written so that a NaN in x survives: the comparison is false and x is taken.
IGRPO_INLINE vf at_least(vf x, vf low) { return select(x < low, low, x); }
IGRPO_INLINE vf max2(vf a, vf x) { return select(x > a, x, a); }

IGRPO_INLINE float max_of(vf v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// Pairwise, so the order of additions is fixed by the lane count alone.
IGRPO_INLINE float sum_of(vf v) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = v[i];
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// exp(x) for x <= ~88; below -88 exactly 0, NaN stays NaN. Relative error < 1.5e-7 (tests sweep it).
// exp(x) = 2^k · exp(r), k = round(x / ln 2); the polynomial is a minimax fit of (exp(r) - 1 - r) / r² on |r| <= ln2/2.
IGRPO_INLINE vf exp_v(vf x) {
  const float round_to_integer = 12582912.0f;  // 1.5 · 2^23: adding it leaves round(x) in the low mantissa bits
  x = at_least(x, splat(-88.0f));
  const vf shifted = x * 1.44269504f + round_to_integer;
  const vf k = shifted - round_to_integer;
  vf r = x - k * 0.693145751953125f;  // ln 2 in two parts; the first has few bits, so its product is exact
  r = r - k * 1.42860682e-6f;
  vf p = r * 1.3814467e-3f + 8.3687808e-3f;
  p = p * r + 4.1668393e-2f;
  p = p * r + 0.16666520f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  const vu biased = (vu)shifted + splat_bits(127u - 0x4B400000u);  // k + 127: the exponent field of 2^k
  return p * (vf)(biased << 23);
}

// tanh: an odd polynomial near 0, where 1 - 2 / (e^{2x} + 1) would lose relative accuracy.
IGRPO_INLINE vf tanh_v(vf x) {
  const vf magnitude = (vf)((vu)x & 0x7FFFFFFFu);
  const vf y = x * x;
  vf p = y * -5.7049845e-3f + 2.0639084e-2f;
  p = p * y - 5.3739715e-2f;
  p = p * y + 0.13331442f;
  p = p * y - 0.33333281f;
  const vf near_zero = x + x * y * p;
  const vf capped = select(magnitude > 20.0f, splat(20.0f), magnitude);
  const vf far = 1.0f - 2.0f / (exp_v(capped + capped) + 1.0f);
  const vf signed_far = (vf)((vu)far | ((vu)x & 0x80000000u));
  return select(magnitude < 0.625f, near_zero, select(x == x, signed_far, x));
}

struct Float32 {
  typedef float Storage;
  IGRPO_INLINE vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  IGRPO_INLINE void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
};

IGRPO_INLINE vu load_halves(const uint16_t* p) {
  vh h;
  __builtin_memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
}
IGRPO_INLINE void store_halves(uint16_t* p, vu bits) {
  const vh h = __builtin_convertvector(bits, vh);
  __builtin_memcpy(p, &h, sizeof h);
}

struct BFloat16 {
  typedef uint16_t Storage;
  IGRPO_INLINE vf load(const uint16_t* p) { return (vf)(load_halves(p) << 16); }
  // Round to nearest, ties to even. A NaN's payload may carry into infinity when rounded, so it is truncated instead.
  IGRPO_INLINE void store(uint16_t* p, vf v) {
    const vu u = (vu)v;
    const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    store_halves(p, select(v == v, rounded, (u >> 16) | 0x40u));
  }
};

struct Float16 {
  typedef uint16_t Storage;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
  IGRPO_INLINE vf load(const uint16_t* p) {
    const vu h = load_halves(p);
    const vf scaled = (vf)((h & 0x7FFFu) << 13) * 5.192296858534828e33f;
    const vu special = select((vi)(h & 0x7C00u) == 0x7C00, splat_bits(0x7F800000u), vu{});
    return (vf)((vu)scaled | special | ((h & 0x8000u) << 16));
  }
  IGRPO_INLINE void store(uint16_t* p, vf v) {
    const vu u = (vu)v, sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
    const vu normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    // Below 2^-14, adding 0.5 leaves the subnormal half, correctly rounded, in the low mantissa bits.
    const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3F000000u;
    vu h = select((vi)magnitude < 0x38800000, subnormal, normal);
    h = select((vi)magnitude >= 0x477FF000, splat_bits(0x7C00u), h);  // rounds to infinity
    h = select(v == v, h, splat_bits(0x7E00u));
    store_halves(p, h | sign);
  }
};

}  // namespace
