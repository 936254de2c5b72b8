// p_sel, draws from it and mixtures (ltkernels/score_select.py): kernels and launches; tensors are score_select_cuda.cu's.
//
// Squared distances are sums of direct differences in float: t = x - s c by one FMA, t * t by another. Expanding the square would let
// tensor cores help, but its error is divided by 2 std^2, 2e-4 at the first step of DDPM; and a batch against itself (128 x 128 x 3072)
// is 10^8 FMAs, .1 ms on an H100 with all launches.
//
// A pair's distance depends on its rows and d alone: every tile cuts d into the same slabs, shares, and chains of additions. So a
// batch may be cut anywhere and chooses the same indices.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "../simt/simt.h"

#define LT_PHILOX __host__ __device__ inline
#include "../common/philox.h"

namespace ltkernels::score_select {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 32;      // rows and columns of a tile: 16 of them for 128 x 128, each spread over 8 warps by d
constexpr int kSlab = 64;      // coordinates in shared memory; a warp takes kShare of them
constexpr int kShare = kSlab / kWarps;
constexpr int kChain = 8;      // slabs summed in one chain of 64 additions, so that d = 12288 rounds like d = 512
constexpr int kLane = 4, kLaneColumns = 8;  // a lane's pairs: 12 reads of shared memory for 64 FMAs
constexpr int kStride = kTile + 4;          // 16-byte reads; 4 instead of 32 lanes of a warp write to one bank

template <class T>
struct Problem {
  const T *x, *clean;                       // (rows, d), (columns, d)
  const float *scale, *std, *log_prior;     // (rows), (rows), (columns) or null
  int64_t rows, columns, d;
  float *p, *log_normalizer;                // (rows, columns) or null, (rows)
  int64_t* index;                           // (rows) or null
  const int64_t* seed;                      // one number, where index is asked for
  int64_t row_offset;
};

// What a block knows of one row after its columns: the pieces of a logsumexp, and the best perturbed logit.
struct Partial {
  float most, sum, best;
  int32_t column;  // of best; -1: none is finite
};

struct Tiling {
  int64_t row_tiles, column_tiles;
  int per_block;  // column tiles of a block, one after the other: a partial for each tile would be an eighth of B x K

