// Steps of tensors whose dtypes no kernel has of its own, and of 16-bit parameters that keep more than 16 bits.
//
// A stretch of a tensor is brought to float32 in buffers that stay in the first caches, stepped there by the float32
// kernel, and brought back. fused_l2/parameters/low_precision.py is the definition of what is kept and how it is
// rounded. No include guard: compiled once per instruction set by foreach_capability.h.
#include "parallel.h"

namespace fused_l2 {
namespace FUSED_L2_NAMESPACE {

// Branch-free loops over stretches, which compilers make vectors of. Short ones: what one stretch writes and the next
// one reads overlaps in the processor's queues. 2048 elements took a third longer (AMD EPYC, 25M elements).

constexpr int64_t kStretch = 256;

FUSED_L2_INLINE uint32_t mix(uint32_t x) {  // Wellons 2018, "lowbias32"
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ x >> 16;
}

// The random bits of one tensor at one step: a hash of where they are used.
struct RandomBits {
  uint32_t key, first;

  RandomBits(const Piece& piece, double step) {
    const auto column = static_cast<uint64_t>(piece.row[column::key]);
    key = mix(static_cast<uint32_t>(column) ^ mix(static_cast<uint32_t>(step)));
    first = static_cast<uint32_t>(column >> 32) + static_cast<uint32_t>(piece.begin);
  }
  FUSED_L2_INLINE uint32_t operator()(uint32_t element) const { return mix(mix((first + element) ^ key) + key); }
};

FUSED_L2_INLINE BFloat16 rounded_stochastically(float w, uint32_t random, BFloat16) {
  const uint32_t u = bits_of(w);
  const bool nan = (u & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(nan ? u >> 16 | 0x40 : (u + (random >> 16)) >> 16)};
}
FUSED_L2_INLINE Float16 rounded_stochastically(float w, uint32_t random, Float16) {
  const uint32_t u = bits_of(w), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + (random >> 19)) >> 13;
  const bool small = magnitude < 0x38800000;  // below 2^-14 the last place is 2^-24 throughout
  const float units = float_of(small ? magnitude : 0) * 0x1p24f;
  const auto whole = static_cast<int32_t>(units);
  const bool upwards =
      static_cast<float>(static_cast<int32_t>(random >> 8)) * 0x1p-24f < units - static_cast<float>(whole);
  uint32_t rounded = small ? static_cast<uint32_t>(whole) + upwards : normal;
  rounded = magnitude >= 0x47800000 ? 0x7c00 : rounded;
  rounded = magnitude > 0x7f800000 ? 0x7e00 : rounded;
  return {static_cast<uint16_t>(sign | rounded)};
}

// |w| = |p| * 2^16 + remainder, magnitudes as integers; p is rounded to nearest, ties away from zero.
FUSED_L2_INLINE void split(float w, BFloat16& p, int16_t& remainder) {
  const uint32_t u = bits_of(w), magnitude = u & 0x7fffffff, upper = (magnitude + 0x8000) >> 16;
  const bool nan = magnitude > 0x7f800000;
  p.bits = static_cast<uint16_t>(nan ? u >> 16 | 0x40 : (u >> 16 & 0x8000) | upper);
  remainder = static_cast<int16_t>(nan ? 0 : magnitude - (upper << 16));
}
FUSED_L2_INLINE float join(BFloat16 p, int16_t remainder) {
  const uint32_t u = p.bits;
  const auto magnitude = static_cast<int32_t>((u & 0x7fff) << 16);
  // Of what is no NaN neither sum can overflow.
  int32_t joined = magnitude > 0x7f800000 ? magnitude : magnitude + remainder;
  joined = joined < 0 ? 0 : joined;
  joined = magnitude <= 0x7f800000 && joined > 0x7f800000 ? 0x7f800000 : joined;
  return float_of((u & 0x8000) << 16 | static_cast<uint32_t>(joined));
}

FUSED_L2_INLINE float half_unit(float p, BFloat16) { return std::max(std::fabs(p) * 0x1p-8f, 0x1p-134f); }
FUSED_L2_INLINE float half_unit(float p, Float16) { return std::max(std::fabs(p) * 0x1p-11f, 0x1p-25f); }

template <class P> FUSED_L2_INLINE P narrowed(float w) {
  P p;
  narrow(w, p);
  return p;
}

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
};

template <class P> void load_kept(const Piece& piece, const P* p, float* w) {
  const int64_t flags = piece.bucket->flags, begin = piece.begin, count = piece.count;
  if (flags & flag::master) {
    const float* master = address<const float>(piece.row[column::kept]) + begin;
    for (int64_t i = 0; i < count; ++i) {
      const float own = widen(p[i]), kept = master[i];
      w[i] = narrowed<P>(kept).bits == p[i].bits ? kept : own;
    }
  } else if (flags & flag::kahan) {
    const BFloat16* kept = address<const BFloat16>(piece.row[column::kept]) + begin;
    for (int64_t i = 0; i < count; ++i) {
      const float own = widen(p[i]), c = widen(kept[i]), sum = own + c;
      w[i] = std::fabs(c) <= half_unit(own, P{}) ? sum : own;
    }
  } else {
    widen_all(p, w, count);
  }
}

