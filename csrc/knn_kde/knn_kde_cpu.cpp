// The operators of knn_kde.h on the CPU: checks, outputs, dtypes. The search itself is in cpu_search.h.
#include "knn_kde.h"

#include "../common/check.h"
#include "../common/cpu_tensor.h"
#include "cpu_search.h"

namespace ltkernels {
namespace {

struct Inputs {
  const Tensor &queries, &points, &centre, &centred, &sqnorm;
  const std::optional<Tensor>&self_index, &bound;
  int64_t k;
};

void check(const char* op, const Inputs& in) {
  LT_CHECK(in.queries.dim() == 2 && in.points.dim() == 2, op, "queries and points must be matrices");
  const int64_t q = in.queries.size(0), n = in.points.size(0), d = in.points.size(1);
  check_matrix(op, "queries", in.queries, q, d, in.points.scalar_type());
  check_matrix(op, "points", in.points, n, d, in.points.scalar_type());
  check_vector(op, "centre", in.centre, d, ScalarType::Float);
  const bool copied = in.centred.dim() != 2 || in.centred.size(0) != 0;
  check_matrix(op, "centred", in.centred, copied ? n : 0, d, ScalarType::Float);
  check_vector(op, "sqnorm", in.sqnorm, n, ScalarType::Float);
  if (in.self_index) check_vector(op, "self_index", *in.self_index, q, ScalarType::Long);
  if (in.bound) check_vector(op, "bound", *in.bound, q, result_type(in.points.scalar_type()));
  LT_CHECK(d >= 1, op, "points must have at least one column");
  LT_CHECK(n <= int64_t(UINT32_MAX), op, "at most 2^32 - 1 bank rows on the CPU; got ", n);
  LT_CHECK(in.k >= 1 && in.k <= n, op, "k must be in [1, N]; got k=", in.k, " with N=", n);
}

template <class T>
void centre_rows(const Tensor& points, const Tensor& centre, Tensor& centred, Tensor& sqnorm) {
  const int64_t n = points.size(0), d = points.size(1);
  const auto* rows = static_cast<const T*>(points.const_data_ptr());
  const auto* shift = static_cast<const float*>(centre.const_data_ptr());
  auto* out = static_cast<float*>(centred.mutable_data_ptr());
  auto* norm = static_cast<float*>(sqnorm.mutable_data_ptr());
  const bool copy = centred.size(0) == n;
  const auto ops = isa::row_ops<T>(isa::level());
  torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(copy ? 0 : d);
    for (int64_t i = begin; i < end; ++i) {
      float* row = copy ? out + i * d : scratch.data();
      const double sum = ops.centre(rows + i * d, shift, d, row);
      norm[i] = static_cast<float>(sum);
      if (sum < kInf || isa::finite(rows + i * d, d)) continue;
      std::fill_n(row, d, 0.f);
      norm[i] = kInf;
    }
  });
}

template <class T>
void search(const Inputs& in, Tensor& sqdist, Tensor& index, const Tensor* bandwidth,
            const std::optional<Tensor>& log_weight, Tensor* log_density, Tensor* score) {
  using W = Wide<T>;
  Problem<T> p{};
  p.queries = static_cast<const T*>(in.queries.const_data_ptr());
  p.points = static_cast<const T*>(in.points.const_data_ptr());
  p.centre = static_cast<const float*>(in.centre.const_data_ptr());
  if (in.centred.size(0) > 0) p.centred = static_cast<const float*>(in.centred.const_data_ptr());
  p.sqnorm = static_cast<const float*>(in.sqnorm.const_data_ptr());
  p.self_index = data<int64_t>(in.self_index);
  p.bound = data<W>(in.bound);
  p.q = in.queries.size(0), p.n = in.points.size(0), p.d = in.points.size(1), p.k = in.k;
  p.sqdist = static_cast<W*>(sqdist.mutable_data_ptr());
  p.index = static_cast<int64_t*>(index.mutable_data_ptr());
  if (bandwidth) {
    p.bandwidth = static_cast<const W*>(bandwidth->const_data_ptr());
    p.log_weight = data<W>(log_weight);
    p.log_density = static_cast<W*>(log_density->mutable_data_ptr());
    p.score = static_cast<W*>(score->mutable_data_ptr());
  }
  if (p.q > 0) Search<T>(p).run();
}