  int64_t blocks() const { return (column_tiles + per_block - 1) / per_block; }
  int64_t partials(int64_t rows) const { return rows * blocks(); }
};

inline Tiling make_tiling(int64_t rows, int64_t columns) {
  const int64_t tiles = (columns + kTile - 1) / kTile;
  return {(rows + kTile - 1) / kTile, tiles, static_cast<int>(std::clamp<int64_t>(tiles / 128, 1, 64))};
}

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ bool finite(float v) { return fabsf(v) <= FLT_MAX; }

struct ScoreShared {
  union {
    struct {
      float x[kSlab][kStride], clean[kSlab][kStride];  // transposed: lanes read neighbouring rows of one coordinate
    } slab;
    float partial[kWarps][kTile][kStride];
  };
  float scale[kTile];
  int broken[kTile];  // rows of x with NaN or inf
};

constexpr int kFetch = kTile * kSlab / kThreads, kFetchRows = kThreads / kSlab;  // numbers of a slab a thread, rows of a pass

// A thread's part of rows first .. of a matrix, coordinates from .. of them; 0 beyond its edges.
template <class T>
__device__ __forceinline__ void fetch_slab(const T* matrix, int64_t rows, int64_t d, int64_t first, int64_t from, float (&part)[kFetch]) {
  const int64_t l = from + threadIdx.x % kSlab, row = first + threadIdx.x / kSlab;
#pragma unroll
  for (int i = 0; i < kFetch; ++i) {
    const int64_t r = row + i * kFetchRows;
    part[i] = r < rows && l < d ? widened(matrix[r * d + l]) : 0.0f;
  }
}

// Those parts, transposed. Notes rows with NaN or inf.
__device__ __forceinline__ void put_slab(const float (&part)[kFetch], float (*slab)[kStride], int* broken) {
#pragma unroll
  for (int i = 0; i < kFetch; ++i) {
    const int r = threadIdx.x / kSlab + i * kFetchRows;
    slab[threadIdx.x % kSlab][r] = part[i];
    if (broken && !finite(part[i])) atomicOr(&broken[r], 1);
  }
}

// Squared distances of a tile: thread i has those of row i / 8 and columns 4 (i % 8) .. + 3.
template <class T>
__device__ void distances(ScoreShared& sm, const Problem<T>& p, int64_t first_row, int64_t first_column, float out[kLane]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4 * kLane, column = lane % 4 * kLaneColumns;
  float total[kLane][kLaneColumns] = {}, chain[kLane][kLaneColumns] = {}, scale[kLane];
  for (int a = 0; a < kLane; ++a) scale[a] = sm.scale[row + a];
  int slabs = 0;
  for (int64_t from = 0; from < p.d; from += kSlab) {
    float part_x[kFetch], part_clean[kFetch];  // all under way at once; a slab ahead of the sums they would spill
    fetch_slab(p.x, p.rows, p.d, first_row, from, part_x);
    fetch_slab(p.clean, p.columns, p.d, first_column, from, part_clean);
    __syncthreads();  // the slab before, or the sums of the tile before, have been read
    put_slab(part_x, sm.slab.x, sm.broken);
    put_slab(part_clean, sm.slab.clean, nullptr);
    __syncthreads();
    for (int l = warp * kShare; l < (warp + 1) * kShare; ++l) {
      float x[kLane], clean[kLaneColumns];
#pragma unroll
      for (int a = 0; a < kLane; ++a) x[a] = sm.slab.x[l][row + a];
#pragma unroll
      for (int b = 0; b < kLaneColumns; ++b) clean[b] = sm.slab.clean[l][column + b];
#pragma unroll
      for (int a = 0; a < kLane; ++a) {
#pragma unroll
        for (int b = 0; b < kLaneColumns; ++b) {
          const float t = fmaf(-scale[a], clean[b], x[a]);
          chain[a][b] = fmaf(t, t, chain[a][b]);
        }
      }
    }
    if (++slabs == kChain || from + kSlab >= p.d) {
      slabs = 0;
#pragma unroll
      for (int a = 0; a < kLane; ++a) {
#pragma unroll
        for (int b = 0; b < kLaneColumns; ++b) {
          total[a][b] += chain[a][b];
          chain[a][b] = 0.0f;
        }
      }
    }
  }
  __syncthreads();  // the sums take the place of the last slab
#pragma unroll
  for (int a = 0; a < kLane; ++a) {
#pragma unroll
    for (int b = 0; b < kLaneColumns; ++b) sm.partial[warp][row + a][column + b] = total[a][b];
  }
  __syncthreads();
  for (int c = 0; c < kLane; ++c) {
    out[c] = 0.0f;
    for (int w = 0; w < kWarps; ++w) out[c] += sm.partial[w][threadIdx.x / 8][threadIdx.x % 8 * kLane + c];
  }
}

template <class T>
__device__ float logit(const Problem<T>& p, float sqdist, double halved_precision, int64_t column) {
  if (column >= p.columns || !finite(sqdist)) return -INFINITY;  // beyond the edge; NaN, inf or a square too large
  const float own = static_cast<float>(-sqdist * halved_precision);
  return p.log_prior ? own + p.log_prior[column] : own;
}

// logsumexp so far, joined with another piece; the maximum of nothing is -inf.
__device__ __forceinline__ void join(float& most, float& sum, float other_most, float other_sum) {
  const float top = fmaxf(most, other_most);
  if (top == -INFINITY) return;
  sum = sum * expf(most - top) + other_sum * expf(other_most - top);
  most = top;
}

// Logits of the tiles of a block: into p, or what is left of them into partials (blocks, rows).
template <class T>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(Problem<T> p, Tiling tiling, Partial* partials) {
  SIMT_SMEM_STATIC(ScoreShared, sm);
  const int64_t block = blockIdx.x / tiling.row_tiles, first_row = blockIdx.x % tiling.row_tiles * kTile;
  const int r = threadIdx.x / 8;
  const int64_t row = first_row + r;
  const bool inside = row < p.rows;
  if (threadIdx.x < kTile) {
    sm.scale[threadIdx.x] = first_row + threadIdx.x < p.rows ? p.scale[first_row + threadIdx.x] : 0.0f;
    sm.broken[threadIdx.x] = 0;
  }
  __syncthreads();
  const double std = inside ? p.std[row] : 1.0, halved_precision = 0.5 / (std * std);
  Partial mine{-INFINITY, 0.0f, -INFINITY, -1};
  const int64_t last = (block + 1) * tiling.per_block;
  for (int64_t tile = block * tiling.per_block; tile < (last < tiling.column_tiles ? last : tiling.column_tiles); ++tile) {
    float value[kLane];
    distances(sm, p, first_row, tile * kTile, value);
    const int64_t column = tile * kTile + threadIdx.x % 8 * kLane;
    float most = -INFINITY, sum = 0.0f;
    for (int c = 0; c < kLane; ++c) {
      value[c] = sm.broken[r] ? NAN : logit(p, value[c], halved_precision, column + c);
      if (p.p && inside && column + c < p.columns) p.p[row * p.columns + column + c] = value[c];
      most = fmaxf(most, value[c]);
    }
    if (!p.index) continue;
    for (int c = 0; c < kLane; ++c) sum += value[c] > -INFINITY ? expf(value[c] - most) : 0.0f;
    join(mine.most, mine.sum, most, sum);
    const Philox4 noise = philox(*p.seed, p.row_offset + row, static_cast<uint32_t>(column / 4));
    for (int c = 0; c < kLane; ++c) {
      const float perturbed = value[c] + philox_gumbel(noise.word[c]);
      if (perturbed > mine.best) mine.best = perturbed, mine.column = static_cast<int32_t>(column + c);
    }
  }
  if (!p.index) return;  // all of the block
  for (int step = 1; step < 8; step *= 2) {  // among the 8 threads of a row
    const float most = __shfl_xor_sync(0xffffffffu, mine.most, step), sum = __shfl_xor_sync(0xffffffffu, mine.sum, step);
    const float best = __shfl_xor_sync(0xffffffffu, mine.best, step);
    const int column = __shfl_xor_sync(0xffffffffu, mine.column, step);
    join(mine.most, mine.sum, most, sum);
    if (best > mine.best || (best == mine.best && column < mine.column)) mine.best = best, mine.column = column;
  }
  if (inside && threadIdx.x % 8 == 0) {
    if (sm.broken[r]) mine.sum = NAN;
    partials[block * p.rows + row] = mine;
  }
}

// One thread a row: the partials in the order of the columns.
template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(Problem<T> p, int64_t blocks, const Partial* partials) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= p.rows) return;
  Partial all = partials[row];
  const bool broken = all.sum != all.sum;  // NaN
  for (int64_t block = 1; block < blocks; ++block) {
    const Partial next = partials[block * p.rows + row];
    join(all.most, all.sum, next.most, next.sum);
    if (next.best > all.best) all.best = next.best, all.column = next.column;
  }
  p.log_normalizer[row] = broken ? NAN : all.most == -INFINITY ? -INFINITY : all.most + logf(all.sum);
  p.index[row] = broken ? -1 : all.column;
}

