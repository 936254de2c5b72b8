// Squared distances between rows and the contrastive loss on them, with its gradient, on the CPU.
//
// Everything is a direct difference, so close rows far from the origin keep their digits: a subtraction beside the multiply-add of a
// matrix product, and on a processor with pipes of its own for additions at the same price. A distance is summed in float over kChain
// vectors at most, then in double, lane by lane: its bits depend on neither tiles nor threads, and d_ij = d_ji exactly.
//
// pcl_rows takes blocks of kBlock x kBlock pairs. In each, first the distances, terms and derivatives, in blocks of kSub x kSub pairs that
// threads take from a queue; among the rows of one batch half of them, for d_ij serves both pairs. Then the gradient,
//     sum_j pull_ij (mu_i - mu_j),   pull_ij = w_i phi'(d_ij; m_i) + w_j phi'(d_ij; m_j) = pull_ji,
// in strips of columns, again from a queue. What a task adds to a row is stored and added in a fixed order. Rows are ordered by group and
// label, so that pairs that do not count fill blocks of kSub x kSub, which are passed over; so are those whose derivatives are all 0.
//
// Rows with NaN, inf or numbers whose squares could overflow stay out of the tiles: their pairs are taken one by one, in double.
#include "pairwise_pcl.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "../common/check.h"
#include "../common/cpu_memory.h"
#include "../common/cpu_tasks.h"
#include "../common/cpu_tensor.h"
#include "cpu_loops.h"

namespace ltkernels {
namespace {

using isa::kSpan, isa::kSub, isa::Wide;

constexpr int64_t kBlock = 256;            // rows and columns whose pulls are stored at one time: 256 KiB of float
constexpr int64_t kSubs = kBlock / kSub;
constexpr int64_t kStrip = 64;             // columns of the gradient that a task packs

// ---- distances of a block of kSub x kSub pairs ----------------------------------------------------------------------

template <class T>
struct PairBuffers {
  AlignedVector<Wide<T>> a, b;
  AlignedVector<double> sums, sqdist;
};

// w.sqdist (kSub, kSub); entries beyond rows and cols are whatever they were.
template <class T>
void distances(const isa::PairOps<T>& ops, PairBuffers<T>& w, const T* const* a, int64_t rows, const T* const* b, int64_t cols, int64_t d) {
  const bool same = a == b;
  const int64_t stride = kSpan * ops.width;
  w.a.resize(kSub * stride), w.sums.resize(kSub * kSub * ops.lanes), w.sqdist.resize(kSub * kSub);
  if (!same) w.b.resize(kSub * stride);
  for (int64_t first = 0; first < d; first += stride) {
    const int64_t n = std::min(stride, d - first);
    ops.pack(a, rows, first, n, stride, w.a.data());
    if (!same) ops.pack(b, cols, first, n, stride, w.b.data());
    ops.squares(w.a.data(), rows, same ? w.a.data() : w.b.data(), cols, same, divide_up(n, ops.width), first > 0, w.sums.data());
  }
  ops.add_lanes(w.sums.data(), rows, cols, same, w.sqdist.data());
}

template <class T>
std::vector<const T*> pointers(const T* rows, int64_t count, int64_t d) {
  std::vector<const T*> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = rows + i * d;
  return out;
}

template <class T>
void all_distances(const T* x, int64_t b, const T* y, int64_t n, int64_t d, Wide<T>* out) {
  const auto ops = isa::pair_ops<T>(isa::level());
  const bool symmetric = x == y && b == n;
  const auto rows = pointers(x, b, d), partners = symmetric ? rows : pointers(y, n, d);
  std::vector<PairBuffers<T>> workers(worker_count(double(b) * n * d));
  const int64_t across = divide_up(n, kSub);
  for_each(workers.size(), divide_up(b, kSub) * across, [&](int64_t w, int64_t task) {
    const int64_t i = task / across * kSub, j = task % across * kSub, height = std::min(kSub, b - i), width = std::min(kSub, n - j);
    if (symmetric && j < i) return;
    const T* const* columns = symmetric ? rows.data() + j : partners.data() + j;
    distances(ops, workers[w], rows.data() + i, height, columns, width, d);
    const double* sqdist = workers[w].sqdist.data();
    for (int64_t r = 0; r < height; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        const Wide<T> value = static_cast<Wide<T>>(sqdist[r * kSub + c]);
        out[(i + r) * n + j + c] = value;
        if (symmetric) out[(j + c) * n + i + r] = value;
      }
    }
  });
}

// ---- the loss ------------------------------------------------------------------------------------------------------

template <class T>
struct Problem {
  using W = Wide<T>;
  const T* mu;
  const int64_t *labels, *group;  // group: or null
  const W *weight, *margin;       // margin: or null
  const T* other;                 // mu where the pairs are among its rows
  const int64_t *other_labels, *other_group;
  int64_t b, n, d, form;
  double scale;
  bool among;
  W* row;
  int64_t* pairs;
  W *active, *mu_grad, *partner_grad;  // or null
};

template <class T>
class Contrast {
  using W = Wide<T>;
  using Class = std::pair<int64_t, int64_t>;  // group, label

