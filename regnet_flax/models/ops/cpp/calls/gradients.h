// The gradients of convolutions' inputs and kernels as custom calls.

#include "batch_norm.h"
#include "call.h"
#include "convolution.h"

namespace {

// The job that computes the gradients of inputs, `out`, from those of outputs, `in`, of a convolution with this geometry.
Convolution backward_of(std::vector<Operand> in, std::vector<Operand> out, Numbers geometry) {
  Convolution job{};
  job.in = in, job.out = out;
  const int64_t width = geometry[1];
  job.taps = static_cast<int>(geometry[0] * width);
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
  return job;
}

// Arguments are (gradient of the outputs, kernel), the results are those of the inputs.
ffi::Error input_gradient(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                          Numbers geometry) {
  const Library& library = library_of(lanes());
  Arrays arrays(arguments, results);
  int64_t height = 0, width = 0, out_height = 0, out_width = 0;
  const Operand d = arrays.operand(false, height, width);
  std::vector<Operand> out;
  for (size_t k = 0; k < results.size(); k++) out.push_back(arrays.operand(true, out_height, out_width));
  const float* kernel = arrays.floats(false, arrays.seeds * geometry[0] * geometry[1] * channels_of(out) * d.channels);
  if (!arrays.done()) return invalid("arrays do not fit each other");
  Convolution job = backward_of({d}, out, geometry);
  job.height = height, job.width = width, job.out_height = out_height, job.out_width = out_width;
  Prepared all;
  if (!prepare(pool, library, job, arrays.seeds, arrays.images, kernel, true, {{}}, {}, all)) return out_of_memory();
  return run(pool, library, all);
}

// The gradient of a kernel: a job for each seed, and partial sums [seed][chunk of inputs][part].
struct KernelGradient {
  std::vector<FilterGradient> jobs;
  Space partial;
  int64_t images, parts, taps, inputs, outputs, in_chunks, channels, size;  // `size` numbers of a partial sum

  int64_t first(int64_t part) const { return part * images / parts; }
  float* sums(int64_t seed, int64_t chunk, int64_t part) {
    return partial.get(0) + ((seed * in_chunks + chunk) * parts + part) * size;
  }
};

FilterGradient filter_of(std::vector<Operand> in, Operand d, Numbers geometry) {
  FilterGradient job{};
  job.in = in, job.d = d;
  job.kernel_height = geometry[0], job.kernel_width = geometry[1], job.step = static_cast<int>(geometry[2]);
  job.top = geometry[3], job.left = geometry[4];
  return job;
}

// Returns whether there was the memory.
bool prepare(const Library& library, FilterGradient job, int64_t seeds, int64_t images,
             const std::vector<std::vector<float>>& norms, KernelGradient& to) {
  const int lanes = library.lanes;
  job.d_chunks = chunks_of({job.d}, lanes);
  for (int64_t seed = 0; seed < seeds; seed++) {
    set_norms(job.in, norms, seed, lanes);
    job.in_chunks = chunks_of(job.in, lanes);
    to.jobs.push_back(job);
  }
  to.images = images, to.taps = job.kernel_height * job.kernel_width;
  to.inputs = channels_of(job.in), to.outputs = job.d.channels;
  to.in_chunks = job.in_chunks.size(), to.channels = static_cast<int64_t>(job.d_chunks.size()) * lanes;
  to.size = to.taps * lanes * to.channels;
  // Partial sums by the shapes alone: enough to occupy many threads, few enough to add quickly.
  const int64_t all = images * job.height * job.width * to.inputs, weights = to.taps * to.inputs * to.outputs;
  const bool empty = !to.outputs || !job.d_height || !job.d_width || !images;
  const int64_t most = std::max<int64_t>(8, std::min<int64_t>(64, all / std::max<int64_t>(1, 4 * weights)));
  to.parts = empty ? 0 : std::min(images, most);
  const int64_t count = std::max<int64_t>(1, seeds * to.in_chunks * to.parts * to.size);
  float* sums = to.partial.get(count);
  if (sums) std::fill(sums, sums + count, 0.0f);
  return sums;
}

// Computes the partial sums.
ffi::Error run(ffi::ThreadPool& pool, const Library& library, KernelGradient& all) {
  const int64_t seeds = all.jobs.size();
  std::atomic<bool> exhausted{false};
  parallel(pool, seeds * all.in_chunks * all.parts, [&](int64_t item) {
    const int64_t part = item % all.parts, chunk = item / all.parts % all.in_chunks;
    const int64_t seed = item / all.parts / all.in_chunks, start = seed * all.images;
    const FilterGradient& job = all.jobs[seed];
    float* planes = own_planes(library.filter_planes(job) * library.lanes);
    if (!planes) {
      exhausted = true;
      return;
    }
    library.filter(job, static_cast<int>(chunk), start + all.first(part), start + all.first(part + 1), planes,
                   all.sums(seed, chunk, part));
  });
  return exhausted ? out_of_memory() : ffi::Error::Success();
}

// Adds the partial sums, into (seeds, taps, inputs, outputs).
void add_up(ffi::ThreadPool& pool, int lanes, KernelGradient& all, float* to) {
  const int64_t seeds = all.jobs.size();
  parallel(pool, seeds * all.in_chunks * all.taps, [&](int64_t item) {
    const int64_t tap = item % all.taps, chunk = item / all.taps % all.in_chunks;
    const int64_t seed = item / all.taps / all.in_chunks;
    const FilterGradient& job = all.jobs[seed];
    const Chunk& in = job.in_chunks[chunk];
    const int64_t first = offset_of(job.in, in);
    std::vector<double> sums(all.outputs);
    for (int lane = 0; lane < in.count; lane++) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t part = 0; part < all.parts; part++) {
        const float* from = all.sums(seed, chunk, part) + (tap * lanes + lane) * all.channels;
        for (int64_t c = 0; c < all.outputs; c++) sums[c] += from[c];
      }
      float* row = to + ((seed * all.taps + tap) * all.inputs + first + lane) * all.outputs;
      for (int64_t c = 0; c < all.outputs; c++) row[c] = static_cast<float>(sums[c]);
    }
  });
}

