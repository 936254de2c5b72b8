// How the CPU kernels cut work into tasks and hand them to threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace ltkernels {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Threads for so many multiply-adds: waking one costs what some 2^18 of them do.
inline int64_t worker_count(double multiply_adds) {
  const double threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  return static_cast<int64_t>(std::clamp(multiply_adds * 0x1p-18, 1.0, threads));
}

template <class F>
void for_each(int64_t workers, int64_t tasks, const F& f) {  // f(worker, task), dynamic: cores need not be equally fast
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      for (int64_t task; (task = next++) < tasks;) f(w, task);
    }
  });
}

}  // namespace ltkernels