  struct Points {                   // of a side, those rows that stand in tiles, by class; padded to whole blocks of kSub
    std::vector<bool> odd;          // of every row: not among them
    std::vector<int64_t> index;     // of the row
    std::vector<const T*> row;
    std::vector<int32_t> key, group;
    std::vector<double> weight, margin;
    int64_t size() const { return index.size(); }
  };

  struct Worker {
    PairBuffers<T> pairs;
    AlignedVector<W> pull, own, theirs, sums;
  };

  struct Task {  // a block of kSub x kSub pairs
    int64_t a, b;
    isa::Sums own, theirs;
  };

  struct Pulls {  // of the rows of one side of a block by those of the other: panels of ops_.pull_rows rows
    AlignedVector<W> panel;
    bool any[kSubs][kSubs];
  };

 public:
  explicit Contrast(const Problem<T>& problem)
      : p_(problem), ops_(isa::pair_ops<T>(isa::level())), workers_(worker_count(double(p_.b) * p_.n * p_.d)) {}

  void run() {
    arrange();
    total_.assign(p_.b, 0), active_.assign(p_.b, 0);
    std::fill_n(p_.pairs, p_.b, 0);
    const Points& partners = p_.among ? own_ : partners_;
    if (p_.mu_grad) clear_untouched(own_, p_.b, partners, p_.mu_grad);
    if (p_.partner_grad) clear_untouched(partners, p_.n, own_, p_.partner_grad);
    for (int64_t i = 0; i < own_.size(); i += kBlock) {
      for (int64_t j = p_.among ? i : 0; j < partners.size(); j += kBlock) {
        block({i, std::min(own_.size(), i + kBlock)}, partners, {j, std::min(partners.size(), j + kBlock)});
      }
    }
    odd_pairs();
    std::copy(total_.begin(), total_.end(), p_.row);
    if (p_.active) std::copy(active_.begin(), active_.end(), p_.active);
  }

 private:
  // ---- rows --------------------------------------------------------------------------------------------------------

  Class class_of(const int64_t* labels, const int64_t* group, int64_t i) const { return {group ? group[i] : 0, labels[i]}; }

  void arrange() {
    std::vector<Class> classes;
    for (int64_t i = 0; i < p_.b; ++i) classes.push_back(class_of(p_.labels, p_.group, i));
    for (int64_t i = 0; i < p_.n && !p_.among; ++i) classes.push_back(class_of(p_.other_labels, p_.other_group, i));
    std::sort(classes.begin(), classes.end());
    classes.erase(std::unique(classes.begin(), classes.end()), classes.end());
    std::vector<int32_t> group(classes.size(), 0);  // of each class, numbered
    for (size_t c = 1; c < classes.size(); ++c) group[c] = group[c - 1] + (classes[c].first != classes[c - 1].first);
    arrange_side(p_.mu, p_.b, p_.labels, p_.group, classes, group, own_);
    if (!p_.among) arrange_side(p_.other, p_.n, p_.other_labels, p_.other_group, classes, group, partners_);
  }

