// The cells' steps as XLA's custom calls: instruction sets, threads, and the arrays of a call.
//
// Arrays may have leading dimensions, the same for images and weights (several seeds under vmap). Images are float32 or
// bfloat16, weights float32. Which images make a partial sum of a weight's gradient depends on the batch alone, and
// partial sums are added in order: a result depends neither on the number of threads nor on their timing.

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cells.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// ---------------------------------------------------------------------------------------------------------------------
// The processor's best instructions, found when the program runs: a library built on one machine serves another.

typedef void (*Run)(const Job&, V*);

template <Cell CELL, bool BACKWARD>
void run_anywhere(const Job& job, V* space) {
  run<CELL, BACKWARD>(job, space);
}

#if defined(__x86_64__) && !defined(ONE_INSTRUCTION_SET)
template <Cell CELL, bool BACKWARD>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(const Job& job, V* space) {
  run<CELL, BACKWARD>(job, space);
}

template <Cell CELL, bool BACKWARD>
__attribute__((target("avx2,fma"))) void run_avx2(const Job& job, V* space) {
  run<CELL, BACKWARD>(job, space);
}

template <Cell CELL, bool BACKWARD>
Run best() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return run_avx512<CELL, BACKWARD>;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return run_avx2<CELL, BACKWARD>;
  return run_anywhere<CELL, BACKWARD>;
}
#else
template <Cell CELL, bool BACKWARD>
Run best() {
  return run_anywhere<CELL, BACKWARD>;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Threads

// Calls body(0) … body(count − 1) on XLA's threads and this one. It waits for bodies that have begun, never for a thread
// to become free, so that calls which occupy all threads cannot wait for each other.
template <typename Body>
void parallel(ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable finished;
  };
  const auto state = std::make_shared<State>();
  const auto work = [state, count, &body] {
    int64_t own = 0;
    for (int64_t item; (item = state->next.fetch_add(1)) < count; own++) body(item);
    if (own && state->done.fetch_add(own) + own == count) {
      const std::lock_guard<std::mutex> lock(state->mutex);
      state->finished.notify_all();
    }
  };
  const int64_t threads = count > 1 ? std::min(count, pool.num_threads()) : 1;
  for (int64_t thread = 1; thread < threads; thread++) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done.load() == count; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Custom calls

// Weights of one seed and 16 channels as the cells take them, from (2, 9, gates, n) and (gates, n), or back.
template <Cell CELL, typename Copy>
void each_weight(const Size& size, int64_t block, const Copy& copy) {
  constexpr int G = GATES[CELL];
  int64_t to = 0;
  const auto group = [&](int first, int last) {
    for (int tap = 0; tap < 9; tap++) {
      for (int input = 0; input < 2; input++) {
        for (int g = first; g < last; g++) copy(to++, ((input * 9 + tap) * G + g) * size.n + block * LANES, false);
      }
    }
  };
  group(0, CELL == GRU ? 2 : G);
  if (CELL == GRU) group(2, 3);
  for (int g = 0; g < G; g++) copy(to++, g * size.n + block * LANES, true);
}

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("regnet_flax: " + what); }

ffi::Error out_of_memory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "regnet_flax: out of memory"); }

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

  const int64_t blocks = size.blocks();
  // Enough parts of a batch to occupy many threads, few enough to add quickly; by the batch alone.
  const int64_t parts = elements ? std::min<int64_t>(size.images, BACKWARD ? 64 : 1024) : 0;
  const auto images = [&](const ffi::AnyBuffer& a) { return Images{static_cast<char*>(a.untyped_data()), narrow}; };
  Job common{};
  common.size = size;
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
  V* const weights = weights_space.get(std::max<int64_t>(1, size.seeds * blocks * WEIGHTS));
  V* const d_weights = d_weights_space.get(std::max<int64_t>(1, BACKWARD ? size.seeds * blocks * parts * WEIGHTS : 0));
  if (!weights || !d_weights) return out_of_memory();
  for (int64_t seed = 0; seed < size.seeds; seed++) {
    const float* from_taps = reinterpret_cast<const float*>(taps.untyped_data()) + seed * 18 * G * size.n;
    const float* from_bias = reinterpret_cast<const float*>(bias.untyped_data()) + seed * G * size.n;
    for (int64_t block = 0; block < blocks; block++) {
      V* to = weights + (seed * blocks + block) * WEIGHTS;
      const int64_t count = std::min<int64_t>(LANES, size.n - block * LANES);
      each_weight<CELL>(size, block, [&](int64_t k, int64_t from, bool is_bias) {
        to[k] = V{};
        memcpy(to + k, (is_bias ? from_bias : from_taps) + from, 4 * count);
      });
    }
  }

  static const Run run = best<CELL, BACKWARD>();
  std::atomic<bool> exhausted{false};
  parallel(pool, size.seeds * blocks * parts, [&](int64_t item) {
    // Each thread keeps its planes: memory asked for anew comes as pages that the kernel has to clear.
    thread_local Space space;
    constexpr int count = planes_of(CELL, BACKWARD);
    V* planes = space.get(count * size.plane());
    if (!planes) {
      exhausted = true;
      return;
    }
    clear_borders(planes, count, size);
    Job job = common;
    const int64_t part = item % parts, group = item / parts, seed = group / blocks;
    job.weights = weights + group * WEIGHTS;
    if (BACKWARD) {
      job.d_weights = d_weights + item * WEIGHTS;
      std::fill(job.d_weights, job.d_weights + WEIGHTS, V{});
    }
    job.channel = group % blocks * LANES;
    job.first = seed * size.images + part * size.images / parts;
    job.last = seed * size.images + (part + 1) * size.images / parts;
    run(job, planes);
  });
  if (exhausted) return out_of_memory();

  if (BACKWARD) {
    float* taps_out = reinterpret_cast<float*>(out[inputs - 2].untyped_data());
    float* bias_out = reinterpret_cast<float*>(out[inputs - 1].untyped_data());
    parallel(pool, size.seeds * blocks, [&](int64_t group) {
      const int64_t seed = group / blocks, block = group % blocks;
      const float* from = reinterpret_cast<const float*>(d_weights + group * parts * WEIGHTS);
      const int64_t count = std::min<int64_t>(LANES, size.n - block * LANES);
      each_weight<CELL>(size, block, [&](int64_t k, int64_t to, bool is_bias) {
        double sums[LANES] = {};
        for (int64_t part = 0; part < parts; part++) {
          for (int lane = 0; lane < LANES; lane++) sums[lane] += from[(part * WEIGHTS + k) * LANES + lane];
        }
        float* at = (is_bias ? bias_out + seed * G * size.n : taps_out + seed * 18 * G * size.n) + to;
        for (int64_t lane = 0; lane < count; lane++) at[lane] = static_cast<float>(sums[lane]);
      });
    });
  }
  return ffi::Error::Success();
}

}  // namespace

#define TARGET(name, cell, backward)                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (call<cell, backward>),                 \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets())

TARGET(regnet_flax_rnn_forward, RNN, false);
TARGET(regnet_flax_rnn_backward, RNN, true);
TARGET(regnet_flax_gru_forward, GRU, false);
TARGET(regnet_flax_gru_backward, GRU, true);
TARGET(regnet_flax_lstm_forward, LSTM, false);
TARGET(regnet_flax_lstm_backward, LSTM, true);