struct NormaliseShared {
  float most[kWarps], sum[kWarps];
};

// One block a row: logits to probabilities, in place.
template <class T>
__global__ void __launch_bounds__(kThreads) normalise_kernel(Problem<T> p) {
  SIMT_SMEM_STATIC(NormaliseShared, sm);
  float* logits = p.p + blockIdx.x * p.columns;
  float most = -INFINITY, sum = 0.0f;
  bool broken = false;
  for (int64_t j = threadIdx.x; j < p.columns; j += kThreads) {
    broken |= logits[j] != logits[j];  // NaN
    most = fmaxf(most, logits[j]);
  }
  for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  if (threadIdx.x % 32 == 0) sm.most[threadIdx.x / 32] = most;
  broken = __syncthreads_or(broken);
  for (int w = 0; w < kWarps; ++w) most = fmaxf(most, sm.most[w]);
  const bool none = broken || most == -INFINITY;
  for (int64_t j = threadIdx.x; j < p.columns; j += kThreads) {
    const float weight = none ? NAN : expf(logits[j] - most);
    logits[j] = weight;
    sum += weight;
  }
  for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) sm.sum[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += sm.sum[w];
  for (int64_t j = threadIdx.x; j < p.columns; j += kThreads) logits[j] /= sum;
  if (threadIdx.x == 0) p.log_normalizer[blockIdx.x] = broken ? NAN : none ? -INFINITY : most + logf(sum);
}

template <class T>
cudaError_t run(const Problem<T>& p, Partial* partials, cudaStream_t stream) {
  const Tiling tiling = make_tiling(p.rows, p.columns);
  const dim3 grid(static_cast<unsigned>(tiling.row_tiles * tiling.blocks()));
  cudaError_t status = simt::launch(score_kernel<T>, grid, kThreads, 0, stream, p, tiling, partials);
  if (status != cudaSuccess) return status;
  if (p.index) {
    const dim3 blocks(static_cast<unsigned>((p.rows + kThreads - 1) / kThreads));
    return simt::launch(combine_kernel<T>, blocks, kThreads, 0, stream, p, tiling.blocks(), partials);
  }
  return simt::launch(normalise_kernel<T>, dim3(static_cast<unsigned>(p.rows)), kThreads, 0, stream, p);
}

