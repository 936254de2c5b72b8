// The order in which the rows of a bank are searched, and cells of near rows that rule each other out.
//
// Without cells, chunks of the bank follow each other as a golden ratio scatters them: a bank sorted by distance, whose queues
// would fill and empty all the time, costs what any other order does. A file is read from its beginning to its end. With cells, rows lie
// cell by cell. By the triangle inequality
// |x - z| >= |a - b| - |x - a| - |z - b| for rows x, z of the cells of pivots a, b: cells whose rows all have k nearer rows already are never
// multiplied. Pivots are the farthest points of a sample from each other, one after the other, so that each of as many clusters gets one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "../common/cpu_memory.h"
#include "../common/cpu_tasks.h"
#include "cpu_isa.h"

namespace ltkernels {
namespace {

constexpr float kLargestNorm = 1e37f;  // beyond, sums of norms and products could overflow: such rows are in no cell

template <class T>
class Cells {
 public:
  // The rows of a bank, what is to be subtracted from them, and their squared norms after that.
  Cells(const T* points, const float* centre, const float* sqnorm, int64_t n, int64_t d, bool in_file)
      : points_(points), centre_(centre), sqnorm_(sqnorm), n_(n), d_(d) {
    while (shift_ < 8 && (int64_t(sizeof(T)) * d << shift_) < kChunkBytes) ++shift_;
    const int64_t chunks = n >> shift_;  // a shorter one at the end stays there
    int64_t stride = std::max<int64_t>(1, static_cast<int64_t>(in_file ? 1 : 0.6180339887 * chunks));
    while (std::gcd(stride, chunks) > 1) ++stride;
    for (int64_t i = 0, chunk = 0; i < chunks; ++i, chunk = (chunk + stride) % chunks) first_.push_back(chunk << shift_);
    first_.push_back(chunks << shift_);
  }

  bool any() const { return !radius_.empty(); }
  uint32_t row(int64_t position) const {
    return any() ? order_[position] : first_[position >> shift_] + (position & ((1 << shift_) - 1));
  }
  int64_t at(int64_t position) const {  // the cell of a position
    return std::upper_bound(begin_.begin(), begin_.end(), position) - begin_.begin() - 1;
  }
  int64_t end(int64_t cell) const { return begin_[cell + 1]; }

  double width(int64_t cell) const { return 4 * radius_[cell] * radius_[cell]; }  // no two rows are farther apart, squared

  // A value below the squared distance, as it is computed, of every row of one cell to every row of the other; 0 if unknown.
  double nearest(int64_t a, int64_t b) const {
    const double span = radius_[a] + radius_[b];
    if (!(span < std::numeric_limits<double>::infinity())) return 0;
    // The centred rows, their distances and those to the pivots are rounded to 2^-24 each; 2^-20 covers their sum.
    const double gap = distance_[a * count() + b] * (1 - kRounding) - span * (1 + kRounding) -
                       kRounding * (norm_[a] + norm_[b] + span);
    return gap > 0 ? gap * gap * (1 - 4 * kRounding) - 0x1p-120 * d_ : 0;
  }

  // Orders the rows by cells, if the bank looks as if that could pay.
  void find() {
    if (n_ < 4 * kSample) return;
    const auto centre = isa::row_ops<T>(isa::level()).centre;
    Rows sample{{}, std::vector<float>(kSample * d_)};
    for (int64_t i = 0; i < kSample; ++i) {
      const uint32_t id = row(i * n_ / kSample);
      if (!(sqnorm_[id] <= kLargestNorm)) continue;
      sample.sqnorm.push_back(centre(points_ + id * d_, centre_, d_, sample.rows.data() + sample.size() * d_));
    }
    if (sample.size() < kSample / 2 || !clustered(sample)) return;
    assign(farthest_points(sample, std::min<int64_t>(kMostCells, n_ / 64)));
  }

 private:
  static constexpr int64_t kChunkBytes = 64 * 1024, kSample = 1024, kProbes = 33, kMostCells = 256;
  static constexpr double kRounding = 0x1p-20;

  struct Rows {
    std::vector<double> sqnorm;
    std::vector<float> rows;
    int64_t size() const { return sqnorm.size(); }
  };

  int64_t count() const { return radius_.size(); }

