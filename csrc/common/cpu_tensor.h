// Tensors of the CPU kernels: their numbers, dtypes, and new ones.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

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
  const AOTITorchError error = aoti_torch_empty_strided(shape.size(), shape.begin(), strides, dtype, device, 0, &handle);
  int64_t numbers = 1;
  for (int64_t size : shape) numbers *= size;
  LT_CHECK(error == 0, "ltkernels", "not enough memory for an answer of ", numbers, " numbers");  // torch's own words are on stderr
  return Tensor(handle);
}

inline ScalarType result_type(ScalarType input) { return input == ScalarType::Double ? input : ScalarType::Float; }

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

template <class F>
void for_dtype(const char* op, ScalarType type, const F& f) {  // f(a value of the type)
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    default: LT_CHECK(false, op, "expected fp16, bf16, fp32 or fp64 tensors");
  }
}

}  // namespace ltkernels
