#include "parallel.h"

#include "capability.h"
#include "float_mode.h"
#include "patience.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <vector>

namespace fused_l2 {
namespace {

// What a thread takes at a time: small enough to even out the ends, large enough that streams run.
constexpr int64_t kChunk = 16384;
// Cuts inside a tensor fall on multiples of this, so that threads share no cache line of an aligned tensor.
constexpr int64_t kCut = 64;
// A step that touches more than this many bytes does not fit the caches. Asking for memory ahead then gains 10 to 13 %
// on Intel (Sapphire Rapids) and costs 3 to 13 % on AMD (Zen 4), whose own prefetchers are enough.
constexpr int64_t kStreamsFrom = int64_t(48) << 20;

// Below this many elements a step is shorter than waking a thread.
constexpr int64_t kSerialElements = 32768;
// Below this many a step takes less than a millisecond, and a thread that has to wait for a busy core, as beside data
// loaders, takes longer to begin than the caller to do its share.
constexpr int64_t kSmallElements = int64_t(1) << 20;

TorchThreads torch_threads{nullptr, nullptr};

// The rows of all buckets in one line of elements.
struct Line {
  struct Entry {
    const Bucket* bucket;
    Row row;
  };
  std::vector<Entry> entries;
  std::vector<int64_t> first;  // first[i]: position of entry i; the last one is the total
  bool streams;

  Line(const Bucket* buckets, int64_t count) {
    size_t rows = 0;
    for (int64_t b = 0; b < count; ++b) rows += static_cast<size_t>(buckets[b].rows);
    entries.reserve(rows);
    first.reserve(rows + 1);
    int64_t position = 0;
    for (int64_t b = 0; b < count; ++b) {
      for (int64_t r = 0; r < buckets[b].rows; ++r) {
        const Row row = buckets[b].row(r);
        if (row[column::numel] == 0) continue;  // an empty tensor has no place in the line
        entries.push_back({&buckets[b], row});
        first.push_back(position);
        position += row[column::numel];
      }
    }
    first.push_back(position);
    streams = streams_from_memory(position);
  }

  int64_t size() const { return first.back(); }
  size_t entry_of(int64_t position) const {
    return static_cast<size_t>(std::upper_bound(first.begin(), first.end(), position) - first.begin()) - 1;
  }
  int64_t cut(int64_t position) const {
    if (position <= 0) return 0;
    if (position >= size()) return size();
    const int64_t start = first[entry_of(position)];
    return start + (position - start) / kCut * kCut;
  }
  void visit(int64_t begin, int64_t end, PieceFunction f) const {
    if (begin >= end) return;
    for (size_t i = entry_of(begin); begin < end; ++i) {
      const int64_t stop = std::min(end, first[i + 1]);
      f(Piece{entries[i].bucket, entries[i].row, begin - first[i], stop - begin, streams, streams && is_intel()});
      begin = stop;
    }
  }
};

// Each thread owns a contiguous range of chunks and, once done, takes chunks from the far end of another's.
struct Shares {
  struct Share {
    std::atomic<uint64_t> range;                       // first chunk in the upper half, one past the last in the lower
    char padding[64 - sizeof(std::atomic<uint64_t>)];  // shares of different threads lie in different cache lines
  };
  std::unique_ptr<Share[]> shares;
  int64_t count;

