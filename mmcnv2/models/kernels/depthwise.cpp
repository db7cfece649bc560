// Depthwise convolution, 7 x 7, of pictures that are given as tiles: the visible patches
// of a masked picture, or all of an ordinary one.
#include <algorithm>

#include "kernels.h"
#include "lanes.h"

// Squares of S x S positions of channels, wherever they lie in memory. `_Tiles` in
// cpu.py is the same.
struct Tiles {
  int64_t side;           // S: 8, 4, 2 or 1
  const int32_t* near;    // (count, W, W): who lies around a tile, itself in the middle,
                          // -1 where nobody does; W reaches as far as the kernel
  const int64_t* origin;  // (count): the first position of each
  const int32_t* extent;  // (count, 2): rows and columns of each that are there, of 8;
                          // null where all are
  int64_t count;
  int64_t row;       // positions from one row of a tile to the next
  int64_t channels;  // a multiple of 8
  int64_t group;     // tiles whose gradients are summed in one go
};

namespace {

constexpr int kSize = 7;   // side of the kernel
constexpr int kReach = 3;  // of it to each side of its middle
constexpr int kBias = kSize * kSize;

INLINE int rows_of(const Tiles& tiles, int64_t tile) { return tiles.extent[2 * tile]; }
INLINE int columns_of(const Tiles& tiles, int64_t tile) {
  return tiles.extent[2 * tile + 1];
}

// Calls `each(pixel, column)` for all that the kernel sees of the line that lies `y`
// rows below a tile's first, with columns counted from the tile's first. What is not
// there is zero and left out.
template <int S, bool RAGGED, typename T, typename Each>
INLINE void for_pixels(const Tiles& tiles, const T* x, int64_t tile, int y, Each each) {
  constexpr int reach = (kReach + S - 1) / S, width = 2 * reach + 1;
  const int down = (y + reach * S) / S - reach, row = y - down * S;
  const int32_t* line = tiles.near + (tile * width + down + reach) * width;
#pragma GCC unroll 7
  for (int right = -reach; right <= reach; ++right) {
    const int64_t near = line[right + reach];
    if (near < 0 || (RAGGED && row >= rows_of(tiles, near))) continue;
    const int columns = RAGGED ? columns_of(tiles, near) : S;
    const T* pixels = x + (tiles.origin[near] + row * tiles.row) * tiles.channels;
    UNROLL for (int p = 0; p < S; ++p) {
      const int column = right * S + p;
      if (column < -kReach || column >= S + kReach) continue;
      if (RAGGED && p >= columns) continue;
      each(pixels + p * tiles.channels, column);
    }
  }
}

// Those functions below that end in `block` work on V * 8 channels of one tile.
template <int S, int V, bool RAGGED, typename T>
INLINE void convolve_block(const Tiles& tiles, const T* x, const float* weight,
                           const float* bias, T* out, int64_t tile) {
  const int64_t channels = tiles.channels;
  const int rows = RAGGED ? rows_of(tiles, tile) : S;
  const int columns = RAGGED ? columns_of(tiles, tile) : S;
  for (int i = 0; i < rows; ++i) {
    Lanes sums[S][V];
    UNROLL for (int v = 0; v < V; ++v) {
      const Lanes start = bias ? load(bias + v * kLanes) : Lanes{};
      UNROLL for (int o = 0; o < S; ++o) sums[o][v] = start;
    }
    for (int dy = 0; dy < kSize; ++dy) {
      const float* taps = weight + dy * kSize * channels;
      const auto add = [&](const T* pixel, int column) ALWAYS_INLINE {
        UNROLL for (int v = 0; v < V; ++v) {
          const Lanes value = load(pixel + v * kLanes);
          UNROLL for (int o = 0; o < S; ++o) {
            const int dx = column - o + kReach;
            if (dx < 0 || dx >= kSize) continue;
            sums[o][v] += value * load(taps + dx * channels + v * kLanes);
          }
        }
      };
      for_pixels<S, RAGGED>(tiles, x, tile, i + dy - kReach, add);
    }
    T* line = out + (tiles.origin[tile] + i * tiles.row) * channels;
    UNROLL for (int o = 0; o < S; ++o) {
      if (RAGGED && o >= columns) continue;
      UNROLL for (int v = 0; v < V; ++v) {
        store(line + o * channels + v * kLanes, sums[o][v]);
      }
    }
  }
}

template <int S, int V, bool RAGGED, typename T>
INLINE void gradient_block(const Tiles& tiles, const T* x, const T* grad, float* out,
                           int64_t tile) {
  const int64_t channels = tiles.channels;
  const int rows = RAGGED ? rows_of(tiles, tile) : S;
  const int columns = RAGGED ? columns_of(tiles, tile) : S;
  for (int dy = 0; dy < kSize; ++dy) {
    float* taps = out + dy * kSize * channels;
    Lanes sums[kSize][V], bias[V] = {};
    UNROLL for (int d = 0; d < kSize; ++d) {
      UNROLL for (int v = 0; v < V; ++v) {
        sums[d][v] = load(taps + d * channels + v * kLanes);
      }
    }
    for (int i = 0; i < rows; ++i) {
      const T* line = grad + (tiles.origin[tile] + i * tiles.row) * channels;
      Lanes slopes[S][V];
      UNROLL for (int o = 0; o < S; ++o) {
        const bool there = !RAGGED || o < columns;
        UNROLL for (int v = 0; v < V; ++v) {
          slopes[o][v] = there ? load(line + o * channels + v * kLanes) : Lanes{};
          bias[v] += slopes[o][v];
        }
      }
      const auto add = [&](const T* pixel, int column) ALWAYS_INLINE {
        UNROLL for (int v = 0; v < V; ++v) {
          const Lanes value = load(pixel + v * kLanes);
          UNROLL for (int o = 0; o < S; ++o) {
            const int dx = column - o + kReach;
            if (dx >= 0 && dx < kSize) sums[dx][v] += value * slopes[o][v];
          }
        }
      };
      for_pixels<S, RAGGED>(tiles, x, tile, i + dy - kReach, add);
    }
    UNROLL for (int v = 0; v < V; ++v) {
      UNROLL for (int d = 0; d < kSize; ++d) {
        store(taps + d * channels + v * kLanes, sums[d][v]);
      }
      // Once is enough.
      float* last = out + kBias * channels + v * kLanes;
      if (dy == 0) store(last, load(last) + bias[v]);
    }
  }
}

template <int S, int V, bool RAGGED, typename T>
INLINE void convolve_tiles(const Tiles& tiles, const T* x, const float* weight,
                           const float* bias, T* out, int64_t begin, int64_t end) {
  constexpr int step = V * kLanes;
  for (int64_t tile = begin; tile < end; ++tile) {
    int64_t c = 0;
    for (; c + step <= tiles.channels; c += step) {
      convolve_block<S, V, RAGGED>(tiles, x + c, weight + c, bias ? bias + c : bias,
                                   out + c, tile);
    }
    for (; V > 1 && c < tiles.channels; c += kLanes) {
      convolve_block<S, 1, RAGGED>(tiles, x + c, weight + c, bias ? bias + c : bias,
                                   out + c, tile);
    }
  }
}

// Some of the channels, and some of the tiles, whose sums go to one place.
struct Part {
  int64_t first_tile, last_tile, first_channel, last_channel;
};

template <int S, int V, bool RAGGED, typename T>
INLINE void gradient_tiles(const Tiles& tiles, const T* x, const T* grad, float* out,
                           Part part) {
  constexpr int step = V * kLanes;
  for (int64_t tile = part.first_tile; tile < part.last_tile; ++tile) {
    int64_t c = part.first_channel;
    for (; c + step <= part.last_channel; c += step) {
      gradient_block<S, V, RAGGED>(tiles, x + c, grad + c, out + c, tile);
    }
    for (; V > 1 && c < part.last_channel; c += kLanes) {
      gradient_block<S, 1, RAGGED>(tiles, x + c, grad + c, out + c, tile);
    }
  }
}

// Tiles of one position: few of the many around them are there.
template <typename T>
INLINE void gradient_positions(const Tiles& tiles, const T* x, const T* grad,
                               float* out, Part part) {
  const int64_t channels = tiles.channels;
  for (int64_t tile = part.first_tile; tile < part.last_tile; ++tile) {
    const T* slopes = grad + tiles.origin[tile] * channels;
    for (int tap = 0; tap < kBias; ++tap) {
      const int64_t near = tiles.near[tile * kBias + tap];
      if (near < 0) continue;
      const T* values = x + tiles.origin[near] * channels;
      float* to = out + tap * channels;
      for (int64_t c = part.first_channel; c < part.last_channel; c += kLanes) {
        store(to + c, load(to + c) + load(values + c) * load(slopes + c));
      }
    }
    float* bias = out + kBias * channels;
    for (int64_t c = part.first_channel; c < part.last_channel; c += kLanes) {
      store(bias + c, load(bias + c) + load(slopes + c));
    }
  }
}

// So many lanes that all of a line's sums stay in registers.
template <typename T>
INLINE void convolve_range(const Tiles& tiles, const T* x, const float* weight,
                           const float* bias, T* out, int64_t begin, int64_t end) {
  if (tiles.extent) {
    return convolve_tiles<8, 1, true>(tiles, x, weight, bias, out, begin, end);
  }
  switch (tiles.side) {
    case 8: return convolve_tiles<8, 1, false>(tiles, x, weight, bias, out, begin, end);
    case 4: return convolve_tiles<4, 2, false>(tiles, x, weight, bias, out, begin, end);
    case 2: return convolve_tiles<2, 4, false>(tiles, x, weight, bias, out, begin, end);
    case 1: return convolve_tiles<1, 4, false>(tiles, x, weight, bias, out, begin, end);
  }
}

template <typename T>
INLINE void gradient_part(const Tiles& tiles, const T* x, const T* grad, float* out,
                          Part part) {
  if (tiles.extent) return gradient_tiles<8, 1, true>(tiles, x, grad, out, part);
  switch (tiles.side) {
    case 8: return gradient_tiles<8, 1, false>(tiles, x, grad, out, part);
    case 4: return gradient_tiles<4, 1, false>(tiles, x, grad, out, part);
    case 2: return gradient_tiles<2, 2, false>(tiles, x, grad, out, part);
    case 1: return gradient_positions(tiles, x, grad, out, part);
  }
}

// Templates cannot be compiled for several CPUs, so each dtype has a function.
FOR_EACH_CPU void run(const Tiles& tiles, const float* x, const float* weight,
                      const float* bias, float* out, int64_t begin, int64_t end) {
  convolve_range(tiles, x, weight, bias, out, begin, end);
}
FOR_EACH_CPU void run(const Tiles& tiles, const BFloat16* x, const float* weight,
                      const float* bias, BFloat16* out, int64_t begin, int64_t end) {
  convolve_range(tiles, x, weight, bias, out, begin, end);
}
FOR_EACH_CPU void run(const Tiles& tiles, const float* x, const float* grad, float* out,
                      Part part) {
  gradient_part(tiles, x, grad, out, part);
}
FOR_EACH_CPU void run(const Tiles& tiles, const BFloat16* x, const BFloat16* grad,
                      float* out, Part part) {
  gradient_part(tiles, x, grad, out, part);
}

template <typename T>
void convolve(const Tiles& tiles, const T* x, const float* weight, const float* bias,
              T* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int k = 0; k < threads; ++k) {
    run(tiles, x, weight, bias, out, share(tiles.count, k, threads),
        share(tiles.count, k + 1, threads));
  }
}