template <class P> void store_kept(const Piece& piece, double step, const float* w, P* p) {
  const int64_t flags = piece.bucket->flags, begin = piece.begin, count = piece.count;
  const RandomBits random(piece, step);
  if (flags & flag::stochastic) {
    for (int64_t i = 0; i < count; ++i) p[i] = rounded_stochastically(w[i], random(static_cast<uint32_t>(i)), P{});
    return;
  }
  narrow_all(w, p, count);
  if (flags & flag::master) {
    std::memcpy(address<float>(piece.row[column::kept]) + begin, w, static_cast<size_t>(count) * sizeof(float));
  } else if (flags & flag::kahan) {
    BFloat16* kept = address<BFloat16>(piece.row[column::kept]) + begin;
    for (int64_t i = 0; i < count; ++i) {
      const float left = w[i] - widen(p[i]);
      const float finite = std::fabs(left) <= 3.4028234663852886e38f ? left : 0;
      kept[i] = rounded_stochastically(finite, random(static_cast<uint32_t>(i)), BFloat16{});
    }
  }
}

inline void load_param(const Piece& piece, Stretch& w) {
  const Row row = piece.row;
  const int64_t begin = piece.begin, count = piece.count, type = piece.bucket->param_dtype;
  w.at = w.buffer;
  if (piece.bucket->flags & flag::remainder) {
    const BFloat16* p = address<const BFloat16>(row[column::param]) + begin;
    const int16_t* remainder = address<const int16_t>(row[column::kept]) + begin;
    for (int64_t i = 0; i < count; ++i) w.buffer[i] = join(p[i], remainder[i]);
  } else if (type == dtype::bfloat16) {
    load_kept(piece, address<const BFloat16>(row[column::param]) + begin, w.buffer);
  } else if (type == dtype::float16) {
    load_kept(piece, address<const Float16>(row[column::param]) + begin, w.buffer);
  } else {
    w.at = address<float>(row[column::param]) + begin;
  }
}

inline void store_param(const Piece& piece, double step, const Stretch& w) {
  const Row row = piece.row;
  const int64_t begin = piece.begin, count = piece.count, type = piece.bucket->param_dtype;
  if (piece.bucket->flags & flag::remainder) {
    BFloat16* p = address<BFloat16>(row[column::param]) + begin;
    int16_t* remainder = address<int16_t>(row[column::kept]) + begin;
    for (int64_t i = 0; i < count; ++i) split(w.buffer[i], p[i], remainder[i]);
  } else if (type == dtype::bfloat16) {
    store_kept(piece, step, w.buffer, address<BFloat16>(row[column::param]) + begin);
  } else if (type == dtype::float16) {
    store_kept(piece, step, w.buffer, address<Float16>(row[column::param]) + begin);
  }
}

// Whether a bucket's dtypes, or what it keeps, are none that a kernel has of its own.
inline bool is_staged(const Bucket& bucket) {
  const bool half = bucket.param_dtype == dtype::bfloat16 || bucket.param_dtype == dtype::float16;
  const bool own_states = bucket.state_dtype == bucket.param_dtype || (half && bucket.state_dtype == dtype::float32);
  return bucket.flags & flag::low_precision || bucket.grad_dtype != bucket.param_dtype || !own_states;
}

inline double sum_of_changes(const float* before, const float* after, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double change = static_cast<double>(after[i]) - static_cast<double>(before[i]);
    sum += change * change;
  }
  return sum;
}

// One step of a piece by `kernel`, a stretch at a time.
inline void step_staged(const Piece& piece, int states, PieceFunction kernel) {
  Stretch param, grad, state[3];
  alignas(64) float before[kStretch];
  Bucket bucket = *piece.bucket;
  bucket.flags &= ~int64_t(flag::low_precision);
  bucket.param_dtype = bucket.grad_dtype = bucket.state_dtype = dtype::float32;
  const double step = bucket.coefficients[piece.row[column::coefficients] * kCoefficients + kStepCount];
  const bool reads = !(bucket.rule == rule::sgd && piece.row[column::flags] & row_flag::first_step);
  int64_t row[column::count];
  std::copy(piece.row, piece.row + column::count, row);
  for (int64_t done = 0; done < piece.count; done += kStretch) {
    Piece here = piece;
    here.begin += done;
    here.count = std::min(kStretch, piece.count - done);
    load_param(here, param);
    grad.load(piece.row[column::grad], piece.bucket->grad_dtype, here.begin, here.count, true);
    row[column::param] = static_cast<int64_t>(reinterpret_cast<intptr_t>(param.at));
    row[column::grad] = static_cast<int64_t>(reinterpret_cast<intptr_t>(grad.at));
    for (int k = 0; k < states; ++k) {
      state[k].load(piece.row[column::state0 + k], piece.bucket->state_dtype, here.begin, here.count, reads);
      row[column::state0 + k] = static_cast<int64_t>(reinterpret_cast<intptr_t>(state[k].at));
    }
    double measured[statistic::count] = {};
    Piece staged{&bucket, row, 0, here.count, piece.prefetch, piece.measured ? measured : nullptr};
    if (piece.measured) std::copy(param.at, param.at + here.count, before);
    kernel(staged);
    store_param(here, step, param);
    for (int k = 0; k < states; ++k)
      state[k].store(piece.row[column::state0 + k], piece.bucket->state_dtype, here.begin, here.count);
    if (piece.measured) {
      load_param(here, param);  // as it was rounded
      piece.measured[statistic::grads] += measured[statistic::grads];
      piece.measured[statistic::params] += measured[statistic::params];
      piece.measured[statistic::updates] += sum_of_changes(before, param.at, here.count);
    }
  }
}

}  // namespace FUSED_L2_NAMESPACE
}  // namespace fused_l2
