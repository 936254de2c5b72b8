// planted.cuh behind a C interface, for ctypes.
#include "planted.cuh"

#include <utility>

namespace {

template <int... kBug>
int dispatch(int bug, planted::Params p, int blocks, std::integer_sequence<int, kBug...>) {
  int status = -1;
  ((bug == kBug ? void(status = planted::run<kBug>(p, blocks, nullptr)) : void()), ...);
  return status;
}

}  // namespace

extern "C" int planted_run(int bug, int blocks, const float* x, const float* bias, int rows, float* sums, float* total,
                           int* positive, int* done) {
  return dispatch(bug, {x, bias, rows, sums, total, positive, done}, blocks,
                  std::make_integer_sequence<int, planted::kBugs>());
}
