// Front door: one kernel source for two compilers. Under nvcc this is CUDA itself; under a host compiler it is an
// executor that runs every CUDA thread as a fiber (host.h, runtime.cpp). The rules for kernels are in README.md.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// A kernel's shared memory is one struct: the host can then give each block a fresh, poisoned one and check its bounds.
#define SIMT_SMEM_STATIC(T, name) __shared__ T name
#define SIMT_SMEM_DYNAMIC(T, name)                                  \
  extern __shared__ __align__(16) unsigned char simt_dynamic_[]; \
  T& name = *reinterpret_cast<T*>(simt_dynamic_)

namespace simt {

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, Args... args) {
  if (smem > 48 * 1024) {  // beyond the portable limit the driver wants it said
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem));
    if (status != cudaSuccess) return status;
  }
  kernel<<<grid, block, smem, stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace simt

#else
#include "host.h"
#endif

#include "ptx.h"
