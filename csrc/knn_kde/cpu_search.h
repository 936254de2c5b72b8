// k nearest bank rows and the kernel density estimate over them, on the CPU.
//
// The answer is defined by f(q, z), the squared distance summed from direct differences in double and rounded once to the
// output dtype: the first k bank rows in the order (f, index). Most pairs are discarded without f, by a filter that can
// err on one side only:
//
//  1. Filter. With q' = fl(q - centre), c = centred row, n = |c|^2, all in fp32, (f - |q'|^2) / 2 ~ n/2 - q'.c =: g, one
//     multiply-add a dimension in register tiles. Writing u = 2^-24 and L for the longest chain of additions in q'.c,
//         |n/2 - q'.c - g|  <=  (L + 12) u |q'||c| + 8u (|q'|^2 + n) + tau  <=  B (|q'|^2 + n) + tau,
//         B = ((L + 12) / 2 + 8) u * 1.01,        tau = 2^-122 d  (underflow, also with denormals flushed),
//     (rows as integers, see isa::Avx512Vnni: |x - x^| <= r |x| with r = sqrt(d) / 65534 + 3u, so that
//     |x.y - x^.y^| <= |x - x^||y| + |x^||y - y^| <= (2 + r) r |x||y|; L u = (2 + r) r + 4u, tau = 2^-104 d)
//     where L u |q'||c| is the sum of products, the rest the rounding of q', c, n, f and of the test itself, and
//     |q'||c| <= (|q'|^2 + n) / 2 makes the bound a sum of a row term and a column term. So with
//         low = n/2 - B n - tau - q'.c,        limit = (F - |q'|^2) / 2 + B |q'|^2 + tau,
//     low > limit proves f > F for an F that k rows are already known to reach: such a pair is dropped, every other
//     one is appended to the queue of its row. Norms above 1e37 are not bounded this way: those rows always pass.
//  2. A full queue is tightened: the k-th smallest upper bound (low + twice the margins) is a new limit. Where that
//     frees too little (duplicates, clusters tighter than the rounding), the queue is ranked by f itself and its k best
//     are kept, which always fits. Nothing is dropped that could be in the answer, so neither tiles, threads, chunks nor
//     `bound` can be seen in the result.
//  3. Every queue is ranked by (f, index); density and score come from the winners in that order, in double.
//
// A bank against itself (queries is points): the tile of blocks I, J serves the rows of I and, transposed, those of J, so half
// of the tiles suffice. A worker owns both blocks while it works on them; queues need no locks. Its rows lie by cells
// (cpu_cells.h), and tiles of cells that are too far apart are left out.
// Few queries: the bank is split between the workers, each split has its own queues, and the ranking merges them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/check.h"
#include "cpu_cells.h"
#include "cpu_file.h"
#include "cpu_isa.h"
#include "cpu_queues.h"

namespace ltkernels {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kBlockFloats = 512 * 1024;     // a packed block: 2 MiB, shares of the last-level cache
constexpr int64_t kSubBlockFloats = 128 * 1024;  // query rows that stay in L2 while a panel of the bank passes

template <class T>
struct Problem {
  const T *queries, *points;
  const float *centre, *centred, *sqnorm;  // centred: (n, d), or null for rows in a file, centred as they are read
  const int64_t* self_index;    // or null
  const Wide<T>* bound;         // or null
  int64_t q, n, d, k;
  Wide<T>* sqdist;              // (q, k)
  int64_t* index;               // (q, k)
  const Wide<T>* bandwidth;     // (q,), null for knn alone: then nothing below is used
  const Wide<T>* log_weight;    // (n,) or null
  Wide<T>*log_density, *score;  // (q,), (q, d)
};

template <class T>
class Search {
  using W = Wide<T>;