  void arrange_side(const T* rows, int64_t count, const int64_t* labels, const int64_t* groups, const std::vector<Class>& classes,
                    const std::vector<int32_t>& group, Points& side) {
    const W limit = std::is_same_v<W, double> ? W(0x1p500) : W(0x1p60);  // squares of differences and chains of them stay finite
    std::vector<char> bounded(count);
    for_each(workers_.size(), divide_up(count, kSub), [&](int64_t, int64_t task) {
      for (int64_t i = task * kSub; i < std::min(count, (task + 1) * kSub); ++i) bounded[i] = ops_.bounded(rows + i * p_.d, p_.d, limit);
    });
    std::vector<int32_t> key(count);
    for (int64_t i = 0; i < count; ++i) {
      key[i] = std::lower_bound(classes.begin(), classes.end(), class_of(labels, groups, i)) - classes.begin();
      side.odd.push_back(!bounded[i]);
      if (bounded[i]) side.index.push_back(i);
    }
    std::stable_sort(side.index.begin(), side.index.end(), [&](int64_t i, int64_t j) { return key[i] < key[j]; });
    const int64_t padded = round_up(side.size(), kSub);
    side.key.assign(padded, -1), side.group.assign(padded, -1);  // one class that is in no pair
    side.weight.assign(padded, 0), side.margin.assign(padded, 0);
    for (int64_t at = 0; at < side.size(); ++at) {
      const int64_t i = side.index[at];
      side.row.push_back(rows + i * p_.d);
      side.key[at] = key[i], side.group[at] = group[key[i]];
      if (&side != &own_) continue;
      side.weight[at] = p_.weight[i];
      if (p_.margin) side.margin[at] = p_.margin[i];
    }
  }

  static isa::Side side(const Points& points, int64_t at) {
    return {&points.key[at], &points.group[at], &points.weight[at], &points.margin[at]};
  }

  // ---- a block of pairs --------------------------------------------------------------------------------------------

  void block(Range rows, const Points& partners, Range cols) {
    const bool same = p_.among && rows.begin == cols.begin, both = p_.among ? !same : p_.partner_grad != nullptr;
    tasks_.clear();
    for (int64_t a = rows.begin; a < rows.end; a += kSub) {
      for (int64_t b = same ? a : cols.begin; b < cols.end; b += kSub) {
        if (may_count(a, rows.end, partners, b, cols.end)) tasks_.push_back({a, b, {}, {}});
      }
    }
    make_room(pull_, rows);
    if (both) make_room(back_, cols);
    for_each(workers_.size(), tasks_.size(), [&](int64_t w, int64_t t) {
      Task& task = tasks_[t];
      Worker& worker = workers_[w];
      const int64_t height = std::min(kSub, rows.end - task.a), width = std::min(kSub, cols.end - task.b);
      distances(ops_, worker.pairs, own_.row.data() + task.a, height, partners.row.data() + task.b, width, p_.d);
      worker.pull.resize(kSub * kSub);
      const bool mirrored = p_.among && task.a != task.b;
      const bool any = ops_.terms(p_.form, p_.scale, worker.pairs.sqdist.data(), side(own_, task.a), side(partners, task.b), p_.among,
                                  &task.own, mirrored ? &task.theirs : nullptr, worker.pull.data());
      if (!any || !(p_.mu_grad || p_.partner_grad)) return;
      const int64_t a = task.a - rows.begin, b = task.b - cols.begin;
      place(worker.pull.data(), kSub, 1, a, b, pull_);
      if (both || mirrored) place(worker.pull.data(), 1, kSub, b, a, same ? pull_ : back_);
    });
    for (const Task& task : tasks_) {
      add_sums(task.own, task.a, rows.end);
      if (p_.among && task.a != task.b) add_sums(task.theirs, task.b, cols.end);
    }
    if (p_.mu_grad) gather(own_, rows, partners, cols, pull_, p_.mu_grad);
    if (both && p_.among && p_.mu_grad) gather(own_, cols, own_, rows, back_, p_.mu_grad);
    if (p_.partner_grad) gather(partners, cols, own_, rows, back_, p_.partner_grad);
  }

  static void make_room(Pulls& pulls, Range rows) {
    pulls.panel.resize(std::max<size_t>(pulls.panel.size(), round_up(rows.size(), kSub) * kBlock));
    std::fill_n(&pulls.any[0][0], kSubs * kSubs, false);
  }

  // False where the order of the rows shows that no pair of the two blocks counts.
  bool may_count(int64_t a, int64_t a_end, const Points& partners, int64_t b, int64_t b_end) const {
    const int64_t a_last = std::min(a_end, a + kSub) - 1, b_last = std::min(b_end, b + kSub) - 1;
    if (own_.group[a_last] < partners.group[b] || partners.group[b_last] < own_.group[a]) return false;
    return !(own_.key[a] == own_.key[a_last] && partners.key[b] == partners.key[b_last] && own_.key[a] == partners.key[b]);
  }

