// pair_sqdist and pcl_rows for CUDA tensors: checks, allocation, launch, registration. The kernels are in pairwise_pcl.cuh.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_tensor.h"
#include "pairwise_pcl.cuh"

namespace ltkernels {
namespace {

// call(T*) for the type of the tensors.
template <class Call>
void with_type(const char* op, ScalarType type, const Call& call) {
  switch (type) {
    case ScalarType::Float: return call(static_cast<float*>(nullptr));
    case ScalarType::Half: return call(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16: return call(static_cast<__nv_bfloat16*>(nullptr));
    default: LT_CHECK(false, op, "expected fp16, bf16 or fp32 on cuda");
  }
}

Tensor pair_sqdist_cuda(const Tensor& x, const Tensor& y) {
  const char* op = "pairwise_sqdist";
  LT_CHECK(x.dim() == 2 && y.dim() == 2, op, "x and y must be matrices");
  const int64_t rows = x.size(0), columns = y.size(0), d = x.size(1);
  check_cuda(op, x, {&x, &y});
  check_matrix(op, "x", x, rows, d, x.scalar_type());
  check_matrix(op, "y", y, columns, d, x.scalar_type());
  const int64_t row_tiles = pairwise_pcl::tiles(rows, pairwise_pcl::kTile);
  LT_CHECK(row_tiles <= INT32_MAX / std::max<int64_t>(1, pairwise_pcl::tiles(columns, pairwise_pcl::kTile)), op,
           "the problem is too large for one launch on cuda; split the rows");
  const Tensor out = torch::stable::new_empty(x, {rows, columns}, ScalarType::Float);
  if (rows == 0 || columns == 0) return out;  // an empty grid is a launch error
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_type(op, x.scalar_type(), [&]<class T>(T*) {
    STD_CUDA_CHECK(pairwise_pcl::sqdist(read<T>(x), read<T>(y), rows, columns, d, write<float>(out), stream_of(x)));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pcl_rows_cuda(const Tensor& mu, const Tensor& labels, const OptionalTensor& group,
                                                                 const Tensor& weight, const OptionalTensor& margin,
                                                                 const OptionalTensor& other, const OptionalTensor& other_labels,
                                                                 const OptionalTensor& other_group, int64_t form, double scale,
                                                                 bool grad, bool other_grad) {
  const char* op = "pcl_loss";
  LT_CHECK(mu.dim() == 2 && (!other || other->dim() == 2), op, "mu and other must be matrices");
  LT_CHECK(form >= 0 && form < pairwise_pcl::kForms, op, "there is no form ", form);
  LT_CHECK(margin.has_value() == (form == pairwise_pcl::kHinge), op, "a margin belongs to the hinge");
  LT_CHECK(other.has_value() == other_labels.has_value() && (other || !other_grad), op, "other and other_labels come together");
  LT_CHECK((other && group.has_value()) == other_group.has_value(), op, "group and other_group come together");
  const Tensor &partner = other ? *other : mu, &their_labels = other ? *other_labels : labels;
  const OptionalTensor& their_group = other ? other_group : group;
  const int64_t rows = mu.size(0), columns = partner.size(0), d = mu.size(1);
  check_cuda(op, mu, {&mu, &labels, pointer(group), &weight, pointer(margin), &partner, &their_labels, pointer(their_group)});
  check_matrix(op, "mu", mu, rows, d, mu.scalar_type());
  check_matrix(op, "other", partner, columns, d, mu.scalar_type());
  check_vector(op, "labels", labels, rows, ScalarType::Long);
  check_vector(op, "other_labels", their_labels, columns, ScalarType::Long);
  if (group) check_vector(op, "group", *group, rows, ScalarType::Long);
  if (their_group) check_vector(op, "other_group", *their_group, columns, ScalarType::Long);
  check_vector(op, "weight", weight, rows, ScalarType::Float);
  if (margin) check_vector(op, "margin", *margin, rows, ScalarType::Float);

  const auto gradient = [&](bool wanted, int64_t count) {
    return wanted ? torch::stable::new_empty(weight, {count, d}) : torch::stable::new_empty(weight, {0});
  };
  const Tensor row = torch::stable::new_empty(weight, {rows}), pairs = torch::stable::new_empty(labels, {rows});
  const Tensor active = torch::stable::new_empty(weight, {margin ? rows : 0});
  const Tensor mu_grad = gradient(grad, rows), partner_grad = gradient(other_grad, columns);
  const torch::stable::accelerator::DeviceGuard guard(mu.get_device_index());
  with_type(op, mu.scalar_type(), [&]<class T>(T*) {
    pairwise_pcl::Problem<T> problem{};
    problem.mu = read<T>(mu);
    problem.other = read<T>(partner);
    problem.rows = rows;
    problem.columns = columns;
    problem.d = d;
    problem.mu_grad = grad ? write<float>(mu_grad) : nullptr;
    problem.partner_grad = other_grad ? write<float>(partner_grad) : nullptr;
    pairwise_pcl::Loss& loss = problem.loss;
    loss.labels = read<int64_t>(labels);
    loss.other_labels = read<int64_t>(their_labels);
    loss.group = read<int64_t>(group);
    loss.other_group = read<int64_t>(their_group);
    loss.weight = read<float>(weight);
    loss.margin = read<float>(margin);
    loss.among = !other;
    loss.form = static_cast<int>(form);
    loss.scale = scale;
    loss.row = write<float>(row);
    loss.pairs = write<int64_t>(pairs);
    loss.active = margin ? write<float>(active) : nullptr;
    // The allocator hands this memory to later work of the same stream only, so it may be freed before the kernels have run.
    const pairwise_pcl::Plan plan = pairwise_pcl::make_plan(rows, columns);
    const Tensor scratch = torch::stable::new_empty(weight, {plan.floats()});
    STD_CUDA_CHECK(pairwise_pcl::run(problem, plan, write<float>(scratch), stream_of(mu)));
  });
  return {row, pairs, active, mu_grad, partner_grad};
}

}  // namespace
}  // namespace ltkernels

STABLE_TORCH_LIBRARY_IMPL(ltkernels_native, CUDA, m) {
  m.impl("pair_sqdist", TORCH_BOX(&ltkernels::pair_sqdist_cuda));
  m.impl("pcl_rows", TORCH_BOX(&ltkernels::pcl_rows_cuda));
}
