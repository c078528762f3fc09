// What all instruction sets share: the size of a call, and one of its jobs.

#pragma once

#include <algorithm>
#include <cstdint>

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

// As many channels as a vector holds, of some images.
struct Job {
  Size size;
  bool backward;
  Images x, h, c, new_h, new_c;            // C for the LSTM alone
  Images d_new_h, d_new_c, d_x, d_h, d_c;  // of the backward pass
  const float* weights;                    // a vector each: the groups of gates, one after another, then the bias
  float* d_weights;                        // likewise
  int64_t first, last;                     // images
  int64_t channel;
  int count;  // channels that there are; the rest of a vector is 0

  int64_t at(int64_t image, int64_t row, int64_t column) const {
    return ((image * size.height + row) * size.width + column) * size.n + channel;
  }
};

typedef void (*Run)(const Job&, float* planes);

}  // namespace
