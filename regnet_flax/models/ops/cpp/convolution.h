// Convolutions of images, and the gradients of their kernels, for a vector's channels at a time.
//
// Chunks of an image's channels are copied into planes, a vector per pixel with zeros around: so neighbours are at
// constant distances, whatever the number of channels, and normalising while copying costs nothing.

INLINE void read(const Chunk& chunk, Norm& norm) {
  if (chunk.norms) memcpy(&norm, chunk.norms, sizeof norm);
}

template <bool WHOLE>
TARGET void fill_rows_of(const Operand& from, const Chunk& chunk, int64_t image, int64_t height, int64_t width,
                         int64_t first, int64_t rows, int64_t left, int64_t stride, V* to) {
  Norm norm;
  read(chunk, norm);
  // Where no column lies left of the image, its first are not read.
  const int64_t skipped = left < 0 ? -left : 0, end = std::min(width, stride - left);
  for (int64_t i = first; i < first + rows; i++, to += stride) {
    if (i < 0 || i >= height) {
      clear(to, to + stride);
      continue;
    }
    clear(to, to + std::min(left, stride));
    V* here = to + left;
    const int64_t index = ((image * height + i) * width + skipped) * from.channels + chunk.channel;
    V *start = here + skipped, *stop = here + end;
    if (!chunk.norms) {
      read_row<WHOLE, false, false>(from.images, index, from.channels, chunk.count, norm, start, stop);
    } else if (from.relu) {
      read_row<WHOLE, true, true>(from.images, index, from.channels, chunk.count, norm, start, stop);
    } else {
      read_row<WHOLE, true, false>(from.images, index, from.channels, chunk.count, norm, start, stop);
    }
    if (end < stride - left) clear(stop, to + stride);
  }
}

INLINE void fill_rows(const Operand& from, const Chunk& chunk, int64_t image, int64_t height, int64_t width,
                      int64_t first, int64_t rows, int64_t left, int64_t stride, V* to) {
  const bool whole = chunk.count == LANES && !from.images.narrow;
  (whole ? fill_rows_of<true> : fill_rows_of<false>)(from, chunk, image, height, width, first, rows, left, stride, to);
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
  write_row(to.images, first, apart, chunk.count, sums, end, step);
}

// How many pixels in a row are computed together, of `left`: fewer where fewer would be computed in vain. Two chunks have
// room for 12 sums with AVX2, besides two weights and an input in 16 registers.
template <int C>
INLINE constexpr int64_t tile_length(int64_t left) {
  constexpr int most = LANES == 8 && C == 2 ? 6 : SUMS / C, fewer = most == 6 ? 4 : (most + 1) / 2;
  return left <= fewer || (left > most && left <= 2 * fewer) ? fewer : most;
}

template <int C, int P, int STEP>
INLINE void tile_of_row(const Convolution& job, const Phase& phase, const V* here, int64_t stride, int64_t plane,
                        const V* weights, size_t first_chunk, int64_t pixel, int64_t pixels) {
  V sums[P * C];
  tile<C, P, STEP>(job, phase, here, stride, plane, weights, sums);
  ROLLED for (int c = 0; c < C; c++) finish(job, job.out_chunks[first_chunk + c], pixel, pixels, sums + c, C);
}

template <int C, int STEP>
TARGET void convolve_tiles(const Convolution& job, int64_t image, int64_t first, int64_t last, const V* planes,
                           int64_t stride, int64_t plane) {
  const int64_t group = C * job.in_chunks.size() * job.taps * LANES;
  constexpr int most = tile_length<C>(1000), fewer = tile_length<C>(1);
  for (size_t g = 0; g < job.out_chunks.size() / C; g++) {
    const V* weights = reinterpret_cast<const V*>(job.weights) + g * group;
    for (const Phase& phase : job.phases) {
      const int64_t columns = (job.out_width - phase.column + job.spread - 1) / job.spread;
      for (int64_t i = first; i < last; i++) {
        const int64_t row = job.spread * i + phase.row;
        if (row >= job.out_height) break;
        const int64_t start = (image * job.out_height + row) * job.out_width + phase.column;
        int64_t p;
        for (int64_t j = 0; j < columns; j += p) {
          p = tile_length<C>(columns - j);
          const V* here = planes + job.step * ((i - first) * stride + j);
          const int64_t pixel = start + job.spread * j, there = std::min(p, columns - j);
          if (p == most) {
            tile_of_row<C, most, STEP>(job, phase, here, stride, plane, weights, g * C, pixel, there);
          } else {
            tile_of_row<C, fewer, STEP>(job, phase, here, stride, plane, weights, g * C, pixel, there);
          }
        }
      }
    }
  }
}

