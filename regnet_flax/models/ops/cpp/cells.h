// One step of the separable ConvRNN, ConvGRU and ConvLSTM, forward and backward, for a vector's channels.
//
// A gate's sums are 18 multiply-adds per element: little arithmetic, much memory. So X and H of one image are copied
// into planes that stay in the cache; all gates of a pixel are held in registers; nothing is written but the new state.
// The backward pass recomputes the gates, keeps their gradients for one image, and takes the weights' gradients from
// there. The caller folds the 1×1 weights into the 3×3 taps: y[g] = Σ_tap a[g]·X + b[g]·H, where a = w_x·k, b = w_h·k.
//
// calls.cc includes this once for each instruction set, with LANES and TARGET, in a namespace of its own.

#include "planes.h"

INLINE void fill(const Job& job, const Images& from, V* plane) {
  const bool whole = job.count == LANES && !from.narrow;
  V* to = plane + job.size.start();
  for (int64_t i = 0; i < job.size.height; i++, to += job.size.stride()) {
    const int64_t index = job.at(i, 0);
    if (whole) {
      read_row<true, false, false>(from, index, job.size.n, job.count, {}, to, to + job.size.width);
    } else {
      read_row<false, false, false>(from, index, job.size.n, job.count, {}, to, to + job.size.width);
    }
  }
}

INLINE void write_gradients(const Job& job, int64_t row, int64_t column, int64_t pixels, const V* x, const V* h) {
  const int64_t index = job.at(row, column);
  write_row(job.d_x, index, job.size.n, job.count, x, x + pixels, 1);
  write_row(job.d_h, index, job.size.n, job.count, h, h + pixels, 1);
}

// What the gradients d of a cell's G sums are for its weights, X and H, where H is seen by all of them.
template <int G>
INLINE void through_sums(const Job& job, const V* x, const V* h, const V* d) {
  constexpr int P = SUMS / 2;
  const Size& size = job.size;
  const int64_t stride = size.stride(), plane = size.plane(), start = size.start();
  V inputs[2 * P];
  correlate<G>(x + start, h + start, d + start, size, reinterpret_cast<V*>(job.d_weights));
  for (int64_t i = 0; i < size.height; i++) {
    for (int64_t j = 0; j < size.width; j += P) {
      clear(inputs, inputs + 2 * P);
      spread<G, 2, P>(d + start + i * stride + j, plane, stride, reinterpret_cast<const V*>(job.weights), inputs);
      write_gradients(job, i, j, std::min<int64_t>(P, size.width - j), inputs, inputs + P);
    }
  }
}

INLINE void lstm(const Job& job, V* space) {
  constexpr int G = 4, P = SUMS / G;
  const Size& size = job.size;
  const int64_t stride = size.stride(), plane = size.plane(), start = size.start();
  const int count = job.count;
  const V* weights = reinterpret_cast<const V*>(job.weights);
  V* d_weights = reinterpret_cast<V*>(job.d_weights);
  V *x = space, *h = x + plane, *d = h + plane;
  const V* bias = weights + 9 * 2 * G;
  V sums[P * G], new_c[P], t[P];
  fill(job, job.x, x);
  fill(job, job.h, h);
  V by_bias[G] = {};
  for (int64_t i = 0; i < size.height; i++) {
    for (int64_t j = 0; j < size.width; j += P) {
      const int64_t here = start + i * stride + j;
      convolve<G, P>(x + here, h + here, stride, weights, bias, sums);
      const int64_t pixels = std::min<int64_t>(P, size.width - j), first = job.at(i, j);
      // Loops of their own: the processor computes neighbours at once where none waits for the one before it.
      ROLLED for (int64_t p = 0; p < pixels; p++) {
        V *f = sums + p * G, c;
        sigmoid(f[0]), sigmoid(f[1]), sigmoid(f[2]), tanh(f[3]);
        read(job.c, first + p * size.n, count, c);
        new_c[p] = t[p] = f[1] * c + f[0] * f[3];
      }
      ROLLED for (int64_t p = 0; p < pixels; p++) tanh(t[p]);
      ROLLED for (int64_t p = 0; p < pixels; p++) {
        const int64_t index = first + p * size.n;
        const V a = sums[p * G], f = sums[p * G + 1], o = sums[p * G + 2], g = sums[p * G + 3];
        if (!job.backward) {
          write(job.new_c, index, count, new_c[p]);
          write(job.new_h, index, count, o * t[p]);
          continue;
        }
        V c, d_h, d_c;
        read(job.c, index, count, c);
        read(job.d_new_h, index, count, d_h);
        read(job.d_new_c, index, count, d_c);
        V d_t = d_h * o, d_g;
        through_tanh(d_t, t[p]);
        d_c += d_t;
        d_g = d_c * a;
        through_tanh(d_g, g);
        V* to = d + here + p;
        to[0] = d_c * g * (a * (1.0f - a));
        to[plane] = d_c * c * (f * (1.0f - f));
        to[2 * plane] = d_h * t[p] * (o * (1.0f - o));
        to[3 * plane] = d_g;
        UNROLL for (int k = 0; k < G; k++) by_bias[k] += to[k * plane];
        write(job.d_c, index, count, d_c * f);
      }
    }
  }
  if (!job.backward) return;
  UNROLL for (int k = 0; k < G; k++) d_weights[9 * 2 * G + k] += by_bias[k];
  through_sums<G>(job, x, h, d);
}

