// csrc/knn_kde/knn_kde.cuh behind a C interface, for ctypes: the kernels and their launch sequence as the GPU runs
// them.
#include "../../csrc/knn_kde/knn_kde.cuh"

#include <vector>

using namespace ltkernels::knn_kde;

namespace {

template <class T>
int solve(void* const* a, const int64_t* n, int64_t* paths) {
  Problem<T> p{};
  p.queries = static_cast<const T*>(a[0]);
  p.points = static_cast<const T*>(a[1]);
  p.centre = static_cast<const float*>(a[2]);
  p.centred = static_cast<const float*>(a[3]);
  p.sqnorm = static_cast<const float*>(a[4]);
  p.self_index = static_cast<const int64_t*>(a[5]);
  p.bound = static_cast<const float*>(a[6]);
  p.bandwidth = static_cast<const float*>(a[7]);
  p.log_weight = static_cast<const float*>(a[8]);
  p.log_density = static_cast<float*>(a[9]);
  p.score = static_cast<float*>(a[10]);
  p.sqdist = static_cast<float*>(a[11]);
  p.index = static_cast<int64_t*>(a[12]);
  p.count = n[0];
  p.bank = n[1];
  p.d = static_cast<int>(n[2]);
  p.k = static_cast<int>(n[3]);
  Plan plan = make_plan(p.count, p.bank, p.d, p.k, static_cast<int>(n[4]));
  if (n[5] > 0) plan.rows = std::min(plan.rows, n[5]);  // chunks without the 50 000 queries that ask for them
  Workspace w;
  std::vector<char> scratch(plan.carve(nullptr, p.d, w) + 256, static_cast<char>(0xff));
  char* base = scratch.data() + (256 - reinterpret_cast<uintptr_t>(scratch.data()) % 256);
  const cudaError_t status = run(p, plan, base, nullptr);
  plan.carve(base, p.d, w);
  paths[0] = *w.left_count;  // rows that took the second rung, and rows that went over the whole bank
  paths[1] = std::count(w.state, w.state + std::min(plan.rows, p.count), kMeasured);
  return status;
}

}  // namespace

extern "C" int knn_kde_run(int dtype, int order, uint64_t seed, void* const* arrays, const int64_t* sizes,
                           int64_t* paths) {
  simt::options() = {static_cast<simt::Order>(order), seed};
  switch (dtype) {
    case 0: return solve<float>(arrays, sizes, paths);
    case 1: return solve<__half>(arrays, sizes, paths);
    default: return solve<__nv_bfloat16>(arrays, sizes, paths);
  }
}

extern "C" const char* knn_kde_error() { return simt::error().c_str(); }