inline int64_t computed_columns(const Convolution& job) {
  const int64_t columns = job.columns();
  int64_t j = 0;
  while (j < columns) {
    j += job.group == 4 ? tile_length<4>(columns - j) : job.group == 2 ? tile_length<2>(columns - j) : tile_length<1>(columns - j);
  }
  return j;
}

inline int64_t plane_stride(const Convolution& job) {
  return job.step * (computed_columns(job) - 1) + job.high_column - job.low_column + 1;
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
  if (job.group == 4) return convolve_tiles<4, STEP>(job, image, first, last, planes, stride, plane);
  if (job.group == 2) return convolve_tiles<2, STEP>(job, image, first, last, planes, stride, plane);
  convolve_tiles<1, STEP>(job, image, first, last, planes, stride, plane);
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

// From a pixel of the outputs' gradient to the next, to the next row and to the next chunk, in floats.
struct Strides {
  int64_t pixel, row, chunk;
};

// Adds what `rows` rows give for a tap, CI channels of X and C chunks of the outputs.
template <int C, int CI, int STEP>
INLINE void outer_products(const float* x, int64_t x_stride, const float* d, const Strides& by, int64_t rows,
                           int64_t columns, float* sums, int64_t sums_stride) {
  V products[CI][C] = {};
  for (int64_t i = 0; i < rows; i++) {
    const float* here = x + i * STEP * x_stride * LANES;
    const float* there = d + i * by.row;
    ROLLED for (int64_t j = 0; j < columns; j++, here += STEP * LANES, there += by.pixel) {
      V v[C];
      UNROLL for (int c = 0; c < C; c++) load(there + c * by.chunk, v[c]);
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
TARGET void filter_block(const FilterGradient& job, const V* x, const float* d, const Strides& by, int64_t rows,
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
          outer_products<C, CI, STEP>(here + lane, stride, d + g * C * by.chunk + first * by.row, by, some, job.d_width,
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
  // A single chunk lies in memory as in a plane. Pairs are read in place with AVX2; with AVX-512 they are faster in planes.
  const bool whole = job.d.channels % LANES == 0 && !job.d.images.narrow;
  const bool in_place = whole && (job.d_chunks.size() == 1 || (LANES == 8 && pairs));
  for (int64_t image = first; image < last; image++) {
    for (int64_t i = 0; i < job.d_height; i += block) {
      const int64_t rows = std::min(block, job.d_height - i), d_plane = rows * job.d_width;
      fill_rows(job.in[in.operand], in, image, job.height, job.width, job.step * i - job.top,
                job.step * (rows - 1) + job.kernel_height, job.left, stride, x);
      const float* d = reinterpret_cast<const float*>(copy);
      Strides by{LANES, job.d_width * LANES, d_plane * LANES};
      if (in_place) {
        by = {job.d.channels, job.d_width * job.d.channels, LANES};
        d = reinterpret_cast<const float*>(job.d.images.data) + (image * job.d_height + i) * by.row;
      } else {
        for (size_t k = 0; k < job.d_chunks.size(); k++) {
          fill_rows(job.d, job.d_chunks[k], image, job.d_height, job.d_width, i, rows, 0, job.d_width, copy + k * d_plane);
        }
      }
      if (job.step == 1) {
        pairs ? filter_block<2, 1>(job, x, d, by, rows, in.count, sums)
              : filter_block<1, 1>(job, x, d, by, rows, in.count, sums);
      } else {
        pairs ? filter_block<2, 2>(job, x, d, by, rows, in.count, sums)
              : filter_block<1, 2>(job, x, d, by, rows, in.count, sums);
      }
    }
  }
}
