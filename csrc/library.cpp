// The C interface that fused_l2/engines/cpu.py loads with ctypes. No header of torch or Python is needed to build it:
// what is used of libtorch is looked up by name in the copy that the process has loaded.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "torch_abi.h"

#if defined(_WIN32)
#define FUSED_L2_EXPORT extern "C" __declspec(dllexport)
#else
#define FUSED_L2_EXPORT extern "C" __attribute__((visibility("default")))
#endif

using namespace fused_l2;

// Names and order of every column, coefficient and flag: Python compares it with its own before the first call.
FUSED_L2_EXPORT const char* fused_l2_layout() { return layout(); }

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

// A watch over one tensor is int64: handle, address, bytes of its storage, dtype, dim, sizes, strides. Dim is -1 where
// only the memory is watched: for step counters.
namespace watch {
enum : int { handle, address, storage_bytes, dtype, dim, sizes };
}

// Is every watched tensor where and what it was when the plan was made?
FUSED_L2_EXPORT int64_t fused_l2_watches_hold(const int64_t* w, int64_t count) {
  const TorchAbi& torch = torch_abi();
  for (int64_t i = 0; i < count; ++i) {
    void* const tensor = address<void>(w[watch::handle]);
    void* data = nullptr;
    int64_t bytes = 0, dim = 0, *sizes = nullptr, *strides = nullptr;
    int32_t type = 0;
    if (torch.get_data_ptr(tensor, &data) != 0 || torch.get_storage_size(tensor, &bytes) != 0 ||
        data != address<void>(w[watch::address]) || bytes != w[watch::storage_bytes])
      return 0;
    const int64_t watched_dim = w[watch::dim];
    if (watched_dim < 0) {
      w += watch::sizes;
      continue;
    }
    if (torch.get_dtype(tensor, &type) != 0 || torch.get_dim(tensor, &dim) != 0 ||
        torch.get_sizes(tensor, &sizes) != 0 || torch.get_strides(tensor, &strides) != 0 || type != w[watch::dtype] ||
        dim != watched_dim || !std::equal(sizes, sizes + dim, w + watch::sizes) ||
        !std::equal(strides, strides + dim, w + watch::sizes + dim))
      return 0;
    w += watch::sizes + 2 * dim;
  }
  return 1;
}

// Do these words of memory still hold what they held?
FUSED_L2_EXPORT int64_t fused_l2_words_hold(const int64_t* addresses, const int64_t* expected, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (*address<const int64_t>(addresses[i]) != expected[i]) return 0;
  return 1;
}

// Writes the watch of one tensor to `out`, which has room for it; its length, or 0 if the tensor has no memory to
// watch.
FUSED_L2_EXPORT int64_t fused_l2_make_watch(int64_t handle, int64_t memory_only, int64_t* out) {
  const TorchAbi& torch = torch_abi();
  void* const tensor = address<void>(handle);
  void* data = nullptr;
  int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
  int32_t type = 0;
  if (torch.get_data_ptr(tensor, &data) != 0 || torch.get_storage_size(tensor, &out[watch::storage_bytes]) != 0 ||
      torch.get_dtype(tensor, &type) != 0 || torch.get_dim(tensor, &dim) != 0 || torch.get_sizes(tensor, &sizes) != 0 ||
      torch.get_strides(tensor, &strides) != 0)
    return 0;
  out[watch::handle] = handle;
  out[watch::address] = static_cast<int64_t>(reinterpret_cast<intptr_t>(data));
  out[watch::dtype] = type;
  out[watch::dim] = memory_only ? -1 : dim;
  if (memory_only) return watch::sizes;
  std::copy(sizes, sizes + dim, out + watch::sizes);
  std::copy(strides, strides + dim, out + watch::sizes + dim);
  return watch::sizes + 2 * dim;
}

FUSED_L2_EXPORT void fused_l2_release(const int64_t* handles, int64_t count) {
  for (int64_t i = 0; i < count; ++i) torch_abi().release(address<void>(handles[i]));
}

// Do all tensors have memory, and do the step counters stand where the coefficients were computed for?
// Returns 0 if so, else 1 + the position of the first row, over all buckets, that does not.
FUSED_L2_EXPORT int64_t fused_l2_check(const Bucket* buckets, int64_t count) {
  int64_t position = 0;
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      const Row row = buckets[b].row(r);
      ++position;
      if (row[column::numel] != 0) {
        const int states = buckets[b].rule == rule::sgd ? (buckets[b].flags & flag::momentum ? 1 : 0)
                                                        : (buckets[b].flags & flag::amsgrad ? 3 : 2);
        for (int k = 0; k < column::state0 + states; ++k)
          if (row[k] == 0) return position;
        if (buckets[b].flags & (flag::master | flag::remainder | flag::kahan) && row[column::kept] == 0)
          return position;
      }
      if (row[column::step] == 0) continue;
      float step;
      std::memcpy(&step, address<const void>(row[column::step]), sizeof step);
      if (static_cast<double>(step) != buckets[b].steps[row[column::coefficients]]) return position;
    }
  }
  return 0;
}

namespace {
void update(const Piece& piece) { (piece.bucket->rule == rule::sgd ? sgd_kernels : adam_kernels).get()(piece); }
}  // namespace

