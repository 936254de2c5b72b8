// One small kernel for every wrapper of ptx.h and every kind of thing that host.h offers. They run on the fibers and, as
// nvcc compiles them, in the PTX interpreter; test_micro.py and test_ptx_kernels.py expect the same numbers of both.
#pragma once
#include <simt.h>

namespace micro {

constexpr int kThreads = 64, kBlocks = 2, kIn = 8, kOut = 8;

struct Params {
  const uint32_t* in;  // (kBlocks * kThreads, kIn)
  uint32_t* out;       // (kBlocks * kThreads, kOut), zeros before
  uint32_t* total;     // (kOut), zeros before
};

struct Row {  // of one thread
  const uint32_t* in;
  uint32_t* out;
  int lane;
};

__device__ inline Row row_of(const Params& p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  return {p.in + row * kIn, p.out + row * kOut, static_cast<int>(threadIdx.x % 32)};
}

// Two groups of copies in flight; a thread reads its neighbour's, every third of them is zero-filled.
template <int kBytes, bool kCached>
__device__ inline void copy(const Params& p) {
  struct Shared { uint32_t first[kThreads][4], second[kThreads][4]; };
  SIMT_SMEM_STATIC(Shared, sm);
  const Row r = row_of(p);
  ptx::cp_async<kBytes, kCached>(sm.first[threadIdx.x], r.in, threadIdx.x % 3 != 0);
  ptx::cp_async_commit();
  ptx::cp_async<kBytes, kCached>(sm.second[threadIdx.x], r.in + 4, threadIdx.x % 3 != 1);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  const int from = (threadIdx.x + 1) % kThreads;
  for (int i = 0; i < kBytes / 4; ++i) r.out[i] = sm.first[from][i];
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < kBytes / 4; ++i) r.out[4 + i] = sm.second[from][i];
}
__global__ void copy4(Params p) { copy<4, false>(p); }
__global__ void copy8(Params p) { copy<8, false>(p); }
__global__ void copy16(Params p) { copy<16, false>(p); }
__global__ void copy16_cached(Params p) { copy<16, true>(p); }

__global__ void mma_tf32(Params p) {  // a thread's words: a[4], b[2]; c[0], c[1] of the same words twice
  const Row r = row_of(p);
  const uint32_t a[4] = {r.in[0], r.in[1], r.in[2], r.in[3]}, b[2] = {r.in[4], r.in[5]};
  float c[4] = {__uint_as_float(r.in[6]), __uint_as_float(r.in[7]), __uint_as_float(r.in[0]), __uint_as_float(r.in[1])};
  ptx::mma_tf32(c, a, b);
  for (int e = 0; e < 4; ++e) r.out[e] = __float_as_uint(c[e]);
}

__global__ void shuffles(Params p) {
  const Row r = row_of(p);
  r.out[0] = __shfl_sync(0xffffffffu, r.in[0], r.lane * 7);
  r.out[1] = __shfl_up_sync(0xffffffffu, r.in[0], 3);
  r.out[2] = __shfl_down_sync(0xffffffffu, r.in[0], 5);
  r.out[3] = __shfl_xor_sync(0xffffffffu, r.in[0], 9);
  const double wide = __shfl_xor_sync(0xffffffffu, 1.5 * r.in[0], 1);
  r.out[4] = static_cast<uint32_t>(wide / 1.5);
}

__global__ void votes(Params p) {
  const Row r = row_of(p);
  r.out[0] = __ballot_sync(0xffffffffu, r.in[0] & 1);
  r.out[1] = __any_sync(0xffffffffu, r.in[1] > 0xe0000000u);
  r.out[2] = __all_sync(0xffffffffu, r.in[1] < 0xe0000000u);
}

__global__ void reductions(Params p) {
  const Row r = row_of(p);
  const int v = static_cast<int>(r.in[0]);
  r.out[0] = __reduce_add_sync(0xffffffffu, r.in[0]);
  r.out[1] = __reduce_min_sync(0xffffffffu, r.in[0]);
  r.out[2] = __reduce_max_sync(0xffffffffu, r.in[0]);
  r.out[3] = static_cast<uint32_t>(__reduce_min_sync(0xffffffffu, v));
  r.out[4] = static_cast<uint32_t>(__reduce_max_sync(0xffffffffu, v));
  r.out[5] = __reduce_or_sync(0xffffffffu, r.in[1] & r.in[2]);
  r.out[6] = __reduce_and_sync(0xffffffffu, r.in[1] | r.in[2]);
  r.out[7] = static_cast<uint32_t>(__reduce_add_sync(0xffffffffu, v >> 8));
}

__global__ void barriers(Params p) {
  const Row r = row_of(p);
  r.out[0] = __syncthreads_or(r.in[0] > 0xfc000000u) != 0;
  r.out[1] = __syncthreads_and(r.in[0] > 0x04000000u) != 0;
  r.out[2] = __syncthreads_count(r.in[0] & 1);
}

