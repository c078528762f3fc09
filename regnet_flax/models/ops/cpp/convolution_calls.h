// Convolutions as custom calls: their arrays, weights in the order of the tiles, and which thread computes what.

#include "job.h"
#include "threads.h"

namespace {

using Numbers = ffi::Span<const int64_t>;
using Reals = ffi::Span<const double>;

// What batch normalisation multiplies x − mean by.
float factor_of(float variance, float scale, double epsilon) {
  return static_cast<float>(scale / std::sqrt(variance + epsilon));
}

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

// The arrays of a call, checked while they are taken in order.
class Arrays {
 public:
  Arrays(ffi::RemainingArgs& arguments, ffi::RemainingRets& results) {
    for (size_t k = 0; k < arguments.size(); k++) in_.push_back(arguments.get<ffi::AnyBuffer>(k).value());
    for (size_t k = 0; k < results.size(); k++) out_.push_back(*results.get<ffi::AnyBuffer>(k).value());
  }

  bool good = true;  // whether all arrays were there, of these types and shapes
  int64_t seeds = 0, images = 0;

  const ffi::AnyBuffer* next(bool result) {
    std::vector<ffi::AnyBuffer>& arrays = result ? out_ : in_;
    size_t& place = result ? placed_out_ : placed_in_;
    if (place < arrays.size()) return &arrays[place++];
    good = false;
    return nullptr;
  }

  bool done() const { return good && placed_in_ == in_.size() && placed_out_ == out_.size(); }

  // Images of any or of given height and width (0: any).
  Operand operand(bool result, int64_t& height, int64_t& width) {
    const ffi::AnyBuffer* a = next(result);
    if (!a || a->dimensions().size() < 4) return good = false, Operand{};
    const bool narrow = a->element_type() == ffi::DataType::BF16;
    const auto shape = a->dimensions();
    const int64_t* last = shape.end() - 4;
    int64_t seeds_here = 1;
    for (size_t k = 0; k + 4 < shape.size(); k++) seeds_here *= shape[k];
    if (seeds == 0) seeds = seeds_here, images = last[0];
    if (height == 0 && width == 0) height = last[1], width = last[2];
    good = good && (narrow || a->element_type() == ffi::DataType::F32) && seeds_here == seeds && last[0] == images &&
           last[1] == height && last[2] == width;
    return {Images{static_cast<char*>(a->untyped_data()), narrow}, last[3], nullptr, false};
  }

  float* floats(bool result, int64_t elements) {
    const ffi::AnyBuffer* a = next(result);
    if (!a || a->element_type() != ffi::DataType::F32 || static_cast<int64_t>(a->element_count()) != elements) {
      return good = false, nullptr;
    }
    return static_cast<float*>(a->untyped_data());
  }

