// Steps without a kernel of their own (see is_staged): rare mixes of dtypes, low_precision modes and rules.
//
// A stretch of a tensor is brought to float32 in buffers that stay in the first caches, stepped there by the float32
// loop, and brought back. No include guard: compiled once per instruction set by foreach_capability.h.
#include "low_precision_kernels.h"

#include "eight_bit_kernels.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// Branch-free loops over stretches, which compilers make vectors of. Short ones: what one stretch writes and the next
// one reads overlaps in the processor's queues. 2048 elements took a third longer (AMD EPYC, 25M elements).
constexpr int64_t kStretch = 256;
// Shorter where memory is waited for: the processor begins the next one while it waits. Steps of 25M take 4 to 8 % less
// on an Intel Xeon; in its caches they would take 5 to 15 % more.
constexpr int64_t kStreamingStretch = 128;
static_assert(kStretch % kGroup == 0 && kStreamingStretch % kGroup == 0 && kStreamingStretch <= kStretch);

template <class S> void widen_all(const S* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}
template <class S> void narrow_all(const float* from, S* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

// A stretch of some stream in float32: where it lies if it has that dtype, else in a buffer.
struct Stretch {
  alignas(64) float buffer[kStretch];
  float* at;

  void load(int64_t address_of, int64_t type, int64_t begin, int64_t count, bool reads) {
    at = buffer;
    switch (type) {
      case dtype::float32: at = address<float>(address_of) + begin; return;
      case dtype::bfloat16:
        if (reads) widen_all(address<const BFloat16>(address_of) + begin, buffer, count);
        return;
      default:
        if (reads) widen_all(address<const Float16>(address_of) + begin, buffer, count);
    }
  }
  void store(int64_t address_of, int64_t type, int64_t begin, int64_t count) const {
    if (type == dtype::bfloat16) narrow_all(buffer, address<BFloat16>(address_of) + begin, count);
    if (type == dtype::float16) narrow_all(buffer, address<Float16>(address_of) + begin, count);
  }
  // The same of an 8-bit state. Groups are whole: so are the tensors that have such states, and what they are cut into.
  template <class Codes>
  void load_codes(int64_t codes_of, int64_t scales_of, int64_t begin, int64_t count, bool reads) {
    at = buffer;
    if (!reads) return;
    const uint8_t* codes = address<const uint8_t>(codes_of) + begin;
    const uint8_t* scales = address<const uint8_t>(scales_of) + begin / kGroup;
    for (int64_t i = 0; i < count; i += kGroup) decode_group<Codes>(codes + i, scales[i / kGroup], buffer + i);
  }
  template <class Codes>
  void store_codes(int64_t codes_of, int64_t scales_of, int64_t begin, int64_t count, const uint32_t* random) const {
    uint8_t* codes = address<uint8_t>(codes_of) + begin;
    uint8_t* scales = address<uint8_t>(scales_of) + begin / kGroup;
    for (int64_t i = 0; i < count; i += kGroup)
      scales[i / kGroup] = encode_group<Codes>(buffer + i, random + i, codes + i);
  }
};

template <class Remainder> void join_all(const Piece& piece, float* w) {
  const BFloat16* p = address<const BFloat16>(piece.row[column::param]) + piece.begin;
  const Remainder* remainder = address<const Remainder>(piece.row[column::kept]) + piece.begin;
  for (int64_t i = 0; i < piece.count; ++i) w[i] = kept_value(p[i], remainder[i]);
}
template <class Remainder> void split_all(const Piece& piece, const float* w, const uint32_t* random) {
  BFloat16* p = address<BFloat16>(piece.row[column::param]) + piece.begin;
  Remainder* remainder = address<Remainder>(piece.row[column::kept]) + piece.begin;
  const int64_t count = piece.count;
  BFloat16 upper[kStretch];  // memory that the compiler knows to be apart from the rest
  Remainder lower[kStretch];
  for (int64_t i = 0; i < count; ++i) {
    const Halves<uint32_t> halves = split(w[i], random[i], Remainder{});
    upper[i].bits = static_cast<uint16_t>(halves.number);
    lower[i] = static_cast<Remainder>(halves.remainder);
  }
  std::memcpy(p, upper, static_cast<size_t>(count) * sizeof(BFloat16));
  std::memcpy(remainder, lower, static_cast<size_t>(count) * sizeof(Remainder));
}

template <class P> void load_kept(const Piece& piece, const P* p, float* w) {
  const int64_t flags = piece.bucket->flags, begin = piece.begin, count = piece.count;
  if (flags & flag::master) {
    const float* master = address<const float>(piece.row[column::kept]) + begin;
    for (int64_t i = 0; i < count; ++i) w[i] = kept_value(p[i], master[i]);
  } else if (flags & flag::kahan) {
    const Compensation* kept = address<const Compensation>(piece.row[column::kept]) + begin;
    for (int64_t i = 0; i < count; ++i) w[i] = kept_value(p[i], kept[i]);
  } else {
    widen_all(p, w, count);
  }
}

template <class P> void store_kept(const Piece& piece, const float* w, P* p, const uint32_t* random) {
  const int64_t flags = piece.bucket->flags, begin = piece.begin, count = piece.count;
  if (flags & flag::stochastic) {
    for (int64_t i = 0; i < count; ++i) p[i].bits = static_cast<uint16_t>(rounded_stochastically(w[i], random[i], P{}));
    return;
  }
  narrow_all(w, p, count);
  if (flags & flag::master) {
    std::memcpy(address<float>(piece.row[column::kept]) + begin, w, static_cast<size_t>(count) * sizeof(float));
  } else if (flags & flag::kahan) {
    Compensation* kept = address<Compensation>(piece.row[column::kept]) + begin;
    for (int64_t i = 0; i < count; ++i)
      kept[i].bits = static_cast<uint16_t>(rounded_stochastically(left_out(w[i], widen(p[i])), random[i], BFloat16{}));
  }
}

inline void load_param(const Piece& piece, Stretch& w) {
  const int64_t at = piece.row[column::param], type = piece.bucket->param_dtype;
  w.at = w.buffer;
  if (piece.bucket->flags & flag::remainder) return join_all<int16_t>(piece, w.buffer);
  if (piece.bucket->flags & flag::remainder8) return join_all<int8_t>(piece, w.buffer);
  if (type == dtype::bfloat16) return load_kept(piece, address<const BFloat16>(at) + piece.begin, w.buffer);
  if (type == dtype::float16) return load_kept(piece, address<const Float16>(at) + piece.begin, w.buffer);
  w.at = address<float>(at) + piece.begin;
}

inline void store_param(const Piece& piece, const Stretch& w, const uint32_t* random) {
  const int64_t at = piece.row[column::param], type = piece.bucket->param_dtype;
  if (piece.bucket->flags & flag::remainder) return split_all<int16_t>(piece, w.buffer, random);
  if (piece.bucket->flags & flag::remainder8) return split_all<int8_t>(piece, w.buffer, random);
  if (type == dtype::bfloat16) store_kept(piece, w.buffer, address<BFloat16>(at) + piece.begin, random);
  if (type == dtype::float16) store_kept(piece, w.buffer, address<Float16>(at) + piece.begin, random);
}

inline bool has_states(const Bucket& bucket) { return bucket.rule != rule::sgd || bucket.flags & flag::momentum; }
inline bool is_first_step(const Piece& piece) {  // of a momentum, which is not read then
  return piece.bucket->rule == rule::sgd && has_states(*piece.bucket) &&
         piece.row[column::flags] & row_flag::first_step;
}
// That of the states; of a rule without any the parameter's.
inline int64_t state_dtype(const Bucket& bucket) {
  return has_states(bucket) ? bucket.state_dtype : bucket.param_dtype;
}

// Whether there is no kernel of its own for a piece: for its dtypes and what it keeps, or for them with this rule.
// Kernels are compiled for what is stepped often. That is not SGD's first step of 16-bit parameters or states, nor
// cautious decay or amsgrad beside a mode, beside 8-bit states or beside bfloat16 states of float32. with_dtypes and
// has_all_rules say the same of types.
inline bool is_staged(const Piece& piece) {
  const Bucket& bucket = *piece.bucket;
  const int64_t type = bucket.param_dtype, states = state_dtype(bucket), mode = bucket.flags & flag::low_precision;
  const bool half = type == dtype::bfloat16 || type == dtype::float16, is_bfloat16 = type == dtype::bfloat16;
  if (type == dtype::float64) return false;
  if (bucket.grad_dtype != type || (half && !kLoads16Bit)) return true;
  const bool eight_bit = bucket.flags & flag::eight_bit, is_common = !(bucket.flags & (flag::cautious | flag::amsgrad));
  if (is_first_step(piece) && (type != dtype::float32 || states != dtype::float32 || eight_bit)) return true;
  if (eight_bit) {
    const bool has_kernel = mode == 0 || mode == flag::remainder || mode == flag::remainder8;
    return !kGroupIsTwoVectors || !is_common || !has_kernel || type == dtype::float16;
  }
  if (mode != 0) {
    const int64_t of_bfloat16 = flag::remainder | flag::remainder8 | flag::stochastic | flag::kahan;
    const bool has_kernel = mode == flag::master || (is_bfloat16 && mode & of_bfloat16);
    return !is_common || !has_kernel || (has_states(bucket) && states != dtype::float32);
  }
  if (states == type || (half && states == dtype::float32)) return false;
  return half || !is_common || !kLoads16Bit || states != dtype::bfloat16;
}

inline double sum_of_changes(const float* before, const float* after, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double change = static_cast<double>(after[i]) - static_cast<double>(before[i]);
    sum += change * change;
  }
  return sum;
}

