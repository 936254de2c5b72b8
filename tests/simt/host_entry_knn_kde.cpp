// csrc/knn_kde/knn_kde.cuh behind a C interface, for ctypes: the kernels and their launch sequence as the GPU runs
// them.
#include "knn_kde/knn_kde.cuh"

using namespace ltkernels::knn_kde;

namespace {

// n: count, bank, d, k, multiprocessors, queries a chunk at most (0: as many as there is room for)
Plan plan_of(const int64_t* n) {
  Plan plan = make_plan(n[0], n[1], static_cast<int>(n[2]), static_cast<int>(n[3]), static_cast<int>(n[4]));
  if (n[5] > 0) plan.rows = std::min(plan.rows, n[5]);  // chunks without the 50 000 queries that ask for them
  return plan;
}

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
  const Plan plan = plan_of(n);
  Workspace w;
  char* scratch = static_cast<char*>(a[13]);
  const cudaError_t status = run(p, plan, scratch, nullptr);
  plan.carve(scratch, p.d, w);
  paths[0] = *w.left_count;  // rows that took the second rung, and rows that went over the whole bank
  paths[1] = std::count(w.state, w.state + std::min(plan.rows, p.count), kMeasured);
  return status;
}

}  // namespace

extern "C" int64_t knn_kde_scratch(const int64_t* sizes) {
  Workspace w;
  return plan_of(sizes).carve(nullptr, static_cast<int>(sizes[2]), w);
}

// cross, self, query, tiny
extern "C" void knn_kde_error_bound(int d, int terms, float* bound) {
  const ErrorBound e = error_bound(d, terms);
  bound[0] = e.cross, bound[1] = e.self, bound[2] = e.query, bound[3] = e.tiny;
}

extern "C" int knn_kde_run(int dtype, void* const* arrays, const int64_t* sizes, int64_t* paths) {
  switch (dtype) {
    case 0: return solve<float>(arrays, sizes, paths);
    case 1: return solve<__half>(arrays, sizes, paths);
    default: return solve<__nv_bfloat16>(arrays, sizes, paths);
  }
}
