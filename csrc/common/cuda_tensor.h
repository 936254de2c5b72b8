// What the .cu files of all ops do with tensors before a launch.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>  // torch 2.11 has STD_CUDA_CHECK here and includes it nowhere else
#include <torch/csrc/stable/ops.h>

#include <initializer_list>
#include <optional>

#include "check.h"

namespace ltkernels {

using OptionalTensor = std::optional<Tensor>;

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* read(const OptionalTensor& t) {
  return t ? read<T>(*t) : nullptr;
}
template <class T>
T* write(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline const Tensor* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }

// Null pointers are tensors that were not given.
inline void check_cuda(const char* op, const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* t : others) {
    LT_CHECK(!t || (t->is_cuda() && t->get_device_index() == first.get_device_index()), op,
             "all tensors must be on one CUDA device");
  }
}

inline cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;  // by the older of two ways: Stream::nativeHandle would ask for torch 2.13
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace ltkernels
