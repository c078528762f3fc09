// One step of the separable ConvRNN, ConvGRU and ConvLSTM, forward and backward, for 16 channels of some images.
//
// A gate's sums are 18 multiply-adds per element: little arithmetic, much memory. So X and H of one image are copied into
// planes that stay in the cache; all gates of a pixel are held in registers; nothing is written but the new state. The
// backward pass recomputes the gates, keeps their gradients for one image, and takes the weights' gradients from there.
// The caller folds the 1×1 weights into the 3×3 taps: y[g] = Σ_tap a[g]·X + b[g]·H, with a = w_x·k and b = w_h·k.

#pragma once

#include "planes.h"

namespace {

// ---------------------------------------------------------------------------------------------------------------------
// The cells. A job is 16 channels of some images.

enum Cell { RNN, GRU, LSTM };
constexpr int GATES[] = {1, 3, 4};

struct Job {
  Size size;
  Images x, h, c, new_h, new_c;           // C for the LSTM alone
  Images d_new_h, d_new_c, d_x, d_h, d_c;  // of the backward pass
  const V* weights;                        // of these channels: the groups of gates, one after another, then the bias
  V* d_weights;                            // likewise, 0 at first
  int64_t first, last;                     // images
  int64_t channel;

  int64_t at(int64_t image, int64_t row, int64_t column) const {
    return ((image * size.height + row) * size.width + column) * size.n + channel;
  }
  int count() const { return static_cast<int>(std::min<int64_t>(LANES, size.n - channel)); }
};

INLINE void fill(const Job& job, const Images& from, int64_t image, V* plane) {
  const int count = job.count();
  for (int64_t i = 0; i < job.size.height; i++) {
    V* to = plane + job.size.start() + i * job.size.stride();
    for (int64_t j = 0; j < job.size.width; j++) read(from, job.at(image, i, j), count, to[j]);
  }
}

template <bool BACKWARD>
INLINE void lstm(const Job& job, V* space) {
  constexpr int G = 4, P = 4;
  const Size& size = job.size;
  const int64_t stride = size.stride(), plane = size.plane(), start = size.start();
  const int count = job.count();
  V *x = space, *h = x + plane, *d = h + plane;
  const V* bias = job.weights + 9 * 2 * G;
  V sums[P * G], inputs[2 * 8];
  for (int64_t image = job.first; image < job.last; image++) {
    fill(job, job.x, image, x);
    fill(job, job.h, image, h);
    V by_bias[G] = {};
    for (int64_t i = 0; i < size.height; i++) {
      for (int64_t j = 0; j < size.width; j += P) {
        const int64_t here = start + i * stride + j;
        convolve<G, P>(x + here, h + here, stride, job.weights, bias, sums);
        for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
          const int64_t index = job.at(image, i, j + p);
          V a = sums[p * G], f = sums[p * G + 1], o = sums[p * G + 2], g = sums[p * G + 3], c;
          sigmoid(a), sigmoid(f), sigmoid(o), tanh(g);
          read(job.c, index, count, c);
          const V new_c = f * c + a * g;
          V t = new_c;
          tanh(t);
          if (!BACKWARD) {
            write(job.new_c, index, count, new_c);
            write(job.new_h, index, count, o * t);
            continue;
          }
          V d_h, d_c;
          read(job.d_new_h, index, count, d_h);
          read(job.d_new_c, index, count, d_c);
          V d_t = d_h * o, d_g;
          through_tanh(d_t, t);
          d_c += d_t;
          d_g = d_c * a;
          through_tanh(d_g, g);
          V* to = d + here + p;
          to[0] = d_c * g * (a * (1.0f - a));
          to[plane] = d_c * c * (f * (1.0f - f));
          to[2 * plane] = d_h * t * (o * (1.0f - o));
          to[3 * plane] = d_g;
          UNROLL for (int k = 0; k < G; k++) by_bias[k] += to[k * plane];
          write(job.d_c, index, count, d_c * f);
        }
      }
    }
    if (!BACKWARD) continue;
    UNROLL for (int k = 0; k < G; k++) job.d_weights[9 * 2 * G + k] += by_bias[k];
    correlate<G>(x + start, d + start, size, job.d_weights);
    correlate<G>(h + start, d + start, size, job.d_weights + G);
    for (int64_t i = 0; i < size.height; i++) {
      for (int64_t j = 0; j < size.width; j += 8) {
        std::fill(inputs, inputs + 2 * 8, V{});
        spread<G, 2, 8>(d + start + i * stride + j, plane, stride, job.weights, inputs);
        for (int64_t p = 0; p < std::min<int64_t>(8, size.width - j); p++) {
          write(job.d_x, job.at(image, i, j + p), count, inputs[p]);
          write(job.d_h, job.at(image, i, j + p), count, inputs[8 + p]);
        }
      }
    }
  }
}