void dispatch(const char* op, const Inputs& in, Tensor& sqdist, Tensor& index, const Tensor* bandwidth,
              const std::optional<Tensor>& log_weight, Tensor* log_density, Tensor* score) {
  for_dtype(op, in.points.scalar_type(), [&](auto zero) {
    search<decltype(zero)>(in, sqdist, index, bandwidth, log_weight, log_density, score);
  });
}

// exp(log_weight) and its sum, in blocks of rows, each in one order: the same bits for any number of threads.
template <class W>
std::pair<std::vector<double>, double> weights(const W* log_weight, int64_t n) {
  constexpr int64_t kRows = 1 << 12;
  std::vector<double> weight(n), sums(divide_up(n, kRows));
  torch::stable::parallel_for(0, sums.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kRows; i < std::min(n, end * kRows); ++i) sums[i / kRows] += weight[i] = std::exp(double(log_weight[i]));
  });
  double total = 0;
  for (double sum : sums) total += sum;
  return {std::move(weight), total};
}

// `truncation` of reference.py, whose comments say why it is a bound.
template <class W>
void truncate(const Tensor& log_density, const Tensor& sqdist, const Tensor& index, const Tensor& bandwidth,
              const std::optional<Tensor>& log_weight, const std::optional<Tensor>& self_index, int64_t n, Tensor& truncation) {
  const int64_t q = sqdist.size(0), k = sqdist.size(1);
  const auto* kept = static_cast<const W*>(log_density.const_data_ptr());
  const auto* distance = static_cast<const W*>(sqdist.const_data_ptr());
  const auto* rows = static_cast<const int64_t*>(index.const_data_ptr());
  const auto* h = static_cast<const W*>(bandwidth.const_data_ptr());
  const int64_t* self = data<int64_t>(self_index);
  auto* out = static_cast<W*>(truncation.mutable_data_ptr());
  for (int64_t i = 0; self && i < q; ++i) {
    LT_CHECK(self[i] < n, "knn_kde", "self_index must be below N; got ", self[i], " with N=", n);
  }
  const double wide = std::numeric_limits<double>::epsilon(), eps = std::numeric_limits<W>::epsilon();
  const double rounding = 8 * eps + 2 * wide, log_k = std::log(double(k)), slack = rounding * (1 + log_k) + k * eps;
  const auto [weight, total] = log_weight ? weights(data<W>(log_weight), n) : std::pair{std::vector<double>{}, 0.0};
  torch::stable::parallel_for(0, q, 1 << 12, [&, &weight = weight, &total = total](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool left_out = self && self[i] >= 0;
      double rest = double(n - k - left_out);
      if (log_weight && rest > 0) {
        double sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += weight[rows[i * k + j]];
        rest = total - sum - (left_out ? weight[self[i]] : 0);
        rest = (rest < 0 ? 0 : rest) + 4 * n * wide * total;
      }
      const double log_last = distance[i * k + k - 1] / (double(h[i]) * h[i] * -2);
      const double density = kept[i], lowest = std::numeric_limits<double>::lowest();
      const double log_kept = (density < lowest ? lowest : density) + log_k;
      out[i] = static_cast<W>((1 - rounding) * log_last - log_kept + rounding * std::abs(log_kept) + (std::log(rest) + slack));
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> bank_rows_cpu(const Tensor& points, const Tensor& centre, bool copy) {
  const char* op = "bank_prepare";
  LT_CHECK(points.dim() == 2, op, "points must be a matrix");
  const int64_t n = points.size(0), d = points.size(1);
  check_matrix(op, "points", points, n, d, points.scalar_type());
  check_vector(op, "centre", centre, d, ScalarType::Float);
  Tensor centred = empty(ScalarType::Float, {copy ? n : 0, d}), sqnorm = empty(ScalarType::Float, {n});
  for_dtype(op, points.scalar_type(), [&](auto zero) { centre_rows<decltype(zero)>(points, centre, centred, sqnorm); });
  return {centred, sqnorm};
}

Tensor bank_sample_cpu(const Tensor& points, int64_t step) {
  const char* op = "bank_prepare";
  LT_CHECK(points.dim() == 2 && step >= 1, op, "points must be a matrix, and step at least 1");
  check_matrix(op, "points", points, points.size(0), points.size(1), points.scalar_type());
  const int64_t n = divide_up(points.size(0), step), bytes = points.size(1) * int64_t(points.element_size());
  Tensor sample = empty(points.scalar_type(), {n, points.size(1)});
  const char* rows = static_cast<const char*>(points.const_data_ptr());
  char* out = static_cast<char*>(sample.mutable_data_ptr());
  const ScatteredReads file(rows, points.size(0) * bytes);
  for (int64_t i = 0; i < n; ++i) file.fetch(rows + i * step * bytes, bytes);
  for (int64_t i = 0; i < n; ++i) std::copy_n(rows + i * step * bytes, bytes, out + i * bytes);
  return sample;
}

std::tuple<Tensor, Tensor> knn_cpu(const Tensor& queries, const Tensor& points, const Tensor& centre,
                                   const Tensor& centred, const Tensor& sqnorm, const std::optional<Tensor>& self_index,
                                   const std::optional<Tensor>& bound, int64_t k) {
  const Inputs in{queries, points, centre, centred, sqnorm, self_index, bound, k};
  check("knn", in);
  const int64_t q = queries.size(0);
  Tensor sqdist = empty(result_type(points.scalar_type()), {q, k}), index = empty(ScalarType::Long, {q, k});
  dispatch("knn", in, sqdist, index, nullptr, std::nullopt, nullptr, nullptr);
  return {sqdist, index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> knn_kde_cpu(const Tensor& queries, const Tensor& points,
                                                       const Tensor& centre, const Tensor& centred,
                                                       const Tensor& sqnorm, const std::optional<Tensor>& self_index,
                                                       const std::optional<Tensor>& bound, int64_t k,
                                                       const Tensor& bandwidth,
                                                       const std::optional<Tensor>& log_weight) {
  const Inputs in{queries, points, centre, centred, sqnorm, self_index, bound, k};
  check("knn_kde", in);
  const int64_t q = queries.size(0), n = points.size(0), d = points.size(1);
  const ScalarType type = result_type(points.scalar_type());
  check_vector("knn_kde", "bandwidth", bandwidth, q, type);
  if (log_weight) check_vector("knn_kde", "log_weight", *log_weight, n, type);
  Tensor log_density = empty(type, {q}), score = empty(type, {q, d});
  Tensor sqdist = empty(type, {q, k}), index = empty(ScalarType::Long, {q, k});
  dispatch("knn_kde", in, sqdist, index, &bandwidth, log_weight, &log_density, &score);
  return {log_density, score, sqdist, index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> knn_kde_bounded_cpu(
    const Tensor& queries, const Tensor& points, const Tensor& centre, const Tensor& centred, const Tensor& sqnorm,
    const std::optional<Tensor>& self_index, const std::optional<Tensor>& bound, int64_t k, const Tensor& bandwidth,
    const std::optional<Tensor>& log_weight) {
  auto [log_density, score, sqdist, index] =
      knn_kde_cpu(queries, points, centre, centred, sqnorm, self_index, bound, k, bandwidth, log_weight);
  Tensor truncation = empty(bandwidth.scalar_type(), {queries.size(0)});
  if (truncation.scalar_type() == ScalarType::Double) {
    truncate<double>(log_density, sqdist, index, bandwidth, log_weight, self_index, points.size(0), truncation);
  } else {
    truncate<float>(log_density, sqdist, index, bandwidth, log_weight, self_index, points.size(0), truncation);
  }
  return {log_density, score, sqdist, index, truncation};
}

}  // namespace ltkernels
