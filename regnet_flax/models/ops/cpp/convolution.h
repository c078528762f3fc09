// Convolutions of images, and the gradients of their kernels, for a vector's channels at a time.
//
// Chunks of an image's channels are copied into planes, a vector per pixel with zeros around: so neighbours are at
// constant distances, whatever the number of channels, and normalising while copying costs nothing.

struct Norm {
  V mean{}, factor{}, bias{};
};

INLINE void read(const Chunk& chunk, Norm& norm) {
  if (chunk.norms) memcpy(&norm, chunk.norms, sizeof norm);
}

INLINE void relu(V& v) { v = v < 0.0f ? V{} : v; }  // NaN stays

INLINE void fill_rows(const Operand& from, const Chunk& chunk, int64_t image, int64_t height, int64_t width,
                      int64_t first, int64_t rows, int64_t left, int64_t stride, V* to) {
  Norm norm;
  read(chunk, norm);
  for (int64_t i = first; i < first + rows; i++, to += stride) {
    if (i < 0 || i >= height) {
      clear(to, to + stride);
      continue;
    }
    clear(to, to + left);
    V* here = to + left;
    // Where no column lies left of the image, its first are not read.
    const int64_t skipped = left < 0 ? -left : 0, end = std::min(width, stride - left);
    int64_t index = ((image * height + i) * width + skipped) * from.channels + chunk.channel;
    if (chunk.norms) {
      if (from.relu) {
        for (int64_t j = skipped; j < end; j++, index += from.channels) {
          V v;
          read(from.images, index, chunk.count, v);
          here[j] = (v - norm.mean) * norm.factor + norm.bias;
          relu(here[j]);
        }
      } else {
        for (int64_t j = skipped; j < end; j++, index += from.channels) {
          V v;
          read(from.images, index, chunk.count, v);
          here[j] = (v - norm.mean) * norm.factor + norm.bias;
        }
      }
    } else {
      for (int64_t j = skipped; j < end; j++, index += from.channels) read(from.images, index, chunk.count, here[j]);
    }
    if (end < stride - left) clear(here + end, to + stride);
  }
}

// The sums of C chunks of outputs at P pixels in a row.
template <int C, int P, int STEP>
INLINE void tile(const Convolution& job, const Phase& phase, const V* planes, int64_t stride, int64_t plane,
                 const V* weights, V* out) {
  V sums[P][C] = {};
  for (size_t k = 0; k < job.in_chunks.size(); k++, planes += plane, weights += job.taps * LANES * C) {
    const int count = job.in_chunks[k].count;
    for (const Tap& tap : phase.taps) {
      const float* x = reinterpret_cast<const float*>(planes + (tap.row - job.low_row) * stride +
                                                      (tap.column - job.low_column));
      const V* w = weights + tap.index * LANES * C;
      ROLLED for (int lane = 0; lane < count; lane++, x++, w += C) {
        UNROLL for (int p = 0; p < P; p++) {
          UNROLL for (int c = 0; c < C; c++) sums[p][c] += x[p * STEP * LANES] * w[c];
        }
      }
    }
  }
  UNROLL for (int p = 0; p < P; p++) UNROLL for (int c = 0; c < C; c++) out[p * C + c] = sums[p][c];
}

// Writes a chunk of `pixels` outputs, every `step`-th vector of `sums`, and does first what comes before.
INLINE void finish(const Convolution& job, const Chunk& chunk, int64_t pixel, int64_t pixels, V* sums, int step) {
  const Operand& to = job.out[chunk.operand];
  const int64_t first = pixel * to.channels + chunk.channel, apart = job.spread * to.channels;
  V* const end = sums + pixels * step;
  if (chunk.norms) {
    Norm norm;
    read(chunk, norm);
    ROLLED for (V* v = sums; v < end; v += step) *v = (*v - norm.mean) * norm.factor + norm.bias;
  }
  if (job.added.images.data) {
    int64_t index = first;
    ROLLED for (V* v = sums; v < end; v += step, index += apart) {
      V other;
      read(job.added.images, index, chunk.count, other);
      *v += other;
    }
  }
  if (to.relu) {
    ROLLED for (V* v = sums; v < end; v += step) relu(*v);
  }
  int64_t index = first;
  if (chunk.count == LANES && !to.images.narrow) {  // without conditions in the loop
    float* out = reinterpret_cast<float*>(to.images.data) + first;
    ROLLED for (V* v = sums; v < end; v += step, out += apart) memcpy(out, v, sizeof *v);
  } else {
    ROLLED for (V* v = sums; v < end; v += step, index += apart) write(to.images, index, chunk.count, *v);
  }
}

