// What cpu.py calls and the kernels call of one another.
#pragma once

#include <cstdint>

// Raised, here and in cpu.py, whenever a function takes other arguments.
constexpr int kInterface = 6;

// Numbers at any two strides. `_Matrix` in cpu.py is the same.
struct Matrix {
  const float* at;
  int64_t row, column;
};

// From `channels` to `wide` ones and back. `_Layers` in cpu.py is the same.
struct Layers {
  int64_t channels, wide;
  double eps;                    // of GRN
  const float *weight1, *bias1;  // (wide, channels), (wide)
  const float *gamma, *beta;     // (wide)
  const float *weight2, *bias2;  // (channels, wide), (channels)
};

// Of the same, null for weights whose gradients are not wanted. `_Gradients` in cpu.py
// is the same.
struct Gradients {
  float *weight1, *bias1, *gamma, *beta, *weight2;
};

extern "C" {

// out = left right + start: `start` has lines that are `start_line` apart, may be `out`
// itself, and is null for zeros. Each number depends on no other but its row and column.
void multiply_float32(Matrix left, Matrix right, const float* start, int64_t start_line,
                      float* out, int64_t rows, int64_t columns, int64_t depth,
                      int threads);

// out = gelu(x), which may be x itself, and the sums of its squares, (pictures, channels).
void gelu_squares_float32(int64_t pictures, int64_t positions, int64_t channels,
                          const float* x, float* out, float* sums, int threads);

// The sums of the products of gelu(x) and `grad`, and those of `grad`: (pictures, 2,
// channels).
void gelu_products_float32(int64_t pictures, int64_t positions, int64_t channels,
                           const float* x, const float* grad, float* sums, int threads);

// out = gelu(x) * scale + shift, and the way back through it, where each position adds
// `gelu(x) * slope` to its gradient through the scale. `grad` becomes that of x, and the
// sums are those of it, (pictures, channels). `scale` and `slope` are (pictures,
// channels), `shift` is (channels).
void gelu_backward_float32(int64_t pictures, int64_t positions, int64_t channels,
                           const float* x, const float* scale, const float* shift,
                           const float* slope, float* grad, float* out, float* sums,
                           int threads);

// Expansion, GELU, GRN and projection of features (pictures, positions, channels).
// `hidden` is what enters GELU, and `active` a place for what leaves it, which may be the
// same where there is no way back. `norms` and `scales` are (pictures, wide).
void expand_and_project_float32(const Layers* layers, int64_t pictures,
                                int64_t positions, const float* x, float* hidden,
                                float* active, float* norms, float* scales, float* out,
                                int threads);

// The way back. `grad_hidden` and `active` are places as large as `hidden`. Gradients of
// biases, gamma and beta are added to what is there, those of weights if there are any.
void expand_and_project_backward_float32(
    const Layers* layers, int64_t pictures, int64_t positions, const float* x,
    const float* hidden, const float* norms, const float* scales, const float* grad,
    float* grad_hidden, float* active, float* grad_x, const Gradients* grads,
    int64_t has_weights, int threads);
}