// Half a warp on its own, then the other half, lane writing what another reads after __syncwarp of the half.
__global__ void half_warps(Params p) {
  struct Shared { uint32_t word[kThreads]; };
  SIMT_SMEM_STATIC(Shared, sm);
  const Row r = row_of(p);
  sm.word[threadIdx.x] = r.in[0];
  if (r.lane < 16) {
    __syncwarp(0x0000ffffu);
    r.out[0] = sm.word[threadIdx.x ^ 15];
    r.out[1] = __reduce_add_sync(0x0000ffffu, r.in[1]);
  } else {
    __syncwarp(0xffff0000u);
    r.out[0] = sm.word[threadIdx.x ^ 7];
    r.out[1] = __reduce_max_sync(0xffff0000u, r.in[1]);
  }
  __syncwarp();
  r.out[2] = sm.word[threadIdx.x ^ 31];
}

__global__ void loops(Params p) {  // each lane takes its own number of turns; they meet again
  const Row r = row_of(p);
  uint32_t steps = 0;
  for (uint32_t v = r.in[0] & 255; v > 1; ++steps) v = v % 2 ? 3 * v + 1 : v / 2;
  r.out[0] = steps;
  __syncwarp();
  r.out[1] = __shfl_xor_sync(0xffffffffu, steps, 16);
}

__global__ void atomics(Params p) {
  struct Shared { uint32_t sum, least, most, any, all, owner; unsigned long long wide; float real; };
  SIMT_SMEM_STATIC(Shared, sm);
  const Row r = row_of(p);
  if (threadIdx.x == 0) sm = {0, ~0u, 0, 0, ~0u, 0, 0, 0.0f};
  __syncthreads();
  atomicAdd(&sm.sum, r.in[0]);
  atomicMin(&sm.least, r.in[0]);
  atomicMax(&sm.most, r.in[0]);
  atomicOr(&sm.any, r.in[1] & r.in[2]);
  atomicAnd(&sm.all, r.in[1] | r.in[2]);
  atomicExch(&sm.owner, r.in[3] | 1);
  atomicAdd(&sm.wide, static_cast<unsigned long long>(r.in[0]) << 8);
  atomicAdd(&sm.real, static_cast<float>(r.in[0] & 1023));  // whole numbers: the order cannot matter
  __syncthreads();
  const uint32_t found[kOut] = {sm.sum, sm.least, sm.most, sm.any, sm.all, sm.owner & 1,
                                static_cast<uint32_t>(sm.wide >> 16), __float_as_uint(sm.real)};
  for (int i = 0; i < kOut; ++i) r.out[i] = found[i];
}

// The last block to arrive adds up what all have written.
__global__ void last_block(Params p) {
  struct Shared { int last; };
  SIMT_SMEM_STATIC(Shared, sm);
  const Row r = row_of(p);
  for (int i = 0; i < kOut; ++i) r.out[i] = r.in[i] >> 8;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) sm.last = atomicAdd(p.total, 1u) == gridDim.x - 1;
  __syncthreads();
  if (sm.last && threadIdx.x > 0 && threadIdx.x < kOut) {
    uint32_t sum = 0;
    for (unsigned row = 0; row < gridDim.x * kThreads; ++row) sum += p.out[row * kOut + threadIdx.x];
    p.total[threadIdx.x] = sum;
  }
}

__global__ void bits(Params p) {
  const Row r = row_of(p);
  r.out[0] = __popc(r.in[0]);
  r.out[1] = __clz(static_cast<int>(r.in[0] >> (r.in[1] & 31)));
  r.out[2] = __umulhi(r.in[0], r.in[1]);
  r.out[3] = __float_as_uint(__uint_as_float(r.in[2]));
  r.out[4] = static_cast<uint32_t>(__float_as_int(__int_as_float(static_cast<int>(r.in[3]))));
  r.out[5] = __ldg(r.in + 5);
  r.out[6] = static_cast<uint32_t>(static_cast<int>(r.in[0]) >> 3) % 1000003u;
  r.out[7] = static_cast<uint32_t>((static_cast<uint64_t>(r.in[0]) * r.in[1]) / (r.in[2] | 1));
}

__global__ void arithmetic(Params p) {  // in[0]: a float in (0, 4)
  const Row r = row_of(p);
  const float v = __uint_as_float(r.in[0]), w = __uint_as_float(r.in[1]);
  const float found[kOut] = {rsqrtf(v), __expf(v), __logf(v), expf(-v), sqrtf(v), fmaf(v, w, -v), v / w,
                             static_cast<float>(exp(static_cast<double>(v)) * 0.5)};
  for (int i = 0; i < kOut; ++i) r.out[i] = __float_as_uint(found[i]);
}

__global__ void halves(Params p) {
  const Row r = row_of(p);
  const float v = __uint_as_float(r.in[0]);
  const __half h = __float2half(v);
  const __nv_bfloat16 b = __float2bfloat16(v);
  r.out[0] = v == v ? __half_as_ushort(h) : 0;  // which NaN it becomes is nobody's business
  r.out[1] = v == v ? __bfloat16_as_ushort(b) : 0;
  r.out[2] = __float_as_uint(__half2float(h));
  r.out[3] = __float_as_uint(__bfloat162float(b));
}

__global__ void shapes(Params p) {  // grid (1, 2, 1), block (4, 8, 2)
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  uint32_t* out = p.out + (blockIdx.y * kThreads + thread) * kOut;
  const uint32_t found[kOut] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.y, blockDim.y, blockDim.z, gridDim.y,
                                __ballot_sync(0xffffffffu, threadIdx.y % 2)};
  for (int i = 0; i < kOut; ++i) out[i] = found[i];
}

}  // namespace micro
