// The Gaussian-kernel softmax over clean samples on the CPU: probabilities, a draw, weighted sums.
//
// Distances are sums of direct differences (the matrix-product form has no digit left at std = .01), in register tiles over
// vectors of D. A tile adds at most kChain squares to a lane; lanes are summed in double. The columns are cut into chunks of a
// fixed size: each leaves its largest logit, the sum of its exponentials and its best perturbed logit, and these are combined
// in the order of the chunks. So a row's bits depend on neither tiles nor threads nor the rest of the batch, and B x K is
// formed only where it is the answer.
#include "score_select.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/check.h"
#include "../common/cpu_memory.h"
#include "../common/cpu_tasks.h"
#include "../common/cpu_tensor.h"
#include "cpu_loops.h"

namespace ltkernels {
namespace {

using isa::kChain, isa::kChunk, isa::kNone, isa::kTileCols, isa::kTileRows, isa::Wide;

constexpr int64_t kMaxRows = 64;             // rows of x that a worker takes at a time
constexpr int64_t kPartials = 128 * 1024;    // of rows whose chunks are combined at one time
constexpr int64_t kMeanChunk = 1 << 22;      // elements of p, or of the answer, between a softmax and its mean: 16 MB of float

// ---- logits and what follows from them -----------------------------------------------------------------------------

template <class T>
struct Problem {
  using W = Wide<T>;
  const T *x, *clean;
  const W *scale, *std, *prior;  // prior: or null
  int64_t b, k, d;
  W* p;                          // (b, k); null for a draw
  uint64_t seed, row_offset;
  int64_t* index;                // (b,)
  W* log_normalizer;             // (b,)
};

template <class T>
class Selection {
  using W = Wide<T>;

  struct Part {  // of one row and one chunk of columns
    double top = kNone, sum = 0;
    isa::Best best;
  };

  struct Worker {
    AlignedVector<W> x, clean, sums;
    AlignedVector<double> sqdist;
  };

 public:
  explicit Selection(const Problem<T>& problem)
      : p_(problem), ops_(isa::select_ops<T>(isa::level())), workers_(worker_count(double(p_.b) * p_.k * p_.d)) {
    padded_ = round_up(p_.d, ops_.width);
    chunks_ = divide_up(p_.k, kChunk);
    direct_ = std::is_same_v<T, W> && p_.d == padded_;
    const int64_t share = divide_up(p_.b * chunks_, 2 * static_cast<int64_t>(workers_.size()));
    rows_ = std::clamp<int64_t>(round_up(share, kTileRows), kTileRows, kMaxRows);
  }

  void run() {
    const int64_t round = std::max<int64_t>(1, kPartials / (rows_ * chunks_)) * rows_;
    std::vector<Part> parts;
    for (int64_t begin = 0; begin < p_.b; begin += round) {
      const Range rows{begin, std::min(p_.b, begin + round)};
      parts.assign(rows.size() * chunks_, {});
      for_each(workers_.size(), divide_up(rows.size(), rows_) * chunks_, [&](int64_t w, int64_t task) {
        const int64_t first = begin + task / chunks_ * rows_, chunk = task % chunks_;
        const Range block{first, std::min(rows.end, first + rows_)};
        summarise(workers_[w], block, chunk, &parts[(first - begin) * chunks_ + chunk]);
      });
      for_each(workers_.size(), rows.size(), [&](int64_t, int64_t i) { combine(begin + i, &parts[i * chunks_]); });
    }
  }

