// csrc/score_select/score_select.cuh behind a C interface, for ctypes: the kernels and their launches as the GPU runs them.
#include "score_select/score_select.cuh"

using namespace ltkernels::score_select;

namespace {

// a: x, clean, scale, std, log_prior, p, log_normalizer, index, seed, partials; n: rows, columns, d, row_offset
template <class T>
int select(void* const* a, const int64_t* n) {
  Problem<T> p{};
  p.x = static_cast<const T*>(a[0]);
  p.clean = static_cast<const T*>(a[1]);
  p.scale = static_cast<const float*>(a[2]);
  p.std = static_cast<const float*>(a[3]);
  p.log_prior = static_cast<const float*>(a[4]);
  p.p = static_cast<float*>(a[5]);
  p.log_normalizer = static_cast<float*>(a[6]);
  p.index = static_cast<int64_t*>(a[7]);
  p.seed = static_cast<const int64_t*>(a[8]);
  p.rows = n[0];
  p.columns = n[1];
  p.d = n[2];
  p.row_offset = n[3];
  return run(p, static_cast<Partial*>(a[9]), nullptr);
}

// a: weight, clean, out; n: rows, columns, d
template <class T>
int mixture(void* const* a, const int64_t* n) {
  return mix(Mixture<T>{static_cast<const float*>(a[0]), static_cast<const T*>(a[1]), static_cast<float*>(a[2]), n[0], n[1], n[2]},
             nullptr);
}

}  // namespace

// Bytes of the partials of n[0] rows and n[1] columns.
extern "C" int64_t score_select_scratch(const int64_t* n) {
  return make_tiling(n[0], n[1]).partials(n[0]) * static_cast<int64_t>(sizeof(Partial));
}

extern "C" void score_select_words(uint64_t seed, uint64_t row, uint32_t group, uint32_t* words) {
  const ltkernels::Philox4 drawn = ltkernels::philox(seed, row, group);
  for (int i = 0; i < 4; ++i) words[i] = drawn.word[i];
}

extern "C" int score_select_run(int dtype, void* const* arrays, const int64_t* sizes) {
  switch (dtype) {
    case 0: return select<float>(arrays, sizes);
    case 1: return select<__half>(arrays, sizes);
    default: return select<__nv_bfloat16>(arrays, sizes);
  }
}

extern "C" int score_select_mix(int dtype, void* const* arrays, const int64_t* sizes) {
  switch (dtype) {
    case 0: return mixture<float>(arrays, sizes);
    case 1: return mixture<__half>(arrays, sizes);
    default: return mixture<__nv_bfloat16>(arrays, sizes);
  }
}
