// Eight numbers at a time, in the terms of GCC, which knows each CPU's own.
#pragma once

#include <cstdint>

// Compiled for CPUs with AVX2 and for those without; the loader chooses. Elsewhere the
// kernels would be slower than PyTorch's own.
#if !defined(__x86_64__) || !defined(__gnu_linux__) || defined(__clang__)
#error "the kernels are for x86-64 and Linux, by GCC; mmcnv2 does without"
#elif __GNUC__ >= 12
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU __attribute__((target_clones("avx2", "default")))
#endif
// What such a function calls has to become part of it.
#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE ALWAYS_INLINE inline
#define UNROLL _Pragma("GCC unroll 8")

constexpr int kLanes = 8;

typedef float Lanes __attribute__((vector_size(32), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2)));

struct BFloat16 {
  uint16_t bits;
};

INLINE Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

INLINE void store(float* to, Lanes x) { *reinterpret_cast<Lanes*>(to) = x; }

INLINE Lanes load(const BFloat16* from) {
  const Halves halves = *reinterpret_cast<const Halves*>(from);
  return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
}

// Rounds to the nearest, to even ones between two, and keeps what is not a number.
INLINE void store(BFloat16* to, Lanes x) {
  const Bits bits = (Bits)x, top = bits >> 16;
  const Bits rounded = (bits + 0x7fff + (top & 1)) >> 16;
  const Bits halves = x == x ? rounded : top | 0x40;
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(halves, Halves);
}

// Of at most `size`.
inline int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Cut `count` into equal shares for threads.
inline int64_t share(int64_t count, int thread, int threads) {
  return count * thread / threads;
}
