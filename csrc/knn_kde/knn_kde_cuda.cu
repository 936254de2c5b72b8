// knn and knn_kde for CUDA tensors: checks, allocation, launch, registration. The kernels are in knn_kde.cuh.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../common/cuda_tensor.h"
#include "knn_kde.cuh"

namespace ltkernels {
namespace {

template <class T>
void launch(knn_kde::Problem<T> p, const Tensor& queries, const Tensor& points) {
  const torch::stable::accelerator::DeviceGuard guard(queries.get_device_index());
  p.queries = read<T>(queries);
  p.points = read<T>(points);
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, queries.get_device_index()));
  const knn_kde::Plan plan = knn_kde::make_plan(p.count, p.bank, p.d, p.k, multiprocessors);
  knn_kde::Workspace w;
  // The allocator hands this memory to later work of the same stream only, so it may be freed before the kernels have
  // run.
  const Tensor scratch = torch::stable::new_empty(queries, {plan.carve(nullptr, p.d, w)}, ScalarType::Byte);
  STD_CUDA_CHECK(knn_kde::run(p, plan, write<char>(scratch), stream_of(queries)));
}

struct Density {
  const Tensor& bandwidth;
  const OptionalTensor& log_weight;
  const Tensor &log_density, &score;
};

std::tuple<Tensor, Tensor> search(const char* op, const Tensor& queries, const Tensor& points, const Tensor& centre,
                                  const Tensor& centred, const Tensor& sqnorm, const OptionalTensor& self_index,
                                  const OptionalTensor& bound, int64_t k, const Density* density) {
  LT_CHECK(queries.dim() == 2 && points.dim() == 2, op, "queries and points must be matrices");
  const int64_t q = queries.size(0), n = points.size(0), d = points.size(1);
  const ScalarType type = points.scalar_type();
  check_cuda(op, queries, {&queries, &points, &centre, &centred, &sqnorm, pointer(self_index), pointer(bound)});
  check_matrix(op, "queries", queries, q, d, type);
  check_matrix(op, "points", points, n, d, type);
  check_vector(op, "centre", centre, d, ScalarType::Float);
  check_matrix(op, "centred", centred, n, d, ScalarType::Float);
  check_vector(op, "sqnorm", sqnorm, n, ScalarType::Float);
  if (self_index) check_vector(op, "self_index", *self_index, q, ScalarType::Long);
  if (bound) check_vector(op, "bound", *bound, q, ScalarType::Float);
  LT_CHECK(k >= 1 && k <= n && k <= knn_kde::kMaxK, op, "k must be in [1, min(N, ", knn_kde::kMaxK,
           ")] on cuda; got k=", k, " with N=", n);
  LT_CHECK(d >= 1 && d <= 4096, op, "the dimension must be in [1, 4096] on cuda; got d=", d);
  LT_CHECK(n <= INT32_MAX, op, "at most 2^31 - 1 bank rows on cuda; got N=", n);
  if (density) {
    check_cuda(op, queries, {&density->bandwidth, pointer(density->log_weight)});
    check_vector(op, "bandwidth", density->bandwidth, q, ScalarType::Float);
    if (density->log_weight) check_vector(op, "log_weight", *density->log_weight, n, ScalarType::Float);
  }
  Tensor sqdist = torch::stable::new_empty(queries, {q, k}, ScalarType::Float);
  Tensor index = torch::stable::new_empty(queries, {q, k}, ScalarType::Long);
  if (q == 0) return {sqdist, index};  // an empty grid is a launch error

  const auto with = [&]<class T>(knn_kde::Problem<T> p) {
    p.centre = read<float>(centre);
    p.centred = read<float>(centred);
    p.sqnorm = read<float>(sqnorm);
    p.self_index = read<int64_t>(self_index);
    p.bound = read<float>(bound);
    p.count = q;
    p.bank = n;
    p.d = static_cast<int>(d);
    p.k = static_cast<int>(k);
    p.sqdist = write<float>(sqdist);
    p.index = write<int64_t>(index);
    if (density) {
      p.bandwidth = read<float>(density->bandwidth);
      p.log_weight = read<float>(density->log_weight);
      p.log_density = write<float>(density->log_density);
      p.score = write<float>(density->score);
    }
    launch(p, queries, points);
  };
  switch (type) {
    case ScalarType::Float: with(knn_kde::Problem<float>{}); break;
    case ScalarType::Half: with(knn_kde::Problem<__half>{}); break;
    case ScalarType::BFloat16: with(knn_kde::Problem<__nv_bfloat16>{}); break;
    default: LT_CHECK(false, op, "expected fp16, bf16 or fp32 points on cuda");
  }
  return {sqdist, index};
}

std::tuple<Tensor, Tensor> knn_cuda(const Tensor& queries, const Tensor& points, const Tensor& centre,
                                    const Tensor& centred, const Tensor& sqnorm, const OptionalTensor& self_index,
                                    const OptionalTensor& bound, int64_t k) {
  return search("knn", queries, points, centre, centred, sqnorm, self_index, bound, k, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> knn_kde_cuda(const Tensor& queries, const Tensor& points,
                                                        const Tensor& centre, const Tensor& centred,
                                                        const Tensor& sqnorm, const OptionalTensor& self_index,
                                                        const OptionalTensor& bound, int64_t k, const Tensor& bandwidth,
                                                        const OptionalTensor& log_weight) {
  LT_CHECK(queries.dim() == 2, "knn_kde", "queries must be a matrix");
  const int64_t q = queries.size(0), d = queries.size(1);
  const Tensor log_density = torch::stable::new_empty(queries, {q}, ScalarType::Float);
  const Tensor score = torch::stable::new_empty(queries, {q, d}, ScalarType::Float);
  const Density density{bandwidth, log_weight, log_density, score};
  auto [sqdist, index] = search("knn_kde", queries, points, centre, centred, sqnorm, self_index, bound, k, &density);
  return {log_density, score, sqdist, index};
}

}  // namespace
}  // namespace ltkernels

STABLE_TORCH_LIBRARY_IMPL(ltkernels_native, CUDA, m) {
  m.impl("knn", TORCH_BOX(&ltkernels::knn_cuda));
  m.impl("knn_kde", TORCH_BOX(&ltkernels::knn_kde_cuda));
}
