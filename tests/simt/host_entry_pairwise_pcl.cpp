// csrc/pairwise_pcl/pairwise_pcl.cuh behind a C interface, for ctypes: the kernels and their launches as the GPU runs them.
#include "pairwise_pcl/pairwise_pcl.cuh"

using namespace ltkernels::pairwise_pcl;

namespace {

// a: x, y, out; n: rows, columns, d
template <class T>
int squares(void* const* a, const int64_t* n) {
  return sqdist(static_cast<const T*>(a[0]), static_cast<const T*>(a[1]), n[0], n[1], n[2], static_cast<float*>(a[2]), nullptr);
}

// a: mu, other, labels, other_labels, group, other_group, weight, margin, row, pairs, active, mu_grad, partner_grad, scratch; n: rows,
// columns, d, form, among, pairs of a chunk; scale is one over n[6]
template <class T>
int loss(void* const* a, const int64_t* n) {
  Problem<T> p{};
  p.mu = static_cast<const T*>(a[0]);
  p.other = static_cast<const T*>(a[1]);
  p.loss.labels = static_cast<const int64_t*>(a[2]);
  p.loss.other_labels = static_cast<const int64_t*>(a[3]);
  p.loss.group = static_cast<const int64_t*>(a[4]);
  p.loss.other_group = static_cast<const int64_t*>(a[5]);
  p.loss.weight = static_cast<const float*>(a[6]);
  p.loss.margin = static_cast<const float*>(a[7]);
  p.loss.row = static_cast<float*>(a[8]);
  p.loss.pairs = static_cast<int64_t*>(a[9]);
  p.loss.active = static_cast<float*>(a[10]);
  p.mu_grad = static_cast<float*>(a[11]);
  p.partner_grad = static_cast<float*>(a[12]);
  p.rows = n[0];
  p.columns = n[1];
  p.d = n[2];
  p.loss.form = static_cast<int>(n[3]);
  p.loss.among = n[4] != 0;
  p.loss.scale = 1.0 / static_cast<double>(n[6]);
  return run(p, make_plan(n[0], n[1], n[5]), static_cast<float*>(a[13]), nullptr);
}

}  // namespace

// Floats of the scratch memory of n[0] rows and n[1] columns in chunks of n[5] pairs.
extern "C" int64_t pairwise_pcl_scratch(const int64_t* n) { return make_plan(n[0], n[1], n[5]).floats(); }

extern "C" int pairwise_pcl_sqdist(int dtype, void* const* arrays, const int64_t* sizes) {
  switch (dtype) {
    case 0: return squares<float>(arrays, sizes);
    case 1: return squares<__half>(arrays, sizes);
    default: return squares<__nv_bfloat16>(arrays, sizes);
  }
}

extern "C" int pairwise_pcl_run(int dtype, void* const* arrays, const int64_t* sizes) {
  switch (dtype) {
    case 0: return loss<float>(arrays, sizes);
    case 1: return loss<__half>(arrays, sizes);
    default: return loss<__nv_bfloat16>(arrays, sizes);
  }
}
