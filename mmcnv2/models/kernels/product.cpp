// Products of matrices, for CPUs whose widest registers are those of AVX2: tall ones of
// features with weights, and the gradients of these. Others must not call them.
#include <algorithm>
#include <cstring>
#include <memory>

#include "kernels.h"
#include "lanes.h"

#define AVX2 __attribute__((target("avx2,fma")))

namespace {

// A tile is what registers hold of the sums.
constexpr int kRows = 6, kVectors = 2, kColumns = kVectors * kLanes;
// The first cache holds the columns of a tile, so deep; the second one so many rows; the
// last one so many columns.
constexpr int64_t kDepth = 384, kBlock = 96, kWidth = 1024;
// Rows that are packed at a time.
constexpr int64_t kStrip = 8;

// Rows and columns of a product, and how many numbers each is the sum of.
struct Size {
  int64_t rows, columns, depth;
};

// Where a product goes, and what is added to it, or null: with `line` from one row to
// the next, which is 0 for a bias.
struct Target {
  float* out;
  int64_t line;
  const float* start;
  int64_t start_line;
};

INLINE Matrix part(Matrix from, int64_t row, int64_t column) {
  return {from.at + row * from.row + column * from.column, from.row, from.column};
}

INLINE Target part(Target to, int64_t row, int64_t column) {
  to.out += row * to.line + column;
  if (to.start) to.start += row * to.start_line + column;
  return to;
}

INLINE Matrix turned(Matrix from) { return {from.at, from.column, from.row}; }

inline int64_t rounded_up(int64_t count, int64_t unit) {
  return pieces(count, unit) * unit;
}

// Turns 8 x 8 numbers, from columns in memory to rows.
AVX2 INLINE void turn(const float* from, int64_t column, float* to, int64_t row) {
  typedef int32_t Order __attribute__((vector_size(32)));
  Lanes x[kLanes], y[kLanes];
  UNROLL for (int i = 0; i < 8; ++i) x[i] = load(from + i * column);
  UNROLL for (int i = 0; i < 8; i += 2) {
    y[i] = __builtin_shuffle(x[i], x[i + 1], Order{0, 8, 1, 9, 4, 12, 5, 13});
    y[i + 1] = __builtin_shuffle(x[i], x[i + 1], Order{2, 10, 3, 11, 6, 14, 7, 15});
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    UNROLL for (int k = 0; k < 2; ++k) {
      const Lanes a = y[i + k], b = y[i + k + 2];
      x[i + 2 * k] = __builtin_shuffle(a, b, Order{0, 1, 8, 9, 4, 5, 12, 13});
      x[i + 2 * k + 1] = __builtin_shuffle(a, b, Order{2, 3, 10, 11, 6, 7, 14, 15});
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    const Lanes a = x[i], b = x[i + 4];
    const Lanes low = __builtin_shuffle(a, b, Order{0, 1, 2, 3, 8, 9, 10, 11});
    const Lanes high = __builtin_shuffle(a, b, Order{4, 5, 6, 7, 12, 13, 14, 15});
    store(to + i * row, low);
    store(to + (i + 4) * row, high);
  }
}

// Packs W columns, row after row, with zeros for those that are not there.
template <int W>
AVX2 INLINE void pack_panel(Matrix from, int64_t depth, int64_t columns, float* to) {
  int64_t k = 0;
  if (columns == W && from.column == 1) {
    for (; k < depth; ++k) {
      std::memcpy(to + k * W, from.at + k * from.row, W * sizeof(float));
      __builtin_prefetch(from.at + (k + kStrip) * from.row);
    }
  } else if (columns == W && from.row == 1) {
    for (; W % kLanes == 0 && k + kLanes <= depth; k += kLanes) {
      UNROLL for (int n = 0; n < W; n += kLanes) {
        turn(part(from, k, n).at, from.column, to + k * W + n, W);
      }
    }
  }
  for (; k < depth; ++k) {
    for (int64_t n = 0; n < W; ++n) {
      to[k * W + n] = n < columns ? *part(from, k, n).at : 0.0f;
    }
  }
}

// Packs W columns after the other.
template <int W>
AVX2 INLINE void pack_columns(Matrix from, int64_t depth, int64_t columns, float* to) {
  // Memory is read about in its order.
  const int64_t strip = from.column == 1 ? kStrip : depth;
  for (int64_t k = 0; k < depth; k += strip) {
    const int64_t deep = std::min(strip, depth - k);
    for (int64_t n = 0; n < columns; n += W) {
      const int64_t there = std::min<int64_t>(W, columns - n);
      pack_panel<W>(part(from, k, n), deep, there, to + n * depth + k * W);
    }
  }
}

// Packs rows as they lie in memory, and zeros to make up a tile.
AVX2 INLINE void pack_rows(Matrix from, int64_t rows, int64_t depth, float* to) {
  for (int64_t m = 0; m < rows; ++m) {
    std::memcpy(to + m * depth, part(from, m, 0).at, depth * sizeof(float));
  }
  const int64_t missing = rounded_up(rows, kRows) - rows;
  std::memset(to + rows * depth, 0, missing * depth * sizeof(float));
}

// Multiplies packed rows, whose numbers are `row` and `step` apart, by packed columns.
AVX2 INLINE void multiply_tile(int64_t depth, const float* left, int64_t row,
                               int64_t step, const float* right,
                               Lanes (&out)[kRows][kVectors]) {
  Lanes sums[kRows][kVectors] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes low = load(right), high = load(right + kLanes);
    UNROLL for (int i = 0; i < kRows; ++i) {
      const float x = left[i * row];
      const Lanes value = {x, x, x, x, x, x, x, x};
      sums[i][0] += value * low;
      sums[i][1] += value * high;
    }
    left += step;
    right += kColumns;
    // Or the compiler loads ahead more than there are registers for.
    asm volatile("" ::: "memory");
  }
  UNROLL for (int i = 0; i < kRows; ++i) {
    UNROLL for (int v = 0; v < kVectors; ++v) out[i][v] = sums[i][v];
  }
}

AVX2 INLINE void store_tile(const Lanes (&sums)[kRows][kVectors], Target to) {
  UNROLL for (int i = 0; i < kRows; ++i) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      const Target lanes = part(to, i, v * kLanes);
      store(lanes.out, to.start ? load(lanes.start) + sums[i][v] : sums[i][v]);
    }
  }
}

