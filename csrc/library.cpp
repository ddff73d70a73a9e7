// The C interface that fused_l2/engines/cpu.py loads with ctypes. No header of torch or Python is needed to build it:
// what is used of libtorch is looked up by name in the copy that the process has loaded.
#include <cstdint>
#include <new>

#include "capability.h"
#include "float_mode.h"
#include "look.h"
#include "norms.h"
#include "parallel.h"
#include "statistics.h"
#include "steps.h"
#include "table.h"
#include "torch_abi.h"

#if defined(_WIN32)
#define FUSED_L2_EXPORT extern "C" __declspec(dllexport)
#else
#define FUSED_L2_EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace fused_l2;

namespace {
// What a call that may fail returns: Python raises the error (fused_l2/engines/cpu.py). A C++ exception that leaves a C
// function ends the process.
enum Status : int64_t { ok, no_memory, failed };

// f(), in the default floating-point mode.
template <class F> int64_t guarded(F&& f) noexcept {
  try {
    const DefaultFloatMode mode;
    f();
    return ok;
  } catch (const std::bad_alloc&) { return no_memory; } catch (...) {
    return failed;
  }
}
}  // namespace

// Names and order of every column, coefficient and flag: Python compares it with its own before the first call.
FUSED_L2_EXPORT const char* fused_l2_layout() {
  const char* spelled = "";
  guarded([&] { spelled = layout(); });
  return spelled;
}

// What it was built from, as fused_l2/_sources.py computes it; 0 if whoever compiled it did not say.
#ifndef FUSED_L2_SOURCES
#define FUSED_L2_SOURCES 0
#endif
FUSED_L2_EXPORT int64_t fused_l2_sources() { return FUSED_L2_SOURCES; }

// Finds torch's functions in the library loaded from `path`. Returns which were found: 1 threads, 2 tensor accessors.
FUSED_L2_EXPORT int64_t fused_l2_connect(const char* path) {
  const TorchAbi& abi = connect_torch_abi(path);
  use_threads_of({abi.parallel_for, abi.num_threads});
  return (abi.has_threads() ? 1 : 0) | (abi.has_tensors() ? 2 : 0);
}

FUSED_L2_EXPORT int64_t fused_l2_thread_count() { return thread_count(); }

// Instruction sets are numbered from the most general one; a name is null past the last.
FUSED_L2_EXPORT const char* fused_l2_capability_name(int64_t index) {
  if (index < 0 || index >= static_cast<int64_t>(Capability::count)) return nullptr;
  return name_of(static_cast<Capability>(index));
}
FUSED_L2_EXPORT int64_t fused_l2_capability_supported(int64_t index) {
  return is_supported(static_cast<Capability>(index));
}
FUSED_L2_EXPORT int64_t fused_l2_capability() { return static_cast<int64_t>(active_capability()); }
FUSED_L2_EXPORT void fused_l2_select_capability(int64_t index) { activate(static_cast<Capability>(index)); }

FUSED_L2_EXPORT void fused_l2_set_offsets(int64_t head, int64_t handle, int64_t keys) {
  set_offsets({head, handle, keys});
}
FUSED_L2_EXPORT void fused_l2_release(int64_t handle) { torch_abi().release(address<void>(handle)); }
FUSED_L2_EXPORT int64_t fused_l2_make_record(const int64_t* objects, int64_t states, int64_t full, int64_t scales,
                                             int64_t memory, int64_t strict, int64_t* out) {
  return make_record(objects, states, full, scales, memory, strict, out);
}
FUSED_L2_EXPORT void fused_l2_make_records(const int64_t* objects, int64_t states, int64_t memory, int64_t strict,
                                           const int64_t* out, int64_t count, int64_t* lengths) {
  make_records(objects, states, memory, strict, out, count, lengths);
}
FUSED_L2_EXPORT int64_t fused_l2_look(int64_t params, int64_t grads, const Slots* slots) {
  return look(params, grads, *slots);
}
FUSED_L2_EXPORT void fused_l2_place(const Slots* slots, const int64_t* which, const int64_t* active,
                                    const int64_t* rows, int64_t count) {
  place(*slots, which, active, rows, count);
}
FUSED_L2_EXPORT void fused_l2_exchange(const Slots* slots, const int64_t* which, const int64_t* active,
                                       const int64_t* objects, int64_t count) {
  exchange(*slots, which, active, objects, count);
}
FUSED_L2_EXPORT int64_t fused_l2_words_hold(const int64_t* addresses, const int64_t* expected, int64_t count) {
  return words_hold(addresses, expected, count);
}

FUSED_L2_EXPORT int64_t fused_l2_unexpected_counts(const Bucket* buckets, int64_t count, int64_t* positions) {
  return unexpected_counts(buckets, count, positions);
}
FUSED_L2_EXPORT int64_t fused_l2_count(const Bucket* buckets, int64_t count) {
  return guarded([&] { count_steps(buckets, count); });
}
// `begun` is set once the step has begun to change tensors: nothing fails after that.
FUSED_L2_EXPORT int64_t fused_l2_step(const Bucket* buckets, int64_t count, int64_t* begun) {
  return guarded([&] { step(buckets, count, begun); });
}
FUSED_L2_EXPORT int64_t fused_l2_step_measured(const Bucket* buckets, int64_t count, int64_t chunk, int64_t skip,
                                               double* out, int64_t* begun) {
  return guarded([&] { step_measured(buckets, count, chunk, skip != 0, out, begun); });
}

FUSED_L2_EXPORT int64_t fused_l2_sums_of_squares(const int64_t* addresses, const int64_t* dtypes, const int64_t* numels,
                                                 int64_t count, double* out) {
  return guarded([&] { sums_of_squares(addresses, dtypes, numels, count, out); });
}
FUSED_L2_EXPORT int64_t fused_l2_measure_grads(const Bucket* buckets, int64_t count, int64_t chunk, int64_t largest,
                                               double* out) {
  return guarded([&] { *out = measure_grads(buckets, count, chunk, largest != 0); });
}
