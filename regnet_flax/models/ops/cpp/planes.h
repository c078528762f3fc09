// Vectors of channels: sigmoid and tanh, reading and writing images, 3×3 depthwise convolutions of planes.
//
// Helpers are inlined into a function of an instruction set. They take vectors by reference and return none, since the
// calling convention of vectors depends on the instruction set, which Clang takes for an error even where it inlines.

typedef float V __attribute__((vector_size(4 * LANES), may_alias));
typedef float Anywhere __attribute__((vector_size(4 * LANES), may_alias, aligned(4)));  // a vector in an array of floats
typedef int32_t I __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t U __attribute__((vector_size(4 * LANES), may_alias));
typedef uint16_t Half __attribute__((vector_size(2 * LANES), may_alias));

constexpr int SUMS = LANES == 8 ? 8 : 16;  // that are usually held in registers at once, of 16 or 32

// ---------------------------------------------------------------------------------------------------------------------
// Sigmoid and tanh, within 2.5 units in the last place; neither overflows, NaN stays NaN.

// For x ≤ 0: e^x = scale · (1 + q), q exact to its last bits near 0 too. Where e^x is no normal number, scale is 0.
INLINE void exponential(const V& x, V& q, V& scale) {
  const V bounded = x < -88.0f ? V{} - 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 · 2^23: adding it rounds to a whole number, in the lowest bits
  const V rounded = bounded * 1.44269504088896341f + magic;
  const V n = rounded - magic;
  const V r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts, the first of few bits
  // The polynomial of Cephes' expf.
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  q = p * (r * r) + r;
  const I exponent = (I)rounded - 0x4b400000 + 127;  // less the bits of `magic`
  scale = (V)((U)exponent << 23);
}

INLINE void sigmoid(V& x) {
  V q, scale;
  exponential((V)((U)x | 0x80000000u), q, scale);  // of −|x|
  const V e = scale * q + scale;
  x = (x >= 0.0f ? V{} + 1.0f : e) / (e + 1.0f);
}

INLINE void tanh(V& x) {
  V q, scale;
  const U sign = (U)x & 0x80000000u;
  exponential((V)((U)x | 0x80000000u) * 2.0f, q, scale);
  const V e = scale * q + (scale - 1.0f);  // e^(−2|x|) − 1, without loss near 0
  const V t = e / (e + 2.0f);
  x = (V)(((U)t & 0x7fffffffu) | sign);
}

// From the gradient of t = tanh(x) to that of x, of infinite gradients what JAX makes of them.
INLINE void through_tanh(V& d, const V& t) { d = (d + d * t) * (1.0f - t); }

// ---------------------------------------------------------------------------------------------------------------------
// Memory

// Whole vectors, each an instruction; memcpy would be two with AVX2.
INLINE void load(const float* from, V& v) { v = *reinterpret_cast<const Anywhere*>(from); }

INLINE void store(const V& v, float* to) { *reinterpret_cast<Anywhere*>(to) = v; }

// `count` channels, the rest 0.
INLINE void read(const Images& from, int64_t index, int count, V& v) {
  if (!from.narrow) {
    const float* p = reinterpret_cast<const float*>(from.data) + index;
    if (count == LANES) {
      load(p, v);
    } else {
      v = V{};
      memcpy(&v, p, 4 * count);
    }
  } else {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(from.data) + index;
    Half half{};
    if (count == LANES) {
      memcpy(&half, p, sizeof half);
    } else {
      memcpy(&half, p, 2 * count);
    }
    v = (V)(__builtin_convertvector(half, U) << 16);
  }
}

INLINE void write(const Images& to, int64_t index, int count, const V& v) {
  if (!to.narrow) {
    float* p = reinterpret_cast<float*>(to.data) + index;
    if (count == LANES) {
      store(v, p);
    } else {
      memcpy(p, &v, 4 * count);
    }
  } else {
    const U bits = (U)v;
    const U even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U rounded = v == v ? even : (bits >> 16) | 0x40u;
    const Half half = __builtin_convertvector(rounded, Half);
    uint16_t* p = reinterpret_cast<uint16_t*>(to.data) + index;
    if (count == LANES) {
      memcpy(p, &half, sizeof half);
    } else {
      memcpy(p, &half, 2 * count);
    }
  }
}

// How a chunk of channels is normalised.
struct Norm {
  V mean{}, factor{}, bias{};
};

INLINE void relu(V& v) { v = v < 0.0f ? V{} : v; }  // NaN stays

// Pixels `channels` apart, normalised if asked for. WHOLE: float32, and as many channels as a vector holds, so that there
// is no condition in the loop.
template <bool WHOLE, bool NORM, bool RELU>
INLINE void read_row(const Images& from, int64_t index, int64_t channels, int count, const Norm& norm, V* to, V* end) {
  const float* here = reinterpret_cast<const float*>(from.data) + index;
  ROLLED for (; to < end; to++, here += channels, index += channels) {
    V v;
    if (WHOLE) {
      load(here, v);
    } else {
      read(from, index, count, v);
    }
    if (NORM) v = (v - norm.mean) * norm.factor + norm.bias;
    if (RELU) relu(v);
    *to = v;
  }
}