inline double sum_of_returned(const float* before, const float* exact, const float* after, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i)
    sum += static_cast<double>(before[i]) * (static_cast<double>(after[i]) - static_cast<double>(exact[i]));
  return sum;
}

// The stretches of a piece of such a tensor: brought to float32, and back.
struct Staged {
  const Piece& piece;
  int states;
  bool reads_states, eight_bit, random;
  Stretch param, grad, state[3];
  float* state_at[3];
  alignas(64) uint32_t bits[kStretch];
  alignas(64) float before[kStretch], exact[kStretch];

  Staged(const Piece& given, int state_count, bool reads)
      : piece(given),
        states(state_count),
        reads_states(reads),
        eight_bit(given.bucket->flags & flag::eight_bit),
        random(given.bucket->flags & (flag::kahan | flag::stochastic | flag::remainder8 | flag::eight_bit)) {}

  int64_t state_address(int k) const { return piece.row[column::state0 + k]; }

  FUSED_L2_NOINLINE void load(const Piece& here) {
    load_param(here, param);
    grad.load(piece.row[column::grad], piece.bucket->grad_dtype, here.begin, here.count, true);
    for (int k = 0; k < states; ++k) {
      if (eight_bit) {
        with_codes(piece.bucket->rule, k, [&](auto codes) {
          state[k].load_codes<decltype(codes)>(state_address(k), piece.row[column::scale0 + k], here.begin, here.count,
                                               reads_states);
        });
      } else {
        state[k].load(state_address(k), piece.bucket->state_dtype, here.begin, here.count, reads_states);
      }
      state_at[k] = state[k].at;
    }
  }

