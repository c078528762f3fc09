// The cells' steps as custom calls.

#include "call.h"

namespace {

// The places of weights as the cells take them, and in (2, 9, gates, n) and (gates, n) from channel `channel` on.
template <Cell CELL, typename Copy>
void each_weight(const Size& size, int64_t channel, const Copy& copy) {
  constexpr int G = GATES[CELL];
  int64_t to = 0;
  const auto group = [&](int first, int last) {
    for (int tap = 0; tap < 9; tap++) {
      for (int input = 0; input < 2; input++) {
        for (int g = first; g < last; g++) copy(to++, ((input * 9 + tap) * G + g) * size.n + channel, false);
      }
    }
  };
  group(0, CELL == GRU ? 2 : G);
  if (CELL == GRU) group(2, 3);
  for (int g = 0; g < G; g++) copy(to++, g * size.n + channel, true);
}

// Arguments are (x, h[, c], taps, bias[, d_new_h[, d_new_c]]); results are the new state, or the gradients of all but the
// last one or two, in their order.
template <Cell CELL, bool BACKWARD>
ffi::Error call(ffi::ThreadPool pool, ffi::RemainingArgs arguments, ffi::RemainingRets results) {
  constexpr int G = GATES[CELL], STATES = CELL == LSTM ? 2 : 1, WEIGHTS = 9 * 2 * G + G;
  constexpr size_t inputs = 1 + STATES + 2;
  if (arguments.size() != inputs + (BACKWARD ? STATES : 0) || results.size() != (BACKWARD ? inputs : STATES)) {
    return invalid("wrong number of arrays");
  }
  std::vector<ffi::AnyBuffer> in, out;
  for (size_t k = 0; k < arguments.size(); k++) in.push_back(arguments.get<ffi::AnyBuffer>(k).value());
  for (size_t k = 0; k < results.size(); k++) out.push_back(*results.get<ffi::AnyBuffer>(k).value());

  const ffi::AnyBuffer &x = in[0], &taps = in[inputs - 2], &bias = in[inputs - 1];
  const auto shape = x.dimensions();
  const bool narrow = x.element_type() == ffi::DataType::BF16;
  if (shape.size() < 4 || (!narrow && x.element_type() != ffi::DataType::F32)) return invalid("X must be images");
  Size size{1, 0, 0, 0, 0};
  for (size_t k = 0; k + 4 < shape.size(); k++) size.seeds *= shape[k];
  const int64_t* last = shape.end() - 4;
  size.images = last[0], size.height = last[1], size.width = last[2], size.n = last[3];
  const auto check = [&](const ffi::AnyBuffer& a, bool weight, int64_t elements) {
    return a.element_type() == (weight ? ffi::DataType::F32 : x.element_type()) &&
           static_cast<int64_t>(a.element_count()) == elements;
  };
  const int64_t elements = size.seeds * size.images * size.height * size.width * size.n;
  for (size_t k = 0; k < in.size() + out.size(); k++) {
    const ffi::AnyBuffer& a = k < in.size() ? in[k] : out[k - in.size()];
    const size_t place = k < in.size() ? k : k - in.size();
    const bool of_weights = place < inputs && place >= inputs - 2 && (k < in.size() || BACKWARD);
    const int64_t wanted = place == inputs - 2 ? size.seeds * 18 * G * size.n : size.seeds * G * size.n;
    if (!check(a, of_weights, of_weights ? wanted : elements)) return invalid("arrays do not fit each other");
  }

  const int LANES = lanes();
  const int64_t blocks = (size.n + LANES - 1) / LANES;
  // Enough parts of a batch to occupy many threads, few enough to add quickly; by the batch alone.
  const int64_t parts = elements ? std::min<int64_t>(size.images, BACKWARD ? 64 : 1024) : 0;
  const auto images = [&](const ffi::AnyBuffer& a) { return Images{static_cast<char*>(a.untyped_data()), narrow}; };
  Job common{};
  common.size = size;
  common.backward = BACKWARD;
  common.x = images(x);
  common.h = images(in[1]);
  if (CELL == LSTM) common.c = images(in[2]);
  if (BACKWARD) {
    common.d_new_h = images(in[inputs]);
    common.d_x = images(out[0]);
    common.d_h = images(out[1]);
    if (CELL == LSTM) common.d_new_c = images(in[inputs + 1]), common.d_c = images(out[2]);
  } else {
    common.new_h = images(out[0]);
    if (CELL == LSTM) common.new_c = images(out[1]);
  }

  Space weights_space, d_weights_space;
  const int64_t stride = WEIGHTS * LANES;
  float* const weights = weights_space.get(std::max<int64_t>(1, size.seeds * blocks * stride));
  const int64_t partial = BACKWARD ? size.seeds * blocks * parts : 0;
  float* const d_weights = d_weights_space.get(std::max<int64_t>(1, partial * stride));
  if (!weights || !d_weights) return out_of_memory();
  std::fill(weights, weights + size.seeds * blocks * stride, 0.0f);
  for (int64_t block = 0; block < size.seeds * blocks; block++) {  // of all seeds, here and below
    const int64_t seed = block / blocks, channel = block % blocks * LANES;
    const float* from_taps = reinterpret_cast<const float*>(taps.untyped_data()) + seed * 18 * G * size.n;
    const float* from_bias = reinterpret_cast<const float*>(bias.untyped_data()) + seed * G * size.n;
    each_weight<CELL>(size, channel, [&](int64_t k, int64_t from, bool is_bias) {
      const int64_t count = std::min<int64_t>(LANES, size.n - channel);
      memcpy(weights + block * stride + k * LANES, (is_bias ? from_bias : from_taps) + from, 4 * count);
    });
  }

  const Run run = run_of<CELL>(LANES);
  std::atomic<bool> exhausted{false};
  // Blocks of an image share its cache lines, of 16 floats: a thread computes them together if others have work too.
  const int64_t together = size.seeds * parts < pool.num_threads() ? 1 : 16 / LANES;
  const int64_t groups = (blocks + together - 1) / together;
  parallel(pool, size.seeds * groups * parts, [&](int64_t item) {
    float* planes = own_planes(planes_of(CELL, BACKWARD) * size.plane() * LANES);
    if (!planes) {
      exhausted = true;
      return;
    }
    const int64_t part = item % parts, group = item / parts % groups, seed = item / parts / groups;
    const int64_t first = seed * blocks + group * together, last = std::min(first + together, (seed + 1) * blocks);
    if (BACKWARD) {
      for (int64_t block = first; block < last; block++) {
        float* sums = d_weights + (block * parts + part) * stride;
        std::fill(sums, sums + stride, 0.0f);
      }
    }
    Job job = common;
    job.image = seed * size.images + part * size.images / parts;
    for (const int64_t end = seed * size.images + (part + 1) * size.images / parts; job.image < end; job.image++) {
      for (int64_t block = first; block < last; block++) {
        job.weights = weights + block * stride;
        if (BACKWARD) job.d_weights = d_weights + (block * parts + part) * stride;
        job.channel = block % blocks * LANES;
        job.count = static_cast<int>(std::min<int64_t>(LANES, size.n - job.channel));
        run(job, planes);
      }
    }
  });
  if (exhausted) return out_of_memory();

  if (BACKWARD) {
    float* taps_out = reinterpret_cast<float*>(out[inputs - 2].untyped_data());
    float* bias_out = reinterpret_cast<float*>(out[inputs - 1].untyped_data());
    parallel(pool, size.seeds * blocks, [&](int64_t block) {
      const int64_t seed = block / blocks, channel = block % blocks * LANES;
      each_weight<CELL>(size, channel, [&](int64_t k, int64_t to, bool is_bias) {
        double sums[MAX_LANES] = {};
        for (int64_t part = 0; part < parts; part++) {
          const float* from = d_weights + (block * parts + part) * stride + k * LANES;
          for (int lane = 0; lane < LANES; lane++) sums[lane] += from[lane];
        }
        float* at = (is_bias ? bias_out + seed * G * size.n : taps_out + seed * 18 * G * size.n) + to;
        for (int64_t lane = 0; lane < std::min<int64_t>(LANES, size.n - channel); lane++) {
          at[lane] = static_cast<float>(sums[lane]);
        }
      });
    });
  }
  return ffi::Error::Success();
}

}  // namespace