 private:
  std::vector<ffi::AnyBuffer> in_, out_;
  size_t placed_in_ = 0, placed_out_ = 0;
};

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

// Runs `job` for each seed, where kernel (seeds, taps, inputs, outputs) has the convolution's own inputs and outputs, or
// their places exchanged.
ffi::Error convolve(ffi::ThreadPool& pool, const Library& library, Convolution job, int64_t seeds, int64_t images,
                    const float* kernel, bool exchanged, const std::vector<std::vector<float>>& norms,
                    const std::vector<std::vector<float>>& out_norms) {
  const int lanes = library.lanes;
  const int64_t inputs = channels_of(job.in), outputs = channels_of(job.out);
  job.out_chunks = chunks_of(job.out, lanes);
  const int64_t out_chunks = job.out_chunks.size();
  // Many outputs of few pixels, or few of many, as the image allows.
  job.group = out_chunks % 2 ? 1 : 2;
  if (out_chunks % 4 == 0 && job.columns() <= library.pixels(4, job.columns())) job.group = 4;
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
  const int64_t blocks = (rows + block - 1) / block;

  std::vector<Convolution> jobs;
  Space space;
  const int64_t in_chunks = job.in_chunks.size();
  const int64_t size = out_chunks * in_chunks * job.taps * lanes * lanes;
  float* weights = space.get(std::max<int64_t>(1, seeds * size));
  if (!weights) return out_of_memory();
  for (int64_t seed = 0; seed < seeds; seed++) {
    set_norms(job.in, norms, seed, lanes);
    job.in_chunks = chunks_of(job.in, lanes);
    set_norms(job.out, out_norms, seed, lanes);
    job.out_chunks = chunks_of(job.out, lanes);
    job.weights = weights + seed * size;
    jobs.push_back(job);
  }
  parallel(pool, seeds * in_chunks * (out_chunks / job.group), [&](int64_t item) {
    const int64_t k = item % in_chunks, g = item / in_chunks % (out_chunks / job.group);
    const int64_t seed = item / in_chunks / (out_chunks / job.group);
    const Chunk& in = job.in_chunks[k];
    const int64_t from = offset_of(job.in, in);
    float* to = weights + seed * size + (g * in_chunks + k) * job.taps * lanes * job.group * lanes;
    const float* values = kernel + seed * job.taps * inputs * outputs;
    for (int64_t tap = 0; tap < job.taps; tap++) {
      for (int lane = 0; lane < lanes; lane++) {
        for (int c = 0; c < job.group; c++, to += lanes) {
          const Chunk& out = job.out_chunks[g * job.group + c];
          const int64_t first = offset_of(job.out, out), input = from + lane;
          for (int other = 0; other < lanes; other++) {
            const bool there = lane < in.count && other < out.count;
            const int64_t output = first + other;
            to[other] = !there ? 0.0f
                        : exchanged ? values[(tap * outputs + output) * inputs + input]
                                    : values[(tap * inputs + input) * outputs + output];
          }
        }
      }
    }
  });
  std::atomic<bool> exhausted{false};
  parallel(pool, outputs && job.out_width ? seeds * images * blocks : 0, [&](int64_t item) {
    thread_local Space own;
    const int64_t image = item / blocks, first = item % blocks * block, last = std::min(rows, first + block);
    float* planes = own.get(library.planes(job, block) * lanes);
    if (!planes) {
      exhausted = true;
      return;
    }
    library.convolve(jobs[image / images], image, first, last, planes);
  });
  return exhausted ? out_of_memory() : ffi::Error::Success();
}

// Arguments are (inputs…, kernel), then what `after` asks for; the result is the outputs. `geometry` is the kernel's
// height and width, the stride, and the rows and columns of zeros above and left of the image. `after` is what happens
// before the outputs are written: whether they are normalised, with mean, variance, scale and bias; whether an array is
// added; whether a ReLU follows.
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
  std::vector<float> out_norms;
  if (after[0]) out_norms = norms_of(arrays, out.channels, epsilon, library.lanes);
  if (after[1]) job.added = arrays.operand(false, job.out_height, job.out_width);
  out.relu = after[2];
  if (after[1] && job.added.channels != out.channels) return invalid("arrays do not fit each other");
  if (!arrays.done()) return invalid("arrays do not fit each other");
  job.step = static_cast<int>(geometry[2]), job.spread = 1;
  Phase phase{0, 0, {}};
  for (int tap = 0; tap < job.taps; tap++) {
    phase.taps.push_back({static_cast<int>(tap / width - geometry[3]), static_cast<int>(tap % width - geometry[4]), tap});
  }
  job.phases.push_back(phase);
  return convolve(pool, library, job, arrays.seeds, arrays.images, kernel, false, norms, {out_norms});
}

// Arguments are (gradient of the outputs, kernel), the results are those of the inputs.
ffi::Error input_gradient(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                          Numbers geometry) {
  const Library& library = library_of(lanes());
  Arrays arrays(arguments, results);
  Convolution job{};
  job.in.push_back(arrays.operand(false, job.height, job.width));
  for (size_t k = 0; k < results.size(); k++) job.out.push_back(arrays.operand(true, job.out_height, job.out_width));
  const int64_t height = geometry[0], width = geometry[1];
  job.taps = static_cast<int>(height * width);
  const float* kernel = arrays.floats(false, arrays.seeds * job.taps * channels_of(job.out) * job.in[0].channels);
  if (!arrays.done()) return invalid("arrays do not fit each other");
  const int stride = static_cast<int>(geometry[2]);
  job.step = 1, job.spread = stride;
  for (int row = 0; row < stride; row++) {
    for (int column = 0; column < stride; column++) {
      Phase phase{row, column, {}};
      for (int tap = 0; tap < job.taps; tap++) {
        const int down = static_cast<int>(row + geometry[3] - tap / width);
        const int right = static_cast<int>(column + geometry[4] - tap % width);
        if (down % stride == 0 && right % stride == 0) phase.taps.push_back({down / stride, right / stride, tap});
      }
      job.phases.push_back(phase);
    }
  }
  return convolve(pool, library, job, arrays.seeds, arrays.images, kernel, true, {{}}, {});
}

