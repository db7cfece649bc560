// GELU and what a block does around it, in one pass over the widest features.
#include <algorithm>

#include "lanes.h"

namespace {

// Of features: channels are a multiple of 8. So many positions of a picture at most as
// `chunk` are summed, so that small numbers are not added to large ones.
struct Shape {
  int64_t pictures, positions, channels, chunk;
};

INLINE Lanes all(float x) { return Lanes{} + x; }

// Two to the power of x, at most 0, up to a relative error of 2e-7: a polynomial that
// was fitted between -0.5 and 0.5.
INLINE Lanes power_of_two(Lanes x) {
  x = x > -126.0f ? x : all(-126.0f);
  // Adding 1.5 * 2^23 rounds to whole numbers.
  const Lanes shifted = x + 12582912.0f, rest = x - (shifted - 12582912.0f);
  Lanes power = all(1.34004e-3f);
  power = power * rest + 9.67604e-3f;
  power = power * rest + 5.550327e-2f;
  power = power * rest + 2.4022107e-1f;
  power = power * rest + 6.9314721e-1f;
  power = power * rest + 1.0f;
  return (Lanes)((Bits)power + ((Bits)shifted << 23));
}

// How much of the normal distribution lies below x, up to an error of 1.7e-7: a quotient
// of polynomials that was fitted below 5.4. Above that it is 1 within this error, and so
// it is 0 on the other side.
INLINE Lanes below(Lanes x) {
  const Lanes z = x < 5.4f ? x : all(5.4f), square = z * z;
  Lanes above = all(1.1610368222e-10f);
  above = above * square - 2.2257140130e-8f;
  above = above * square + 3.1334691357e-6f;
  above = above * square + 1.5896187688e-4f;
  above = above * square + 4.4350582175e-3f;
  above = above * square + 3.4785442054e-2f;
  above = above * square + 3.9894217253e-1f;
  Lanes under = all(5.8677556808e-5f);
  under = under * square + 1.7636145931e-3f;
  under = under * square + 2.8430202976e-2f;
  under = under * square + 2.5385913253e-1f;
  under = under * square + 1.0f;
  return x > -5.4f ? z * above / under + 0.5f : Lanes{};
}

// Calls `each(place, place in (pictures, channels), channel)` for a thread's share of
// the chunks, row after row, as a CPU expects to read, and adds what it returns to the
// sums of each.
template <typename Each>
INLINE void for_chunks(Shape shape, int thread, int threads, float* sums, Each each) {
  const int64_t chunks = (shape.positions + shape.chunk - 1) / shape.chunk;
  const int64_t count = shape.pictures * chunks;
  const int64_t end = share(count, thread + 1, threads);
  for (int64_t i = share(count, thread, threads); i < end; ++i) {
    const int64_t picture = i / chunks, first = i % chunks * shape.chunk;
    const int64_t last = std::min(shape.positions, first + shape.chunk);
    const int64_t own = picture * shape.channels;
    float* sum = sums + i * shape.channels;
    for (int64_t p = first; p < last; ++p) {
      const int64_t line = (picture * shape.positions + p) * shape.channels;
      for (int64_t c = 0; c < shape.channels; c += kLanes) {
        store(sum + c, load(sum + c) + each(line + c, own + c, c));
      }
    }
  }
}

template <typename T>
INLINE void share_of_squares(Shape shape, const T* x, T* out, float* sums, int thread,
                             int threads) {
  const auto each = [=](int64_t place, int64_t, int64_t) ALWAYS_INLINE {
    const Lanes value = load(x + place), active = value * below(value);
    store(out + place, active);
    return active * load(out + place);
  };
  for_chunks(shape, thread, threads, sums, each);
}

// Templates cannot be compiled for several CPUs, so each dtype has a function.
FOR_EACH_CPU void run_squares(Shape shape, const float* x, float* out, float* sums,
                              int thread, int threads) {
  share_of_squares(shape, x, out, sums, thread, threads);
}
FOR_EACH_CPU void run_squares(Shape shape, const BFloat16* x, BFloat16* out,
                              float* sums, int thread, int threads) {
  share_of_squares(shape, x, out, sums, thread, threads);
}

template <typename T>
void squares(Shape shape, const T* x, T* out, float* sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int k = 0; k < threads; ++k) run_squares(shape, x, out, sums, k, threads);
}

FOR_EACH_CPU void run_products(Shape shape, const float* x, const float* grad,
                               float* sums, int thread, int threads) {
  const auto each = [=](int64_t place, int64_t, int64_t) ALWAYS_INLINE {
    const Lanes value = load(x + place);
    return value * below(value) * load(grad + place);
  };
  for_chunks(shape, thread, threads, sums, each);
}

FOR_EACH_CPU void run_backward(Shape shape, const float* x, const float* scale,
                               const float* shift, const float* slope, float* grad,
                               float* out, float* sums, int thread, int threads) {
  const auto each = [=](int64_t place, int64_t own, int64_t channel) ALWAYS_INLINE {
    const Lanes value = load(x + place), fraction = below(value);
    const Lanes active = value * fraction, factor = load(scale + own);
    const Lanes after = load(grad + place) * factor + active * load(slope + own);
    const Lanes density = 0.398942280f * power_of_two(-0.721347520f * value * value);
    const Lanes before = after * (fraction + value * density);
    store(grad + place, before);
    store(out + place, active * factor + load(shift + channel));
    return before;
  };
  for_chunks(shape, thread, threads, sums, each);
}

}  // namespace

// Sums are (pictures, chunks, channels), zero before. They do not depend on the number
// of threads.
extern "C" {

// out = gelu(x), which may be x itself, and the sums of its squares.
void gelu_squares_float32(int64_t pictures, int64_t positions, int64_t channels,
                          int64_t chunk, const float* x, float* out, float* sums,
                          int threads) {
  squares({pictures, positions, channels, chunk}, x, out, sums, threads);
}

void gelu_squares_bfloat16(int64_t pictures, int64_t positions, int64_t channels,
                           int64_t chunk, const BFloat16* x, BFloat16* out,
                           float* sums, int threads) {
  squares({pictures, positions, channels, chunk}, x, out, sums, threads);
}

// The sums of the products of gelu(x) and `grad`.
void gelu_products_float32(int64_t pictures, int64_t positions, int64_t channels,
                           int64_t chunk, const float* x, const float* grad,
                           float* sums, int threads) {
  const Shape shape{pictures, positions, channels, chunk};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int k = 0; k < threads; ++k) run_products(shape, x, grad, sums, k, threads);
}

// out = gelu(x) * scale + shift, and the way back through it, where each position adds
// `gelu(x) * slope` to its gradient through the scale. `grad` becomes that of x, and the
// sums are those of it. `scale` and `slope` are (pictures, channels), `shift` is
// (channels).
void gelu_backward_float32(int64_t pictures, int64_t positions, int64_t channels,
                           int64_t chunk, const float* x, const float* scale,
                           const float* shift, const float* slope, float* grad,
                           float* out, float* sums, int threads) {
  const Shape shape{pictures, positions, channels, chunk};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int k = 0; k < threads; ++k) {
    run_backward(shape, x, scale, shift, slope, grad, out, sums, k, threads);
  }
}
}
