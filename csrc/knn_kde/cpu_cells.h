// The order in which the rows of a bank are searched, and cells of near rows that rule each other out.
//
// Without cells, chunks of the bank follow each other as a golden ratio scatters them: a bank sorted by distance, whose queues
// would fill and empty all the time, costs what any other order does. With cells, rows lie cell by cell. By the triangle inequality
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

#include "cpu_isa.h"

namespace ltkernels {
namespace {

constexpr float kLargestNorm = 1e37f;  // beyond, sums of norms and products could overflow: such rows are in no cell

class Cells {
 public:
  std::vector<uint32_t> order;  // position -> row

  // The rows of a bank: its centred copy and their squared norms.
  Cells(const float* centred, const float* sqnorm, int64_t n, int64_t d)
      : centred_(centred), sqnorm_(sqnorm), n_(n), d_(d), rows_(isa::row_ops<float>(isa::level())) {
    scatter();
  }

  bool any() const { return !radius_.empty(); }
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
    std::vector<uint32_t> sample;
    for (int64_t i = 0; i < kSample; ++i) {
      const uint32_t row = order[i * n_ / kSample];
      if (sqnorm_[row] <= kLargestNorm) sample.push_back(row);
    }
    if (n_ < 4 * kSample || sample.size() < kSample / 2 || !clustered(sample)) return;
    const std::vector<uint32_t> pivots = farthest_points(sample, std::min<int64_t>(kMostCells, n_ / 64));
    assign(pivots);
  }

 private:
  static constexpr int64_t kChunk = 32, kSample = 1024, kProbes = 33, kMostCells = 256;
  static constexpr double kRounding = 0x1p-20;

  int64_t count() const { return radius_.size(); }

  void scatter() {
    order.reserve(n_);
    const int64_t chunks = (n_ + kChunk - 1) / kChunk;
    int64_t stride = std::max<int64_t>(1, static_cast<int64_t>(0.6180339887 * chunks));
    while (std::gcd(stride, chunks) != 1) ++stride;
    for (int64_t i = 0, chunk = 0; i < chunks; ++i, chunk = (chunk + stride) % chunks) {
      for (int64_t row = chunk * kChunk; row < std::min(n_, (chunk + 1) * kChunk); ++row) order.push_back(row);
    }
  }

  std::vector<double> distances(uint32_t row, const std::vector<uint32_t>& to) const {  // squared
    std::vector<double> out(to.size());
    rows_.distances(centred_ + row * d_, centred_, d_, to.data(), to.size(), nullptr, out.data());
    return out;
  }

  // Whether rows have a neighbour in the sample at half of the median distance or nearer.
  bool clustered(const std::vector<uint32_t>& sample) const {
    int64_t near = 0;
    for (int64_t i = 0; i < kProbes; ++i) {
      const size_t probe = i * sample.size() / kProbes;
      std::vector<double> f = distances(sample[probe], sample);
      f[probe] = std::numeric_limits<double>::infinity();
      const double nearest = *std::min_element(f.begin(), f.end());
      std::nth_element(f.begin(), f.begin() + f.size() / 2, f.end());
      near += 4 * nearest <= f[f.size() / 2];
    }
    return 2 * near > kProbes;
  }

  std::vector<uint32_t> farthest_points(const std::vector<uint32_t>& sample, int64_t most) const {
    std::vector<uint32_t> pivots{sample[0]};
    std::vector<double> nearest = distances(sample[0], sample);
    const double spread = *std::max_element(nearest.begin(), nearest.end());
    while (static_cast<int64_t>(pivots.size()) < most) {
      const auto farthest = std::max_element(nearest.begin(), nearest.end());
      if (16 * *farthest <= spread) break;  // every cluster has its pivot: more would cut them up
      pivots.push_back(sample[farthest - nearest.begin()]);
      const std::vector<double> f = distances(pivots.back(), sample);
      for (size_t i = 0; i < f.size(); ++i) nearest[i] = std::min(nearest[i], f[i]);
    }
    return pivots;
  }

  // Every row goes to the nearest pivot, by a product that may err: what counts is the distance to the pivot chosen.
  void assign(const std::vector<uint32_t>& pivots) {
    const int64_t cells = pivots.size();
    std::vector<float> centres(cells * d_), half_norm(cells);
    for (int64_t c = 0; c < cells; ++c) {
      std::copy_n(centred_ + pivots[c] * d_, d_, centres.data() + c * d_);
      half_norm[c] = 0.5f * sqnorm_[pivots[c]];
    }
    const isa::TileOps tiles = isa::tile_ops(std::min(isa::level(), isa::Level::kAvx512));
    std::vector<uint32_t> cell(n_);
    std::vector<float> radius(n_);
    torch::stable::parallel_for(0, n_, 256, [&](int64_t first, int64_t last) {
      std::vector<float> key(cells);
      for (int64_t row = first; row < last; ++row) {
        const uint32_t id = row;
        if (!(sqnorm_[row] <= kLargestNorm)) {
          cell[row] = cells;
          continue;
        }
        tiles.thin(centres.data(), cells, d_, centred_ + row * d_, 1, key.data());
        for (int64_t c = 0; c < cells; ++c) key[c] = half_norm[c] - key[c];
        cell[row] = std::min_element(key.begin(), key.end()) - key.begin();
        double f;
        rows_.distances(centres.data() + cell[row] * d_, centred_, d_, &id, 1, nullptr, &f);
        radius[row] = static_cast<float>(std::sqrt(f));
      }
    });
    lay_out(pivots, cell, radius);
  }

  // Cells follow each other from neighbour to neighbour, so that blocks hold near cells; rows keep their order within a cell.
  void lay_out(const std::vector<uint32_t>& pivots, const std::vector<uint32_t>& cell, const std::vector<float>& radius) {
    const int64_t cells = pivots.size();
    std::vector<uint32_t> chain{0};
    std::vector<uint8_t> used(cells);
    std::vector<std::vector<double>> f(cells);
    for (int64_t c = 0; c < cells; ++c) f[c] = distances(pivots[c], pivots);
    for (used[0] = 1; static_cast<int64_t>(chain.size()) < cells; used[chain.back()] = 1) {
      int64_t next = -1;
      for (int64_t c = 0; c < cells; ++c) {
        if (!used[c] && (next < 0 || f[chain.back()][c] < f[chain.back()][next])) next = c;
      }
      chain.push_back(next);
    }
    // One more cell, without a bound, holds the rows that are in none.
    radius_.assign(cells + 1, 0), norm_.assign(cells + 1, 0), distance_.assign((cells + 1) * (cells + 1), 0);
    radius_[cells] = std::numeric_limits<double>::infinity();
    std::vector<uint32_t> place(cells + 1, cells);
    for (int64_t a = 0; a < cells; ++a) {
      place[chain[a]] = a;
      norm_[a] = std::sqrt(double(sqnorm_[pivots[chain[a]]]));
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
    std::vector<uint32_t> sorted(n_);
    for (const uint32_t row : order) sorted[next[place[cell[row]]]++] = row;
    order = std::move(sorted);
  }

  const float *centred_, *sqnorm_;
  int64_t n_, d_;
  isa::RowOps<float> rows_;
  std::vector<int64_t> begin_;
  std::vector<double> radius_, norm_, distance_;  // of a cell: farthest row from its pivot; |pivot|; between pivots
};

}  // namespace
}  // namespace ltkernels
