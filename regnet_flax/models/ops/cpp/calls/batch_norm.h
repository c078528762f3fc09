// Batch normalisation as custom calls. Vectors of n numbers have the leading dimensions that the images have.

#pragma once

#include "call.h"

namespace {

// What batch normalisation multiplies x − mean by.
float factor_of(float variance, float scale, double epsilon) {
  return static_cast<float>(scale / std::sqrt(variance + epsilon));
}

// Mean and biased variance of n channels, from the moments (parts, 2, n) of parts with these counts, by Chan's formula.
void combine(const double* moments, const std::vector<int64_t>& counts, int64_t n, float* means, float* variances) {
  for (int64_t c = 0; c < n; c++) {
    double before = 0, mean = 0, squares = 0;
    for (size_t part = 0; part < counts.size(); part++) {
      const double* of = moments + part * 2 * n;
      const double here = counts[part], all = before + here;
      if (!here) continue;
      const double difference = of[c] - mean;
      mean += difference * (here / all);
      squares += of[n + c] + difference * difference * (before * here / all);
      before = all;
    }
    means[c] = static_cast<float>(before ? mean : NAN);
    variances[c] = static_cast<float>(squares / before);
  }
}

// Of each seed (5, n), for the gradient of an input: mean, factor, bias, and what is subtracted for each pixel and for each
// difference from the mean. `of` has (seeds, n) of mean, variance, scale and bias, and of the gradients of bias and scale.
std::vector<float> gradient_norms(const float* const (&of)[6], int64_t seeds, int64_t pixels, int64_t n, double epsilon) {
  std::vector<float> norms(seeds * 5 * n);
  for (int64_t index = 0; index < seeds * n; index++) {
    float* to = norms.data() + index / n * 5 * n + index % n;
    const float factor = factor_of(of[1][index], of[2][index], epsilon);
    const double shared = static_cast<double>(factor) / pixels;
    to[0] = of[0][index], to[n] = factor, to[2 * n] = of[3][index];
    to[3 * n] = static_cast<float>(of[4][index] * shared);
    to[4 * n] = static_cast<float>(of[5][index] * shared / std::sqrt(of[1][index] + epsilon));
  }
  return norms;
}

// Pixels whose channels stay in the first cache, and parts that depend on the shape alone.
struct Pixels {
  int64_t seeds, count, n;  // `count` of each seed
  bool narrow;

  int64_t block() const { return std::max<int64_t>(16, 4096 / std::max<int64_t>(1, n)); }
  int64_t parts() const { return n ? std::min<int64_t>(64, (count + block() - 1) / block()) : 0; }
  int64_t first(int64_t part) const { return part * count / std::max<int64_t>(1, parts()); }
};

// Takes apart what the arrays of a call are: `images` of them, then vectors, in arguments and results.
class Normalization {
 public:
  Normalization(ffi::RemainingArgs& arguments, ffi::RemainingRets& results) {
    for (size_t k = 0; k < arguments.size(); k++) in.push_back(arguments.get<ffi::AnyBuffer>(k).value());
    for (size_t k = 0; k < results.size(); k++) out.push_back(*results.get<ffi::AnyBuffer>(k).value());
  }

  // Whether there are so many arrays, and they fit. `vector` is one of those of n numbers.
  bool fits(size_t images_in, size_t vectors_in, size_t images_out, size_t vectors_out) {
    if (in.size() != images_in + vectors_in || out.size() != images_out + vectors_out) return false;
    const ffi::AnyBuffer& x = in[0];
    const ffi::AnyBuffer& vector = vectors_in ? in.back() : out.back();
    if (x.dimensions().size() < 1 || vector.dimensions().size() < 1) return false;
    pixels.n = x.dimensions().back();
    pixels.seeds = 1;
    for (size_t k = 0; k + 1 < vector.dimensions().size(); k++) pixels.seeds *= vector.dimensions()[k];
    const int64_t elements = static_cast<int64_t>(x.element_count()), numbers = pixels.seeds * pixels.n;
    pixels.count = numbers ? elements / numbers : 0;
    pixels.narrow = x.element_type() == ffi::DataType::BF16;
    if (!pixels.narrow && x.element_type() != ffi::DataType::F32) return false;
    const auto good = [&](const ffi::AnyBuffer& a, bool image) {
      return static_cast<int64_t>(a.element_count()) == (image ? elements : numbers) &&
             a.element_type() == (image ? x.element_type() : ffi::DataType::F32);
    };
    for (size_t k = 0; k < in.size(); k++) if (!good(in[k], k < images_in)) return false;
    for (size_t k = 0; k < out.size(); k++) if (!good(out[k], k < images_out)) return false;
    return true;
  }

  Images images(const ffi::AnyBuffer& a) const { return {static_cast<char*>(a.untyped_data()), pixels.narrow}; }
  float* floats(const ffi::AnyBuffer& a) const { return static_cast<float*>(a.untyped_data()); }