INLINE void rnn(const Job& job, V* space) {
  constexpr int P = SUMS / 2;
  const Size& size = job.size;
  const int64_t stride = size.stride(), plane = size.plane(), start = size.start();
  const int count = job.count;
  const V* weights = reinterpret_cast<const V*>(job.weights);
  V* d_weights = reinterpret_cast<V*>(job.d_weights);
  V *x = space, *h = x + plane, *d = h + plane;
  V sums[P];
  fill(job, job.x, x);
  fill(job, job.h, h);
  V by_bias{};
  for (int64_t i = 0; i < size.height; i++) {
    for (int64_t j = 0; j < size.width; j += P) {
      const int64_t here = start + i * stride + j, first = job.at(i, j);
      convolve<1, P>(x + here, h + here, stride, weights, weights + 9 * 2, sums);
      ROLLED for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
        const int64_t index = first + p * size.n;
        V t = sums[p];
        tanh(t);
        if (!job.backward) {
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
  if (!job.backward) return;
  d_weights[9 * 2] += by_bias;
  through_sums<1>(job, x, h, d);
}

// z and r are one group of gates, the candidate, of X and r⊙H, another.
INLINE void gru(const Job& job, V* space) {
  constexpr int P = SUMS / 2;
  const Size& size = job.size;
  const int64_t stride = size.stride(), plane = size.plane(), start = size.start();
  const int count = job.count;
  const V* weights = reinterpret_cast<const V*>(job.weights);
  V* d_weights = reinterpret_cast<V*>(job.d_weights);
  V *x = space, *h = x + plane, *reset = h + plane, *z = reset + plane, *r = z + plane;
  V *d_z = r + plane, *d_candidate = d_z + 2 * plane, *d_h = d_candidate + plane;  // that of r follows that of z
  const V *second = weights + 9 * 2 * 2, *bias = second + 9 * 2;
  V sums[P * 2], inputs[2 * P];
  fill(job, job.x, x);
  fill(job, job.h, h);
  for (int64_t i = 0; i < size.height; i++) {
    for (int64_t j = 0; j < size.width; j += P) {
      const int64_t here = start + i * stride + j;
      convolve<2, P>(x + here, h + here, stride, weights, bias, sums);
      ROLLED for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
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
      const int64_t here = start + i * stride + j, first = job.at(i, j);
      convolve<1, P>(x + here, reset + here, stride, second, bias + 2, sums);
      ROLLED for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
        const int64_t index = first + p * size.n, pixel = here + p;
        V candidate = sums[p], d, d_sum;
        tanh(candidate);
        if (!job.backward) {
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
  if (!job.backward) return;
  for (int64_t i = 0; i < size.height; i++) {
    for (int64_t j = 0; j < size.width; j += P) {
      const int64_t here = start + i * stride + j;
      clear(inputs, inputs + P);
      spread<1, 1, P>(d_candidate + here, plane, stride, second + 1, inputs);
      ROLLED for (int64_t p = 0; p < std::min<int64_t>(P, size.width - j); p++) {
        const int64_t pixel = here + p;
        const V d_r = inputs[p] * h[pixel] * (r[pixel] * (1.0f - r[pixel]));
        d_z[plane + pixel] = d_r;
        d_h[pixel] += inputs[p] * r[pixel];
        by_bias[1] += d_r;
      }
    }
  }
  V* d_second = d_weights + 9 * 2 * 2;
  UNROLL for (int k = 0; k < 3; k++) d_second[9 * 2 + k] += by_bias[k];
  correlate<2>(x + start, h + start, d_z + start, size, d_weights);
  correlate<1>(x + start, reset + start, d_candidate + start, size, d_second);
  for (int64_t i = 0; i < size.height; i++) {
    for (int64_t j = 0; j < size.width; j += P) {
      const int64_t here = start + i * stride + j;
      for (int64_t p = 0; p < P; p++) inputs[p] = V{}, inputs[P + p] = d_h[here + p];
      spread<2, 2, P>(d_z + here, plane, stride, weights, inputs);
      spread<1, 1, P>(d_candidate + here, plane, stride, second, inputs);
      write_gradients(job, i, j, std::min<int64_t>(P, size.width - j), inputs, inputs + P);
    }
  }
}

template <Cell CELL>
TARGET void run(const Job& job, float* planes) {
  V* space = reinterpret_cast<V*>(planes);
  clear_borders(space, planes_of(CELL, job.backward), job.size);
  if constexpr (CELL == RNN) rnn(job, space);
  if constexpr (CELL == GRU) gru(job, space);
  if constexpr (CELL == LSTM) lstm(job, space);
}