  // The pulls of kSub rows from `row` on by kSub from `col` on.
  void place(const W* pull, int64_t row_step, int64_t col_step, int64_t row, int64_t col, Pulls& to) const {
    to.any[row / kSub][col / kSub] = true;
    for (int64_t r = 0; r < kSub; ++r) {
      W* out = panel(to.panel.data(), row + r) + col * ops_.pull_rows + (row + r) % ops_.pull_rows;
      for (int64_t c = 0; c < kSub; ++c) out[c * ops_.pull_rows] = pull[r * row_step + c * col_step];
    }
  }

  template <class P>
  P* panel(P* panels, int64_t row) const {
    return panels + row / ops_.pull_rows * ops_.pull_rows * kBlock;
  }

  void add_sums(const isa::Sums& sums, int64_t begin, int64_t end) {
    for (int64_t r = 0; r < std::min(kSub, end - begin); ++r) {
      const int64_t i = own_.index[begin + r];
      total_[i] += sums.row[r], p_.pairs[i] += sums.pairs[r], active_[i] += sums.active[r];
    }
  }

  // The rows that `gather` will not write.
  void clear_untouched(const Points& own, int64_t count, const Points& theirs, W* grad) const {
    for (int64_t i = 0; i < count; ++i) {
      if (own.odd[i] || theirs.size() == 0) std::fill_n(grad + i * p_.d, p_.d, W{0});
    }
  }

  // grad_i = or, beyond the first block, += 2 scale sum_j pull_ij (own_i - theirs_j)
  void gather(const Points& own, Range rows, const Points& theirs, Range cols, const Pulls& pulls, W* grad) {
    const int64_t strips = divide_up(p_.d, kStrip), subs = divide_up(rows.size(), kSub);
    const int64_t parts = std::clamp<int64_t>(8 / strips, 1, subs);  // of the rows: few columns are work for threads, too
    for_each(workers_.size(), strips * parts, [&](int64_t w, int64_t task) {
      const int64_t first = task / parts * kStrip, part = task % parts;
      const Range some{rows.begin + part * subs / parts * kSub, std::min(rows.end, rows.begin + (part + 1) * subs / parts * kSub)};
      gather_strips(workers_[w], own, rows.begin, some, theirs, cols, pulls, {first, std::min(p_.d, first + kStrip)}, grad);
    });
  }

  void gather_strips(Worker& w, const Points& own, int64_t begin, Range rows, const Points& theirs, Range cols, const Pulls& pulls,
                     Range columns, W* grad) const {
    const int64_t width = ops_.pull_cols, height = ops_.pull_rows;
    const bool shared = &own == &theirs && begin == cols.begin;
    w.theirs.resize(kBlock * kStrip), w.sums.resize(height * width);
    ops_.pack(theirs.row.data() + cols.begin, cols.size(), columns.begin, columns.size(), width, w.theirs.data());
    if (!shared) {
      w.own.resize(kBlock * kStrip);
      ops_.pack(own.row.data() + rows.begin, rows.size(), columns.begin, columns.size(), width, w.own.data());
    }
    const W factor = static_cast<W>(2 * p_.scale);
    for (int64_t strip = 0; strip < columns.size(); strip += width) {
      const W* their_strip = w.theirs.data() + strip * cols.size();
      const W* own_strip = shared ? their_strip + (rows.begin - begin) * width : w.own.data() + strip * rows.size();
      const int64_t n = std::min(width, columns.size() - strip);
      for (int64_t i = rows.begin; i < rows.end; i += height) {
        const bool* any = pulls.any[(i - begin) / kSub];
        std::fill(w.sums.begin(), w.sums.end(), W{0});
        for (int64_t j = 0; j < cols.size(); j += kSub) {
          if (!any[j / kSub]) continue;
          const W* pull = panel(pulls.panel.data(), i - begin) + j * height;
          const W *mine = own_strip + (i - rows.begin) * width, *theirs = their_strip + j * width;
          ops_.add_pull(pull, mine, theirs, std::min(kSub, cols.size() - j), w.sums.data());
        }
        for (int64_t r = 0; r < std::min(height, rows.end - i); ++r) {
          W* out = grad + own.index[i + r] * p_.d + columns.begin + strip;
          const W* sums = w.sums.data() + r * width;
          if (cols.begin == 0) {
            for (int64_t k = 0; k < n; ++k) out[k] = factor * sums[k];
          } else {
            for (int64_t k = 0; k < n; ++k) out[k] += factor * sums[k];
          }
        }
      }
    }
  }

