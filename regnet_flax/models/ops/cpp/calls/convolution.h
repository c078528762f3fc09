// Convolutions as custom calls: their arrays, weights in the order of the tiles, and which thread computes what.

#pragma once

#include "batch_norm.h"
#include "call.h"

namespace {

using Numbers = ffi::Span<const int64_t>;
using Reals = ffi::Span<const double>;

std::vector<Chunk> chunks_of(const std::vector<Operand>& operands, int lanes) {
  std::vector<Chunk> chunks;
  for (size_t k = 0; k < operands.size(); k++) {
    for (int64_t channel = 0; channel < operands[k].channels; channel += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(lanes, operands[k].channels - channel));
      const float* norms = operands[k].norms ? operands[k].norms + channel * 3 : nullptr;
      chunks.push_back({static_cast<int>(k), channel, count, norms});
    }
  }
  return chunks;
}

// The channel of a chunk's first lane along all operands.
int64_t offset_of(const std::vector<Operand>& operands, const Chunk& chunk) {
  int64_t channel = chunk.channel;
  for (int k = 0; k < chunk.operand; k++) channel += operands[k].channels;
  return channel;
}

// Of all seeds: mean, factor and bias of an operand that is normalised, from its mean, variance, scale and bias.
std::vector<float> norms_of(Arrays& arrays, int64_t channels, double epsilon, int lanes) {
  const int64_t chunks = (channels + lanes - 1) / lanes, all = arrays.seeds * channels;
  const float *mean = arrays.floats(false, all), *variance = arrays.floats(false, all);
  const float *scale = arrays.floats(false, all), *bias = arrays.floats(false, all);
  if (!mean || !variance || !scale || !bias) return {};
  std::vector<float> norms(arrays.seeds * chunks * 3 * lanes, 0.0f);
  for (int64_t index = 0; index < all; index++) {
    const int64_t seed = index / channels, c = index % channels;
    float* to = norms.data() + (seed * chunks + c / lanes) * 3 * lanes + c % lanes;
    to[0] = mean[index], to[lanes] = factor_of(variance[index], scale[index], epsilon), to[2 * lanes] = bias[index];
  }
  return norms;
}

// Inputs by the codes of `kinds`: 0 an array; 1 an array and its mean, variance, scale and bias; 2 the same, and a ReLU.
std::vector<Operand> inputs_of(Arrays& arrays, Numbers kinds, Reals epsilons, int lanes, int64_t& height,
                               int64_t& width, std::vector<std::vector<float>>& norms) {
  std::vector<Operand> operands;
  for (size_t k = 0; k < kinds.size(); k++) {
    operands.push_back(arrays.operand(false, height, width));
    Operand& operand = operands.back();
    norms.push_back(kinds[k] ? norms_of(arrays, operand.channels, epsilons[k], lanes) : std::vector<float>());
    operand.relu = kinds[k] == 2;
  }
  return operands;
}

// Of one seed.
void set_norms(std::vector<Operand>& operands, const std::vector<std::vector<float>>& norms, int64_t seed, int lanes) {
  for (size_t k = 0; k < norms.size(); k++) {
    const int64_t chunks = (operands[k].channels + lanes - 1) / lanes;
    operands[k].norms = norms[k].empty() ? nullptr : norms[k].data() + seed * chunks * 3 * lanes;
  }
}

int64_t channels_of(const std::vector<Operand>& operands) {
  int64_t channels = 0;
  for (const Operand& operand : operands) channels += operand.channels;
  return channels;
}

// A convolution of all images: a job for each seed, with its weights in the order of the tiles.
struct Prepared {
  std::vector<Convolution> jobs;
  Space weights;
  int64_t images, rows, block, blocks;  // rows of an image, and the blocks of rows that are computed by themselves
};