 public:
  explicit Search(const Problem<T>& problem)
      : p_(problem),
        ops_(isa::tile_ops(isa::level())),
        rank_(isa::row_ops<T>(isa::level())),
        cells_(p_.points, p_.centre, p_.sqnorm, p_.n, p_.d, !p_.centred) {
    const int64_t threads = worker_count(double(p_.q) * p_.n * p_.d);
    workers_.resize(threads);
    zeros_.assign(p_.d, 0.f);
    capacity_ = std::min(p_.n, std::max<int64_t>(3 * p_.k, 192));
    // Blocks are whole tiles of every instruction set (96 is a multiple of 12 and 32, of 4 and 24, of 8).
    block_ = std::clamp<int64_t>(kBlockFloats / p_.d, 384, 4096);
    const bool whole_bank = static_cast<const void*>(p_.queries) == p_.points && p_.q == p_.n;
    // With very large k the queues of all rows at once would outweigh the outputs.
    symmetric_ = whole_bank && capacity_ <= 2048;
    if (symmetric_) block_ = std::min(block_, std::max<int64_t>(96, p_.n / (4 * threads)));
    block_ = block_ / 96 * 96;
    // In cycles a bank row, roughly: a dot product and a horizontal sum a query, against transposing the row into a panel
    // and multiplying it with whole tiles of queries.
    const int64_t dots = p_.q * (p_.d / ops_.width + 25);
    const int64_t tiles =
        3 * p_.d / 2 + divide_up(p_.q, ops_.rows) * ops_.rows * p_.d / (2 * ops_.width * ops_.entries);
    thin_ = !symmetric_ && dots < tiles;  // never more than 48 queries: one block
    if (thin_) ops_ = isa::tile_ops(std::min(isa::level(), isa::Level::kAvx512));
    words_ = divide_up(p_.d, ops_.entries);
    const double rho = std::sqrt(double(p_.d)) / 65534 * (1 + 0x1p-18) + 3 * 0x1p-24;
    const double chain = ops_.quantise ? (2 * rho + rho * rho) * 0x1p24 + 4
                         : thin_       ? p_.d / ops_.width + ops_.width + 4
                                       : std::min(p_.d, isa::kDepth) + divide_up(p_.d, isa::kDepth);
    slope_ = static_cast<float>((0.5 * (chain + 12) + 8) * 0x1p-24 * 1.01);
    underflow_ = (ops_.quantise ? 0x1p-104f : 0x1p-122f) * p_.d;
  }

  void run() {
    if (symmetric_) {
      run_symmetric();
    } else {
      run_rectangular();
    }
    LT_CHECK(!shortage_, "knn", "a row has fewer than k=", p_.k,
             " candidates: k exceeds the available rows, or bound is below the k-th distance");
  }

 private:
  // ---- schedule ----------------------------------------------------------------------------------------------------