// Adds one to every tensor's step counter.
FUSED_L2_EXPORT void fused_l2_count(const Bucket* buckets, int64_t count) {
  for (int64_t b = 0; b < count; ++b) {
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      void* counter = address<void>(buckets[b].row(r)[column::step]);
      if (counter == nullptr) continue;
      float step;
      std::memcpy(&step, counter, sizeof step);
      step += 1;
      std::memcpy(counter, &step, sizeof step);
    }
  }
}

// One step of every tensor of every bucket, then its step counter.
FUSED_L2_EXPORT void fused_l2_step(const Bucket* buckets, int64_t count) {
  for_each_piece(buckets, count, update);
  fused_l2_count(buckets, count);
}

// The same, and statistics of every chunk, rows of `statistic::count` in the order of buckets, tensors and chunks.
// `chunk` is a multiple of kLanes. With `skip` nothing is changed.
FUSED_L2_EXPORT void fused_l2_step_measured(const Bucket* buckets, int64_t count, int64_t chunk, int64_t skip,
                                            double* out) {
  struct Context {
    std::vector<Piece> pieces;
    bool skip;
    double* out;
  } context{{}, skip != 0, out};
  int64_t elements = 0;
  for (int64_t b = 0; b < count; ++b)
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      const Row row = buckets[b].row(r);
      for (int64_t begin = 0; begin < row[column::numel]; begin += chunk)
        context.pieces.push_back({&buckets[b], row, begin, std::min(chunk, row[column::numel] - begin), false});
      elements += row[column::numel];
    }
  const auto one = [](void* opaque, int64_t i) {
    const Context& c = *static_cast<Context*>(opaque);
    const Piece& piece = c.pieces[static_cast<size_t>(i)];
    const PieceFunction update = (piece.bucket->rule == rule::sgd ? sgd_kernels : adam_kernels).get();
    step_measured_kernels.get()(piece, c.skip ? nullptr : update, c.out + i * statistic::count);
  };
  const int64_t pieces = static_cast<int64_t>(context.pieces.size());
  if (elements < kSerialElements)
    for (int64_t i = 0; i < pieces; ++i) one(&context, i);
  else for_each_once(pieces, one, &context);
  if (!skip) fused_l2_count(buckets, count);
}

namespace {
// Tensors cut into chunks, each measured on its own: no result depends on the number of threads.
struct Chunks {
  struct Chunk {
    const char* x;
    int64_t dtype, count;
    double value;
  };
  std::vector<Chunk> all;

  void add(int64_t x, int64_t dtype, int64_t numel, int64_t chunk) {
    constexpr int64_t sizes[] = {4, 8, 2, 2};
    static_assert(sizeof sizes / sizeof *sizes == dtype::count);
    for (int64_t begin = 0; begin < numel; begin += chunk)
      all.push_back({address<const char>(x) + begin * sizes[dtype], dtype, std::min(chunk, numel - begin), 0});
  }

  void measure(Norm norm) {
    struct Context {
      std::vector<Chunk>& all;
      Norm norm;
    } context{all, norm};
    const auto one = [](void* opaque, int64_t i) {
      const Context& c = *static_cast<Context*>(opaque);
      Chunk& chunk = c.all[static_cast<size_t>(i)];
      chunk.value = c.norm(chunk.x, chunk.dtype, chunk.count);
    };
    for_each_index(static_cast<int64_t>(all.size()), one, &context);
  }
};
}  // namespace

// out[i] = sum of squares of tensor i, in float64.
FUSED_L2_EXPORT void fused_l2_sums_of_squares(const int64_t* addresses, const int64_t* dtypes, const int64_t* numels,
                                              int64_t count, double* out) {
  Chunks chunks;
  std::vector<size_t> first;
  for (int64_t i = 0; i < count; ++i) {
    first.push_back(chunks.all.size());
    chunks.add(addresses[i], dtypes[i], numels[i], 65536);
  }
  first.push_back(chunks.all.size());
  chunks.measure(sum_of_squares_kernels.get());
  for (size_t i = 0; i + 1 < first.size(); ++i) {
    out[i] = 0;
    for (size_t k = first[i]; k < first[i + 1]; ++k) out[i] += chunks.all[k].value;
  }
}

// Over all gradients of all buckets: the sum of squares, or with `largest` the largest absolute value. `chunk` is a
// multiple of kLanes and part of the definition of the order.
FUSED_L2_EXPORT double fused_l2_measure_grads(const Bucket* buckets, int64_t count, int64_t chunk, int64_t largest) {
  Chunks chunks;
  for (int64_t b = 0; b < count; ++b)
    for (int64_t r = 0; r < buckets[b].rows; ++r) {
      const Row row = buckets[b].row(r);
      chunks.add(row[column::grad], buckets[b].grad_dtype, row[column::numel], chunk);
    }
  chunks.measure((largest ? largest_kernels : sum_of_squares_kernels).get());
  double lanes[kLanes] = {};
  for (size_t i = 0; i < chunks.all.size(); ++i) {
    double &lane = lanes[i % kLanes], value = chunks.all[i].value;
    if (!largest) lane += value;
    else if (!(value <= lane)) lane = lane != lane ? lane : value;
  }
  if (!largest) return pairwise_sum(lanes, kLanes);
  for (double lane : lanes)
    if (!(lane <= lanes[0])) lanes[0] = lanes[0] != lanes[0] ? lanes[0] : lane;
  return lanes[0];
}