  // Squared, of one row to all of them, by a product that may err: nothing exact depends on which pivots are chosen.
  std::vector<float> distances(const Rows& from, int64_t to) const {
    std::vector<float> f(from.size());
    torch::stable::parallel_for(0, from.size(), 256, [&](int64_t first, int64_t last) {
      ops_.thin(from.rows.data() + first * d_, last - first, d_, from.rows.data() + to * d_, 1, f.data() + first);
      for (int64_t i = first; i < last; ++i) f[i] = static_cast<float>(from.sqnorm[i] + from.sqnorm[to] - 2 * double(f[i]));
    });
    return f;
  }

  // Whether rows have a neighbour in the sample at half of the median distance or nearer.
  bool clustered(const Rows& sample) const {
    int64_t near = 0;
    for (int64_t i = 0; i < kProbes; ++i) {
      const int64_t probe = i * sample.size() / kProbes;
      std::vector<float> f = distances(sample, probe);
      f[probe] = std::numeric_limits<float>::infinity();
      const float nearest = *std::min_element(f.begin(), f.end());
      std::nth_element(f.begin(), f.begin() + f.size() / 2, f.end());
      near += 4 * nearest <= f[f.size() / 2];
    }
    return 2 * near > kProbes;
  }

  Rows farthest_points(const Rows& sample, int64_t most) const {
    Rows pivots;
    std::vector<float> nearest(sample.size(), std::numeric_limits<float>::infinity());
    float spread = 0;
    for (int64_t pivot = 0; pivots.size() < most; pivot = std::max_element(nearest.begin(), nearest.end()) - nearest.begin()) {
      if (pivots.size() > 0 && 16 * nearest[pivot] <= spread) break;  // every cluster has its pivot: more would cut them up
      const float* row = sample.rows.data() + pivot * d_;
      pivots.rows.insert(pivots.rows.end(), row, row + d_);
      pivots.sqnorm.push_back(sample.sqnorm[pivot]);
      const std::vector<float> f = distances(sample, pivot);
      if (pivots.size() == 1) spread = *std::max_element(f.begin(), f.end());
      for (size_t i = 0; i < f.size(); ++i) nearest[i] = std::min(nearest[i], f[i]);
    }
    return pivots;
  }

  // Every row goes to the nearest pivot, by a product that may err: what counts is the distance to the pivot chosen.
  void assign(const Rows& pivots) {
    const int64_t cells = pivots.size(), length = divide_up(d_, ops_.entries), panels = divide_up(cells, ops_.cols);
    const std::vector<float> zeros(d_);
    AlignedVector<float> packed(panels * ops_.cols * length), words(ops_.cols * length);
    std::vector<float> scale(panels * ops_.cols, 1.f);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const float* rows[isa::kMaxTileCols];
      float sqnorm[isa::kMaxTileCols] = {};
      for (int64_t r = 0, c = panel * ops_.cols; r < ops_.cols; ++r, ++c) {
        rows[r] = c < cells ? pivots.rows.data() + c * d_ : zeros.data();
        if (c < cells) sqnorm[r] = static_cast<float>(pivots.sqnorm[c]);
      }
      float* out = packed.data() + panel * ops_.cols * length;
      isa::make_panel(ops_, ops_.pack_cols, rows, sqnorm, ops_.cols, d_, words.data(), scale.data() + panel * ops_.cols,
                      [&](int64_t depth, int64_t) { return out + depth * ops_.cols; });
    }
    const auto centre = isa::row_ops<T>(isa::level()).centre;
    std::vector<uint32_t> cell(n_);
    std::vector<float> radius(n_);
    torch::stable::parallel_for(0, divide_up(n_, ops_.rows), 16, [&](int64_t first, int64_t last) {
      std::vector<float> shifted(ops_.rows * d_), own_scale(ops_.rows, 1.f), least(ops_.rows);
      AlignedVector<float> own(ops_.rows * length), words(ops_.rows * length), tile(ops_.rows * ops_.cols);
      for (int64_t i = first * ops_.rows; i < std::min(n_, last * ops_.rows); i += ops_.rows) {
        const int64_t count = std::min<int64_t>(ops_.rows, n_ - i);
        const float* rows[isa::kMaxTileRows];
        float sqnorm[isa::kMaxTileRows] = {};
        for (int64_t r = 0; r < ops_.rows; ++r) {
          rows[r] = zeros.data(), least[r] = std::numeric_limits<float>::infinity();
          if (r >= count) continue;
          cell[i + r] = cells;
          if (!(sqnorm_[i + r] <= kLargestNorm)) continue;
          cell[i + r] = 0, rows[r] = shifted.data() + r * d_, sqnorm[r] = sqnorm_[i + r];
          centre(points_ + (i + r) * d_, centre_, d_, shifted.data() + r * d_);
        }
        isa::make_panel(ops_, ops_.pack_rows, rows, sqnorm, ops_.rows, d_, words.data(), own_scale.data(),
                        [&](int64_t depth, int64_t) { return own.data() + depth * ops_.rows; });
        for (int64_t begin = 0; begin < cells; begin += ops_.cols) {
          for (int64_t depth = 0; depth < length; depth += isa::kDepth) {
            const float* columns = packed.data() + begin * length + depth * ops_.cols;
            ops_.multiply(own.data() + depth * ops_.rows, columns, std::min(isa::kDepth, length - depth), depth > 0, tile.data());
          }
          for (int64_t r = 0; r < count; ++r) {
            if (cell[i + r] == cells) continue;
            for (int64_t c = begin; c < std::min(cells, begin + ops_.cols); ++c) {
              const float product = ops_.product(tile[r * ops_.cols + c - begin]) * own_scale[r] * scale[c];
              const float key = static_cast<float>(0.5 * pivots.sqnorm[c]) - product;
              if (key < least[r]) least[r] = key, cell[i + r] = c;
            }
          }
        }
        for (int64_t r = 0; r < count; ++r) {
          if (cell[i + r] == cells) continue;
          double f;
          floats_.distances(shifted.data() + r * d_, pivots.rows.data(), d_, &cell[i + r], 1, nullptr, &f);
          radius[i + r] = static_cast<float>(std::sqrt(f));
        }
      }
    });
    lay_out(pivots, cell, radius);
  }