template <int C, int P, int STEP>
TARGET void convolve_tiles(const Convolution& job, int64_t image, int64_t first, int64_t last, const V* planes,
                           int64_t stride, int64_t plane) {
  const int64_t group = C * job.in_chunks.size() * job.taps * LANES;
  V sums[P * C];
  for (size_t g = 0; g < job.out_chunks.size() / C; g++) {
    const V* weights = reinterpret_cast<const V*>(job.weights) + g * group;
    for (const Phase& phase : job.phases) {
      for (int64_t i = first; i < last; i++) {
        const int64_t row = job.spread * i + phase.row;
        if (row >= job.out_height) break;
        const int64_t start = (image * job.out_height + row) * job.out_width;
        int64_t column = phase.column;
        for (int64_t j = 0; column < job.out_width; j += P, column += job.spread * P) {
          const V* here = planes + job.step * ((i - first) * stride + j);
          tile<C, P, STEP>(job, phase, here, stride, plane, weights, sums);
          const int64_t there = std::min<int64_t>(P, (job.out_width - column + job.spread - 1) / job.spread);
          ROLLED for (int c = 0; c < C; c++) {
            finish(job, job.out_chunks[g * C + c], start + column, there, sums + c, C);
          }
        }
      }
    }
  }
}

inline int pixels(int group, int64_t columns) {
  if (group > 1) return SUMS / group;
  return columns > SUMS / 2 ? SUMS : SUMS / 2;
}

inline int64_t plane_stride(const Convolution& job) {
  const int64_t p = pixels(job.group, job.columns()), columns = (job.columns() + p - 1) / p * p;
  return job.step * (columns - 1) + job.high_column - job.low_column + 1;
}

inline int64_t plane_rows(const Convolution& job, int64_t rows) {
  return job.step * (rows - 1) + job.high_row - job.low_row + 1;
}

inline int64_t planes(const Convolution& job, int64_t rows) {
  return static_cast<int64_t>(job.in_chunks.size()) * plane_rows(job, rows) * plane_stride(job);
}

template <int STEP>
TARGET void convolve_step(const Convolution& job, int64_t image, int64_t first, int64_t last, const V* planes,
                          int64_t stride, int64_t plane) {
  const int p = pixels(job.group, job.columns());
  if (job.group == 4) return convolve_tiles<4, SUMS / 4, STEP>(job, image, first, last, planes, stride, plane);
  if (job.group == 2) return convolve_tiles<2, SUMS / 2, STEP>(job, image, first, last, planes, stride, plane);
  if (p == SUMS) return convolve_tiles<1, SUMS, STEP>(job, image, first, last, planes, stride, plane);
  return convolve_tiles<1, SUMS / 2, STEP>(job, image, first, last, planes, stride, plane);
}