// Of a tile that is not all there.
AVX2 INLINE void store_some(const Lanes (&sums)[kRows][kVectors], Target to,
                            int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t n = 0; n < columns; ++n) {
      const Target one = part(to, i, n);
      const float sum = sums[i][n / kLanes][n % kLanes];
      *one.out = to.start ? *one.start + sum : sum;
    }
  }
}

AVX2 INLINE void prefetch(Target to, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_prefetch(part(to, i, 0).out, 1);
    __builtin_prefetch(part(to, i, columns - 1).out, 1);
  }
}

// Multiplies packed rows by packed columns. Rows lie as they did, or by columns.
AVX2 INLINE void multiply_packed(Size size, const float* left, bool by_columns,
                                 const float* right, Target to) {
  const int64_t row = by_columns ? 1 : size.depth, step = by_columns ? kRows : 1;
  for (int64_t n = 0; n < size.columns; n += kColumns) {
    for (int64_t m = 0; m < size.rows; m += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, size.rows - m);
      const int64_t columns = std::min<int64_t>(kColumns, size.columns - n);
      const Target tile = part(to, m, n);
      prefetch(tile, rows, columns);
      Lanes sums[kRows][kVectors];
      multiply_tile(size.depth, left + m * size.depth, row, step,
                    right + n * size.depth, sums);
      if (rows == kRows && columns == kColumns) {
        store_tile(sums, tile);
      } else {
        store_some(sums, tile, rows, columns);
      }
    }
  }
}

// What a thread packs.
struct Packed {
  alignas(64) float rows[kBlock * kDepth];
  alignas(64) float columns[kDepth * kWidth];
};

AVX2 void multiply_share(Size size, Matrix left, Matrix right, Target to) {
  const int64_t equal = pieces(size.depth, pieces(size.depth, kDepth));
  const int64_t depth = rounded_up(equal, kStrip);
  const bool by_columns = left.column != 1;
  // Kept, for the pages of new memory would have to be filled with zeros each time.
  thread_local const std::unique_ptr<Packed> packed(new Packed);
  for (int64_t n = 0; n < size.columns; n += kWidth) {
    const int64_t columns = std::min(kWidth, size.columns - n);
    for (int64_t k = 0; k < size.depth; k += depth) {
      const int64_t deep = std::min(depth, size.depth - k);
      pack_columns<kColumns>(part(right, k, n), deep, columns, packed->columns);
      for (int64_t m = 0; m < size.rows; m += kBlock) {
        const int64_t rows = std::min(kBlock, size.rows - m);
        const Matrix block = part(left, m, k);
        if (by_columns) {
          pack_columns<kRows>(turned(block), deep, rows, packed->rows);
        } else {
          pack_rows(block, rows, deep, packed->rows);
        }
        Target there = part(to, m, n);
        if (k > 0) there.start = there.out, there.start_line = there.line;
        multiply_packed({rows, columns, deep}, packed->rows, by_columns,
                        packed->columns, there);
      }
    }
  }
}

// Among how many threads rows are divided, and columns among the others: so that each
// has little to multiply and, as each packs its own, to pack.
int threads_of_rows(Size size, int threads) {
  int64_t least = INT64_MAX;
  int best = 1;
  for (int down = 1; down <= threads; ++down) {
    if (threads % down) continue;
    const int64_t rows = rounded_up(pieces(size.rows, down), kRows);
    const int64_t columns = rounded_up(pieces(size.columns, threads / down), kColumns);
    // A number is packed in the time of so many multiplications.
    const int64_t work = rows * columns + 16 * (rows + columns);
    if (work < least) least = work, best = down;
  }
  return best;
}

}  // namespace

extern "C" {

void multiply_float32(Matrix left, Matrix right, const float* start, int64_t start_line,
                      float* out, int64_t rows, int64_t columns, int64_t depth,
                      int threads) {
  const Size size{rows, columns, depth};
  const Target to{out, columns, start, start_line};
  const int down = threads_of_rows(size, threads), across = threads / down;
  const int64_t tall = pieces(rows, kRows), wide = pieces(columns, kColumns);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    const int64_t top = share(tall, t / across, down) * kRows;
    const int64_t bottom = std::min(rows, share(tall, t / across + 1, down) * kRows);
    const int64_t first = share(wide, t % across, across) * kColumns;
    const int64_t last =
        std::min(columns, share(wide, t % across + 1, across) * kColumns);
    const Size own{bottom - top, last - first, depth};
    multiply_share(own, part(left, top, 0), part(right, 0, first),
                   part(to, top, first));
  }
}
}
