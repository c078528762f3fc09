// Passes over images for batch normalisation, some pixels at a time, a vector of channels after another.

// Reads `count` channels of U pixels that are `n` elements apart.
template <int U>
INLINE void read_pixels(const Images& from, int64_t index, int64_t n, int count, V* v) {
  UNROLL for (int u = 0; u < U; u++) read(from, index + u * n, count, v[u]);
}

// Mean and sum of squared differences from it, each in double, of pixels `first` to `last`, into (2, n).
TARGET void moments(const Images& x, int64_t n, int64_t first, int64_t last, int64_t block, double* to) {
  std::fill(to, to + 2 * n, 0.0);
  for (int64_t start = first; start < last; start += block) {
    const int64_t end = std::min(last, start + block);
    const double before = start - first, here = end - start, all = before + here;
    for (int64_t c = 0; c < n; c += LANES) {
      const int count = static_cast<int>(std::min<int64_t>(LANES, n - c));
      V sums[4] = {}, v[4];
      int64_t p = start;
      for (; p + 4 <= end; p += 4) {
        read_pixels<4>(x, p * n + c, n, count, v);
        UNROLL for (int u = 0; u < 4; u++) sums[u] += v[u];
      }
      for (; p < end; p++) {
        read_pixels<1>(x, p * n + c, n, count, v);
        sums[0] += v[0];
      }
      const V near = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(here);
      // Differences from what is near the mean have the digits that the mean itself lacks.
      V rests[4] = {}, squares[4] = {};
      for (p = start; p + 4 <= end; p += 4) {
        read_pixels<4>(x, p * n + c, n, count, v);
        UNROLL for (int u = 0; u < 4; u++) {
          v[u] -= near;
          rests[u] += v[u];
          squares[u] += v[u] * v[u];
        }
      }
      for (; p < end; p++) {
        read_pixels<1>(x, p * n + c, n, count, v);
        v[0] -= near;
        rests[0] += v[0];
        squares[0] += v[0] * v[0];
      }
      const V rest = (rests[0] + rests[1]) + (rests[2] + rests[3]);
      const V total = (squares[0] + squares[1]) + (squares[2] + squares[3]);
      for (int lane = 0; lane < count; lane++) {  // Chan's formula
        const double left = rest[lane] / here, difference = near[lane] + left - to[c + lane];
        to[c + lane] += difference * (here / all);
        to[n + c + lane] += total[lane] - left * left * here + difference * difference * (before * here / all);
      }
    }
  }
}

// The sums of d and of d·(x − mean), where d passes the ReLU, into (2, n).
TARGET void gradient_sums(const Images& d, const Images& x, int64_t n, const float* norms, bool relu, int64_t first,
                          int64_t last, int64_t block, double* to) {
  std::fill(to, to + 2 * n, 0.0);
  for (int64_t start = first; start < last; start += block) {
    const int64_t end = std::min(last, start + block);
    for (int64_t c = 0; c < n; c += LANES) {
      const int count = static_cast<int>(std::min<int64_t>(LANES, n - c));
      V mean{}, factor{}, bias{};
      memcpy(&mean, norms + c, 4 * count);
      memcpy(&factor, norms + n + c, 4 * count);
      memcpy(&bias, norms + 2 * n + c, 4 * count);
      V by_bias[2] = {}, by_scale[2] = {}, v[2], g[2];
      for (int64_t p = start; p < end; p += 2) {
        const bool two = p + 1 < end;
        if (two) {
          read_pixels<2>(x, p * n + c, n, count, v);
          read_pixels<2>(d, p * n + c, n, count, g);
        } else {
          read_pixels<1>(x, p * n + c, n, count, v);
          read_pixels<1>(d, p * n + c, n, count, g);
          v[1] = mean, g[1] = V{};
        }
        UNROLL for (int u = 0; u < 2; u++) {
          v[u] -= mean;
          if (relu) g[u] = v[u] * factor + bias > 0.0f ? g[u] : V{};
          by_bias[u] += g[u];
          by_scale[u] += g[u] * v[u];
        }
      }
      const V sum_bias = by_bias[0] + by_bias[1], sum_scale = by_scale[0] + by_scale[1];
      for (int lane = 0; lane < count; lane++) {
        to[c + lane] += sum_bias[lane];
        to[n + c + lane] += sum_scale[lane];
      }
    }
  }
}

// d·factor − constant − (x − mean)·slope, where d passes the ReLU; `norms` is (5, n).
TARGET void input_gradient_of_norm(const Images& d, const Images& x, int64_t n, const float* norms, bool relu,
                                   int64_t first, int64_t last, int64_t block, const Images& to) {
  for (int64_t start = first; start < last; start += block) {
    const int64_t end = std::min(last, start + block);
    for (int64_t c = 0; c < n; c += LANES) {
      const int count = static_cast<int>(std::min<int64_t>(LANES, n - c));
      V of[5] = {};
      for (int k = 0; k < 5; k++) memcpy(of + k, norms + k * n + c, 4 * count);
      const V mean = of[0], factor = of[1], bias = of[2], constant = of[3], slope = of[4];
      for (int64_t p = start; p < end; p++) {
        V v, g;
        read(x, p * n + c, count, v);
        read(d, p * n + c, count, g);
        v -= mean;
        if (relu) g = v * factor + bias > 0.0f ? g : V{};
        write(to, p * n + c, count, g * factor - constant - v * slope);
      }
    }
  }
}