// Arguments are (inputs…, gradient of the outputs), the result is that of the kernel.
ffi::Error filter_gradient(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                           Numbers geometry, Numbers kinds, Reals epsilons) {
  const Library& library = library_of(lanes());
  const int lanes = library.lanes;
  Arrays arrays(arguments, results);
  FilterGradient job{};
  std::vector<std::vector<float>> norms;
  job.in = inputs_of(arrays, kinds, epsilons, lanes, job.height, job.width, norms);
  job.d = arrays.operand(false, job.d_height, job.d_width);
  job.kernel_height = geometry[0], job.kernel_width = geometry[1], job.step = static_cast<int>(geometry[2]);
  job.top = geometry[3], job.left = geometry[4];
  const int64_t taps = job.kernel_height * job.kernel_width, inputs = channels_of(job.in), outputs = job.d.channels;
  const int64_t seeds = arrays.seeds, images = arrays.images;
  float* to = arrays.floats(true, seeds * taps * inputs * outputs);
  if (!arrays.done()) return invalid("arrays do not fit each other");
  job.d_chunks = chunks_of({job.d}, lanes);
  std::vector<FilterGradient> jobs;
  for (int64_t seed = 0; seed < seeds; seed++) {
    set_norms(job.in, norms, seed, lanes);
    job.in_chunks = chunks_of(job.in, lanes);
    jobs.push_back(job);
  }

  // Partial sums by the shapes alone: enough to occupy many threads, few enough to add quickly.
  const int64_t in_chunks = job.in_chunks.size(), channels = static_cast<int64_t>(job.d_chunks.size()) * lanes;
  const int64_t size = taps * lanes * channels, all = images * job.height * job.width * inputs;
  const bool empty = !outputs || !job.d_height || !job.d_width || !images;
  const int64_t most = std::max<int64_t>(8, std::min<int64_t>(64, all / std::max<int64_t>(1, 4 * taps * inputs * outputs)));
  const int64_t parts = empty ? 0 : std::min(images, most);
  Space space;
  float* partial = space.get(std::max<int64_t>(1, seeds * in_chunks * parts * size));
  if (!partial) return out_of_memory();
  std::atomic<bool> exhausted{false};
  parallel(pool, seeds * in_chunks * parts, [&](int64_t item) {
    thread_local Space own;
    float* planes = own.get(library.filter_planes(job) * lanes);
    if (!planes) {
      exhausted = true;
      return;
    }
    const int64_t part = item % parts, chunk = item / parts % in_chunks, seed = item / parts / in_chunks;
    float* sums = partial + item * size;
    std::fill(sums, sums + size, 0.0f);
    library.filter(jobs[seed], static_cast<int>(chunk), seed * images + part * images / parts,
                   seed * images + (part + 1) * images / parts, planes, sums);
  });
  if (exhausted) return out_of_memory();
  parallel(pool, seeds * in_chunks * taps, [&](int64_t item) {
    const int64_t tap = item % taps, chunk = item / taps % in_chunks, seed = item / taps / in_chunks;
    const Chunk& in = job.in_chunks[chunk];
    const int64_t first = offset_of(job.in, in);
    for (int lane = 0; lane < in.count; lane++) {
      float* row = to + ((seed * taps + tap) * inputs + first + lane) * outputs;
      for (int64_t c = 0; c < outputs; c++) {
        double sum = 0;
        for (int64_t part = 0; part < parts; part++) {
          sum += partial[((seed * in_chunks + chunk) * parts + part) * size + (tap * lanes + lane) * channels + c];
        }
        row[c] = static_cast<float>(sum);
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace
