// Expansion, GELU, GRN and projection of a block, and the way back, each in one call:
// what Python would take for their steps is long beside those of a few small pictures.
#include <cmath>
#include <vector>

#include "kernels.h"

namespace {

Matrix rows_of(const float* at, int64_t columns) { return {at, columns, 1}; }

Matrix columns_of(const float* at, int64_t rows) { return {at, 1, rows}; }

void add(const float* values, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += values[i];
}

// Of a picture: the norms, in the place of their squares, and the scales (algorithm 1).
void scale(const Layers& layers, float* norms, float* scales) {
  double sum = 0;
  for (int64_t c = 0; c < layers.wide; ++c) sum += norms[c] = std::sqrt(norms[c]);
  const float mean = sum / layers.wide + layers.eps;
  for (int64_t c = 0; c < layers.wide; ++c) {
    scales[c] = layers.gamma[c] * (norms[c] / mean) + 1;
  }
}

// Of a picture: from the gradients of the scales to those of gamma, to which they are
// added, and to what multiple of the features is their gradient.
void through_scale(const Layers& layers, const float* norms, const float* grads,
                   float* of_gamma, float* slopes) {
  double norm = 0, through = 0;
  for (int64_t c = 0; c < layers.wide; ++c) {
    norm += norms[c];
    through += grads[c] * layers.gamma[c] * norms[c];
  }
  const float mean = norm / layers.wide + layers.eps;
  const float through_mean = through / mean / layers.wide;
  for (int64_t c = 0; c < layers.wide; ++c) {
    of_gamma[c] += grads[c] * (norms[c] / mean);
    const float of_norm = (grads[c] * layers.gamma[c] - through_mean) / mean;
    slopes[c] = norms[c] > 0 ? of_norm / norms[c] : 0;
  }
}

void scale_and_shift(const Layers& layers, int64_t pictures, int64_t positions,
                     const float* scales, float* x, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < pictures * positions; ++row) {
    const float* factors = scales + row / positions * layers.wide;
    float* line = x + row * layers.wide;
    for (int64_t c = 0; c < layers.wide; ++c) {
      line[c] = line[c] * factors[c] + layers.beta[c];
    }
  }
}

}  // namespace

extern "C" {

void expand_and_project_float32(const Layers* layers, int64_t pictures,
                                int64_t positions, const float* x, float* hidden,
                                float* active, float* norms, float* scales, float* out,
                                int threads) {
  const auto [channels, wide, eps, weight1, bias1, gamma, beta, weight2, bias2] =
      *layers;
  const int64_t rows = pictures * positions;
  multiply_float32(rows_of(x, channels), columns_of(weight1, channels), bias1, 0, hidden,
                   rows, wide, channels, threads);
  gelu_squares_float32(pictures, positions, wide, hidden, active, norms, threads);
  for (int64_t n = 0; n < pictures; ++n) {
    scale(*layers, norms + n * wide, scales + n * wide);
  }
  scale_and_shift(*layers, pictures, positions, scales, active, threads);
  multiply_float32(rows_of(active, wide), columns_of(weight2, wide), bias2, 0, out, rows,
                   channels, wide, threads);
}

void expand_and_project_backward_float32(
    const Layers* layers, int64_t pictures, int64_t positions, const float* x,
    const float* hidden, const float* norms, const float* scales, const float* grad,
    float* grad_hidden, float* active, float* grad_x, const Gradients* grads,
    int64_t has_weights, int threads) {
  const int64_t channels = layers->channels, wide = layers->wide;
  const int64_t rows = pictures * positions;
  multiply_float32(rows_of(grad, channels), rows_of(layers->weight2, wide), nullptr, 0,
                   grad_hidden, rows, wide, channels, threads);

  std::vector<float> sums(pictures * 2 * wide), slopes(pictures * wide);
  gelu_products_float32(pictures, positions, wide, hidden, grad_hidden, sums.data(),
                        threads);
  for (int64_t n = 0; n < pictures; ++n) {
    const float* own = &sums[n * 2 * wide];
    through_scale(*layers, norms + n * wide, own, grads->gamma, &slopes[n * wide]);
    add(own + wide, wide, grads->beta);
  }
  gelu_backward_float32(pictures, positions, wide, hidden, scales, layers->beta,
                        slopes.data(), grad_hidden, active, sums.data(), threads);
  for (int64_t n = 0; n < pictures; ++n) add(&sums[n * wide], wide, grads->bias1);

  multiply_float32(rows_of(grad_hidden, wide), rows_of(layers->weight1, channels),
                   nullptr, 0, grad_x, rows, channels, wide, threads);
  if (grads->weight1) {
    multiply_float32(columns_of(grad_hidden, wide), rows_of(x, channels),
                     has_weights ? grads->weight1 : nullptr, channels, grads->weight1,
                     wide, channels, rows, threads);
  }
  if (grads->weight2) {
    multiply_float32(columns_of(grad, channels), rows_of(active, wide),
                     has_weights ? grads->weight2 : nullptr, wide, grads->weight2,
                     channels, wide, rows, threads);
  }
}
}