 private:
  // parts[i * chunks_] = what chunk `chunk` of row rows.begin + i adds.
  void summarise(Worker& w, Range rows, int64_t chunk, Part* parts) const {
    const Range cols{chunk * kChunk, std::min(p_.k, (chunk + 1) * kChunk)};
    distances(w, rows, cols);
    alignas(64) double logit[kChunk];
    alignas(64) W shifted[kChunk], weight[kChunk];
    const int64_t padded = round_up(cols.size(), isa::kNoiseBlock);
    for (int64_t i = 0; i < rows.size(); ++i) {
      const int64_t row = rows.begin + i;
      Part& part = parts[i * chunks_];
      const W* prior = p_.prior ? p_.prior + cols.begin : nullptr;
      part.top = ops_.make_logits(w.sqdist.data() + i * kChunk, prior, cols.size(), padded, p_.std[row], logit);
      if (part.top == kNone) {
        if (p_.p) std::fill_n(p_.p + row * p_.k + cols.begin, cols.size(), static_cast<W>(kNone));
        continue;
      }
      part.sum = ops_.make_weights(logit, padded, part.top, shifted, weight);
      if (p_.p) {
        std::copy_n(shifted, cols.size(), p_.p + row * p_.k + cols.begin);
      } else {
        part.best = ops_.draw(logit, padded, part.top, p_.seed, p_.row_offset + row, cols.begin);
      }
    }
  }

  // w.sqdist (rows, kChunk) = |x - scale clean|^2; not finite where a row of either is not, or a square overflows.
  void distances(Worker& w, Range rows, Range cols) const {
    const int64_t width = ops_.width, pairs = kTileCols * width, tiles = divide_up(rows.size(), kTileRows);
    w.sqdist.resize(std::max<size_t>(w.sqdist.size(), rows.size() * kChunk));
    w.sums.resize(std::max<size_t>(w.sums.size(), tiles * kTileRows * pairs));
    if (!direct_) pack_rows(w, rows);
    const W* x = direct_ ? reinterpret_cast<const W*>(p_.x) + rows.begin * p_.d : w.x.data();
    w.clean.resize(kTileCols * kChain * width);
    const W* clean_rows[kTileCols];
    for (int64_t col = cols.begin; col < cols.end; col += kTileCols) {
      for (int64_t begin = 0; begin < padded_; begin += kChain * width) {
        const int64_t count = std::min(kChain * width, padded_ - begin);
        for (int c = 0; c < kTileCols; ++c) {  // beyond the last column: its own results once more, dropped below
          const T* row = p_.clean + std::min(col + c, cols.end - 1) * p_.d + begin;
          clean_rows[c] = direct_ ? reinterpret_cast<const W*>(row) : w.clean.data() + c * kChain * width;
          if (!direct_) widen(row, std::min(count, p_.d - begin), count, w.clean.data() + c * kChain * width);
        }
        for (int64_t i = 0; i < rows.size(); i += kTileRows) {
          const W* x_rows[kTileRows];
          const int tile = static_cast<int>(std::min<int64_t>(kTileRows, rows.size() - i));
          for (int r = 0; r < tile; ++r) x_rows[r] = x + (i + r) * padded_ + begin;
          ops_.squares(x_rows, tile, clean_rows, p_.scale + rows.begin + i, count / width, begin > 0, w.sums.data() + i * pairs);
        }
      }
      for (int64_t i = 0; i < rows.size(); ++i) {
        ops_.add_lanes(w.sums.data() + i * pairs, w.sqdist.data() + i * kChunk + (col - cols.begin));
      }
    }
  }

  void pack_rows(Worker& w, Range rows) const {
    w.x.resize(std::max<size_t>(w.x.size(), rows.size() * padded_));
    for (int64_t i = 0; i < rows.size(); ++i) widen(p_.x + (rows.begin + i) * p_.d, p_.d, padded_, w.x.data() + i * padded_);
  }

  void widen(const T* from, int64_t count, int64_t padded, W* to) const {
    ops_.widen_finite(from, count, to);
    std::fill(to + count, to + padded, W{0});
  }

  void combine(int64_t row, const Part* parts) const {
    double top = kNone, total = 0;
    isa::Best best;
    for (int64_t c = 0; c < chunks_; ++c) {
      top = std::max(top, parts[c].top);
      if (parts[c].best.value > best.value) best = parts[c].best;
    }
    for (int64_t c = 0; c < chunks_; ++c) {
      if (parts[c].top > kNone) total += parts[c].sum * std::exp(parts[c].top - top);
    }
    const W nan = std::numeric_limits<W>::quiet_NaN();
    if (top == kNone) {  // no finite logit: where x itself is finite that is an answer, otherwise there is none
      p_.log_normalizer[row] = finite(p_.x + row * p_.d) ? static_cast<W>(kNone) : nan;
      if (p_.p) std::fill_n(p_.p + row * p_.k, p_.k, nan);
      if (p_.index) p_.index[row] = -1;
      return;
    }
    p_.log_normalizer[row] = static_cast<W>(top + std::log(total));
    if (p_.index) p_.index[row] = best.column;
    if (p_.p == nullptr) return;
    for (int64_t c = 0; c < chunks_; ++c) {
      const int64_t begin = c * kChunk, count = std::min(kChunk, p_.k - begin);
      ops_.finish_weights(p_.p + row * p_.k + begin, count, parts[c].top - top, total);
    }
  }

