// Memory of the CPU kernels.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <new>
#include <utility>
#include <vector>

#include "check.h"

namespace ltkernels {

// An answer, of two dimensions at most. torch::stable::new_empty asks the dispatcher, 1.1 us against .4, and an op on a few rows makes
// up to five.
inline Tensor empty(ScalarType type, std::initializer_list<int64_t> shape) {
  const int64_t strides[] = {shape.size() == 2 ? std::max<int64_t>(shape.begin()[1], 1) : 1, 1};
  const int32_t dtype = type == ScalarType::Float      ? aoti_torch_dtype_float32()
                        : type == ScalarType::Double   ? aoti_torch_dtype_float64()
                        : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                        : type == ScalarType::Bool     ? aoti_torch_dtype_bool()
                                                       : aoti_torch_dtype_int64();
  AtenTensorHandle handle = nullptr;
  const int32_t device = aoti_torch_device_type_cpu();
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.begin(), strides, dtype, device, 0, &handle));
  return Tensor(handle);
}

template <class T>
struct CacheLines {  // allocator: a vector register loaded from a packed panel must not straddle two lines; no zeros that nobody reads
  using value_type = T;
  CacheLines() = default;
  template <class U>
  CacheLines(const CacheLines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  void construct(T* p) { ::new (static_cast<void*>(p)) T; }
  template <class... Args>
  void construct(T* p, Args&&... args) {
    ::new (static_cast<void*>(p)) T(std::forward<Args>(args)...);
  }
  bool operator==(const CacheLines&) const { return true; }
};
template <class T>
using AlignedVector = std::vector<T, CacheLines<T>>;

}  // namespace ltkernels