// Rows `first` to `last` of the phases, of one image.
TARGET void convolve_image(const Convolution& job, int64_t image, int64_t first, int64_t last, float* space) {
  V* to = reinterpret_cast<V*>(space);
  const int64_t stride = plane_stride(job), rows = plane_rows(job, last - first), plane = rows * stride;
  for (size_t k = 0; k < job.in_chunks.size(); k++) {
    const Chunk& chunk = job.in_chunks[k];
    fill_rows(job.in[chunk.operand], chunk, image, job.height, job.width, job.step * first + job.low_row, rows,
              -job.low_column, stride, to + k * plane);
  }
  if (job.step == 1) return convolve_step<1>(job, image, first, last, to, stride, plane);
  convolve_step<2>(job, image, first, last, to, stride, plane);
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient of a kernel

// Adds what `rows` rows give for a tap, CI channels of X and C chunks of the outputs.
template <int C, int CI, int STEP>
INLINE void outer_products(const float* x, int64_t x_stride, const float* d, int64_t d_stride, int64_t d_plane,
                           int64_t rows, int64_t columns, float* sums, int64_t sums_stride) {
  V products[CI][C] = {};
  for (int64_t i = 0; i < rows; i++) {
    const float* here = x + i * STEP * x_stride * LANES;
    const float* there = d + i * d_stride * LANES;
    ROLLED for (int64_t j = 0; j < columns; j++, here += STEP * LANES, there += LANES) {
      V v[C];
      UNROLL for (int c = 0; c < C; c++) memcpy(&v[c], there + c * d_plane * LANES, sizeof(V));
      UNROLL for (int lane = 0; lane < CI; lane++) {
        UNROLL for (int c = 0; c < C; c++) products[lane][c] += here[lane] * v[c];
      }
    }
  }
  UNROLL for (int lane = 0; lane < CI; lane++) {
    UNROLL for (int c = 0; c < C; c++) reinterpret_cast<V*>(sums + lane * sums_stride)[c] += products[lane][c];
  }
}

inline int64_t filter_stride(const FilterGradient& job) { return job.step * (job.d_width - 1) + job.kernel_width; }

inline int64_t filter_rows(const FilterGradient& job) {
  // As many as keep both planes in a core's cache.
  const int64_t row = job.step * filter_stride(job) + static_cast<int64_t>(job.d_chunks.size()) * job.d_width;
  return std::max<int64_t>(1, std::min(job.d_height, 32768 / 4 * 16 / LANES / row));
}

inline int64_t filter_planes(const FilterGradient& job) {
  const int64_t rows = filter_rows(job);
  return (job.step * (rows - 1) + job.kernel_height) * filter_stride(job) +
         static_cast<int64_t>(job.d_chunks.size()) * rows * job.d_width;
}

template <int C, int STEP>
TARGET void filter_block(const FilterGradient& job, const V* x, const float* d, int64_t rows, int64_t d_plane,
                         int lanes, float* sums) {
  constexpr int CI = SUMS / C < LANES ? SUMS / C : LANES;
  const int64_t stride = filter_stride(job), channels = static_cast<int64_t>(job.d_chunks.size()) * LANES;
  // What these rows hold stays in the first cache while all taps see it.
  const int64_t together = std::max<int64_t>(1, 128 / job.d_width);
  for (int64_t first = 0; first < rows; first += together) {
    const int64_t some = std::min(together, rows - first);
    for (int64_t tap = 0; tap < job.kernel_height * job.kernel_width; tap++) {
      const int64_t row = STEP * first + tap / job.kernel_width;
      const float* here = reinterpret_cast<const float*>(x + row * stride + tap % job.kernel_width);
      for (size_t g = 0; g < job.d_chunks.size() / C; g++) {
        for (int lane = 0; lane < lanes; lane += CI) {
          outer_products<C, CI, STEP>(here + lane, stride, d + (g * C * d_plane + first * job.d_width) * LANES,
                                      job.d_width, d_plane, some, job.d_width,
                                      sums + (tap * LANES + lane) * channels + g * C * LANES, channels);
        }
      }
    }
  }
}

TARGET void filter_images(const FilterGradient& job, int chunk, int64_t first, int64_t last, float* space, float* sums) {
  V* x = reinterpret_cast<V*>(space);
  const int64_t stride = filter_stride(job), block = filter_rows(job);
  V* copy = x + (job.step * (block - 1) + job.kernel_height) * stride;
  const Chunk& in = job.in_chunks[chunk];
  const bool pairs = job.d_chunks.size() % 2 == 0;
  // A single whole chunk is read in place, since it lies in memory as it would in a plane.
  const bool in_place = job.d.channels == LANES && !job.d.images.narrow;
  for (int64_t image = first; image < last; image++) {
    for (int64_t i = 0; i < job.d_height; i += block) {
      const int64_t rows = std::min(block, job.d_height - i), d_plane = rows * job.d_width;
      fill_rows(job.in[in.operand], in, image, job.height, job.width, job.step * i - job.top,
                job.step * (rows - 1) + job.kernel_height, job.left, stride, x);
      const float* d = reinterpret_cast<const float*>(copy);
      if (in_place) {
        d = reinterpret_cast<const float*>(job.d.images.data) + (image * job.d_height + i) * job.d_width * LANES;
      } else {
        for (size_t k = 0; k < job.d_chunks.size(); k++) {
          fill_rows(job.d, job.d_chunks[k], image, job.d_height, job.d_width, i, rows, 0, job.d_width, copy + k * d_plane);
        }
      }
      if (job.step == 1) {
        pairs ? filter_block<2, 1>(job, x, d, rows, d_plane, in.count, sums)
              : filter_block<1, 1>(job, x, d, rows, d_plane, in.count, sums);
      } else {
        pairs ? filter_block<2, 2>(job, x, d, rows, d_plane, in.count, sums)
              : filter_block<1, 2>(job, x, d, rows, d_plane, in.count, sums);
      }
    }
  }
}
