// The native operations as XLA's custom calls.
//
// Arrays may have leading dimensions, the same for images and weights (several seeds under vmap). Images are float32 or
// bfloat16, weights float32. Which images make a partial sum of a weight's gradient depends on the batch alone, and
// partial sums are added in order: a result depends neither on the number of threads nor on their timing.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "job.h"
#include "calls/call.h"

// ---------------------------------------------------------------------------------------------------------------------
// Instruction sets. The processor's best is found when the library is loaded; ONLY_AVX512 and ONLY_AVX2 leave out the
// other.

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#define ROLLED _Pragma("GCC unroll 1")

namespace {

#ifdef __x86_64__

#ifndef ONLY_AVX2
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
namespace avx512 {
#include "cells.h"
#include "convolution.h"
#include "batch_norm.h"
constexpr Library LIBRARY{LANES,   planes,        convolve_image, filter_planes, filter_images,
                          moments, gradient_sums, input_gradient_of_norm};
}  // namespace avx512
#undef LANES
#undef TARGET
#endif

#ifndef ONLY_AVX512
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
namespace avx2 {
#include "cells.h"
#include "convolution.h"
#include "batch_norm.h"
constexpr Library LIBRARY{LANES,   planes,        convolve_image, filter_planes, filter_images,
                          moments, gradient_sums, input_gradient_of_norm};
}  // namespace avx2
#undef LANES
#undef TARGET
#endif

#if defined(ONLY_AVX512)
namespace avx2 = avx512;
#elif defined(ONLY_AVX2)
namespace avx512 = avx2;
#endif

int lanes_here() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
#ifndef ONLY_AVX2
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return 16;
  }
#endif
#ifdef ONLY_AVX512
  return 0;
#else
  return 8;
#endif
}

template <Cell CELL>
Run run_of(int lanes) {
  return lanes == 16 ? avx512::run<CELL> : avx2::run<CELL>;
}

const Library& library_of(int lanes) { return lanes == 16 ? avx512::LIBRARY : avx2::LIBRARY; }

#else

#define LANES 4
#define TARGET
namespace any {
#include "cells.h"
#include "convolution.h"
#include "batch_norm.h"
constexpr Library LIBRARY{LANES,   planes,        convolve_image, filter_planes, filter_images,
                          moments, gradient_sums, input_gradient_of_norm};
}  // namespace any
#undef LANES
#undef TARGET

int lanes_here() { return 4; }

template <Cell CELL>
Run run_of(int) {
  return any::run<CELL>;
}

const Library& library_of(int) { return any::LIBRARY; }

#endif

constexpr int MAX_LANES = 16;

int lanes() {
  static const int LANES = lanes_here();
  return LANES;
}

}  // namespace

#include "calls/batch_norm.h"
#include "calls/cells.h"
#include "calls/convolution.h"
#include "calls/gradients.h"

#define CUSTOM_CALL(name, cell, backward)                                                                    \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*);                 \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, (call<cell, backward>),                                                \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets())

// Whether this processor is one that the library has code for.
extern "C" __attribute__((visibility("default"))) int regnet_flax_supported() { return lanes() > 0; }

CUSTOM_CALL(regnet_flax_rnn_forward, RNN, false);
CUSTOM_CALL(regnet_flax_rnn_backward, RNN, true);
CUSTOM_CALL(regnet_flax_gru_forward, GRU, false);
CUSTOM_CALL(regnet_flax_gru_backward, GRU, true);
CUSTOM_CALL(regnet_flax_lstm_forward, LSTM, false);
CUSTOM_CALL(regnet_flax_lstm_backward, LSTM, true);

#define WITH_ATTRIBUTES(name, function, attributes)                                              \
  extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(name, function,                                              \
                                ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets() attributes)

WITH_ATTRIBUTES(regnet_flax_convolution, convolution,
                .Attr<Numbers>("geometry").Attr<Numbers>("kinds").Attr<Reals>("epsilons")
                .Attr<Numbers>("after").Attr<double>("epsilon"));
WITH_ATTRIBUTES(regnet_flax_input_gradient, input_gradient, .Attr<Numbers>("geometry"));
WITH_ATTRIBUTES(regnet_flax_filter_gradient, filter_gradient,
                .Attr<Numbers>("geometry").Attr<Numbers>("kinds").Attr<Reals>("epsilons"));
WITH_ATTRIBUTES(regnet_flax_convolution_gradients, convolution_gradients,
                .Attr<Numbers>("geometry").Attr<Numbers>("kinds").Attr<Reals>("epsilons")
                .Attr<bool>("relu").Attr<double>("epsilon"));
WITH_ATTRIBUTES(regnet_flax_moments, batch_moments, );
WITH_ATTRIBUTES(regnet_flax_norm_gradient_sums, batch_gradient_sums, .Attr<bool>("relu").Attr<double>("epsilon"));
WITH_ATTRIBUTES(regnet_flax_norm_gradient, batch_input_gradient, .Attr<bool>("relu").Attr<double>("epsilon"));
