// Registers the CPU kernels. The schemas are defined in Python (ltkernels/backends.py), once for every route, before this
// library is loaded; the CUDA kernels register themselves at the end of their own .cu files.
#include <torch/csrc/stable/library.h>

#include "knn_kde/knn_kde.h"

STABLE_TORCH_LIBRARY_IMPL(ltkernels_native, CPU, m) {
  m.impl("knn", TORCH_BOX(&ltkernels::knn_cpu));
  m.impl("knn_kde", TORCH_BOX(&ltkernels::knn_kde_cpu));
}
