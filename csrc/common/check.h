// One wording of errors. User errors (ValueError, TypeError) are raised in Python; what is left here is the wall that keeps
// a wrong call from reading or writing memory it does not own.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// LT_CHECK(k >= 1, "knn", "k must be at least 1; got k=", k)  ->  RuntimeError "...knn: k must be at least 1; got k=0"
#define LT_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

namespace ltkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t cols, ScalarType type) {
  LT_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, op, name, " must have shape (", rows, ", ", cols, ")");
  LT_CHECK(t.scalar_type() == type, op, name, " has the wrong dtype");
  LT_CHECK(t.is_contiguous(), op, name, " must be contiguous");
}

inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t size, ScalarType type) {
  LT_CHECK(t.dim() == 1 && t.size(0) == size, op, name, " must have shape (", size, ")");
  LT_CHECK(t.scalar_type() == type, op, name, " has the wrong dtype");
  LT_CHECK(t.is_contiguous(), op, name, " must be contiguous");
}

}  // namespace ltkernels