  template <class F>
  void for_each_worker(const F& f) {
    torch::stable::parallel_for(0, workers_.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t w = begin; w < end; ++w) f(workers_[w]);
    });
  }

  template <class F>
  void for_each(int64_t tasks, const F& f) {  // dynamic: cores need not be equally fast, and the answer cannot tell
    std::atomic<int64_t> next{0};
    for_each_worker([&](Worker<T>& w) {
      for (int64_t task; (task = next++) < tasks;) f(w, task);
    });
  }

  void run_symmetric() {
    cells_.find();
    std::vector<Queues> queues(1);
    start(queues, {0, p_.n});
    PairSchedule schedule(divide_up(p_.n, block_));
    for_each_worker([&](Worker<T>& w) {
      try {
        for (int64_t i = -1, j = -1; schedule.next(i, j);) sweep(w, queues[0], block(i, p_.n), block(j, p_.n));
      } catch (...) {
        schedule.abort();
        throw;
      }
    });
    finish(queues, {0, p_.n});
  }

  // Blocks of queries times splits of the bank, a few tasks for each worker.
  void run_rectangular() {
    const int64_t threads = workers_.size();
    const int64_t share = p_.centred ? divide_up(p_.q, threads) : p_.q;  // a file has to be read for every block of queries
    const int64_t rows = std::min(block_, std::max<int64_t>(96, divide_up(share, 96) * 96));
    const int64_t chunk = 4 * threads * rows;  // queries whose queues exist at one time
    for (int64_t begin = 0; begin < p_.q; begin += chunk) {
      const Range range{begin, std::min(p_.q, begin + chunk)};
      const int64_t row_blocks = divide_up(range.size(), rows), bank_blocks = divide_up(p_.n, block_);
      const int64_t splits = std::min(bank_blocks, divide_up(threads, row_blocks));
      std::vector<Queues> queues(splits);
      start(queues, range);
      for_each(row_blocks * splits, [&](Worker<T>& w, int64_t task) {
        const int64_t first = begin + task / splits * rows, split = task % splits;
        const Range query_rows{first, std::min(range.end, first + rows)};
        if (!thin_) pack(w, query_rows, ops_.rows, ops_.pack_rows, w.a, w.row_scale);
        for (int64_t b = split * bank_blocks / splits; b < (split + 1) * bank_blocks / splits; ++b) {
          sweep(w, queues[split], query_rows, block(b, p_.n));
        }
      });
      finish(queues, range);
    }
  }

  // Rows and columns of tiles are positions in the order of the cells; the queries of a rectangular search are themselves.
  int64_t row_at(int64_t position) const { return symmetric_ ? cells_.row(position) : position; }

  Range block(int64_t b, int64_t n) const { return {b * block_, std::min(n, (b + 1) * block_)}; }

  // ---- rows --------------------------------------------------------------------------------------------------------

  // q' of a query; |q'|^2, +inf where it is not bounded, NaN for a query with NaN or inf.
  float shift(int64_t row, float* out) const {
    const T* q = p_.queries + row * p_.d;
    const double sum = rank_.centre(q, p_.centre, p_.d, out);
    if (sum <= kLargestNorm) return static_cast<float>(sum);
    std::fill_n(out, p_.d, 0.f);
    return isa::finite(q, p_.d) ? kInf : kNaN;
  }

  float floor_of(int64_t id) const {  // low + q'.c; +inf for rows that are infinitely far, -inf for rows without a bound
    const float n = p_.sqnorm[id];
    if (n <= kLargestNorm) return n * (0.5f - slope_) - underflow_;
    return isa::finite(p_.points + id * p_.d, p_.d) ? -kInf : kInf;
  }

  float limit_of(float sqnorm, double f) const {  // limit that keeps every row with a distance up to f
    if (!(sqnorm <= kLargestNorm)) return sqnorm;
    if (!(f < kInf)) return kInf;
    const double limit = 0.5 * (f - sqnorm) + double(slope_) * sqnorm + underflow_;
    return std::nextafter(static_cast<float>(limit), kInf);
  }

  int64_t self_of(int64_t row) const { return p_.self_index ? p_.self_index[row] : -1; }

  const float* centred_row(int64_t id, float* out) const {  // zero where the filter is off
    if (!(p_.sqnorm[id] <= kLargestNorm)) return zeros_.data();
    if (p_.centred) return p_.centred + id * p_.d;
    rank_.centre(p_.points + id * p_.d, p_.centre, p_.d, out);
    return out;
  }

  void start(std::vector<Queues>& queues, Range range) {
    for (Queues& queue : queues) queue.first = range.begin, queue.resize(range.size(), capacity_);
    for_each(divide_up(range.size(), 64), [&](Worker<T>& w, int64_t task) {
      w.shifted.resize(std::max<size_t>(w.shifted.size(), p_.d));
      const int64_t end = std::min(range.size(), task * 64 + 64);
      for (int64_t slot = task * 64; slot < end; ++slot) {
        const int64_t row = row_at(range.begin + slot);
        const float sqnorm = symmetric_ && p_.sqnorm[row] <= kLargestNorm ? p_.sqnorm[row]
                                                                         : shift(row, w.shifted.data());
        for (Queues& queue : queues) {
          queue.sqnorm[slot] = sqnorm;
          queue.limit[slot] = limit_of(sqnorm, p_.bound ? double(p_.bound[row]) : double(kInf));
          queue.count[slot] = 0, queue.last[slot] = UINT32_MAX;
        }
      }
    });
  }

  // ---- filter ------------------------------------------------------------------------------------------------------

  // Packs rows into slices of kDepth words, a slice into panels of `width` rows: what `multiply` reads in sequence
  // lies in sequence. Rows are centred on the way, unless the bank has a copy of them that is, and rounded to integers.
  template <class Pack>
  void pack(Worker<T>& w, Range rows, int width, Pack pack_slice, AlignedFloats& out, std::vector<float>& scale) {
    const int64_t panels = divide_up(rows.size(), width);
    const bool queries = width == ops_.rows && !symmetric_;
    out.resize(std::max<size_t>(out.size(), panels * width * words_));
    w.shifted.resize(std::max<size_t>(w.shifted.size(), width * p_.d));
    w.words.resize(std::max<size_t>(w.words.size(), width * words_));
    scale.assign(panels * width, 0.f);
    const float* sources[isa::kMaxTileCols];
    float sqnorms[isa::kMaxTileCols];
    for (int64_t panel = 0; panel < panels; ++panel) {
      for (int r = 0; r < width; ++r) {
        const int64_t position = rows.begin + panel * width + r;
        float* shifted = w.shifted.data() + r * p_.d;
        float sqnorm = 0;
        if (position >= rows.end) {
          sources[r] = zeros_.data();
        } else if (queries) {
          sources[r] = shifted;
          sqnorm = shift(position, shifted);
        } else {
          const int64_t id = cells_.row(position);
          sources[r] = centred_row(id, shifted);
          sqnorm = p_.sqnorm[id];
        }
        sqnorms[r] = sqnorm <= kLargestNorm ? sqnorm : 0.f;
      }
      isa::make_panel(ops_, pack_slice, sources, sqnorms, width, p_.d, w.words.data(), scale.data() + panel * width,
                      [&](int64_t depth, int64_t count) { return out.data() + (depth * panels + panel * count) * width; });
    }
  }

  void floors(Range rows, std::vector<float>& out) const {  // NaN pads to whole tiles: it passes no comparison
    out.assign(rows.size() + isa::kMaxTileCols, kNaN);
    for (int64_t i = 0; i < rows.size(); ++i) out[i] = floor_of(cells_.row(rows.begin + i));
  }

  // The largest distance a row of each cell that `rows` meets still lets in. A row that lets in more than its cell is wide
  // may know better: a queue is tightened when it is full, but can tell as soon as it holds k rows.
  void reaches(Queues& queues, Range rows, std::vector<double>& out) const {
    out.clear();
    for (int64_t i = rows.begin, cell = cells_.at(i); i < rows.end; ++cell) {
      double reach = -std::numeric_limits<double>::infinity();
      for (const int64_t end = std::min(rows.end, cells_.end(cell)); i < end; ++i) {
        float& limit = queues.limit[i];
        uint32_t& count = queues.count[i];
        const float sqnorm = queues.sqnorm[i];
        const bool loose = 2 * double(limit) + sqnorm > cells_.width(cell) && count >= p_.k + (limit < kInf ? p_.k / 4 : 0);
        if (loose) count = tighten(queues.of(i), count, 0, sqnorm, limit);
        reach = std::max(reach, 2 * double(limit) + sqnorm);  // a NaN limit loses: it lets nothing in
      }
      out.push_back(reach);
    }
  }

  // Which cells of the blocks may hold neighbours of each other: w.near, row cells times column cells. False: none.
  bool find_near(Worker<T>& w, Queues& queues, Range rows, Range cols) const {
    reaches(queues, rows, w.row_reach), reaches(queues, cols, w.col_reach);
    w.near.assign(w.row_reach.size() * w.col_reach.size(), 0);
    const int64_t first_row = cells_.at(rows.begin), first_col = cells_.at(cols.begin);
    bool any = false;
    for (size_t r = 0, pair = 0; r < w.row_reach.size(); ++r) {
      for (size_t c = 0; c < w.col_reach.size(); ++c, ++pair) {
        w.near[pair] = !(cells_.nearest(first_row + r, first_col + c) > std::max(w.row_reach[r], w.col_reach[c]));
        any |= w.near[pair];
      }
    }
    return any;
  }

  bool near(const Worker<T>& w, Range row_block, Range rows, Range col_block, Range cols) const {
    const int64_t first_row = cells_.at(row_block.begin), first_col = cells_.at(col_block.begin);
    const int64_t last_row = cells_.at(rows.end - 1), last_col = cells_.at(cols.end - 1);
    for (int64_t r = cells_.at(rows.begin); r <= last_row; ++r) {
      for (int64_t c = cells_.at(cols.begin); c <= last_col; ++c) {
        if (w.near[(r - first_row) * w.col_reach.size() + (c - first_col)]) return true;
      }
    }
    return false;
  }

  // All pairs of the two blocks; in a symmetric search for the queues of both.
  void sweep(Worker<T>& w, Queues& queues, Range rows, Range cols) {
    if (cells_.any() && !find_near(w, queues, rows, cols)) return;
    if (symmetric_) {
      pack(w, rows, ops_.rows, ops_.pack_rows, w.a, w.row_scale);
      floors(rows, w.row_floor);
    }
    if (thin_) shift_rows(w, rows);
    if (!symmetric_ || w.packed_bank != cols.begin) {
      if (!thin_) pack(w, cols, ops_.cols, ops_.pack_cols, w.b, w.col_scale);
      floors(cols, w.col_floor);
      w.packed_bank = cols.begin;
    }
    if (cells_.any() && rows.begin == cols.begin) {  // rows of a cell tell each other how near a row of another cell has to be
      sweep_tiles(w, queues, rows, cols, [&](Range tile, Range panel) { return share_a_cell(tile, panel); });
      find_near(w, queues, rows, cols);
      sweep_tiles(w, queues, rows, cols, [&](Range tile, Range panel) {
        return !share_a_cell(tile, panel) && near(w, rows, tile, cols, panel);
      });
    } else if (cells_.any()) {
      sweep_tiles(w, queues, rows, cols, [&](Range tile, Range panel) { return near(w, rows, tile, cols, panel); });
    } else {
      sweep_tiles(w, queues, rows, cols, [](Range, Range) { return true; });
    }
  }

  bool share_a_cell(Range a, Range b) const {
    return cells_.at(a.end - 1) >= cells_.at(b.begin) && cells_.at(b.end - 1) >= cells_.at(a.begin);
  }

  template <class Wanted>
  void sweep_tiles(Worker<T>& w, Queues& queues, Range rows, Range cols, const Wanted& wanted) {
    const int64_t most = std::clamp<int64_t>(kSubBlockFloats / words_ / ops_.rows, 4, 32);
    const int64_t step = std::min(most, divide_up(rows.size(), ops_.rows)) * ops_.rows;
    w.tile.resize(std::max<size_t>(w.tile.size(), step * ops_.cols));
    for (int64_t row = rows.begin; row < rows.end; row += step) {
      const Range sub{row, std::min(rows.end, row + step)};
      for (int64_t col = cols.begin; col < cols.end; col += ops_.cols) {
        const Range panel{col, std::min(cols.end, col + ops_.cols)};
        w.tiles.clear();
        for (int64_t i = sub.begin; i < sub.end; i += ops_.rows) {
          const Range tile{i, std::min(sub.end, i + ops_.rows)};
          if (symmetric_ && panel.end <= i) continue;  // below the diagonal: its mirror image is done
          if (wanted(tile, panel)) w.tiles.push_back(tile);
        }
        if (thin_) {
          multiply_thin(w, rows, sub, panel);
        } else {
          multiply(w, rows, sub, cols, panel);
        }
        for (const Range tile : w.tiles) {
          filter(w, queues, rows, tile, cols, panel, w.tile.data() + (tile.begin - sub.begin) * ops_.cols);
        }
      }
    }
  }

  void multiply(Worker<T>& w, Range rows, Range sub, Range cols, Range panel) {
    const int64_t padded_rows = divide_up(rows.size(), ops_.rows) * ops_.rows;
    const int64_t padded_cols = divide_up(cols.size(), ops_.cols) * ops_.cols;
    for (int64_t depth = 0; depth < words_; depth += isa::kDepth) {
      const int64_t count = std::min(isa::kDepth, words_ - depth);
      const float* a = w.a.data() + depth * padded_rows;
      const float* b = w.b.data() + depth * padded_cols + (panel.begin - cols.begin) * count;
      for (const Range tile : w.tiles) {
        const int64_t i = tile.begin;
        ops_.multiply(a + (i - rows.begin) * count, b, count, depth > 0, w.tile.data() + (i - sub.begin) * ops_.cols);
      }
    }
  }

  void shift_rows(Worker<T>& w, Range rows) {
    w.shifted.resize(std::max<size_t>(w.shifted.size(), rows.size() * p_.d));
    for (int64_t i = 0; i < rows.size(); ++i) shift(rows.begin + i, w.shifted.data() + i * p_.d);
  }

  void multiply_thin(Worker<T>& w, Range rows, Range sub, Range panel) {
    const float* queries = w.shifted.data() + (sub.begin - rows.begin) * p_.d;
    w.words.resize(p_.d);
    for (int64_t col = panel.begin; col < panel.end; ++col) {
      const float* point = centred_row(cells_.row(col), w.words.data());
      ops_.thin(queries, sub.size(), p_.d, point, ops_.cols, w.tile.data() + (col - panel.begin));
    }
  }

  void filter(Worker<T>& w, Queues& queues, Range row_block, Range rows, Range col_block, Range cols, float* tile) {
    float row_limit[isa::kMaxTileRows], col_limit[isa::kMaxTileCols];
    uint32_t row_mask[isa::kMaxTileRows], col_mask[isa::kMaxTileRows];
    std::fill_n(row_limit, ops_.rows, kNaN);
    std::copy_n(queues.limit.data() + (rows.begin - queues.first), rows.size(), row_limit);
    const float* row_floor = nullptr;
    if (symmetric_) {
      std::fill_n(col_limit, ops_.cols, kNaN);
      std::copy_n(queues.limit.data() + cols.begin, cols.size(), col_limit);
      row_floor = w.row_floor.data() + (rows.begin - row_block.begin);
    }
    const float* col_floor = w.col_floor.data() + (cols.begin - col_block.begin);
    const isa::TileSide row_side{row_floor, row_limit, w.row_scale.data() + (rows.begin - row_block.begin)};
    const isa::TileSide col_side{col_floor, col_limit, w.col_scale.data() + (cols.begin - col_block.begin)};
    if (!ops_.filter(tile, row_side, col_side, symmetric_, row_mask, col_mask)) return;
    for (int64_t r = 0; r < rows.size(); ++r, tile += ops_.cols) {
      const int64_t row = rows.begin + r;
      if (symmetric_ && cols.begin <= row) {  // a tile on the diagonal: each pair once, and a row is its own column once
        const uint64_t from_diagonal = ~uint64_t(0) << (row - cols.begin);  // the shift can pass 32, not 64
        row_mask[r] &= from_diagonal;
        col_mask[r] &= from_diagonal << 1;
      }
      for (uint32_t mask = row_mask[r]; mask != 0; mask &= mask - 1) {
        const int c = __builtin_ctz(mask);
        push(w, queues, row, cells_.row(cols.begin + c), col_floor[c] - tile[c]);
      }
      for (uint32_t mask = col_mask[r]; mask != 0; mask &= mask - 1) {
        const int c = __builtin_ctz(mask);
        push(w, queues, cols.begin + c, cells_.row(row), row_floor[r] - tile[c]);
      }
    }
  }

  void push(Worker<T>& w, Queues& queues, int64_t position, uint32_t id, float low) {
    const int64_t slot = position - queues.first, row = row_at(position);
    if (id == self_of(row) || id > queues.last[slot]) return;
    const Candidates queue = queues.of(slot);
    uint32_t count = queues.count[slot];
    if (count == capacity_) count = make_room(w, row, queues, slot);
    queue.low[count] = low;
    queue.id[count] = id;
    queues.count[slot] = count + (low <= queues.limit[slot]);
  }

  __attribute__((noinline))  // rare: its registers are not the loop's
  uint32_t make_room(Worker<T>& w, int64_t row, Queues& queues, int64_t slot) {
    const Candidates queue = queues.of(slot);
    float& limit = queues.limit[slot];
    const uint32_t count = tighten(queue, queues.count[slot], p_.k / 8, queues.sqnorm[slot], limit);
    if (2 * count <= p_.k + capacity_) return count;
    rank(w, row, queue, count);
    const Ranked<W> kth = w.ranked[p_.k - 1];
    uint32_t last = 0, kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (kth < w.place[i]) continue;
      last = std::max(last, queue.id[i]);
      queue.low[kept] = queue.low[i], queue.id[kept++] = queue.id[i];
    }
    limit = std::min(limit, limit_of(queues.sqnorm[slot], kth.f()));
    if (kth.f() == 0) queues.last[slot] = last;
    return kept;
  }

  // Lowers the limit to an upper bound that k (to k + slack) candidates reach, and drops those that cannot.
  uint32_t tighten(Candidates queue, int64_t count, int64_t slack, float sqnorm, float& limit) const {
    if (!(sqnorm <= kLargestNorm)) return static_cast<uint32_t>(count);
    const int64_t unbounded = ops_.count_up_to(queue.low, count, std::numeric_limits<float>::lowest());
    const int64_t wanted = p_.k + unbounded;
    if (count < wanted) return static_cast<uint32_t>(count);
    const float kth = ops_.bisect(queue.low, count, wanted, slack);
    float largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float n = p_.sqnorm[queue.id[i]];
      largest = std::max(largest, queue.low[i] <= kth && n <= kLargestNorm ? n : 0.f);
    }
    const float reached = kth + 2 * (slope_ * (largest + sqnorm) + 2 * underflow_);
    const float tightened = limit = std::min(limit, std::nextafter(reached, kInf));
    uint32_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float low = queue.low[i];
      const uint32_t id = queue.id[i];
      queue.low[kept] = low, queue.id[kept] = id;
      kept += low <= tightened;
    }
    return kept;
  }

  // ---- rank --------------------------------------------------------------------------------------------------------

  // w.place[i] = where candidate i stands in (f, index); w.ranked = the same with the k first in front, the last of these k last.
  void rank(Worker<T>& w, int64_t row, Candidates queue, int64_t count) const {
    w.f.resize(count), w.place.resize(count);
    const W* q = widen_query(w, row);
    rank_.distances(q, p_.points, p_.d, queue.id, count, w.buffer.data(), w.f.data());
    for (int64_t i = 0; i < count; ++i) {
      const W f = static_cast<W>(w.f[i]);
      w.place[i] = {std::isnan(f) ? std::numeric_limits<W>::infinity() : f, queue.id[i]};
    }
    w.ranked = w.place;
    std::nth_element(w.ranked.begin(), w.ranked.begin() + (p_.k - 1), w.ranked.end());
  }

  const W* widen_query(Worker<T>& w, int64_t row) const {
    const T* q = p_.queries + row * p_.d;
    if constexpr (std::is_same_v<T, W>) {
      return q;
    } else {
      w.buffer.resize(p_.d);
      w.query.assign(q, q + p_.d);
      return w.query.data();
    }
  }

  void finish(std::vector<Queues>& queues, Range range) {
    const ScatteredReads file(p_.points, p_.centred ? 0 : p_.n * p_.d * int64_t(sizeof(T)));
    for_each(divide_up(range.size(), 32), [&](Worker<T>& w, int64_t task) {
      const int64_t end = std::min(range.end, range.begin + task * 32 + 32);
      for (int64_t position = range.begin + task * 32; position < end; ++position) finish_row(w, queues, position, file);
    });
  }

  void finish_row(Worker<T>& w, const std::vector<Queues>& queues, int64_t position, const ScatteredReads& file) {
    const int64_t slot = position - queues[0].first, row = row_at(position);
    const float sqnorm = queues[0].sqnorm[slot];
    if (std::isnan(sqnorm)) return write_undefined(row);
    float limit = kInf;
    w.low.clear(), w.id.clear();
    for (const Queues& queue : queues) {
      const Candidates part = queue.of(slot);
      w.low.insert(w.low.end(), part.low, part.low + queue.count[slot]);
      w.id.insert(w.id.end(), part.id, part.id + queue.count[slot]);
      limit = std::min(limit, queue.limit[slot]);
    }
    const Candidates merged{w.low.data(), w.id.data()};
    const int64_t count = tighten(merged, w.low.size(), 0, sqnorm, limit);
    if (count < p_.k) {
      shortage_ = true;
      return;
    }
    for (int64_t i = 0; i < count && !p_.centred; ++i) file.fetch(p_.points + merged.id[i] * p_.d, p_.d * sizeof(T));
    rank(w, row, merged, count);
    std::sort(w.ranked.begin(), w.ranked.begin() + p_.k);
    int64_t* index = p_.index + row * p_.k;
    for (int64_t i = 0; i < p_.k; ++i) {
      p_.sqdist[row * p_.k + i] = w.ranked[i].f();
      index[i] = w.ranked[i].id();
    }
    if (p_.bandwidth) write_density(w, row, index);
  }

  // log p = logsumexp_i(log_weight_i - f_i / 2h^2) - log k and its gradient sum_i w_i (z_i - q) / h^2.
  void write_density(Worker<T>& w, int64_t row, const int64_t* index) const {
    const double h = p_.bandwidth[row];
    w.weight.resize(p_.k), w.sum.resize(p_.d);
    double largest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t i = 0; i < p_.k; ++i) {
      const double prior = p_.log_weight ? double(p_.log_weight[index[i]]) : 0.0;
      w.weight[i] = prior - 0.5 * (double(p_.sqdist[row * p_.k + i]) / h / h);  // h * h could underflow
      largest = std::max(largest, w.weight[i]);
    }
    W* score = p_.score + row * p_.d;
    if (!(largest > -std::numeric_limits<double>::infinity())) {
      p_.log_density[row] = static_cast<W>(largest);
      std::fill_n(score, p_.d, std::numeric_limits<W>::quiet_NaN());
      return;
    }
    for (double& weight : w.weight) total += weight = std::exp(weight - largest);
    for (double& weight : w.weight) weight /= total;
    p_.log_density[row] = static_cast<W>(largest + std::log(total) - std::log(double(p_.k)));
    rank_.weighted(widen_query(w, row), p_.points, p_.d, index, w.weight.data(), p_.k, w.sum.data());
    const double inverse = 1 / h;
    for (int64_t i = 0; i < p_.d; ++i) {
      score[i] = static_cast<W>(inverse < kInf ? w.sum[i] * inverse * inverse : w.sum[i] / h / h);
    }
  }

  void write_undefined(int64_t row) const {  // a query with NaN or inf: NaN, and the k lowest available rows
    for (int64_t i = 0, id = 0; i < p_.k && id < p_.n; ++id) {
      if (id != self_of(row)) p_.index[row * p_.k + i++] = id;
    }
    const W nan = std::numeric_limits<W>::quiet_NaN();
    std::fill_n(p_.sqdist + row * p_.k, p_.k, nan);
    if (p_.bandwidth == nullptr) return;
    p_.log_density[row] = nan;
    std::fill_n(p_.score + row * p_.d, p_.d, nan);
  }

  const Problem<T>& p_;
  isa::TileOps ops_;
  const isa::RowOps<T> rank_;
  Cells<T> cells_;
  std::vector<Worker<T>> workers_;
  std::vector<float> zeros_;
  int64_t block_ = 0, capacity_ = 0, words_ = 0;  // words_: of a packed row
  bool symmetric_ = false, thin_ = false;
  float slope_ = 0, underflow_ = 0;  // B and tau
  std::atomic<bool> shortage_{false};
};

}  // namespace
}  // namespace ltkernels
