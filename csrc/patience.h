// When a small step is worth a second thread.
#pragma once
#include <algorithm>
#include <atomic>

namespace fused_l2 {

// Whether small steps are shared out. They are, until the caller had to wait for others longer than it worked itself,
// which is no gain. Then some steps are made by the caller alone, and twice as many each time that happens again.
class Patience {
 public:
  bool shares() {
    const int left = alone_.load(std::memory_order_relaxed);
    if (left > 0) alone_.store(left - 1, std::memory_order_relaxed);
    return left <= 0;
  }
  void learn(bool waited_in_vain) {
    const int steps = steps_.load(std::memory_order_relaxed);
    if (waited_in_vain) alone_.store(steps, std::memory_order_relaxed);
    steps_.store(waited_in_vain ? std::min(2 * steps, 4096) : std::max(steps / 2, 16), std::memory_order_relaxed);
  }

 private:
  std::atomic<int> alone_{0}, steps_{16};
};

}  // namespace fused_l2
