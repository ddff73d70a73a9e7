// The update kernels on random tables, without torch or Python: `make sanitize` builds this with sanitizers.
//
// Every tensor lies in an allocation of exactly its size, at a random alignment, so that a sanitizer sees any access
// beyond it. The expected bits come from the same step made one element at a time, each as a tensor of its own, with
// the baseline instruction set and one thread: a result that depended on an element's position, on alignment, thread
// count or instruction set would differ.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "dtypes.h"
#include "kernels.h"

using namespace fused_l2;

namespace {

unsigned threads = 1;
int parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> pool;
  for (int64_t i = begin; i < end; ++i) pool.emplace_back([=] { f(i, i + 1, context); });
  for (auto& thread : pool) thread.join();
  return 0;
}
int num_threads(uint32_t* count) {
  *count = threads;
  return 0;
}

constexpr int64_t kSizes[] = {4, 8, 2, 2};  // by dtype

struct Buffer {
  std::vector<char> bytes;
  size_t offset;
  char* data() { return bytes.data() + offset; }
};

struct Fuzz {
  std::mt19937_64 random;
  int64_t below(int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

  Buffer make(int64_t numel, int64_t type, bool positive) {
    const auto element = static_cast<size_t>(kSizes[type]);
    Buffer b{{}, static_cast<size_t>(below(16)) * element};
    b.bytes.resize(b.offset + static_cast<size_t>(numel) * element);
    b.bytes.shrink_to_fit();
    for (int64_t i = 0; i < numel; ++i) {
      const int kind = static_cast<int>(below(64));
      double x =
          std::ldexp(static_cast<double>(below(1 << 24)) - (positive ? 0 : 1 << 23), static_cast<int>(below(40)) - 44);
      if (kind == 0) x = 0;
      if (kind == 1) x = std::ldexp(1.0, -140);
      if (kind == 2) x = INFINITY;
      if (kind == 3) x = NAN;
      char* at = b.data() + static_cast<size_t>(i) * element;
      if (type == dtype::float64) std::memcpy(at, &x, 8);
      float f = static_cast<float>(x);
      BFloat16 half;
      Float16 ieee_half;
      narrow(f, half);
      narrow(f, ieee_half);
      if (type == dtype::float32) std::memcpy(at, &f, 4);
      if (type == dtype::bfloat16) std::memcpy(at, &half, 2);
      if (type == dtype::float16) std::memcpy(at, &ieee_half, 2);
    }
    return b;
  }

  bool once() {
    const int64_t rule = below(rule::count), param_type = below(dtype::count);
    int64_t flags = below(int64_t(1) << flag::bit::count) & ~int64_t(flag::low_precision | flag::eight_bit);
    int64_t grad_type = param_type, state_type = param_type, kept_type = -1;
    if (param_type != dtype::float64) {
      const int64_t narrow[] = {dtype::float32, dtype::bfloat16, dtype::float16};
      if (below(2) == 0) grad_type = narrow[below(3)];
      if (below(2) == 0) state_type = narrow[below(2)];
    }
    if (param_type >= dtype::bfloat16) {
      const int64_t modes[] = {0, flag::master, flag::kahan, flag::stochastic, flag::remainder};
      const int64_t kept[] = {-1, dtype::float32, dtype::bfloat16, -1, dtype::bfloat16};
      const int64_t mode = below(param_type == dtype::bfloat16 ? 5 : 4);
      flags |= modes[mode];
      kept_type = kept[mode];
    }
    const int states = rule == rule::adam ? (flags & flag::amsgrad ? 3 : 2) : (flags & flag::momentum ? 1 : 0);
    double coefficients[2 * kCoefficients];
    for (double& c : coefficients) c = static_cast<double>(1 + below(1000)) / 1001;
    if (below(2)) coefficients[0] = 0;  // weight_decay of the first coefficient row
    for (int row = 0; row < 2; ++row) coefficients[row * kCoefficients + kStepCount] = static_cast<double>(below(1000));
    std::vector<int64_t> element_types = {param_type, grad_type};
    for (int k = 0; k < states; ++k) element_types.push_back(state_type);
    if (kept_type >= 0) element_types.push_back(kept_type);

    const int64_t tensors = 1 + below(12);
    std::vector<std::vector<Buffer>> all, expected;
    std::vector<int64_t> table, single;
    for (int64_t t = 0; t < tensors; ++t) {
      const int64_t numel = below(8) ? below(700) : below(60000);
      const int64_t key = below(int64_t(1) << 32);
      std::vector<Buffer> buffers;
      for (size_t k = 0; k < element_types.size(); ++k)
        buffers.push_back(make(numel, element_types[k], rule == rule::adam && k > 2));
      all.push_back(buffers);
      expected.push_back(buffers);
      const int64_t row_flags = below(2) ? row_flag::first_step : 0, row = below(2);
      for (auto* list : {&all, &expected}) {
        auto& here = list->back();
        const int64_t step = list == &all ? numel : 1;
        for (int64_t i = 0; i < numel || (list == &all && i == 0); i += step ? step : 1) {
          int64_t columns[column::count] = {};
          for (size_t k = 0; k < here.size(); ++k) {
            const bool kept = kept_type >= 0 && k + 1 == here.size();
            columns[kept ? static_cast<size_t>(column::kept) : k] =
                reinterpret_cast<intptr_t>(here[k].data()) + i * kSizes[element_types[k]];
          }
          columns[column::key] = key | i << 32;
          columns[column::numel] = step;
          columns[column::coefficients] = row;
          columns[column::flags] = row_flags;
          auto& into = list == &all ? table : single;
          into.insert(into.end(), columns, columns + column::count);
          if (!step) break;
        }
      }
    }
    const PieceFunction update = [](const Piece& piece) { kernel_of(piece)(piece); };
    const double factor = below(2) ? 1 : 0.37;
    const auto singles = static_cast<int64_t>(single.size() / column::count);
    Bucket bucket{rule,    flags,         param_type,   grad_type, state_type,
                  singles, single.data(), coefficients, nullptr,   &factor};
    threads = 1;
    int64_t begun = 0;
    activate(Capability::baseline);
    for_each_piece(&bucket, 1, update, &begun);

    do activate(static_cast<Capability>(below(static_cast<int64_t>(Capability::count))));
    while (!is_supported(active_capability()));
    threads = static_cast<unsigned>(1 + below(8));
    bucket.rows = tensors;
    bucket.table = table.data();
    for_each_piece(&bucket, 1, update, &begun);

    for (int64_t t = 0; t < tensors; ++t)
      for (size_t k = 0; k < all[t].size(); ++k)
        if (!same(all[t][k], expected[t][k], element_types[k])) {
          std::printf("rule %d flags %d dtypes %d %d %d, %s, %u threads: tensor %d of %d, buffer %d differs\n",
                      int(rule), int(flags), int(param_type), int(grad_type), int(state_type),
                      name_of(active_capability()), threads, int(t), int(tensors), int(k));
          return false;
        }
    return true;
  }

  // Equal bits; any NaN equals any other.
  static bool same(Buffer& a, Buffer& b, int64_t type) {
    const size_t element = static_cast<size_t>(kSizes[type]), bytes = a.bytes.size() - a.offset;
    for (size_t i = 0; i < bytes; i += element) {
      if (std::memcmp(a.data() + i, b.data() + i, element) == 0) continue;
      if (!is_nan(a.data() + i, type) || !is_nan(b.data() + i, type)) return false;
    }
    return true;
  }
  template <class T> static T read(const char* p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static bool is_nan(const char* p, int64_t type) {
    switch (type) {
      case dtype::float64: return std::isnan(read<double>(p));
      case dtype::float32: return std::isnan(read<float>(p));
      case dtype::bfloat16: return std::isnan(widen(read<BFloat16>(p)));
      default: return std::isnan(widen(read<Float16>(p)));
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  use_threads_of({parallel_for, num_threads});
  for (int i = 0; i < rounds; ++i)
    if (!Fuzz{std::mt19937_64(static_cast<uint64_t>(i))}.once()) {
      std::printf("failed in round %d\n", i);
      return 1;
    }
  std::printf("%d rounds, no difference\n", rounds);
}