  Shares(int64_t chunks, int64_t threads) : shares(new Share[static_cast<size_t>(threads)]), count(threads) {
    for (int64_t t = 0; t < threads; ++t)
      shares[t].range.store(uint64_t(chunks * t / threads) << 32 | uint64_t(chunks * (t + 1) / threads));
  }
  bool take(int64_t owner, bool from_front, int64_t& chunk) {
    std::atomic<uint64_t>& range = shares[owner].range;
    uint64_t seen = range.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t front = seen >> 32, back = seen & 0xffffffff;
      if (front >= back) return false;
      const uint64_t left = from_front ? (front + 1) << 32 | back : front << 32 | (back - 1);
      if (range.compare_exchange_weak(seen, left, std::memory_order_relaxed)) {
        chunk = static_cast<int64_t>(from_front ? front : back - 1);
        return true;
      }
    }
  }
};

using Clock = std::chrono::steady_clock;

struct IndexedCall {
  void (*f)(void*, int64_t);
  void* context;
};

// Calls f(context, index) for 0 <= index < count on torch's threads; if torch fails, for all of them once more.
void for_each_index(int64_t count, void (*f)(void*, int64_t), void* context) {
  const auto serial = [&](int64_t begin) {
    for (int64_t i = begin; i < count; ++i) f(context, i);
  };
  if (count <= 1 || thread_count() == 1) return serial(0);
  IndexedCall call{f, context};
  const auto range = [](int64_t begin, int64_t end, void* opaque) {
    const auto* c = static_cast<IndexedCall*>(opaque);
    const DefaultFloatMode mode;  // each thread has its own
    for (int64_t i = begin; i < end; ++i) c->f(c->context, i);
  };
  // An error leaves some indices undone: f has to bear being called again for those that were done.
  if (torch_threads.parallel_for(0, count, 1, range, &call) != 0) serial(0);
}

// f(index) for what is left of 0 <= index < count, by all of torch's threads. `small`: what one thread does in less
// than a millisecond. Nothing is allocated once *begun is set.
template <class F> void share_out(int64_t count, bool small, F&& f, int64_t* begun, Patience& patience) {
  struct Work {
    Shares shares;
    F& f;
    std::thread::id caller;
    Clock::time_point done;  // when the caller found nothing more to do
  } work{Shares(count, thread_count()), f, std::this_thread::get_id(), {}};
  *begun = 1;
  const auto run = [](void* opaque, int64_t thread) {
    Work& w = *static_cast<Work*>(opaque);
    int64_t taken;
    for (int64_t hop = 0; hop < w.shares.count; ++hop) {
      const int64_t owner = (thread + hop) % w.shares.count;
      while (w.shares.take(owner, hop == 0, taken)) w.f(taken);
    }
    if (std::this_thread::get_id() == w.caller) w.done = Clock::now();
  };
  if (!small) return for_each_index(work.shares.count, run, &work);
  const Clock::time_point begin = Clock::now();
  for_each_index(work.shares.count, run, &work);
  const Clock::duration worked = work.done - begin, waited = Clock::now() - work.done;
  patience.learn(waited > worked);
}

// Whether the calling thread makes a step of so many elements alone.
bool is_alone(int64_t elements, Patience& patience) {
  return thread_count() == 1 || elements < kSerialElements || (elements < kSmallElements && !patience.shares());
}

}  // namespace

Patience step_patience;

void use_threads_of(const TorchThreads& threads) { torch_threads = threads; }

int64_t thread_count() {
  uint32_t count = 1;
  if (torch_threads.parallel_for == nullptr || torch_threads.num_threads == nullptr) return 1;
  if (torch_threads.num_threads(&count) != 0) return 1;
  return std::max<int64_t>(count, 1);
}

bool streams_from_memory(int64_t elements) {
  return elements * 16 > kStreamsFrom;  // 16: param, grad and two states of float32
}

void for_each_once(int64_t count, int64_t elements, void (*f)(void*, int64_t), void* context, int64_t* begun,
                   Patience& patience) {
  if (is_alone(elements, patience)) {
    *begun = 1;
    for (int64_t i = 0; i < count; ++i) f(context, i);
  } else {
    share_out(count, elements < kSmallElements, [&](int64_t i) { f(context, i); }, begun, patience);
  }
}

void for_each_piece(const Bucket* buckets, int64_t count, PieceFunction f, int64_t* begun) {
  const Line line(buckets, count);
  if (is_alone(line.size(), step_patience)) {
    *begun = 1;
    return line.visit(0, line.size(), f);
  }
  // 32 bits hold the chunk numbers of a share: a larger line gets larger chunks.
  const int64_t chunk = std::max(kChunk, (line.size() / (int64_t(1) << 31) + 1) * kCut);
  share_out((line.size() + chunk - 1) / chunk, line.size() < kSmallElements,
            [&](int64_t i) { line.visit(line.cut(i * chunk), line.cut((i + 1) * chunk), f); }, begun, step_patience);
}

}  // namespace fused_l2
