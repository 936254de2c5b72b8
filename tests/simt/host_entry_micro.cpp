// micro.cuh behind a C interface, for ctypes.
#include "micro.cuh"

#define MICRO(name)                                                                          \
  extern "C" int micro_##name(const uint32_t* in, uint32_t* out, uint32_t* total) {          \
    return simt::launch(micro::name, micro::kBlocks, micro::kThreads, 0, nullptr, micro::Params{in, out, total}); \
  }
MICRO(copy4) MICRO(copy8) MICRO(copy16) MICRO(copy16_cached) MICRO(mma_tf32) MICRO(shuffles) MICRO(votes)
MICRO(reductions) MICRO(barriers) MICRO(half_warps) MICRO(loops) MICRO(atomics) MICRO(last_block) MICRO(bits)
MICRO(arithmetic) MICRO(halves)

extern "C" int micro_shapes(const uint32_t* in, uint32_t* out, uint32_t* total) {
  return simt::launch(micro::shapes, dim3(1, 2), dim3(4, 8, 2), 0, nullptr, micro::Params{in, out, total});
}
