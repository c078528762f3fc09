// What all custom calls share: memory, threads and errors.

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

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("regnet_flax: " + what); }

ffi::Error out_of_memory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "regnet_flax: out of memory"); }

}  // namespace