// Arguments are (inputs…, gradient of the outputs), the result is that of the kernel.
ffi::Error filter_gradient(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                           Numbers geometry, Numbers kinds, Reals epsilons) {
  const Library& library = library_of(lanes());
  Arrays arrays(arguments, results);
  std::vector<std::vector<float>> norms;
  int64_t height = 0, width = 0, d_height = 0, d_width = 0;
  const std::vector<Operand> in = inputs_of(arrays, kinds, epsilons, library.lanes, height, width, norms);
  const Operand d = arrays.operand(false, d_height, d_width);
  float* to = arrays.floats(true, arrays.seeds * geometry[0] * geometry[1] * channels_of(in) * d.channels);
  if (!arrays.done()) return invalid("arrays do not fit each other");
  FilterGradient job = filter_of(in, d, geometry);
  job.height = height, job.width = width, job.d_height = d_height, job.d_width = d_width;
  KernelGradient all;
  if (!prepare(library, job, arrays.seeds, arrays.images, norms, all)) return out_of_memory();
  const ffi::Error error = run(pool, library, all);
  if (error.success()) add_up(pool, library.lanes, all, to);
  return error;
}

Images at(const Images& images, int64_t element) {
  return {images.data + element * (images.narrow ? 2 : 4), images.narrow};
}

