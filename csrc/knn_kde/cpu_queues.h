// What the CPU search keeps of each query row and of each thread, and the schedule of a bank against itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../common/cpu_memory.h"
#include "../common/cpu_tasks.h"
#include "cpu_isa.h"

namespace ltkernels {
namespace {

using isa::Wide;

using AlignedFloats = AlignedVector<float>;

// A candidate: its bank row and a lower bound of (f - |q'|^2) / 2, up to the row's own margin.
struct Candidates {
  float* low;
  uint32_t* id;
};

// Candidate queues of the query rows [first, first + rows).
struct Queues {
  int64_t first = 0, capacity = 0;
  std::vector<float> sqnorm, limit;  // |q'|^2: +inf switches the filter off, NaN (also the limit) the whole row
  std::vector<uint32_t> count;
  std::vector<uint32_t> last;  // where k rows at distance 0 are known: the highest index among them
  std::unique_ptr<std::byte[]> memory;  // a row's lows, then its ids; not initialised: pages are touched as they fill

  void resize(int64_t rows, int64_t row_capacity) {
    capacity = row_capacity;
    sqnorm.resize(rows), limit.resize(rows), count.resize(rows), last.resize(rows);
    memory.reset(new std::byte[rows * capacity * (sizeof(float) + sizeof(uint32_t))]);
  }

  Candidates of(int64_t slot) const {
    std::byte* row = memory.get() + slot * capacity * (sizeof(float) + sizeof(uint32_t));
    return {reinterpret_cast<float*>(row), reinterpret_cast<uint32_t*>(row + capacity * sizeof(float))};
  }
};

// A candidate's place in the order (f, index). For floats one integer: bits of f >= 0 compare as f does, and sorting is twice as fast.
template <class W>
struct Ranked {
  W f_;
  uint32_t id_;
  Ranked() = default;
  Ranked(W f, uint32_t id) : f_(f), id_(id) {}
  W f() const { return f_; }
  uint32_t id() const { return id_; }
  bool operator<(const Ranked& other) const { return f_ < other.f_ || (f_ == other.f_ && id_ < other.id_); }
};

template <>
struct Ranked<float> {
  uint64_t key;
  Ranked() = default;
  Ranked(float f, uint32_t id) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    key = uint64_t(bits) << 32 | id;
  }
  float f() const {
    const auto bits = static_cast<uint32_t>(key >> 32);
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
  uint32_t id() const { return static_cast<uint32_t>(key); }
  bool operator<(const Ranked& other) const { return key < other.key; }
};

// Scratch of one thread.
template <class T>
struct Worker {
  AlignedFloats a, b, tile;                 // packed query block, packed bank block, their products
  std::vector<float> row_floor, col_floor;  // per row of the blocks: low + q'.c
  std::vector<float> row_scale, col_scale;  // per row of the blocks: the unit of its integers
  std::vector<double> row_reach, col_reach;  // per cell of the blocks: the largest distance that still counts
  std::vector<uint8_t> near;                 // pairs of their cells
  std::vector<Range> tiles;                  // to compute of a panel
  std::vector<float> shifted, words, low;
  std::vector<uint32_t> id;
  std::vector<double> f, weight, sum;
  std::vector<Wide<T>> query, buffer;
  std::vector<Ranked<Wide<T>>> place, ranked;
  int64_t packed_bank = -1;
};

// Hands out pairs of blocks (i <= j) so that no block is in two hands; a worker keeps its j while it can, as j is packed.
class PairSchedule {
 public:
  explicit PairSchedule(int64_t blocks) : blocks_(blocks), left_(blocks), busy_(blocks), done_(blocks * blocks) {
    for (int64_t j = 0; j < blocks; ++j) left_[j] = j + 1;
    remaining_ = blocks * (blocks + 1) / 2, near_ = 2 * blocks - 1;
  }

  // Gives back (i, j) unless i < 0 and replaces it by the next pair; false when none is left.
  bool next(int64_t& i, int64_t& j) {
    std::unique_lock lock(mutex_);
    if (i >= 0) busy_[i] = busy_[j] = false;
    while (remaining_ > 0) {
      for (int64_t band = 0; band < 2 && near_ > 0; ++band) {  // with cells these are the near rows, which tighten the limits
        for (int64_t row = 0; row + band < blocks_; ++row) {
          if (try_claim(i, j, row, row + band)) return true;
        }
      }
      if (i >= 0 && take(i, j, j)) return true;
      for (int64_t column = blocks_ - 1; column >= 0; --column) {
        if (take(i, j, column)) return true;
      }
      lock.unlock();  // all that is left touches blocks in other hands
      std::this_thread::yield();
      lock.lock();
    }
    return false;
  }

  // A worker that fails keeps its blocks, and the others would wait for them forever: nothing is left for anybody.
  void abort() {
    const std::lock_guard lock(mutex_);
    remaining_ = 0;
  }

 private:
  bool take(int64_t& i, int64_t& j, int64_t column) {
    if (busy_[column] || left_[column] == 0) return false;
    for (int64_t row = 0; row <= column; ++row) {
      if (try_claim(i, j, row, column)) return true;
    }
    return false;
  }

  bool try_claim(int64_t& i, int64_t& j, int64_t row, int64_t column) {
    if (busy_[row] || busy_[column] || done_[column * blocks_ + row]) return false;
    i = row, j = column;
    busy_[i] = busy_[j] = done_[column * blocks_ + row] = true;
    --left_[column], --remaining_, near_ -= column - row < 2;
    return true;
  }

  int64_t blocks_, remaining_, near_;  // near_: pairs left of a block with itself or the next
  std::vector<int64_t> left_;
  std::vector<uint8_t> busy_, done_;
  std::mutex mutex_;
};

}  // namespace
}  // namespace ltkernels
