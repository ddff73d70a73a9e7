// The update kernels on random tables, without torch or Python: `make sanitize` builds this with sanitizers.
//
// Every tensor lies in an allocation of exactly its size, at a random alignment, so that a sanitizer sees any access
// beyond it. The expected bits come from the same step made one element at a time, each as a tensor of its own, with
// the baseline instruction set and one thread: a result that depended on an element's position, on alignment, thread
// count or instruction set would differ. With 8-bit states a group at a time. Half of the steps are measured.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "dtypes.h"
#include "kernels.h"
#include "statistics.h"

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

// What else than a dtype a buffer may hold.
constexpr int64_t kBytes = -1, kCodes = -2, kScales = -3, kHalves = -4, kNothing = -5;

struct Stream {  // what a tensor of the table has in some column
  int column;
  int64_t type;
  bool positive = false;
  int64_t element() const { return type >= 0 ? kSizes[type] : type == kHalves ? 2 : 1; }
  int64_t at(int64_t i) const { return (type == kScales ? i / kGroup : i) * element(); }  // bytes before element i
};

struct Buffer {
  std::vector<char> bytes;
  size_t offset;
  char* data() { return bytes.data() + offset; }
};

struct Sums {  // what statistics found, of a tensor
  double of[statistic::count] = {};
  void add(const double* out) {
    for (int i = 0; i < statistic::count; ++i) of[i] += out[i];
  }
  // The same sums, added in another order: they may differ by 1e-12, or by 2^-22 where vectors round differences to
  // float32. What was returned may cancel, so it is compared relative to params + updates, which bound its terms.
  bool same(const Sums& other) const {
    for (int i = 0; i < statistic::count; ++i) {
      const double a = of[i], b = other.of[i];
      const double size = i == statistic::returned ? of[statistic::params] + of[statistic::updates] : std::fabs(a);
      const double unit = i == statistic::returned || i == statistic::updates ? 0x1p-22 : 1e-12;
      const bool close = std::isfinite(size) ? std::fabs(a - b) <= unit * size : !std::isfinite(b);
      if (!close && (std::isfinite(size) || i != statistic::returned)) return false;
    }
    return true;
  }
};

int64_t compared_sums = 0;  // of updates that are finite, of tensors of several vectors

struct Fuzz {
  std::mt19937_64 random;
  bool finite = false;  // no inf, no NaN: sums can be compared then
  int64_t below(int64_t n) { return static_cast<int64_t>(random() % static_cast<uint64_t>(n)); }