  // ---- pairs with a row that stands in no tile ---------------------------------------------------------------------

  void odd_pairs() {
    const std::vector<bool>& odd = p_.among ? own_.odd : partners_.odd;
    const auto any = [](const std::vector<bool>& side) { return std::find(side.begin(), side.end(), true) != side.end(); };
    if (!any(odd) && !any(own_.odd)) return;  // else every pair would be looked at for nothing
    const int64_t* labels = p_.among ? p_.labels : p_.other_labels;
    const int64_t* group = p_.among ? p_.group : p_.other_group;
    for (int64_t j = 0; j < p_.n; ++j) {
      for (int64_t i = 0; i < p_.b; ++i) {
        if ((odd[j] || own_.odd[i]) && labels[j] != p_.labels[i] && (!group || group[j] == p_.group[i])) odd_pair(i, j);
      }
    }
  }

  static double at(const T* row, int64_t k) { return static_cast<double>(static_cast<W>(row[k])); }

  void odd_pair(int64_t i, int64_t j) {
    const T *x = p_.mu + i * p_.d, *y = p_.other + j * p_.d;
    ++p_.pairs[i];
    double sqdist = 0;
    bool finite = true;
    for (int64_t k = 0; k < p_.d; ++k) {
      finite &= std::isfinite(at(x, k)) && std::isfinite(at(y, k));
      sqdist += (at(x, k) - at(y, k)) * (at(x, k) - at(y, k));
    }
    const double nan = std::numeric_limits<double>::quiet_NaN();
    double pull = nan;
    if (finite) {
      const auto [value, slope] = term(p_.scale * sqdist, p_.margin ? p_.margin[i] : 0);
      total_[i] += value, active_[i] += slope != 0;
      pull = p_.weight[i] * slope;
      if (p_.among) pull += p_.weight[j] * term(p_.scale * sqdist, p_.margin ? p_.margin[j] : 0).second;
    } else {
      total_[i] = active_[i] = nan;
    }
    if (pull == 0) return;
    pull *= 2 * p_.scale;
    for (int64_t k = 0; k < p_.d; ++k) {
      const double step = pull * (at(x, k) - at(y, k));
      if (p_.mu_grad) p_.mu_grad[i * p_.d + k] += static_cast<W>(step);
      if (p_.partner_grad) p_.partner_grad[j * p_.d + k] -= static_cast<W>(step);
    }
  }

  std::pair<double, double> term(double d, double margin) const {
    switch (p_.form) {
      case isa::kExponential: return {std::exp(-d), -std::exp(-d)};
      case isa::kReciprocal: return {1 / (1 + d), -1 / ((1 + d) * (1 + d))};
      case isa::kHinge: return d < margin ? std::pair{margin - d, -1.0} : std::pair{0.0, 0.0};
      default: return {-d, -1};
    }
  }

