// The operators of ltkernels/knn_kde.py as C++ functions; shapes and meaning are documented there.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace ltkernels {

using torch::stable::Tensor;

// Rows minus centre in float32, (n, d) if `copy` else (0, d), and their squared norms: 0 and +inf for a row with NaN or inf.
std::tuple<Tensor, Tensor> bank_rows_cpu(const Tensor& points, const Tensor& centre, bool copy);

// Rows 0, step, 2 step, ... of points in a file, which is not read in between.
Tensor bank_sample_cpu(const Tensor& points, int64_t step);

// `centred`: (n, d), or (0, d) where no copy is kept.
std::tuple<Tensor, Tensor> knn_cpu(const Tensor& queries, const Tensor& points, const Tensor& centre,
                                   const Tensor& centred, const Tensor& sqnorm, const std::optional<Tensor>& self_index,
                                   const std::optional<Tensor>& bound, int64_t k);

std::tuple<Tensor, Tensor, Tensor, Tensor> knn_kde_cpu(const Tensor& queries, const Tensor& points,
                                                       const Tensor& centre, const Tensor& centred,
                                                       const Tensor& sqnorm, const std::optional<Tensor>& self_index,
                                                       const std::optional<Tensor>& bound, int64_t k,
                                                       const Tensor& bandwidth,
                                                       const std::optional<Tensor>& log_weight);

// And (q,) what truncation dropped at most; see `truncation` in reference.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> knn_kde_bounded_cpu(
    const Tensor& queries, const Tensor& points, const Tensor& centre, const Tensor& centred, const Tensor& sqnorm,
    const std::optional<Tensor>& self_index, const std::optional<Tensor>& bound, int64_t k, const Tensor& bandwidth,
    const std::optional<Tensor>& log_weight);

}  // namespace ltkernels
