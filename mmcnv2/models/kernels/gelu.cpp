// GELU and what a block does around it, in one pass over the widest features.
#include <algorithm>
#include <memory>

#include "kernels.h"
#include "lanes.h"

namespace {

// So many positions of a picture are summed in one go, so that small numbers are not
// added to large ones.
constexpr int64_t kChunk = 64;

// Of features: channels are a multiple of 8.
struct Shape {
  int64_t pictures, positions, channels;

  int64_t chunks() const { return pieces(positions, kChunk); }
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

// Several sums at a place of features.
template <int K>
struct Values {
  Lanes at[K];
};

// Calls `each(place, place in (pictures, channels), channel)` for a thread's share of
// the chunks, row after row, as a CPU expects to read, and sums what it returns.
template <int K, typename Each>
INLINE void for_chunks(Shape shape, int thread, int threads, float* sums, Each each) {
  const int64_t chunks = shape.chunks(), count = shape.pictures * chunks;
  const int64_t end = share(count, thread + 1, threads);
  for (int64_t i = share(count, thread, threads); i < end; ++i) {
    const int64_t picture = i / chunks, first = i % chunks * kChunk;
    const int64_t last = std::min(shape.positions, first + kChunk);
    const int64_t own = picture * shape.channels;
    float* sum = sums + i * K * shape.channels;
    std::fill_n(sum, K * shape.channels, 0.0f);
    for (int64_t p = first; p < last; ++p) {
      const int64_t line = (picture * shape.positions + p) * shape.channels;
      for (int64_t c = 0; c < shape.channels; c += kLanes) {
        const Values<K> values = each(line + c, own + c, c);
        UNROLL for (int k = 0; k < K; ++k) {
          float* to = sum + k * shape.channels + c;
          store(to, load(to) + values.at[k]);
        }
      }
    }
  }
}

// Lets each thread `run(thread, sums of its chunks)`, and sums those of each picture.
template <int K, typename Run>
void sum_chunks(Shape shape, float* sums, int threads, Run run) {
  const int64_t chunks = shape.chunks(), line = K * shape.channels;
  const std::unique_ptr<float[]> partial(new float[shape.pictures * chunks * line]);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int k = 0; k < threads; ++k) run(k, partial.get());
#pragma omp for schedule(static)
    for (int64_t n = 0; n < shape.pictures; ++n) {
      float* sum = sums + n * line;
      std::fill_n(sum, line, 0.0f);
      for (int64_t i = n * chunks; i < (n + 1) * chunks; ++i) {
        const float* from = partial.get() + i * line;
        for (int64_t c = 0; c < line; ++c) sum[c] += from[c];
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
    const Lanes rounded = load(out + place);
    return Values<1>{rounded * rounded};
  };
  for_chunks<1>(shape, thread, threads, sums, each);
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
  sum_chunks<1>(shape, sums, threads, [=](int thread, float* partial) {
    run_squares(shape, x, out, partial, thread, threads);
  });
}

FOR_EACH_CPU void run_products(Shape shape, const float* x, const float* grad,
                               float* sums, int thread, int threads) {
  const auto each = [=](int64_t place, int64_t, int64_t) ALWAYS_INLINE {
    const Lanes value = load(x + place), slope = load(grad + place);
    return Values<2>{value * below(value) * slope, slope};
  };
  for_chunks<2>(shape, thread, threads, sums, each);
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
    return Values<1>{before};
  };
  for_chunks<1>(shape, thread, threads, sums, each);
}

}  // namespace

// Sums do not depend on the number of threads.
extern "C" {

void gelu_squares_float32(int64_t pictures, int64_t positions, int64_t channels,
                          const float* x, float* out, float* sums, int threads) {
  squares({pictures, positions, channels}, x, out, sums, threads);
}

void gelu_squares_bfloat16(int64_t pictures, int64_t positions, int64_t channels,
                           const BFloat16* x, BFloat16* out, float* sums, int threads) {
  squares({pictures, positions, channels}, x, out, sums, threads);
}

void gelu_products_float32(int64_t pictures, int64_t positions, int64_t channels,
                           const float* x, const float* grad, float* sums,
                           int threads) {
  const Shape shape{pictures, positions, channels};
  sum_chunks<2>(shape, sums, threads, [=](int thread, float* partial) {
    run_products(shape, x, grad, partial, thread, threads);
  });
}

void gelu_backward_float32(int64_t pictures, int64_t positions, int64_t channels,
                           const float* x, const float* scale, const float* shift,
                           const float* slope, float* grad, float* out, float* sums,
                           int threads) {
  const Shape shape{pictures, positions, channels};
  sum_chunks<1>(shape, sums, threads, [=](int thread, float* partial) {
    run_backward(shape, x, scale, shift, slope, grad, out, partial, thread, threads);
  });
}
}
