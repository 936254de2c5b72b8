// The operators of ltkernels/score_select.py as C++ functions; shapes and meaning are documented there and in reference.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace ltkernels {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> psel_cpu(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                    const std::optional<Tensor>& log_prior);

std::tuple<Tensor, Tensor> psel_sample_cpu(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                           const std::optional<Tensor>& log_prior, const Tensor& seed, int64_t row_offset);

// own, counts, labels, self_labels, gate: as in `score_select` of reference.py.
std::tuple<Tensor, Tensor, Tensor> score_select_cpu(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                                    const std::optional<Tensor>& log_prior, const Tensor& seed, int64_t row_offset,
                                                    const std::optional<Tensor>& own, const std::optional<Tensor>& counts,
                                                    const std::optional<Tensor>& labels, const std::optional<Tensor>& self_labels,
                                                    int64_t gate);

std::tuple<Tensor, Tensor> psel_mean_cpu(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                         const std::optional<Tensor>& log_prior);

Tensor psel_mix_cpu(const Tensor& weight, const Tensor& clean);

}  // namespace ltkernels
