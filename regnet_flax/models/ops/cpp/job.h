// What all instruction sets share: the sizes of a call, and its jobs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

enum Cell { RNN, GRU, LSTM };
constexpr int GATES[] = {1, 3, 4};

// Of images, and of a plane: a buffer of some channels of one image, zeros around it and to the right.
struct Size {
  int64_t seeds, images, height, width, n;
  int64_t stride() const { return (width + 7) / 8 * 8 + 2; }
  int64_t plane() const { return stride() * (height + 2); }
  int64_t start() const { return stride() + 1; }  // the first pixel of a plane
};

constexpr int planes_of(Cell cell, bool backward) {
  if (cell == GRU) return backward ? 9 : 5;
  return backward ? 2 + GATES[cell] : 2;
}

// An array (…, images, height, width, n) of float32 or bfloat16.
struct Images {
  char* data;
  bool narrow;
};

// As many channels as a vector holds, of one image.
struct Job {
  Size size;
  bool backward;
  Images x, h, c, new_h, new_c;            // C for the LSTM alone
  Images d_new_h, d_new_c, d_x, d_h, d_c;  // of the backward pass
  const float* weights;                    // a vector each: the groups of gates, one after another, then the bias
  float* d_weights;                        // likewise
  int64_t image;
  int64_t channel;
  int count;  // channels that there are; the rest of a vector is 0

  int64_t at(int64_t row, int64_t column) const {
    return ((image * size.height + row) * size.width + column) * size.n + channel;
  }
};

typedef void (*Run)(const Job&, float* planes);

// ---------------------------------------------------------------------------------------------------------------------
// Convolutions and batch normalisations

// Images (N, height, width, channels), normalised while they are read or written where `norms` is set: (x − mean)·factor
// + bias, three vectors for each vector of channels, and a ReLU where asked for.
struct Operand {
  Images images;
  int64_t channels;
  const float* norms;
  bool relu;
};

// As many channels of an operand as a vector holds.
struct Chunk {
  int operand;
  int64_t channel;
  int count;
  const float* norms;
};

// A tap of the outputs that are `spread` pixels from each other: where it reads, and which of the kernel's it is.
struct Tap {
  int row, column, index;
};

// Outputs (spread·i + row, spread·j + column) read inputs (step·i + tap.row, step·j + tap.column).
struct Phase {
  int row, column;
  std::vector<Tap> taps;
};

// A convolution: from `in` to `out`, both along the channels of one or two arrays.
struct Convolution {
  std::vector<Operand> in, out;
  Operand added;  // to the outputs, before the ReLU; nothing if it has no data
  std::vector<Chunk> in_chunks, out_chunks;
  int64_t height, width, out_height, out_width;
  int step, spread;
  std::vector<Phase> phases;
  int taps;              // of the kernel
  int low_row, low_column, high_row, high_column;  // of the taps
  const float* weights;  // [out chunks, `group` at a time][in chunk][tap][lane][chunk of the group], a vector each
  int group;             // out chunks computed together

  int64_t rows() const { return (out_height + spread - 1) / spread; }  // of a phase, at most
  int64_t columns() const { return (out_width + spread - 1) / spread; }
};

// The gradient of a kernel: of one chunk of inputs, for some images.
struct FilterGradient {
  std::vector<Operand> in;
  Operand d;
  std::vector<Chunk> in_chunks, d_chunks;
  int64_t height, width, d_height, d_width, kernel_height, kernel_width;
  int step, top, left;
};

struct Library {
  int lanes;
  int64_t (*planes)(const Convolution&, int64_t rows);  // vectors
  void (*convolve)(const Convolution&, int64_t image, int64_t first, int64_t last, float* planes);
  int64_t (*filter_planes)(const FilterGradient&);
  // Adds to `sums`: [tap][lane][d's channels, whole vectors].
  void (*filter)(const FilterGradient&, int chunk, int64_t first, int64_t last, float* planes, float* sums);
  // Of batch_norm.h.
  void (*moments)(const Images& x, int64_t n, int64_t first, int64_t last, int64_t block, double* to);
  void (*gradient_sums)(const Images& d, const Images& x, int64_t n, const float* norms, bool relu, int64_t first,
                        int64_t last, int64_t block, double* to);
  void (*norm_gradient)(const Images& d, const Images& x, int64_t n, const float* norms, bool relu, int64_t first,
                        int64_t last, int64_t block, const Images& to);
};

}  // namespace