template <bool BACKWARD>
INLINE void rnn(const Job& job, V* space) {
  constexpr int P = 8;
  const Size& size = job.size;
  const int64_t stride = size.stride(), plane = size.plane(), start = size.start();
  const int count = job.count();
  V *x = space, *h = x + plane, *d = h + plane;
  V sums[P], inputs[2 * P];
  for (int64_t image = job.first; image < job.last; image++) {
    fill(job, job.x, image, x);
    fill(job, job.h, image, h);
    V by_bias{};
    for (int64_t i = 0; i < size.height; i++) {
      for (int64_t j = 0; j < size.width; j += P) {
        const int64_t here = start + i * stride + j;
        convolve<1, P>(x + here, h + here, stride, job.weights, job.weights + 9 * 2, sums);
        for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
          const int64_t index = job.at(image, i, j + p);
          V t = sums[p];
          tanh(t);
          if (!BACKWARD) {
            write(job.new_h, index, count, t);
            continue;
          }
          V d_h;
          read(job.d_new_h, index, count, d_h);
          through_tanh(d_h, t);
          d[here + p] = d_h;
          by_bias += d_h;
        }
      }
    }
    if (!BACKWARD) continue;
    job.d_weights[9 * 2] += by_bias;
    correlate<1>(x + start, d + start, size, job.d_weights);
    correlate<1>(h + start, d + start, size, job.d_weights + 1);
    for (int64_t i = 0; i < size.height; i++) {
      for (int64_t j = 0; j < size.width; j += P) {
        std::fill(inputs, inputs + 2 * P, V{});
        spread<1, 2, P>(d + start + i * stride + j, plane, stride, job.weights, inputs);
        for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
          write(job.d_x, job.at(image, i, j + p), count, inputs[p]);
          write(job.d_h, job.at(image, i, j + p), count, inputs[P + p]);
        }
      }
    }
  }
}

// z and r are one group of gates, the candidate, of X and r⊙H, another.
template <bool BACKWARD>
INLINE void gru(const Job& job, V* space) {
  constexpr int P = 8;
  const Size& size = job.size;
  const int64_t stride = size.stride(), plane = size.plane(), start = size.start();
  const int count = job.count();
  V *x = space, *h = x + plane, *reset = h + plane, *z = reset + plane, *r = z + plane;
  V *d_z = r + plane, *d_candidate = d_z + 2 * plane, *d_h = d_candidate + plane;  // that of r follows that of z
  const V *second = job.weights + 9 * 2 * 2, *bias = second + 9 * 2;
  V sums[P * 2], inputs[2 * P];
  for (int64_t image = job.first; image < job.last; image++) {
    fill(job, job.x, image, x);
    fill(job, job.h, image, h);
    for (int64_t i = 0; i < size.height; i++) {
      for (int64_t j = 0; j < size.width; j += P) {
        const int64_t here = start + i * stride + j;
        convolve<2, P>(x + here, h + here, stride, job.weights, bias, sums);
        for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
          sigmoid(sums[p * 2]), sigmoid(sums[p * 2 + 1]);
          z[here + p] = sums[p * 2];
          r[here + p] = sums[p * 2 + 1];
          reset[here + p] = r[here + p] * h[here + p];
        }
      }
    }
    V by_bias[3] = {};
    for (int64_t i = 0; i < size.height; i++) {
      for (int64_t j = 0; j < size.width; j += P) {
        const int64_t here = start + i * stride + j;
        convolve<1, P>(x + here, reset + here, stride, second, bias + 2, sums);
        for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
          const int64_t index = job.at(image, i, j + p), pixel = here + p;
          V candidate = sums[p], d, d_sum;
          tanh(candidate);
          if (!BACKWARD) {
            write(job.new_h, index, count, (1.0f - z[pixel]) * h[pixel] + z[pixel] * candidate);
            continue;
          }
          read(job.d_new_h, index, count, d);
          d_z[pixel] = (d * candidate - d * h[pixel]) * (z[pixel] * (1.0f - z[pixel]));
          d_sum = d * z[pixel];
          through_tanh(d_sum, candidate);
          d_candidate[pixel] = d_sum;
          d_h[pixel] = d * (1.0f - z[pixel]);
          by_bias[0] += d_z[pixel];
          by_bias[2] += d_candidate[pixel];
        }
      }
    }
    if (!BACKWARD) continue;
    for (int64_t i = 0; i < size.height; i++) {
      for (int64_t j = 0; j < size.width; j += P) {
        const int64_t here = start + i * stride + j;
        std::fill(inputs, inputs + P, V{});
        spread<1, 1, P>(d_candidate + here, plane, stride, second + 1, inputs);
        for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
          const int64_t pixel = here + p;
          const V d_r = inputs[p] * h[pixel] * (r[pixel] * (1.0f - r[pixel]));
          d_z[plane + pixel] = d_r;
          d_h[pixel] += inputs[p] * r[pixel];
          by_bias[1] += d_r;
        }
      }
    }
    V* d_second = job.d_weights + 9 * 2 * 2;
    UNROLL for (int k = 0; k < 3; k++) d_second[9 * 2 + k] += by_bias[k];
    correlate<2>(x + start, d_z + start, size, job.d_weights);
    correlate<2>(h + start, d_z + start, size, job.d_weights + 2);
    correlate<1>(x + start, d_candidate + start, size, d_second);
    correlate<1>(reset + start, d_candidate + start, size, d_second + 1);
    for (int64_t i = 0; i < size.height; i++) {
      for (int64_t j = 0; j < size.width; j += P) {
        const int64_t here = start + i * stride + j;
        for (int64_t p = 0; p < P; p++) inputs[p] = V{}, inputs[P + p] = d_h[here + p];
        spread<2, 2, P>(d_z + here, plane, stride, job.weights, inputs);
        spread<1, 1, P>(d_candidate + here, plane, stride, second, inputs);
        for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
          write(job.d_x, job.at(image, i, j + p), count, inputs[p]);
          write(job.d_h, job.at(image, i, j + p), count, inputs[P + p]);
        }
      }
    }
  }
}

template <Cell CELL, bool BACKWARD>
INLINE void run(const Job& job, V* space) {
  if constexpr (CELL == RNN) rnn<BACKWARD>(job, space);
  if constexpr (CELL == GRU) gru<BACKWARD>(job, space);
  if constexpr (CELL == LSTM) lstm<BACKWARD>(job, space);
}

constexpr int planes_of(Cell cell, bool backward) {
  if (cell == GRU) return backward ? 9 : 5;
  return backward ? 2 + GATES[cell] : 2;
}

}  // namespace
