// psel, psel_sample and psel_mix for CUDA tensors: checks, allocation, launch, registration. The kernels are in score_select.cuh.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_tensor.h"
#include "score_select.cuh"

namespace ltkernels {
namespace {

// Blocks are numbered in 32 bits, and so are the columns; the softmax has a block a row.
void check_size(const char* op, int64_t rows, int64_t columns, int64_t row_tiles, int64_t column_tiles) {
  LT_CHECK(std::max(rows, columns) <= INT32_MAX && row_tiles <= INT32_MAX / std::max<int64_t>(1, column_tiles), op,
           "the problem is too large for one launch on cuda; split the rows");
}

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

struct Outputs {
  Tensor p, index;  // one of the two
  const Tensor* seed;
  int64_t row_offset;
};

Tensor select(const char* op, const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
              const OptionalTensor& log_prior, const Outputs& out) {
  const int64_t rows = x.size(0), columns = clean.size(0), d = clean.size(1);
  check_cuda(op, x, {&x, &clean, &scale, &std, pointer(log_prior)});
  check_matrix(op, "x", x, rows, d, clean.scalar_type());
  check_matrix(op, "clean", clean, columns, d, clean.scalar_type());
  check_vector(op, "scale", scale, rows, ScalarType::Float);
  check_vector(op, "std", std, rows, ScalarType::Float);
  if (log_prior) check_vector(op, "log_prior", *log_prior, columns, ScalarType::Float);
  LT_CHECK(columns >= 1, op, "clean must have at least one row");
  const score_select::Tiling tiling = score_select::make_tiling(rows, columns);
  check_size(op, rows, columns, tiling.row_tiles, tiling.blocks());
  const Tensor log_normalizer = torch::stable::new_empty(scale, {rows});
  if (rows == 0) return log_normalizer;  // an empty grid is a launch error

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  with_type(op, clean.scalar_type(), [&]<class T>(T*) {
    score_select::Problem<T> problem{};
    problem.x = read<T>(x);
    problem.clean = read<T>(clean);
    problem.scale = read<float>(scale);
    problem.std = read<float>(std);
    problem.log_prior = read<float>(log_prior);
    problem.rows = rows;
    problem.columns = columns;
    problem.d = d;
    problem.log_normalizer = write<float>(log_normalizer);
    // The allocator hands this memory to later work of the same stream only, so it may be freed before the kernels have run.
    const int64_t bytes = out.seed ? tiling.partials(rows) * static_cast<int64_t>(sizeof(score_select::Partial)) : 0;
    const Tensor scratch = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
    if (out.seed) {
      problem.index = write<int64_t>(out.index);
      problem.seed = read<int64_t>(*out.seed);
      problem.row_offset = out.row_offset;
    } else {
      problem.p = write<float>(out.p);
    }
    STD_CUDA_CHECK(score_select::run(problem, static_cast<score_select::Partial*>(scratch.mutable_data_ptr()), stream_of(x)));
  });
  return log_normalizer;
}

std::tuple<Tensor, Tensor> psel_cuda(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                     const OptionalTensor& log_prior) {
  LT_CHECK(x.dim() == 2 && clean.dim() == 2, "p_sel", "x and clean must be matrices");
  const Tensor p = torch::stable::new_empty(scale, {x.size(0), clean.size(0)}, ScalarType::Float);
  const Tensor log_normalizer = select("p_sel", x, clean, scale, std, log_prior, {p, p, nullptr, 0});
  return {p, log_normalizer};
}

std::tuple<Tensor, Tensor> psel_sample_cuda(const Tensor& x, const Tensor& clean, const Tensor& scale, const Tensor& std,
                                            const OptionalTensor& log_prior, const Tensor& seed, int64_t row_offset) {
  LT_CHECK(x.dim() == 2 && clean.dim() == 2, "score_select", "x and clean must be matrices");
  check_cuda("score_select", x, {&seed});
  check_vector("score_select", "seed", seed, 1, ScalarType::Long);
  const Tensor index = torch::stable::new_empty(scale, {x.size(0)}, ScalarType::Long);
  const Tensor log_normalizer = select("score_select", x, clean, scale, std, log_prior, {index, index, &seed, row_offset});
  return {index, log_normalizer};
}

Tensor psel_mix_cuda(const Tensor& weight, const Tensor& clean) {
  const char* op = "posterior_mean";
  LT_CHECK(weight.dim() == 2 && clean.dim() == 2, op, "weight and clean must be matrices");
  const int64_t rows = weight.size(0), columns = clean.size(0), d = clean.size(1);
  check_cuda(op, weight, {&weight, &clean});
  check_matrix(op, "weight", weight, rows, columns, ScalarType::Float);
  check_matrix(op, "clean", clean, columns, d, clean.scalar_type());
  check_size(op, rows, columns, (rows + score_select::kMixTile - 1) / score_select::kMixTile,
             (d + score_select::kMixTile - 1) / score_select::kMixTile);
  const Tensor out = torch::stable::new_empty(weight, {rows, d});
  if (rows == 0 || d == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  with_type(op, clean.scalar_type(), [&]<class T>(T*) {
    const score_select::Mixture<T> m{read<float>(weight), read<T>(clean), write<float>(out), rows, columns, d};
    STD_CUDA_CHECK(score_select::mix(m, stream_of(weight)));
  });
  return out;
}

}  // namespace
}  // namespace ltkernels

STABLE_TORCH_LIBRARY_IMPL(ltkernels_native, CUDA, m) {
  m.impl("psel", TORCH_BOX(&ltkernels::psel_cuda));
  m.impl("psel_sample", TORCH_BOX(&ltkernels::psel_sample_cuda));
  m.impl("psel_mix", TORCH_BOX(&ltkernels::psel_mix_cuda));
}