  const Problem<T>& p_;
  const isa::PairOps<T> ops_;
  std::vector<Worker> workers_;
  Points own_, partners_;
  std::vector<double> total_, active_;
  std::vector<Task> tasks_;
  Pulls pull_, back_;
};

// ---- operators -----------------------------------------------------------------------------------------------------

using OptionalTensor = std::optional<Tensor>;

template <class T>
T* written(Tensor& t, bool asked) {
  return asked ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

}  // namespace

Tensor pair_sqdist_cpu(const Tensor& x, const Tensor& y) {
  LT_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) >= 1, "pair_sqdist", "x and y must be matrices with at least one column");
  const int64_t b = x.size(0), n = y.size(0), d = x.size(1);
  check_matrix("pair_sqdist", "x", x, b, d, x.scalar_type());
  check_matrix("pair_sqdist", "y", y, n, d, x.scalar_type());
  Tensor out = empty(result_type(x.scalar_type()), {b, n});
  for_dtype("pair_sqdist", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    all_distances(data<T>(x), b, data<T>(y), n, d, written<Wide<T>>(out, true));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pcl_rows_cpu(const Tensor& mu, const Tensor& labels, const OptionalTensor& group,
                                                                const Tensor& weight, const OptionalTensor& margin,
                                                                const OptionalTensor& other, const OptionalTensor& other_labels,
                                                                const OptionalTensor& other_group, int64_t form, double scale, bool grad,
                                                                bool other_grad) {
  const char* op = "pcl_rows";
  LT_CHECK(mu.dim() == 2 && mu.size(1) >= 1, op, "mu must be a matrix with at least one column");
  const int64_t b = mu.size(0), d = mu.size(1), n = other ? other->size(0) : b;
  const ScalarType type = mu.scalar_type(), answer = result_type(type);
  check_matrix(op, "mu", mu, b, d, type);
  check_vector(op, "labels", labels, b, ScalarType::Long);
  if (group) check_vector(op, "group", *group, b, ScalarType::Long);
  check_vector(op, "weight", weight, b, answer);
  if (margin) check_vector(op, "margin", *margin, b, answer);
  LT_CHECK(form >= 0 && form <= isa::kNegativeL2, op, "form must be 0, 1, 2 or 3; got ", form);
  LT_CHECK(margin.has_value() == (form == isa::kHinge), op, "margin goes with form 2 and with no other");
  LT_CHECK(other.has_value() == other_labels.has_value() && other_group.has_value() == (other.has_value() && group.has_value()), op,
           "other needs other_labels, and with group other_group");
  LT_CHECK(other || !other_grad, op, "other_grad needs other");
  if (other) {
    check_matrix(op, "other", *other, n, d, type);
    check_vector(op, "other_labels", *other_labels, n, ScalarType::Long);
    if (other_group) check_vector(op, "other_group", *other_group, n, ScalarType::Long);
  }
  Tensor row = empty(answer, {b}), pairs = empty(ScalarType::Long, {b}), active = empty(answer, {margin ? b : 0});
  const auto gradient = [&](bool asked, int64_t rows) { return asked ? empty(answer, {rows, d}) : empty(answer, {0}); };
  Tensor mu_grad = gradient(grad, b), partner_grad = gradient(other_grad, n);
  for_dtype(op, type, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    Problem<T> p{};
    p.mu = data<T>(mu), p.labels = data<int64_t>(labels), p.group = data<int64_t>(group);
    p.weight = data<W>(weight), p.margin = data<W>(margin);
    p.other = other ? data<T>(*other) : p.mu;
    p.other_labels = data<int64_t>(other_labels), p.other_group = data<int64_t>(other_group);
    p.b = b, p.n = n, p.d = d, p.form = form, p.scale = scale, p.among = !other;
    p.row = written<W>(row, true), p.pairs = written<int64_t>(pairs, true), p.active = written<W>(active, margin.has_value());
    p.mu_grad = written<W>(mu_grad, grad), p.partner_grad = written<W>(partner_grad, other_grad);
    Contrast<T>(p).run();
  });
  return {row, pairs, active, mu_grad, partner_grad};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pcl_cpu(const Tensor& mu, const Tensor& labels, const OptionalTensor& group,
                                                                   const Tensor& weight, const OptionalTensor& margin,
                                                                   const OptionalTensor& other, const OptionalTensor& other_labels,
                                                                   const OptionalTensor& other_group, int64_t form, double scale,
                                                                   bool grad, bool other_grad, bool mean) {
  auto [row, pairs, active, mu_grad, partner_grad] =
      pcl_rows_cpu(mu, labels, group, weight, margin, other, other_labels, other_group, form, scale, grad, other_grad);
  Tensor loss = empty(weight.scalar_type(), {}), divisor = empty(weight.scalar_type(), {});
  const auto* counts = data<int64_t>(pairs);
  const double count = mean ? std::max<int64_t>(1, std::accumulate(counts, counts + pairs.size(0), int64_t{0})) : 1;
  const auto add = [&](auto zero) {
    using W = decltype(zero);
    const W *weights = data<W>(weight), *rows = data<W>(row);
    const double total =
        std::inner_product(weights, weights + row.size(0), rows, 0.0, std::plus<>(), [](W a, W b) { return double(a) * b; });
    *written<W>(loss, true) = static_cast<W>(total / count), *written<W>(divisor, true) = static_cast<W>(count);
  };
  weight.scalar_type() == ScalarType::Double ? add(double{}) : add(float{});
  return {loss, divisor, row, active, mu_grad, partner_grad};
}

}  // namespace ltkernels