// Prepares `job` for each seed, where kernel (seeds, taps, inputs, outputs) has the convolution's own inputs and outputs,
// or their places exchanged. The jobs point into `norms` and `out_norms`. Returns whether there was the memory.
bool prepare(ffi::ThreadPool& pool, const Library& library, Convolution job, int64_t seeds, int64_t images,
             const float* kernel, bool exchanged, const std::vector<std::vector<float>>& norms,
             const std::vector<std::vector<float>>& out_norms, Prepared& to) {
  const int lanes = library.lanes;
  const int64_t inputs = channels_of(job.in), outputs = channels_of(job.out);
  job.out_chunks = chunks_of(job.out, lanes);
  const int64_t out_chunks = job.out_chunks.size();
  // Many outputs of few pixels, or few of many, as the image and the registers allow.
  job.group = out_chunks % 2 ? 1 : 2;
  if (out_chunks % 4 == 0 && job.columns() <= (lanes == 8 ? 2 : 4)) job.group = 4;
  job.low_row = job.low_column = INT32_MAX, job.high_row = job.high_column = INT32_MIN;
  for (const Phase& phase : job.phases) {
    for (const Tap& tap : phase.taps) {
      job.low_row = std::min(job.low_row, tap.row), job.high_row = std::max(job.high_row, tap.row);
      job.low_column = std::min(job.low_column, tap.column), job.high_column = std::max(job.high_column, tap.column);
    }
  }
  job.in_chunks = chunks_of(job.in, lanes);
  const int64_t rows = job.rows();
  int64_t block = std::max<int64_t>(1, rows);
  while (block > 1 && library.planes(job, block) * lanes * 4 > 512 * 1024) block = (block + 1) / 2;
  const int64_t threads = pool.num_threads();
  while (block > 4 && seeds * images * ((rows + block - 1) / block) < 2 * threads) block = (block + 1) / 2;
  to.images = images, to.rows = rows, to.block = block, to.blocks = (rows + block - 1) / block;

  const int64_t in_chunks = job.in_chunks.size();
  const int64_t size = out_chunks * in_chunks * job.taps * lanes * lanes;
  float* weights = to.weights.get(std::max<int64_t>(1, seeds * size));
  if (!weights) return false;
  for (int64_t seed = 0; seed < seeds; seed++) {
    set_norms(job.in, norms, seed, lanes);
    job.in_chunks = chunks_of(job.in, lanes);
    set_norms(job.out, out_norms, seed, lanes);
    job.out_chunks = chunks_of(job.out, lanes);
    job.weights = weights + seed * size;
    to.jobs.push_back(job);
  }
  parallel(pool, seeds * in_chunks * (out_chunks / job.group), [&](int64_t item) {
    const int64_t k = item % in_chunks, g = item / in_chunks % (out_chunks / job.group);
    const int64_t seed = item / in_chunks / (out_chunks / job.group);
    const Chunk& in = job.in_chunks[k];
    const int64_t from = offset_of(job.in, in);
    float* here = weights + seed * size + (g * in_chunks + k) * job.taps * lanes * job.group * lanes;
    const float* values = kernel + seed * job.taps * inputs * outputs;
    for (int64_t tap = 0; tap < job.taps; tap++) {
      for (int lane = 0; lane < lanes; lane++) {
        for (int c = 0; c < job.group; c++, here += lanes) {
          const Chunk& out = job.out_chunks[g * job.group + c];
          const int64_t first = offset_of(job.out, out), input = from + lane;
          for (int other = 0; other < lanes; other++) {
            const bool there = lane < in.count && other < out.count;
            const int64_t output = first + other;
            here[other] = !there ? 0.0f
                          : exchanged ? values[(tap * outputs + output) * inputs + input]
                                      : values[(tap * inputs + input) * outputs + output];
          }
        }
      }
    }
  });
  return true;
}