  bool finite(const T* row) const {
    return std::all_of(row, row + p_.d, [](T value) { return std::isfinite(static_cast<W>(value)); });
  }

  const Problem<T>& p_;
  const isa::SelectOps<T> ops_;
  std::vector<Worker> workers_;
  int64_t padded_ = 0, chunks_ = 0, rows_ = 0;
  bool direct_ = false;  // rows are whole vectors of the right dtype: read where they are
};

// ---- weighted sums -------------------------------------------------------------------------------------------------

// out (b, d) = weight (b, k) clean (k, d), kMixDepth rows of clean at a time: as in a matrix product a block of clean is
// packed into strips of register-tile width, and the weights into panels of tile height.
template <class T>
class Mix {
  using W = Wide<T>;

  static constexpr int64_t kMaxRows = 192, kStrips = 16, kDepth = isa::kMixDepth;

  struct Worker {
    AlignedVector<W> weight, clean, row, sums;
    std::vector<char> any;  // a tile of weights that is not all zero
    std::vector<int64_t> broken;
  };

 public:
  Mix(const W* weight, const T* clean, W* out, int64_t b, int64_t k, int64_t d)
      : weight_(weight), clean_(clean), out_(out), b_(b), k_(k), d_(d), ops_(isa::select_ops<T>(isa::level())),
        workers_(worker_count(double(b) * k * d)), group_(kStrips * ops_.mix_cols) {
    const int64_t groups = divide_up(d_, group_), wanted = divide_up(4 * static_cast<int64_t>(workers_.size()), groups);
    rows_ = std::clamp<int64_t>(round_up(divide_up(b_, wanted), ops_.mix_rows), ops_.mix_rows, kMaxRows);
  }

  void run() {
    const int64_t groups = divide_up(d_, group_);
    for_each(workers_.size(), divide_up(b_, rows_) * groups, [&](int64_t w, int64_t task) {
      const int64_t row = task / groups * rows_, col = task % groups * group_;
      mix(workers_[w], {row, std::min(b_, row + rows_)}, {col, std::min(d_, col + group_)});
    });
  }

 private:
  void mix(Worker& w, Range rows, Range cols) const {
    const int64_t tile = ops_.mix_rows * ops_.mix_cols;
    const int64_t tiles = divide_up(rows.size(), ops_.mix_rows), strips = divide_up(cols.size(), ops_.mix_cols);
    w.sums.assign(strips * tiles * tile, W{0});
    for (int64_t begin = 0; begin < k_; begin += kDepth) {
      const Range block{begin, std::min(k_, begin + kDepth)};
      if (!pack_weights(w, rows, block)) continue;
      pack_clean(w, block, cols);
      for (int64_t s = 0; s < strips; ++s) {
        const W* strip = w.clean.data() + s * kDepth * ops_.mix_cols;
        for (int64_t t = 0; t < tiles; ++t) {
          if (!w.any[t]) continue;
          ops_.add_product(w.weight.data() + t * kDepth * ops_.mix_rows, strip, block.size(), w.sums.data() + (s * tiles + t) * tile);
        }
      }
      for (int64_t k : w.broken) add_broken(w, k, rows, cols);
    }
    for (int64_t i = 0; i < rows.size(); ++i) {
      for (int64_t s = 0; s < strips; ++s) {
        const int64_t count = std::min<int64_t>(ops_.mix_cols, cols.size() - s * ops_.mix_cols);
        std::copy_n(sums(w, tiles, i, s), count, out_ + (rows.begin + i) * d_ + cols.begin + s * ops_.mix_cols);
      }
    }
  }