  // Cells follow each other from neighbour to neighbour, so that blocks hold near cells; rows keep their order within a cell.
  void lay_out(const Rows& pivots, const std::vector<uint32_t>& cell, const std::vector<float>& radius) {
    const int64_t cells = pivots.size();
    std::vector<uint32_t> chain{0};
    std::vector<uint8_t> used(cells);
    std::vector<uint32_t> all(cells);
    std::iota(all.begin(), all.end(), 0);
    std::vector<std::vector<double>> f(cells, std::vector<double>(cells));
    torch::stable::parallel_for(0, cells, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        const float* rows = pivots.rows.data();
        floats_.distances(rows + c * d_, rows, d_, all.data(), cells, nullptr, f[c].data());
      }
    });
    for (used[0] = 1; static_cast<int64_t>(chain.size()) < cells; used[chain.back()] = 1) {
      int64_t next = -1;
      for (int64_t c = 0; c < cells; ++c) {
        if (!used[c] && (next < 0 || f[chain.back()][c] < f[chain.back()][next])) next = c;
      }
      chain.push_back(next);
    }
    std::vector<uint32_t> scattered(n_);
    for (int64_t i = 0; i < n_; ++i) scattered[i] = row(i);
    // One more cell, without a bound, holds the rows that are in none.
    radius_.assign(cells + 1, 0), norm_.assign(cells + 1, 0), distance_.assign((cells + 1) * (cells + 1), 0);
    radius_[cells] = std::numeric_limits<double>::infinity();
    std::vector<uint32_t> place(cells + 1, cells);
    for (int64_t a = 0; a < cells; ++a) {
      place[chain[a]] = a;
      norm_[a] = std::sqrt(pivots.sqnorm[chain[a]]);
      for (int64_t b = 0; b < cells; ++b) distance_[a * (cells + 1) + b] = std::sqrt(f[chain[a]][chain[b]]);
    }
    begin_.assign(cells + 2, 0);
    for (int64_t row = 0; row < n_; ++row) {
      const uint32_t at = place[cell[row]];
      ++begin_[at + 1];
      if (at < cells) radius_[at] = std::max<double>(radius_[at], radius[row]);
    }
    std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
    std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
    order_.resize(n_);
    for (const uint32_t row : scattered) order_[next[place[cell[row]]]++] = row;
  }

  const T* points_;
  const float *centre_, *sqnorm_;
  int64_t n_, d_;
  int shift_ = 5;                // chunks have 2^shift rows
  std::vector<uint32_t> first_;  // of each chunk of positions: its first row
  const isa::RowOps<float> floats_ = isa::row_ops<float>(isa::level());
  const isa::TileOps ops_ = isa::tile_ops(isa::level());
  std::vector<uint32_t> order_;  // position -> row, once there are cells
  std::vector<int64_t> begin_;
  std::vector<double> radius_, norm_, distance_;  // of a cell: farthest row from its pivot; |pivot|; between pivots
};

}  // namespace
}  // namespace ltkernels
