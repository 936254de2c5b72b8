// Registers the CPU kernels. The schemas are defined in Python (ltkernels/backends.py), once for every route, before this
// library is loaded; the CUDA kernels register themselves at the end of their own .cu files.
#include <torch/csrc/stable/library.h>

#include "knn_kde/knn_kde.h"
#include "pairwise_pcl/pairwise_pcl.h"
#include "score_select/score_select.h"

STABLE_TORCH_LIBRARY_IMPL(ltkernels_native, CPU, m) {
  m.impl("bank_sample", TORCH_BOX(&ltkernels::bank_sample_cpu));
  m.impl("bank_rows", TORCH_BOX(&ltkernels::bank_rows_cpu));
  m.impl("knn", TORCH_BOX(&ltkernels::knn_cpu));
  m.impl("knn_kde", TORCH_BOX(&ltkernels::knn_kde_cpu));
  m.impl("knn_kde_bounded", TORCH_BOX(&ltkernels::knn_kde_bounded_cpu));
  m.impl("psel", TORCH_BOX(&ltkernels::psel_cpu));
  m.impl("psel_sample", TORCH_BOX(&ltkernels::psel_sample_cpu));
  m.impl("score_select", TORCH_BOX(&ltkernels::score_select_cpu));
  m.impl("psel_mean", TORCH_BOX(&ltkernels::psel_mean_cpu));
  m.impl("psel_mix", TORCH_BOX(&ltkernels::psel_mix_cpu));
  m.impl("pair_sqdist", TORCH_BOX(&ltkernels::pair_sqdist_cpu));
  m.impl("pcl_rows", TORCH_BOX(&ltkernels::pcl_rows_cpu));
  m.impl("pcl", TORCH_BOX(&ltkernels::pcl_cpu));
}
