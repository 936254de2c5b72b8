// The operators of ltkernels/pairwise_pcl.py as C++ functions; shapes and meaning are documented there and in reference.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace ltkernels {

using torch::stable::Tensor;

Tensor pair_sqdist_cpu(const Tensor& x, const Tensor& y);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pcl_rows_cpu(
    const Tensor& mu, const Tensor& labels, const std::optional<Tensor>& group, const Tensor& weight, const std::optional<Tensor>& margin,
    const std::optional<Tensor>& other, const std::optional<Tensor>& other_labels, const std::optional<Tensor>& other_group, int64_t form,
    double scale, bool grad, bool other_grad);

// And before them sum_i weight_i row_i / divisor and, instead of `pairs`, the divisor: their sum or 1 if `mean`, else 1.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> pcl_cpu(
    const Tensor& mu, const Tensor& labels, const std::optional<Tensor>& group, const Tensor& weight, const std::optional<Tensor>& margin,
    const std::optional<Tensor>& other, const std::optional<Tensor>& other_labels, const std::optional<Tensor>& other_group, int64_t form,
    double scale, bool grad, bool other_grad, bool mean);

}  // namespace ltkernels
