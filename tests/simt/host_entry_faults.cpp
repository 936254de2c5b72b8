// Kernels and launches that the runtime has to refuse, each in words of its own. test_faults.py has the words.
#include <simt.h>

#include <functional>
#include <iterator>

namespace {

struct Line { int word[32]; };
struct Page { char byte[49 * 1024]; };

template <class T>
__device__ void touch() {
  SIMT_SMEM_STATIC(T, shared);
  (void)shared;
}

__global__ void misaligned_copy(const float* x) {
  SIMT_SMEM_STATIC(Line, shared);
  ptx::cp_async<8>(shared.word, x + 1, true);
}
__global__ void not_in_mask() { __syncwarp(threadIdx.x == 3 ? 0xf7u : 0xffu); }
__global__ void two_places() {
  if (threadIdx.x % 2) (void)__any_sync(0xffffffffu, 1);
  else (void)__all_sync(0xffffffffu, 1);
}
__global__ void left_the_warp() {
  if (threadIdx.x < 31) (void)__any_sync(0xffffffffu, 1);
}
__global__ void barrier_and_shuffle() {
  if (threadIdx.x == 0) __syncthreads();
  else (void)__shfl_sync(0xffffffffu, 1, 0);
}
__global__ void two_types() { touch<Line>(), touch<int>(); }
__global__ void too_much_static() { touch<Page>(); }
__global__ void launches() { simt::launch(two_places, 1, 32, 0, nullptr); }
__global__ void nothing() {}

const float x[4] = {};
const std::function<cudaError_t()> faults[] = {
    [] { return simt::launch(misaligned_copy, 1, 32, 0, nullptr, x); },
    [] { return simt::launch(not_in_mask, 1, 8, 0, nullptr); },
    [] { return simt::launch(two_places, 1, 32, 0, nullptr); },
    [] { return simt::launch(left_the_warp, 1, 32, 0, nullptr); },
    [] { return simt::launch(barrier_and_shuffle, 1, 32, 0, nullptr); },
    [] { return simt::launch(two_types, 1, 32, 0, nullptr); },
    [] { return simt::launch(too_much_static, 1, 32, 0, nullptr); },
    [] { return simt::launch(launches, 1, 32, 0, nullptr); },
    [] { return simt::launch(nothing, 0, 32, 0, nullptr); },
    [] { return simt::launch(nothing, 1, 1025, 0, nullptr); },
    [] { return simt::launch(nothing, dim3(1, 65536), 32, 0, nullptr); },
    [] { return simt::launch(nothing, 1, dim3(1, 1, 65), 0, nullptr); },
    [] { return simt::launch(nothing, 1, 32, 228 * 1024, nullptr); },
};

}  // namespace

extern "C" int faults_count() { return std::size(faults); }
extern "C" int faults_run(int i) { return faults[i](); }
extern "C" int faults_none() { return simt::launch(nothing, 3, 32, 227 * 1024, nullptr); }