  // Value c of a vector, the argument at `place`.
  float at(size_t place, int64_t seed, int64_t c) const { return floats(in[place])[seed * pixels.n + c]; }

  // Of arguments (d, x, mean, variance, scale, bias, …): mean, factor and bias, of one seed after another.
  std::vector<float> norms(double epsilon) const {
    const int64_t n = pixels.n;
    std::vector<float> all(pixels.seeds * 3 * n);
    for (int64_t index = 0; index < pixels.seeds * n; index++) {
      const int64_t seed = index / n, c = index % n;
      float* to = all.data() + seed * 3 * n + c;
      to[0] = at(2, seed, c), to[n] = factor_of(at(3, seed, c), at(4, seed, c), epsilon), to[2 * n] = at(5, seed, c);
    }
    return all;
  }

  std::vector<ffi::AnyBuffer> in, out;
  Pixels pixels;
};

// The argument is x, the results are mean and biased variance.
ffi::Error batch_moments(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  const Library& library = library_of(lanes());
  Normalization call(arguments, results);
  if (!call.fits(1, 0, 0, 2)) return invalid("arrays do not fit each other");
  const Pixels& pixels = call.pixels;
  const int64_t parts = pixels.parts(), n = pixels.n;
  std::vector<double> partial(std::max<int64_t>(1, pixels.seeds * parts * 2 * n));
  const Images x = call.images(call.in[0]);
  parallel(pool, pixels.seeds * parts, [&](int64_t item) {
    const int64_t part = item % parts, start = item / parts * pixels.count;
    library.moments(x, n, start + pixels.first(part), start + pixels.first(part + 1), pixels.block(),
                    partial.data() + item * 2 * n);
  });
  std::vector<int64_t> counts;
  for (int64_t part = 0; part < parts; part++) counts.push_back(pixels.first(part + 1) - pixels.first(part));
  for (int64_t seed = 0; seed < pixels.seeds; seed++) {
    combine(partial.data() + seed * parts * 2 * n, counts, n, call.floats(call.out[0]) + seed * n,
            call.floats(call.out[1]) + seed * n);
  }
  return ffi::Error::Success();
}

// Arguments are (d, x, mean, variance, scale, bias), the results the gradients of bias and scale.
ffi::Error batch_gradient_sums(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                               bool relu, double epsilon) {
  const Library& library = library_of(lanes());
  Normalization call(arguments, results);
  if (!call.fits(2, 4, 0, 2)) return invalid("arrays do not fit each other");
  const Pixels& pixels = call.pixels;
  const int64_t parts = pixels.parts(), n = pixels.n;
  std::vector<double> partial(std::max<int64_t>(1, pixels.seeds * parts * 2 * n));
  const std::vector<float> norms = call.norms(epsilon);
  const Images d = call.images(call.in[0]), x = call.images(call.in[1]);
  parallel(pool, pixels.seeds * parts, [&](int64_t item) {
    const int64_t part = item % parts, seed = item / parts, start = seed * pixels.count;
    library.gradient_sums(d, x, n, norms.data() + seed * 3 * n, relu, start + pixels.first(part),
                          start + pixels.first(part + 1), pixels.block(), partial.data() + item * 2 * n);
  });
  for (int64_t seed = 0; seed < pixels.seeds; seed++) {
    for (int64_t k = 0; k < 2 * n; k++) {
      double sum = 0;
      for (int64_t part = 0; part < parts; part++) sum += partial[(seed * parts + part) * 2 * n + k];
      if (k >= n) sum /= std::sqrt(call.at(3, seed, k - n) + epsilon);
      call.floats(call.out[k / n])[seed * n + k % n] = static_cast<float>(sum);
    }
  }
  return ffi::Error::Success();
}

// Arguments are (d, x, mean, variance, scale, bias, and the gradients of bias and scale), the result the gradient of x.
ffi::Error batch_input_gradient(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                                bool relu, double epsilon) {
  const Library& library = library_of(lanes());
  Normalization call(arguments, results);
  if (!call.fits(2, 6, 1, 0)) return invalid("arrays do not fit each other");
  const Pixels& pixels = call.pixels;
  const int64_t parts = pixels.parts(), n = pixels.n;
  const float* vectors[6];
  for (int k = 0; k < 6; k++) vectors[k] = call.floats(call.in[2 + k]);
  const std::vector<float> norms = gradient_norms(vectors, pixels.seeds, pixels.count, n, epsilon);
  const Images d = call.images(call.in[0]), x = call.images(call.in[1]), to = call.images(call.out[0]);
  parallel(pool, pixels.seeds * parts, [&](int64_t item) {
    const int64_t part = item % parts, seed = item / parts, start = seed * pixels.count;
    library.norm_gradient(d, x, n, norms.data() + seed * 5 * n, relu, start + pixels.first(part),
                          start + pixels.first(part + 1), pixels.block(), to);
  });
  return ffi::Error::Success();
}

}  // namespace