// Calls `each(item, first, last)` for a thread's share of the channels of all items.
template <typename Each>
void for_share(int64_t items, int64_t channels, int thread, int threads, Each each) {
  const int64_t blocks = channels / kLanes, count = items * blocks;
  const int64_t end = share(count, thread + 1, threads);
  for (int64_t i = share(count, thread, threads); i < end;) {
    const int64_t block = i % blocks, last = std::min(blocks, block + end - i);
    each(i / blocks, block * kLanes, last * kLanes);
    i += last - block;
  }
}

template <typename T>
void sum_gradients(const Tiles& tiles, const T* x, const T* grad, float* out,
                   int threads) {
  const int64_t groups = pieces(tiles.count, tiles.group);
  const auto of_group = [=, &tiles](int64_t group, int64_t first, int64_t last) {
    const int64_t begin = group * tiles.group;
    const Part part{begin, std::min(tiles.count, begin + tiles.group), first, last};
    run(tiles, x, grad, out + group * (kBias + 1) * tiles.channels, part);
  };
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int k = 0; k < threads; ++k) {
    for_share(groups, tiles.channels, k, threads, of_group);
  }
}

}  // namespace

extern "C" {

int mmcnv2_interface() { return kInterface; }

// The convolution at the positions of all tiles. `weight` is (49, channels), `bias` is
// null for none.
void convolve_float32(const Tiles* tiles, const float* x, const float* weight,
                      const float* bias, float* out, int threads) {
  convolve(*tiles, x, weight, bias, out, threads);
}

void convolve_bfloat16(const Tiles* tiles, const BFloat16* x, const float* weight,
                       const float* bias, BFloat16* out, int threads) {
  convolve(*tiles, x, weight, bias, out, threads);
}

// Add the gradients of weight and, behind it, bias to `out`, (groups, 50, channels).
// They do not depend on the number of threads.
void sum_gradients_float32(const Tiles* tiles, const float* x, const float* grad,
                           float* out, int threads) {
  sum_gradients(*tiles, x, grad, out, threads);
}

void sum_gradients_bfloat16(const Tiles* tiles, const BFloat16* x, const BFloat16* grad,
                            float* out, int threads) {
  sum_gradients(*tiles, x, grad, out, threads);
}
}