// ---- mixtures --------------------------------------------------------------------------------------------------------

constexpr int kMixTile = 64, kMixSlab = 16, kMixLane = 4;  // 16 x 16 threads with 4 x 4 sums each: 8 reads for 16 FMAs
constexpr int kMixChain = 16;                              // slabs summed in one chain of 256 additions
constexpr int kMixStride = kMixTile + 4;

template <class T>
struct Mixture {
  const float* weight;  // (rows, columns)
  const T* clean;       // (columns, d)
  float* out;           // (rows, d)
  int64_t rows, columns, d;
};

struct MixShared {
  float weight[kMixSlab][kMixStride], clean[kMixSlab][kMixStride];
};

// out = weight clean. A weight of 0 takes nothing from its row, whatever is in it: 0 * inf would be NaN.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) mix_kernel(Mixture<T> m, int64_t row_tiles) {
  SIMT_SMEM_STATIC(MixShared, sm);
  const int64_t first_row = blockIdx.x % row_tiles * kMixTile, first_l = blockIdx.x / row_tiles * kMixTile;
  const int row = threadIdx.x / 16 * kMixLane, column = threadIdx.x % 16 * kMixLane;
  float total[kMixLane][kMixLane] = {}, chain[kMixLane][kMixLane] = {};
  constexpr int kParts = kMixTile * kMixSlab / kThreads;
  float next_weight[kParts], next_clean[kParts];  // under way while a slab is summed
  const auto fetch = [&](int64_t from) {
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      const int i = threadIdx.x + n * kThreads;
      const int64_t r = first_row + i / kMixSlab, j = from + i % kMixSlab;
      next_weight[n] = r < m.rows && j < m.columns ? m.weight[r * m.columns + j] : 0.0f;
      const int64_t jj = from + i / kMixTile, l = first_l + i % kMixTile;
      next_clean[n] = jj < m.columns && l < m.d ? widened(m.clean[jj * m.d + l]) : 0.0f;
    }
  };
  fetch(0);
  int slabs = 0;
  for (int64_t from = 0; from < m.columns; from += kMixSlab) {
    __syncthreads();  // the slab before has been read
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      const int i = threadIdx.x + n * kThreads;
      sm.weight[i % kMixSlab][i / kMixSlab] = next_weight[n];
      sm.clean[i / kMixTile][i % kMixTile] = next_clean[n];
    }
    __syncthreads();
    fetch(from + kMixSlab);
#pragma unroll
    for (int k = 0; k < kMixSlab; ++k) {
      float clean[kMixLane];
#pragma unroll
      for (int b = 0; b < kMixLane; ++b) clean[b] = sm.clean[k][column + b];
#pragma unroll
      for (int a = 0; a < kMixLane; ++a) {
        const float weight = sm.weight[k][row + a];
        if (weight != 0.0f) {
#pragma unroll
          for (int b = 0; b < kMixLane; ++b) chain[a][b] = fmaf(weight, clean[b], chain[a][b]);
        }
      }
    }
    if (++slabs == kMixChain || from + kMixSlab >= m.columns) {
      slabs = 0;
#pragma unroll
      for (int a = 0; a < kMixLane; ++a) {
#pragma unroll
        for (int b = 0; b < kMixLane; ++b) {
          total[a][b] += chain[a][b];
          chain[a][b] = 0.0f;
        }
      }
    }
  }
  for (int a = 0; a < kMixLane; ++a) {
    for (int b = 0; b < kMixLane; ++b) {
      const int64_t r = first_row + row + a, l = first_l + column + b;
      if (r < m.rows && l < m.d) m.out[r * m.d + l] = total[a][b];
    }
  }
}

template <class T>
cudaError_t mix(const Mixture<T>& m, cudaStream_t stream) {
  const int64_t row_tiles = (m.rows + kMixTile - 1) / kMixTile, l_tiles = (m.d + kMixTile - 1) / kMixTile;
  return simt::launch(mix_kernel<T>, dim3(static_cast<unsigned>(row_tiles * l_tiles)), kThreads, 0, stream, m, row_tiles);
}

}  // namespace ltkernels::score_select