// Writes every `step`-th vector, to pixels `channels` apart.
INLINE void write_row(const Images& to, int64_t index, int64_t channels, int count, const V* from, const V* end, int step) {
  if (count == LANES && !to.narrow) {  // without conditions in the loop
    float* at = reinterpret_cast<float*>(to.data) + index;
    ROLLED for (; from < end; from += step, at += channels) store(*from, at);
  } else {
    ROLLED for (; from < end; from += step, index += channels) write(to, index, count, *from);
  }
}

INLINE void clear(V* first, V* last) {
  for (; first < last; first++) *first = V{};
}

// Sets to 0 what is around the image.
INLINE void clear_borders(V* planes, int count, const Size& size) {
  const int64_t stride = size.stride(), right = stride - 1 - size.width;
  for (V* plane = planes; plane < planes + count * size.plane(); plane += size.plane()) {
    V* end = plane + size.plane();
    clear(plane, plane + size.start());
    for (V* row = plane + stride + 1; row < end - stride; row += stride) {
      clear(row + size.width, row + size.width + right + 1);
    }
    clear(end - stride, end);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Convolutions. Weights of G gates are [tap][X or H][gate], V each; `stride` is a plane's.

// The sums of G gates at P pixels next to each other, from planes at the first pixel.
template <int G, int P>
INLINE void convolve(const V* x, const V* h, int64_t stride, const V* weights, const V* bias, V* out) {
  V sums[P][G];
  UNROLL for (int p = 0; p < P; p++) UNROLL for (int g = 0; g < G; g++) sums[p][g] = bias[g];
  for (int row = -1; row <= 1; row++) {
    for (int column = -1; column <= 1; column++, weights += 2 * G) {
      const V* here[2] = {x + row * stride + column, h + row * stride + column};
      UNROLL for (int input = 0; input < 2; input++) {
        UNROLL for (int p = 0; p < P; p++) {
          UNROLL for (int g = 0; g < G; g++) sums[p][g] += here[input][p] * weights[input * G + g];
        }
      }
    }
  }
  UNROLL for (int p = 0; p < P; p++) UNROLL for (int g = 0; g < G; g++) out[p * G + g] = sums[p][g];
}

// The transposed convolution, added to `out` [input][pixel], of INPUTS inputs at P pixels, from the planes of G gates.
template <int G, int INPUTS, int P>
INLINE void spread(const V* gates, int64_t plane, int64_t stride, const V* weights, V* out) {
  V sums[INPUTS][P];
  UNROLL for (int i = 0; i < INPUTS; i++) UNROLL for (int p = 0; p < P; p++) sums[i][p] = out[i * P + p];
  for (int row = 1; row >= -1; row--) {
    for (int column = 1; column >= -1; column--, weights += 2 * G) {
      const V* here = gates + row * stride + column;
      for (int g = 0; g < G; g++, here += plane) {  // unrolled, it would need more registers than there are
        UNROLL for (int p = 0; p < P; p++) {
          UNROLL for (int i = 0; i < INPUTS; i++) sums[i][p] += here[p] * weights[i * G + g];
        }
      }
    }
  }
  UNROLL for (int i = 0; i < INPUTS; i++) UNROLL for (int p = 0; p < P; p++) out[i * P + p] = sums[i][p];
}

// Adds the gradients of weights. Some pixels at a time, whose gradients stay in the cache; their sums keep the digits of
// float32.
template <int G>
INLINE void correlate(const V* x, const V* h, const V* gates, const Size& size, V* weights) {
  const int64_t stride = size.stride(), plane = size.plane(), rows = std::max<int64_t>(1, 64 / size.width);
  for (int64_t first = 0; first < size.height; first += rows) {
    V* to = weights;
    for (int row = -1; row <= 1; row++, to += 3 * 2 * G) {
      ROLLED for (int input = 0; input < 2; input++) {
        V sums[3][G] = {};
        for (int64_t i = first; i < std::min(first + rows, size.height); i++) {
          const V* here = (input ? h : x) + (i + row) * stride;
          const V* d = gates + i * stride;
          for (int64_t j = 0; j < size.width; j++) {
            const V left = here[j - 1], middle = here[j], right = here[j + 1];
            UNROLL for (int g = 0; g < G; g++) {
              const V v = d[g * plane + j];
              sums[0][g] += left * v;
              sums[1][g] += middle * v;
              sums[2][g] += right * v;
            }
          }
        }
        UNROLL for (int column = 0; column < 3; column++) {
          UNROLL for (int g = 0; g < G; g++) to[(column * 2 + input) * G + g] += sums[column][g];
        }
      }
    }
  }
}