// All gradients of a convolution whose outputs are normalised by their own statistics: those of its inputs and of its
// kernel, from that of what is normalised. An image at a time, so that the gradient of its outputs stays in the cache.
// Arguments are (inputs…, gradient of the normalised outputs, outputs, kernel, the outputs' mean, variance, scale and bias,
// and the gradients of bias and scale), the results are the gradients of the inputs and of the kernel.
ffi::Error convolution_gradients(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results,
                                 Numbers geometry, Numbers kinds, Reals epsilons, bool relu, double epsilon) {
  const Library& library = library_of(lanes());
  Arrays arrays(arguments, results);
  std::vector<std::vector<float>> norms;
  int64_t height = 0, width = 0, d_height = 0, d_width = 0;
  const std::vector<Operand> in = inputs_of(arrays, kinds, epsilons, library.lanes, height, width, norms);
  const Operand d = arrays.operand(false, d_height, d_width), x = arrays.operand(false, d_height, d_width);
  const int64_t seeds = arrays.seeds, images = arrays.images, n = d.channels, inputs = channels_of(in);
  const int64_t weights = seeds * geometry[0] * geometry[1] * inputs * n;
  const float* kernel = arrays.floats(false, weights);
  const float* vectors[6];
  for (const float*& vector : vectors) vector = arrays.floats(false, seeds * n);
  std::vector<Operand> out;
  for (size_t k = 0; k < in.size(); k++) out.push_back(arrays.operand(true, height, width));
  float* by_kernel = arrays.floats(true, weights);
  if (!arrays.done() || x.channels != n || channels_of(out) != inputs) return invalid("arrays do not fit each other");

  const int64_t pixels = d_height * d_width, size = pixels * n;
  const std::vector<float> of = gradient_norms(vectors, seeds, images * pixels, n, epsilon);
  const int64_t block = Pixels{1, pixels, n, d.images.narrow}.block();
  Convolution backward = backward_of({d}, out, geometry);
  backward.height = d_height, backward.width = d_width, backward.out_height = height, backward.out_width = width;
  FilterGradient job = filter_of(in, d, geometry);
  job.height = height, job.width = width, job.d_height = d_height, job.d_width = d_width;
  KernelGradient all;
  Prepared inward;
  if (!prepare(library, job, seeds, images, norms, all) ||
      !prepare(pool, library, backward, seeds, images, kernel, true, {{}}, {}, inward)) {
    return out_of_memory();
  }
  ffi::Error error = ffi::Error::Success();
  // A part is a thread's; if they do not occupy the threads, each of the three steps shares its images among all.
  const int64_t parts = seeds * all.parts, threads = pool.num_threads(), rounds = (parts + threads - 1) / threads;
  if (parts > 0 && 4 * parts >= 3 * rounds * threads) {
    std::atomic<bool> exhausted{false};
    parallel(pool, parts, [&](int64_t item) {
      thread_local Space gradient;
      const int64_t part = item % all.parts, seed = item / all.parts;
      Convolution to_inputs = inward.jobs[seed];
      FilterGradient to_kernel = all.jobs[seed];
      const int64_t room = std::max(library.planes(to_inputs, inward.block), library.filter_planes(to_kernel));
      float* planes = own_planes(room * library.lanes);
      const Images here{reinterpret_cast<char*>(gradient.get(size)), d.images.narrow};
      if (!planes || !here.data) {
        exhausted = true;
        return;
      }
      to_inputs.in[0].images = to_kernel.d.images = here;
      for (int64_t image = seed * images + all.first(part); image < seed * images + all.first(part + 1); image++) {
        library.norm_gradient(at(d.images, image * size), at(x.images, image * size), n, of.data() + seed * 5 * n, relu, 0,
                              pixels, block, here);
        for (size_t k = 0; k < in.size(); k++) {
          const int64_t start = image * height * width * in[k].channels;
          to_inputs.out[k].images = at(out[k].images, start), to_kernel.in[k].images = at(in[k].images, start);
        }
        for (int64_t row = 0; row < inward.rows; row += inward.block) {
          library.convolve(to_inputs, 0, row, std::min(inward.rows, row + inward.block), planes);
        }
        for (int64_t chunk = 0; chunk < all.in_chunks; chunk++) {
          library.filter(to_kernel, static_cast<int>(chunk), 0, 1, planes, all.sums(seed, chunk, part));
        }
      }
    });
    if (exhausted) error = out_of_memory();
  } else {
    Space space;
    const Images whole{reinterpret_cast<char*>(space.get(std::max<int64_t>(1, seeds * images * size))), d.images.narrow};
    if (!whole.data) return out_of_memory();
    parallel(pool, seeds * images, [&](int64_t image) {
      library.norm_gradient(d.images, x.images, n, of.data() + image / images * 5 * n, relu, image * pixels,
                            (image + 1) * pixels, block, whole);
    });
    for (Convolution& each : inward.jobs) each.in[0].images = whole;
    for (FilterGradient& each : all.jobs) each.d.images = whole;
    error = run(pool, library, inward);
    if (error.success()) error = run(pool, library, all);
  }
  if (error.success()) add_up(pool, library.lanes, all, by_kernel);
  return error;
}

}  // namespace