// Computes all images; calls then(image), if there is such a function, when an image is complete.
ffi::Error run(ffi::ThreadPool& pool, const Library& library, const Prepared& all,
               const std::function<void(int64_t)>& then = nullptr) {
  if (all.jobs.empty()) return ffi::Error::Success();
  const Convolution& any = all.jobs.front();
  const bool nothing = !channels_of(any.out) || !any.out_width;
  const int64_t images = static_cast<int64_t>(all.jobs.size()) * all.images;
  std::atomic<bool> exhausted{false};
  parallel(pool, nothing ? 0 : images * all.blocks, [&](int64_t item) {
    const int64_t image = item / all.blocks, first = item % all.blocks * all.block;
    float* planes = own_planes(library.planes(any, all.block) * library.lanes);
    if (!planes) {
      exhausted = true;
      return;
    }
    library.convolve(all.jobs[image / all.images], image, first, std::min(all.rows, first + all.block), planes);
    if (then && all.blocks == 1) then(image);
  });
  if (then && all.blocks > 1) parallel(pool, nothing ? 0 : images, then);
  return exhausted ? out_of_memory() : ffi::Error::Success();
}

// Arguments are (inputs…, kernel), then what `after` asks for; the result is the outputs. `geometry` is the kernel's
// height and width, the stride, and the rows and columns of zeros above and left of the image. `after` is what happens
// before the outputs are written: whether they are normalised, with mean, variance, scale and bias; whether an array is
// added; whether a ReLU follows. If there are three results, the others are the outputs' means and biased variances.
ffi::Error convolution(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results, Numbers geometry,
                       Numbers kinds, Reals epsilons, Numbers after, double epsilon) {
  const Library& library = library_of(lanes());
  Arrays arrays(arguments, results);
  Convolution job{};
  std::vector<std::vector<float>> norms;
  job.in = inputs_of(arrays, kinds, epsilons, library.lanes, job.height, job.width, norms);
  job.out.push_back(arrays.operand(true, job.out_height, job.out_width));
  const int64_t height = geometry[0], width = geometry[1];
  job.taps = static_cast<int>(height * width);
  Operand& out = job.out[0];
  const float* kernel = arrays.floats(false, arrays.seeds * job.taps * channels_of(job.in) * out.channels);
  std::vector<std::vector<float>> out_norms(1);
  if (after[0]) out_norms[0] = norms_of(arrays, out.channels, epsilon, library.lanes);
  if (after[1]) job.added = arrays.operand(false, job.out_height, job.out_width);
  out.relu = after[2];
  if (after[1] && job.added.channels != out.channels) return invalid("arrays do not fit each other");
  const int64_t seeds = arrays.seeds, images = arrays.images, n = out.channels;
  const bool measured = results.size() > 1;
  float* means = measured ? arrays.floats(true, seeds * n) : nullptr;
  float* variances = measured ? arrays.floats(true, seeds * n) : nullptr;
  if (!arrays.done()) return invalid("arrays do not fit each other");
  job.step = static_cast<int>(geometry[2]), job.spread = 1;
  Phase phase{0, 0, {}};
  for (int tap = 0; tap < job.taps; tap++) {
    phase.taps.push_back({static_cast<int>(tap / width - geometry[3]), static_cast<int>(tap % width - geometry[4]), tap});
  }
  job.phases.push_back(phase);
  Prepared all;
  if (!prepare(pool, library, job, seeds, images, kernel, false, norms, out_norms, all)) return out_of_memory();
  if (!measured) return run(pool, library, all);
  const Pixels pixels{1, job.out_height * job.out_width, n, out.images.narrow};  // of an image
  std::vector<double> partial(std::max<int64_t>(1, seeds * images * 2 * n));
  const ffi::Error error = run(pool, library, all, [&](int64_t image) {
    library.moments(out.images, n, image * pixels.count, (image + 1) * pixels.count, pixels.block(),
                    partial.data() + image * 2 * n);
  });
  const std::vector<int64_t> counts(images, pixels.count);
  for (int64_t seed = 0; seed < seeds; seed++) {
    combine(partial.data() + seed * images * 2 * n, counts, n, means + seed * n, variances + seed * n);
  }
  return error;
}

}  // namespace