  W* sums(Worker& w, int64_t tiles, int64_t row, int64_t strip) const {
    return w.sums.data() + ((strip * tiles + row / ops_.mix_rows) * ops_.mix_rows + row % ops_.mix_rows) * ops_.mix_cols;
  }

  bool pack_weights(Worker& w, Range rows, Range block) const {
    const int64_t height = ops_.mix_rows, tiles = divide_up(rows.size(), height);
    w.weight.resize(tiles * kDepth * height), w.any.assign(tiles, 0);
    bool some = false;
    for (int64_t t = 0; t < tiles; ++t) {
      W* panel = w.weight.data() + t * kDepth * height;
      bool any = false;
      for (int64_t r = 0; r < height; ++r) {
        const int64_t row = rows.begin + t * height + r;
        for (int64_t i = 0; i < block.size(); ++i) {
          const W value = row < rows.end ? weight_[row * k_ + block.begin + i] : W{0};
          panel[i * height + r] = value;
          any |= !(value == 0);
        }
      }
      w.any[t] = any, some |= any;
    }
    return some;
  }

  void pack_clean(Worker& w, Range block, Range cols) const {
    const int64_t strips = divide_up(cols.size(), ops_.mix_cols);
    w.clean.resize(std::max<size_t>(w.clean.size(), strips * kDepth * ops_.mix_cols)), w.row.assign(group_, W{0}), w.broken.clear();
    for (int64_t k = block.begin; k < block.end; ++k) {
      if (!ops_.widen_finite(clean_ + k * d_ + cols.begin, cols.size(), w.row.data())) {
        w.broken.push_back(k);
        for (W& value : w.row) value = std::isfinite(value) ? value : W{0};
      }
      for (int64_t s = 0; s < strips; ++s) {
        W* to = w.clean.data() + (s * kDepth + k - block.begin) * ops_.mix_cols;
        std::memcpy(to, w.row.data() + s * ops_.mix_cols, ops_.mix_cols * sizeof(W));
      }
    }
  }

  // The entries that pack_clean left out, where a weight asks for them: 0 times NaN is 0 here.
  void add_broken(Worker& w, int64_t k, Range rows, Range cols) const {
    const int64_t tiles = divide_up(rows.size(), ops_.mix_rows);
    for (int64_t i = 0; i < rows.size(); ++i) {
      const W weight = weight_[(rows.begin + i) * k_ + k];
      if (weight == 0) continue;
      for (int64_t j = 0; j < cols.size(); ++j) {
        const W value = static_cast<W>(clean_[k * d_ + cols.begin + j]);
        if (!std::isfinite(value)) sums(w, tiles, i, j / ops_.mix_cols)[j % ops_.mix_cols] += weight * value;
      }
    }
  }

