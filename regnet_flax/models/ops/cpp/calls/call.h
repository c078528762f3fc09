// What all custom calls share: memory, threads, arrays and errors.

#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../job.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Memory that grows, aligned for vectors; null where there is too little.
class Space {
 public:
  ~Space() { free(data_); }

  float* get(int64_t count) {
    if (count > count_) {
      free(data_);
      const size_t bytes = (sizeof(float) * count + 63) / 64 * 64;
      data_ = static_cast<float*>(aligned_alloc(64, bytes));
      count_ = data_ ? count : 0;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t count_ = 0;
};

// The planes of a thread, which it keeps: memory asked for anew comes as pages that the kernel has to clear.
float* own_planes(int64_t count) {
  thread_local Space space;
  return space.get(count);
}

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

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("regnet_flax: " + what); }

ffi::Error out_of_memory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "regnet_flax: out of memory"); }

}  // namespace