  FUSED_L2_NOINLINE void store(const Piece& here, double step) {
    if (random) {
      const RandomBits hash(here, step);
      for (int64_t i = 0; i < here.count; ++i) bits[i] = hash(static_cast<uint32_t>(i));
    }
    store_param(here, param, bits);
    for (int k = 0; k < states; ++k) {
      if (eight_bit) {
        with_codes(piece.bucket->rule, k, [&](auto codes) {
          state[k].store_codes<decltype(codes)>(state_address(k), piece.row[column::scale0 + k], here.begin, here.count,
                                                bits);
        });
      } else {
        state[k].store(state_address(k), piece.bucket->state_dtype, here.begin, here.count);
      }
    }
  }
};

// One step of a piece by `loop(param, grad, states, count, measured)`, which steps float32 tensors.
template <class Loop> void step_staged(const Piece& piece, int states, bool reads_states, Loop&& loop) {
  Staged staged(piece, states, reads_states);
  const double step = piece.bucket->coefficients[piece.row[column::coefficients] * kCoefficients + kStepCount];
  const int64_t stretch = piece.streams ? kStreamingStretch : kStretch;
  const bool rounds = !(piece.bucket->flags & (flag::master | flag::remainder));
  for (int64_t done = 0; done < piece.count; done += stretch) {
    Piece here = piece;
    here.begin += done;
    here.count = std::min(stretch, piece.count - done);
    staged.load(here);
    float* const param = staged.param.at;
    if (piece.measured == nullptr) {
      loop(param, staged.grad.at, staged.state_at, here.count, nullptr);
      staged.store(here, step);
      continue;
    }
    double measured[statistic::count] = {};
    std::copy(param, param + here.count, staged.before);
    loop(param, staged.grad.at, staged.state_at, here.count, measured);
    std::copy(param, param + here.count, staged.exact);
    staged.store(here, step);
    load_param(here, staged.param);  // as it was rounded
    piece.measured[statistic::grads] += measured[statistic::grads];
    piece.measured[statistic::params] += measured[statistic::params];
    piece.measured[statistic::updates] += sum_of_changes(staged.before, staged.param.at, here.count);
    if (rounds)
      piece.measured[statistic::returned] += sum_of_returned(staged.before, staged.exact, staged.param.at, here.count);
  }
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