  const W* weight_;
  const T* clean_;
  W* out_;
  const int64_t b_, k_, d_;
  const isa::SelectOps<T> ops_;
  std::vector<Worker> workers_;
  const int64_t group_;  // columns that a task packs at a time: reads of 1 to 2 KiB
  int64_t rows_;
};

// ---- operators -----------------------------------------------------------------------------------------------------

struct Inputs {
  const Tensor &x, &clean, &scale, &std;
  const std::optional<Tensor>& log_prior;
};

void check(const char* op, const Inputs& in) {
  LT_CHECK(in.x.dim() == 2 && in.clean.dim() == 2, op, "x and clean must be matrices");
  const int64_t b = in.x.size(0), k = in.clean.size(0), d = in.clean.size(1);
  const ScalarType type = in.clean.scalar_type();
  check_matrix(op, "x", in.x, b, d, type);
  check_matrix(op, "clean", in.clean, k, d, type);
  check_vector(op, "scale", in.scale, b, result_type(type));
  check_vector(op, "std", in.std, b, result_type(type));
  if (in.log_prior) check_vector(op, "log_prior", *in.log_prior, k, result_type(type));
  LT_CHECK(k >= 1 && d >= 1, op, "clean must have at least one row and one column");
  LT_CHECK(k / 4 <= int64_t(UINT32_MAX), op, "at most 2^34 rows of clean; got ", k);
}

template <class T>
Problem<T> given(const Inputs& in) {
  using W = Wide<T>;
  Problem<T> problem{};
  problem.x = data<T>(in.x), problem.clean = data<T>(in.clean);
  problem.scale = data<W>(in.scale), problem.std = data<W>(in.std);
  problem.prior = data<W>(in.log_prior);
  problem.b = in.x.size(0), problem.k = in.clean.size(0), problem.d = in.clean.size(1);
  return problem;
}

template <class T>
void select(const Inputs& in, Tensor* p, const Tensor* seed, int64_t row_offset, Tensor* index, Tensor& log_normalizer) {
  using W = Wide<T>;
  Problem<T> problem = given<T>(in);
  if (p) problem.p = static_cast<W*>(p->mutable_data_ptr());
  if (index) {
    problem.seed = static_cast<uint64_t>(*data<int64_t>(*seed)), problem.row_offset = static_cast<uint64_t>(row_offset);
    problem.index = static_cast<int64_t*>(index->mutable_data_ptr());
  }
  problem.log_normalizer = static_cast<W*>(log_normalizer.mutable_data_ptr());
  if (problem.b > 0) Selection<T>(problem).run();
}

// The mean of every row under its p, of which kMeanChunk elements exist at a time.
template <class T>
void mean(const Inputs& in, Tensor& mean, Tensor& log_normalizer) {
  using W = Wide<T>;
  constexpr bool narrow = !std::is_same_v<T, W>;
  const Problem<T> whole = given<T>(in);
  const int64_t k = whole.k, d = whole.d, step = std::clamp<int64_t>(kMeanChunk / std::max(k, d), 1, std::max<int64_t>(whole.b, 1));
  std::vector<W> p(step * k), sums(narrow ? step * d : 0);
  T* out = static_cast<T*>(mean.mutable_data_ptr());
  for (int64_t begin = 0; begin < whole.b; begin += step) {
    Problem<T> part = whole;
    part.b = std::min(step, whole.b - begin);
    part.x += begin * d, part.scale += begin, part.std += begin, part.p = p.data();
    part.log_normalizer = static_cast<W*>(log_normalizer.mutable_data_ptr()) + begin;
    Selection<T>(part).run();
    if constexpr (narrow) {
      Mix<T>(p.data(), part.clean, sums.data(), part.b, k, d).run();
      std::transform(sums.begin(), sums.begin() + part.b * d, out + begin * d, [](W sum) { return static_cast<T>(sum); });
    } else {
      Mix<T>(p.data(), part.clean, out + begin * d, part.b, k, d).run();
    }
  }
}

template <class T>
void mix(const Tensor& weight, const Tensor& clean, Tensor& out) {
  using W = Wide<T>;
  const int64_t b = weight.size(0), k = weight.size(1), d = clean.size(1);
  if (b > 0 && d > 0) Mix<T>(data<W>(weight), data<T>(clean), static_cast<W*>(out.mutable_data_ptr()), b, k, d).run();
}

}  // namespace

std::tuple<Tensor, Tensor> psel_cpu(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                    const std::optional<Tensor>& log_prior) {
  const Inputs in{x, clean, scale, std, log_prior};
  check("psel", in);
  Tensor p = empty(scale.scalar_type(), {x.size(0), clean.size(0)});
  Tensor log_normalizer = empty(scale.scalar_type(), {x.size(0)});
  for_dtype("psel", clean.scalar_type(), [&](auto zero) { select<decltype(zero)>(in, &p, nullptr, 0, nullptr, log_normalizer); });
  return {p, log_normalizer};
}

std::tuple<Tensor, Tensor> psel_sample_cpu(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                           const std::optional<Tensor>& log_prior, const Tensor& seed, int64_t row_offset) {
  const Inputs in{x, clean, scale, std, log_prior};
  check("psel_sample", in);
  check_vector("psel_sample", "seed", seed, 1, ScalarType::Long);
  LT_CHECK(row_offset >= 0, "psel_sample", "row_offset must be >= 0; got ", row_offset);
  Tensor index = empty(ScalarType::Long, {x.size(0)});
  Tensor log_normalizer = empty(scale.scalar_type(), {x.size(0)});
  for_dtype("psel_sample", clean.scalar_type(), [&](auto zero) {
    select<decltype(zero)>(in, nullptr, &seed, row_offset, &index, log_normalizer);
  });
  return {index, log_normalizer};
}

std::tuple<Tensor, Tensor, Tensor> score_select_cpu(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                                    const std::optional<Tensor>& log_prior, const Tensor& seed, int64_t row_offset,
                                                    const std::optional<Tensor>& own, const std::optional<Tensor>& counts,
                                                    const std::optional<Tensor>& labels, const std::optional<Tensor>& self_labels,
                                                    int64_t gate) {
  const char* op = "score_select";
  auto [index, log_normalizer] = psel_sample_cpu(x, clean, scale, std, log_prior, seed, row_offset);
  const int64_t b = x.size(0), k = clean.size(0), classes = counts ? counts->size(0) : 0;
  LT_CHECK(gate >= 0 && gate <= 2, op, "gate must be 0, 1 or 2; got ", gate);
  LT_CHECK(counts.has_value() == (gate != 0) && labels.has_value() == (gate != 0), op, "gates 1 and 2 need counts and labels");
  if (own) check_vector(op, "own", *own, b, ScalarType::Long);
  if (gate != 0) {
    check_vector(op, "counts", *counts, classes, ScalarType::Double);
    check_vector(op, "labels", *labels, k, ScalarType::Long);
  }
  if (self_labels) check_vector(op, "self_labels", *self_labels, b, ScalarType::Long);
  Tensor moved = empty(ScalarType::Bool, {b});
  auto* chosen = static_cast<int64_t*>(index.mutable_data_ptr());
  auto* elsewhere = static_cast<bool*>(moved.mutable_data_ptr());
  const auto rows_of_class = [&](const std::optional<Tensor>& labels) {  // in the training set
    std::vector<double> rows;
    for (int64_t i = 0; labels && gate != 0 && i < labels->size(0); ++i) {
      const int64_t label = data<int64_t>(*labels)[i];
      LT_CHECK(label >= 0 && label < classes, op, "labels must be in [0, ", classes, "); got ", label);
      rows.push_back(data<double>(*counts)[label]);
    }
    return rows;
  };
  const std::vector<double> there = rows_of_class(labels), here = rows_of_class(self_labels);
  for (int64_t i = 0; i < b; ++i) {
    const int64_t self = own ? data<int64_t>(*own)[i] : i;
    bool kept = chosen[i] >= 0;
    if (kept && gate != 0) {
      LT_CHECK(self_labels || (self >= 0 && self < k), op, "own must be in [0, ", k, "); got ", self);
      const double before = self_labels ? here[i] : there[self];
      kept = gate == 1 ? there[chosen[i]] >= before : there[chosen[i]] <= before;
    }
    if (!kept) chosen[i] = self;
    elsewhere[i] = chosen[i] != self;
  }
  return {index, moved, log_normalizer};
}

std::tuple<Tensor, Tensor> psel_mean_cpu(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                         const std::optional<Tensor>& log_prior) {
  const Inputs in{x, clean, scale, std, log_prior};
  check("psel_mean", in);
  Tensor out = empty(x.scalar_type(), {x.size(0), x.size(1)}), log_normalizer = empty(scale.scalar_type(), {x.size(0)});
  for_dtype("psel_mean", clean.scalar_type(), [&](auto zero) { mean<decltype(zero)>(in, out, log_normalizer); });
  return {out, log_normalizer};
}

Tensor psel_mix_cpu(const Tensor& weight, const Tensor& clean) {
  LT_CHECK(weight.dim() == 2 && clean.dim() == 2, "psel_mix", "weight and clean must be matrices");
  const ScalarType type = clean.scalar_type();
  check_matrix("psel_mix", "weight", weight, weight.size(0), clean.size(0), result_type(type));
  check_matrix("psel_mix", "clean", clean, clean.size(0), clean.size(1), type);
  Tensor out = empty(weight.scalar_type(), {weight.size(0), clean.size(1)});
  for_dtype("psel_mix", type, [&](auto zero) { mix<decltype(zero)>(weight, clean, out); });
  return out;
}

}  // namespace ltkernels
