// A small kernel with everything that goes wrong in one: cp.async double buffering, shared memory, shuffles, atomics, a
// vector load, the last-block idiom. PLANTED(kind) is true in the variant that has this bug; variant kNone has none and
// must be clean in every layer. test_planted.py says which layer has to catch which.
#pragma once
#include <simt.h>

namespace planted {

enum Bug : int {
  kNone,
  kMissingBarrierRaw,    // partial sums are read before all are written
  kMissingBarrierWar,    // the next tile is fetched into the buffer that others still read
  kDivergentBarrier,     // one warp walks past the barrier
  kEarlyReturn,          // threads leave before the barrier
  kMissingWait,          // the tile is read while its copy is under way
  kUnfinishedCopy,       // a thread ends while a copy is under way
  kWaitWithoutBarrier,   // a thread waits for its own copies and reads another's
  kSharedOutOfBounds,    // past the end of the struct
  kMemberOverrun,        // past the end of an array into its neighbour in the struct
  kGlobalOutOfBounds,    // rows beyond the last
  kOutOfMaskShuffle,     // half a warp reads the other half, which does not take part
  kNonAtomicCounter,     // ++ in place of atomicAdd
  kMisalignedVector,     // float4 from an address that is a multiple of 4 only
  kTooLittleShared,      // the launch asks for fewer bytes than the struct has
  kUninitialisedShared,  // a counter that nobody set to zero
  kMissingSyncwarp,      // one lane reads what another wrote, with no more than the warp's habit of keeping step
  kShuffleForSyncwarp,   // a shuffle lets the lanes meet, but orders none of their writes
  kHalfSyncwarp,         // a half of the warp reads what the other wrote, each after a __syncwarp of its own
  kSyncwarpForBarrier,   // __syncwarp where another warp's writes are read
  kWaitAfterBarrier,     // the copies land after the barrier that should have told of them
  kSourceOverwritten,    // one thread writes what another copies from
  kMissingFence,         // the last block reads what others wrote without a __threadfence in between
  kBugs
};
#define PLANTED(kind) (kBug == kind)

constexpr int kThreads = 64, kColumns = 16, kRows = 16;  // a tile is one float4 a thread

struct Params {
  const float* x;     // (rows, kColumns)
  const float* bias;  // (4)
  int rows;           // blocks take turns in tiles
  float* sums;        // (blocks, kColumns) column sums of a block's rows
  float* total;       // (kColumns) of all rows, plus the sum of the bias
  int *positive, *done;  // (1), (1): positive entries of x; blocks that are through. Both start at 0
};

struct Shared {
  float tile[2][kRows][kColumns];
  float partial[kThreads / 32][kColumns];
  float shift[4];
  int positive, last;
};

template <int kBug>
__global__ void __launch_bounds__(kThreads) kernel(Params p) {
  SIMT_SMEM_DYNAMIC(Shared, sm);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, column = tid % kColumns;
  const int tiles = (p.rows + kRows - 1) / kRows;
  if (tid == 0 && !PLANTED(kUninitialisedShared)) sm.positive = 0;
  if constexpr (PLANTED(kEarlyReturn)) {
    if (tid >= p.rows) return;
  }
  __syncthreads();

  const auto fetch = [&](int tile, int buffer) {
    const int row = tile * kRows + tid / 4;
    const bool valid = tile < tiles && (PLANTED(kGlobalOutOfBounds) || row < p.rows);
    ptx::cp_async<16>(&sm.tile[buffer][tid / 4][tid % 4 * 4], p.x + (valid ? row * kColumns + tid % 4 * 4 : 0), valid);
    ptx::cp_async_commit();
  };
  float sum = 0.0f;
  int positive = 0, buffer = 0;
  fetch(blockIdx.x, 0);
  // x[5][3] is zero: nothing changes but that two threads were at it
  if (PLANTED(kSourceOverwritten) && tid == kThreads - 1) const_cast<float*>(p.x)[5 * kColumns + 3] = 0.0f;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, buffer ^= 1) {
    fetch(tile + gridDim.x, buffer ^ 1);
    if constexpr (PLANTED(kWaitAfterBarrier)) __syncthreads();
    if constexpr (!PLANTED(kMissingWait)) ptx::cp_async_wait<1>();
    if constexpr (PLANTED(kDivergentBarrier)) {
      if (warp == 0) __syncthreads();
    } else if constexpr (!PLANTED(kWaitWithoutBarrier) && !PLANTED(kWaitAfterBarrier)) {
      __syncthreads();
    }
    for (int row = tid / kColumns; row < kRows; row += kThreads / kColumns) {
      const float v = sm.tile[buffer][row][column];
      sum += v;
      positive += v > 0.0f;
    }
    if constexpr (!PLANTED(kMissingBarrierWar)) __syncthreads();
  }
  if constexpr (!PLANTED(kUnfinishedCopy)) ptx::cp_async_wait<0>();

  if constexpr (PLANTED(kOutOfMaskShuffle)) {
    if (lane < 16) sum += __shfl_down_sync(0x0000ffffu, sum, 16);
  } else {
    sum += __shfl_down_sync(0xffffffffu, sum, 16);
  }
  if (lane < kColumns) sm.partial[warp][lane] = sum;
  if (PLANTED(kMemberOverrun) && warp == 1) sm.partial[warp + p.rows % 2][lane % 4] = sum;  // the test gives an odd number of rows
  if constexpr (PLANTED(kNonAtomicCounter)) {
    sm.positive += positive;
  } else {
    atomicAdd(&sm.positive, positive);
  }
  if constexpr (PLANTED(kSharedOutOfBounds)) (&sm.last)[1 + tid] = 0;
  if constexpr (PLANTED(kSyncwarpForBarrier)) {
    __syncwarp();
  } else if constexpr (!PLANTED(kMissingBarrierRaw)) {
    __syncthreads();
  }

  if (tid < kColumns) p.sums[blockIdx.x * kColumns + tid] = sm.partial[0][tid] + sm.partial[1][tid];
  if (tid == 0) atomicAdd(p.positive, sm.positive);
  if constexpr (!PLANTED(kMissingFence)) __threadfence();
  __syncthreads();
  if (tid == 0) sm.last = atomicAdd(p.done, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (sm.last && warp == 0) {
    if (lane == (PLANTED(kHalfSyncwarp) ? 31 : 0)) {
      const float4 bias = *reinterpret_cast<const float4*>(p.bias + (PLANTED(kMisalignedVector) ? 1 : 0));
      sm.shift[0] = bias.x, sm.shift[1] = bias.y, sm.shift[2] = bias.z, sm.shift[3] = bias.w;
    }
    if constexpr (PLANTED(kShuffleForSyncwarp)) {
      (void)__shfl_sync(0xffffffffu, lane, 0);
    } else if constexpr (PLANTED(kHalfSyncwarp)) {
      if (lane < 16) __syncwarp(0x0000ffffu);
      else __syncwarp(0xffff0000u);
    } else if constexpr (!PLANTED(kMissingSyncwarp)) {
      __syncwarp();
    }
    if (lane < kColumns) {
      float all = sm.shift[0] + sm.shift[1] + sm.shift[2] + sm.shift[3];
      for (unsigned b = 0; b < gridDim.x; ++b) all += p.sums[b * kColumns + lane];
      p.total[lane] = all;
    }
  }
}

template <int kBug>
cudaError_t run(Params p, int blocks, cudaStream_t stream) {
  const size_t bytes = sizeof(Shared) - (PLANTED(kTooLittleShared) ? 64 : 0);
  return simt::launch(kernel<kBug>, blocks, kThreads, bytes, stream, p);
}

}  // namespace planted