  Buffer make(int64_t numel, const Stream& stream) {
    const int64_t type = stream.type;
    const bool positive = stream.positive;
    const auto element = static_cast<size_t>(stream.element());
    Buffer b{{}, static_cast<size_t>(below(16)) * element};
    b.bytes.resize(b.offset + static_cast<size_t>(stream.at(numel)));
    b.bytes.shrink_to_fit();
    if (type < 0) {  // a scale is 32 at least
      for (size_t i = b.offset; i < b.bytes.size(); ++i)
        b.bytes[i] = static_cast<char>(type == kScales ? (below(8) ? 96 + below(48) : 32 + below(finite ? 112 : 224))
                                                       : below(256));
      return b;
    }
    for (int64_t i = 0; i < numel; ++i) {
      const int kind = static_cast<int>(below(64));
      double x =
          std::ldexp(static_cast<double>(below(1 << 24)) - (positive ? 0 : 1 << 23), static_cast<int>(below(40)) - 44);
      if (kind == 0) x = 0;
      if (kind == 1) x = std::ldexp(1.0, -140);
      if (kind == 2 && !finite) x = INFINITY;
      if (kind == 3 && !finite) x = NAN;
      if (kind < 4 && !positive && below(2)) x = -x;
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
    finite = below(2);
    const int64_t rule = below(rule::count), param_type = below(dtype::count);
    int64_t flags = below(int64_t(1) << flag::bit::count) & ~int64_t(flag::low_precision | flag::eight_bit);
    int64_t grad_type = param_type, state_type = param_type, kept_type = kNothing;
    if (param_type != dtype::float64) {
      const int64_t narrow[] = {dtype::float32, dtype::bfloat16, dtype::float16};
      if (below(2) == 0) grad_type = narrow[below(3)];
      if (below(2) == 0) state_type = narrow[below(2)];
    }
    if (param_type >= dtype::bfloat16) {
      const int64_t modes[] = {0, flag::master, flag::kahan, flag::stochastic, flag::remainder, flag::remainder8};
      const int64_t kept[] = {kNothing, dtype::float32, dtype::bfloat16, kNothing, kHalves, kBytes};
      const int64_t mode = below(param_type == dtype::bfloat16 ? 6 : 4);
      flags |= modes[mode];
      kept_type = kept[mode];
    }
    const bool eight_bit = param_type != dtype::float64 && below(2) == 0;
    if (below(2)) {  // the larger part of what has kernels of its own
      flags &= ~int64_t(flag::cautious | flag::amsgrad);
      grad_type = param_type;
    }
    if (eight_bit) {
      flags = (flags | flag::eight_bit | flag::momentum) & ~int64_t(flag::amsgrad);
      state_type = dtype::float32;
    }
    const int states = rule == rule::adam ? (flags & flag::amsgrad ? 3 : 2) : (flags & flag::momentum ? 1 : 0);
    double coefficients[2 * kCoefficients];
    for (double& c : coefficients) c = static_cast<double>(1 + below(1000)) / 1001;
    if (below(2)) coefficients[0] = 0;  // weight_decay of the first coefficient row
    for (int row = 0; row < 2; ++row) coefficients[row * kCoefficients + kStepCount] = static_cast<double>(below(1000));
    std::vector<Stream> streams = {{column::param, param_type}, {column::grad, grad_type}};
    for (int k = 0; k < states; ++k) {
      streams.push_back({column::state0 + k, eight_bit ? kCodes : state_type, rule == rule::adam && k > 0});
      if (eight_bit) streams.push_back({column::scale0 + k, kScales});
    }
    if (kept_type != kNothing) streams.push_back({column::kept, kept_type});
    const int64_t single_elements = eight_bit ? kGroup : 1;

    const int64_t tensors = 1 + below(12);
    std::vector<std::vector<Buffer>> all, expected;
    std::vector<int64_t> table, single;
    for (int64_t t = 0; t < tensors; ++t) {
      const int64_t numel = (below(8) ? below(700) : below(60000)) / single_elements * single_elements;
      const int64_t key = below(int64_t(1) << 32);
      std::vector<Buffer> buffers;
      for (const Stream& stream : streams) buffers.push_back(make(numel, stream));
      all.push_back(buffers);
      expected.push_back(buffers);
      const int64_t row_flags = below(2) ? row_flag::first_step : 0, row = below(2);
      for (auto* list : {&all, &expected}) {
        auto& here = list->back();
        const int64_t step = list == &all ? numel : single_elements;
        for (int64_t i = 0; i < numel || (list == &all && i == 0); i += step ? step : 1) {
          int64_t columns[column::count] = {};
          for (size_t k = 0; k < here.size(); ++k)
            columns[streams[k].column] = reinterpret_cast<intptr_t>(here[k].data()) + streams[k].at(i);
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
    const bool measured = below(2);
    const int64_t chunk = kGroup * (1 + below(600));
    // One step of the bucket; sums for each of its rows if it is measured.
    const auto step = [&](const Bucket& bucket) {
      std::vector<Sums> sums(static_cast<size_t>(bucket.rows));
      int64_t begun = 0, chunks = 0;
      if (!measured) {
        for_each_piece(&bucket, 1, update, &begun);
        return sums;
      }
      const auto chunks_of = [&](int64_t r) { return (bucket.row(r)[column::numel] + chunk - 1) / chunk; };
      for (int64_t r = 0; r < bucket.rows; ++r) chunks += chunks_of(r);
      std::vector<double> out(static_cast<size_t>(chunks * statistic::count));
      step_measured(&bucket, 1, chunk, false, out.data(), &begun);
      const double* at = out.data();
      for (int64_t r = 0; r < bucket.rows; ++r)
        for (int64_t c = chunks_of(r); c > 0; --c, at += statistic::count) sums[static_cast<size_t>(r)].add(at);
      return sums;
    };
    const double factor = below(2) ? 1 : 0.37;
    const auto singles = static_cast<int64_t>(single.size() / column::count);
    Bucket bucket{rule,    flags,         param_type,   grad_type, state_type,
                  singles, single.data(), coefficients, nullptr,   &factor};
    threads = 1;
    activate(Capability::baseline);
    const std::vector<Sums> of_singles = step(bucket);

    do activate(static_cast<Capability>(below(static_cast<int64_t>(Capability::count))));
    while (!is_supported(active_capability()));
    threads = static_cast<unsigned>(1 + below(8));
    bucket.rows = tensors;
    bucket.table = table.data();
    const std::vector<Sums> of_tensors = step(bucket);

    size_t next_single = 0;
    for (size_t t = 0; t < all.size(); ++t) {
      const auto differs = [&](const char* what, size_t k) {
        std::printf("rule %d flags %d dtypes %d %d %d, %s, %u threads: tensor %d of %d, %s %d differs\n", int(rule),
                    int(flags), int(param_type), int(grad_type), int(state_type), name_of(active_capability()), threads,
                    int(t), int(tensors), what, int(k));
        return false;
      };
      for (size_t k = 0; k < streams.size(); ++k) {
        Buffer& scales = all[t][streams[k].type == kCodes ? k + 1 : k];
        if (!same(all[t][k], expected[t][k], streams[k], scales)) return differs("buffer", k);
      }
      Sums sums;
      for (int64_t i = 0; i < bucket.row(static_cast<int64_t>(t))[column::numel]; i += single_elements)
        sums.add(of_singles[next_single++].of);
      if (!sums.same(of_tensors[t])) return differs("sum", 0);
      const int64_t numel = bucket.row(static_cast<int64_t>(t))[column::numel];
      compared_sums += measured && numel >= 64 && std::isfinite(sums.of[statistic::updates]);
    }
    return true;
  }

  // Equal bits; any NaN equals any other.
  static bool same(Buffer& a, Buffer& b, const Stream& stream, Buffer& scales) {
    const auto element = static_cast<size_t>(stream.element());
    const size_t bytes = a.bytes.size() - a.offset;
    for (size_t i = 0; i < bytes; i += element) {
      const char *x = a.data() + i, *y = b.data() + i;
      if (std::memcmp(x, y, element) == 0) continue;
      if (stream.type >= 0 && is_nan(x, stream.type) && is_nan(y, stream.type)) continue;
      const char scale = stream.type == kCodes ? scales.data()[i / kGroup] : '\0';
      if (scale == '\xff' && is_nan_code(*x, stream.positive) && is_nan_code(*y, stream.positive)) continue;
      return false;
    }
    return true;
  }
  // With the largest scale: codes whose float32 value has an exponent of ones, but for infinity.
  static bool is_nan_code(char code, bool positive) {
    return positive ? static_cast<uint8_t>(code) > 248 : (static_cast<uint8_t>(code) & 127) > 121;
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
  std::printf("%d rounds, no difference; %d tensors with finite sums\n", rounds, int(compared_sums));
}
