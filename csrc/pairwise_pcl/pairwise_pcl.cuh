// Squared distances between rows, and the contrastive loss on them (ltkernels/pairwise_pcl.py): kernels and launches; tensors are
// pairwise_pcl_cuda.cu's.
//
// The loss goes over the pairs in chunks of at most kChunkPairs, which is all the scratch memory there is:
//   pair   d of each pair of the chunk that counts, from direct differences
//   rows   what a row has of the chunk: its sums; and the coefficients of the gradient in place of d
//   pull   gradient += sum_j coefficient_ij (x_i - y_j), by direct differences again: mu_i sum_j c_ij - sum_j c_ij mu_j would lose
//          a tight cluster far from the origin. The same coefficients, read by columns, are those of the partners
// A launch adds to what the one before it left, every sum has one thread and one order, and (i, j) and (j, i) are both computed: no
// atomics on floats, and the same bits in every run. Against `other`, what a row of mu gets is its own: the batch may be cut anywhere.
//
// A distance has a proven relative error: 2 u (u = 2^-24) of the differences, kChain u of a chain of FMAs, 2 u of the compensated sum of
// chains, and one rounding at the end: 13 u = 8e-7, for any d.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <utility>

#include "../simt/simt.h"

namespace ltkernels::pairwise_pcl {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 32;                            // rows and columns of a tile: 16 of them for 128 x 128
constexpr int kShares = 4;                           // of the coordinates; two warps have one, each a half of the columns
constexpr int kSlab = 64, kShare = kSlab / kShares;  // coordinates in shared memory
constexpr int kChain = 8;
constexpr int kLane = 4;                  // a lane's rows and columns: 8 reads of shared memory for 16 differences and 16 FMAs
constexpr int kStride = kTile + 4;        // 16-byte reads; 4 instead of 32 lanes of a warp write to one bank
constexpr float kNoPair = -1.0f;          // in place of d
constexpr int64_t kChunkPairs = 1 << 20;  // 4 MiB: a batch of 1024 against itself is one chunk

enum Form : int { kExponential, kReciprocal, kHinge, kNegativeL2, kForms };  // as PCL_FORMS in reference.py

// What a call says of its rows, and what it asks of them.
struct Loss {
  const int64_t *labels, *other_labels, *group, *other_group;  // (rows), (columns); groups or null
  const float *weight, *margin;                                // (rows); margin for the hinge or null
  bool among;                                                  // the columns are the rows, so (j, i) is a pair of row i, too
  int form;
  double scale;  // of a squared distance
  float *row, *active;  // (rows); active where there is a margin
  int64_t* pairs;       // (rows)
};

template <class T>
struct Problem {
  Loss loss;
  const T *mu, *other;  // (rows, d), (columns, d)
  int64_t rows, columns, d;
  float *mu_grad, *partner_grad;  // (rows, d) or null, (columns, d) or null
};

// Rows first_row .. of mu against rows first_column .. of other. Here 32 bits hold the number of a pair.
struct Chunk {
  int64_t first_row, first_column;
  int rows, columns;
  float* pair;  // (rows, columns): d, or kNoPair where the pair does not count; later coefficients
};

struct Plan {
  int64_t rows, columns;  // the most a chunk has

  int64_t floats() const { return rows * columns; }
};

inline int64_t tiles(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

inline Plan make_plan(int64_t rows, int64_t columns, int64_t pairs = kChunkPairs) {
  const int64_t most = std::clamp<int64_t>(columns, 1, pairs / kTile);
  return {std::clamp<int64_t>(rows, 1, std::max<int64_t>(kTile, pairs / most / kTile * kTile)), most};
}

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ bool finite(float v) { return fabsf(v) <= FLT_MAX; }

// ---- distances -------------------------------------------------------------------------------------------------------

struct TileShared {
  union {
    struct {
      alignas(16) float x[kSlab][kStride], y[kSlab][kStride];  // transposed: lanes read neighbouring rows of one coordinate
    } slab;
    float partial[kShares][kTile][kStride];
  };
  int broken_x[kTile], broken_y[kTile];  // rows with NaN or inf
};

constexpr int kFetch = kTile * kSlab / kThreads, kFetchRows = kThreads / kSlab;  // numbers of a slab a thread, rows of a pass

// A thread's part of coordinates from .. of kTile rows, or as many as there are; 0 beyond the edges.
template <class T>
__device__ __forceinline__ void fetch_slab(const T* x, int64_t rows, int64_t d, int64_t from, float (&part)[kFetch]) {
  const int64_t l = from + threadIdx.x % kSlab;
  const T* at = x + threadIdx.x / kSlab * d + l;
#pragma unroll
  for (int i = 0; i < kFetch; ++i, at += kFetchRows * d) {
    part[i] = threadIdx.x / kSlab + i * kFetchRows < rows && l < d ? widened(*at) : 0.0f;
  }
}

// Those parts, transposed. Notes rows with NaN or inf.
__device__ __forceinline__ void put_slab(const float (&part)[kFetch], float (*slab)[kStride], int* broken) {
#pragma unroll
  for (int i = 0; i < kFetch; ++i) {
    const int r = threadIdx.x / kSlab + i * kFetchRows;
    slab[threadIdx.x % kSlab][r] = part[i];
    if (!finite(part[i])) atomicOr(&broken[r], 1);
  }
}

// Squared distances of the rows from x and y on: thread i has those of row i / 8 and columns 4 (i % 8) .. + 3. In double, so that they
// are rounded once, at the end.
template <class T>
__device__ __forceinline__ void distances(TileShared& sm, const T* x, int64_t x_rows, const T* y, int64_t y_rows, int64_t d,
                                          double out[kLane]) {
  const int share = threadIdx.x / 64, half = threadIdx.x / 32 % 2, lane = threadIdx.x % 32;
  const int row = lane / 4 * kLane, column = kTile / 2 * half + lane % 4 * kLane;
  float total[kLane][kLane] = {}, excess[kLane][kLane] = {};  // of total over the sum so far (Kahan, 1965)
  if (threadIdx.x < kTile) sm.broken_x[threadIdx.x] = sm.broken_y[threadIdx.x] = 0;
  for (int64_t from = 0; from < d; from += kSlab) {
    float part_x[kFetch], part_y[kFetch];  // all under way at once; a slab ahead of the sums they would spill
    fetch_slab(x, x_rows, d, from, part_x);
    fetch_slab(y, y_rows, d, from, part_y);
    __syncthreads();  // the slab before has been read
    put_slab(part_x, sm.slab.x, sm.broken_x);
    put_slab(part_y, sm.slab.y, sm.broken_y);
    __syncthreads();
    for (int first = share * kShare; first < (share + 1) * kShare; first += kChain) {
      float chain[kLane][kLane] = {};
#pragma unroll
      for (int l = first; l < first + kChain; ++l) {
        float a[kLane], b[kLane];
#pragma unroll
        for (int k = 0; k < kLane; ++k) a[k] = sm.slab.x[l][row + k], b[k] = sm.slab.y[l][column + k];
#pragma unroll
        for (int r = 0; r < kLane; ++r) {
#pragma unroll
          for (int c = 0; c < kLane; ++c) {
            const float t = a[r] - b[c];
            chain[r][c] = fmaf(t, t, chain[r][c]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kLane; ++r) {
#pragma unroll
        for (int c = 0; c < kLane; ++c) {
          const float term = chain[r][c] - excess[r][c], sum = total[r][c] + term;
          excess[r][c] = finite(sum) ? (sum - total[r][c]) - term : 0.0f;  // inf - inf would make NaN of a square too large
          total[r][c] = sum;
        }
      }
    }
  }
  __syncthreads();  // the sums take the place of the last slab
#pragma unroll
  for (int r = 0; r < kLane; ++r) {
#pragma unroll
    for (int c = 0; c < kLane; ++c) sm.partial[share][row + r][column + c] = total[r][c];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kLane; ++c) {
    out[c] = 0.0;
    for (int s = 0; s < kShares; ++s) out[c] += sm.partial[s][threadIdx.x / 8][threadIdx.x % 8 * kLane + c];
  }
}

// One block a tile. Neither the order of the sums nor a square's bits tell x from y: out is symmetric for x = y.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) sqdist_kernel(const T* x, const T* y, int64_t rows, int64_t columns, int64_t d, float* out,
                                                             int64_t column_tiles) {
  SIMT_SMEM_STATIC(TileShared, sm);
  const int64_t first_row = blockIdx.x / column_tiles * kTile, first_column = blockIdx.x % column_tiles * kTile;
  double sqdist[kLane];
  distances(sm, x + first_row * d, rows - first_row, y + first_column * d, columns - first_column, d, sqdist);
  const int64_t row = first_row + threadIdx.x / 8, column = first_column + threadIdx.x % 8 * kLane;
  for (int c = 0; c < kLane; ++c) {
    if (row < rows && column + c < columns) out[row * columns + column + c] = static_cast<float>(sqdist[c]);
  }
}

template <class T>
cudaError_t sqdist(const T* x, const T* y, int64_t rows, int64_t columns, int64_t d, float* out, cudaStream_t stream) {
  const int64_t column_tiles = tiles(columns, kTile);
  const dim3 grid(static_cast<unsigned>(tiles(rows, kTile) * column_tiles));
  return simt::launch(sqdist_kernel<T>, grid, kThreads, 0, stream, x, y, rows, columns, d, out, column_tiles);
}

// ---- the loss --------------------------------------------------------------------------------------------------------

// One block a tile; one in which no pair counts, such as the one of a single class, reads labels only.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) pair_kernel(Problem<T> p, Chunk chunk, int column_tiles) {
  SIMT_SMEM_STATIC(TileShared, sm);
  const int tile_row = blockIdx.x / column_tiles * kTile, tile_column = blockIdx.x % column_tiles * kTile;
  const int r = tile_row + threadIdx.x / 8, c = tile_column + threadIdx.x % 8 * kLane;
  unsigned inside = 0, counts = 0;  // bit k: pair (r, c + k)
  for (int k = 0; k < kLane; ++k) {
    if (r >= chunk.rows || c + k >= chunk.columns) continue;
    inside |= 1u << k;
    const int64_t i = chunk.first_row + r, j = chunk.first_column + c + k;
    const bool together = !p.loss.group || p.loss.group[i] == p.loss.other_group[j];
    if (together && p.loss.labels[i] != p.loss.other_labels[j]) counts |= 1u << k;
  }
  double d[kLane] = {};
  if (__syncthreads_or(counts)) {
    const T *mu = p.mu + (chunk.first_row + tile_row) * p.d, *other = p.other + (chunk.first_column + tile_column) * p.d;
    distances(sm, mu, chunk.rows - tile_row, other, chunk.columns - tile_column, p.d, d);
  }
#pragma unroll
  for (int k = 0; k < kLane; ++k) {
    float value = kNoPair;
    if (counts >> k & 1) {
      const bool broken = sm.broken_x[threadIdx.x / 8] || sm.broken_y[threadIdx.x % 8 * kLane + k];
      value = broken ? NAN : static_cast<float>(p.loss.scale * d[k]);
    }
    if (inside >> k & 1) chunk.pair[r * chunk.columns + c + k] = value;
  }
}

struct Term {
  float value, slope;
};

// phi(d) and its derivative.
__device__ __forceinline__ Term term(int form, float d, float margin) {
  if (form == kExponential) {
    const float e = expf(-d);
    return {e, -e};
  }
  if (form == kReciprocal) {
    const float inverse = 1.0f / (1.0f + d);
    return {inverse, -inverse * inverse};
  }
  if (form == kHinge) return {fmaxf(margin - d, 0.0f), d < margin ? -1.0f : 0.0f};
  return {-d, -1.0f};
}

// One warp a row. Sums in double: they are over pairs, not over coordinates, and a row may have 32768 in a chunk.
__global__ void __launch_bounds__(kThreads) rows_kernel(Loss p, Chunk chunk) {
  const int lane = threadIdx.x % 32, r = blockIdx.x * kWarps + threadIdx.x / 32;
  if (r >= chunk.rows) return;  // all of the warp
  const int64_t i = chunk.first_row + r;
  const float weight = p.weight[i], margin = p.margin ? p.margin[i] : 0.0f;
  double sum = 0.0, active = 0.0;
  int pairs = 0;
  for (int c = lane; c < chunk.columns; c += 32) {
    float& pair = chunk.pair[r * chunk.columns + c];
    const float d = pair;
    if (d == kNoPair) {
      pair = 0.0f;
      continue;
    }
    const bool broken = d != d;
    const Term own = term(p.form, d, margin);
    float coefficient = weight * own.slope;
    if (p.among) {
      const int64_t j = chunk.first_column + c;
      coefficient += p.weight[j] * (p.margin ? term(p.form, d, p.margin[j]).slope : own.slope);
    }
    pair = broken ? NAN : coefficient;
    sum += broken ? NAN : own.value;
    active += broken ? NAN : d < margin ? 1.0f : 0.0f;
    ++pairs;
  }
  for (int step = 16; step; step /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
    active += __shfl_xor_sync(0xffffffffu, active, step);
    pairs += __shfl_xor_sync(0xffffffffu, pairs, step);
  }
  if (lane == 0) {
    const bool first = chunk.first_column == 0;
    p.row[i] = static_cast<float>(first ? sum : p.row[i] + sum);
    p.pairs[i] = first ? pairs : p.pairs[i] + pairs;
    if (p.active) p.active[i] = static_cast<float>(first ? active : p.active[i] + active);
  }
}

// ---- gradients -------------------------------------------------------------------------------------------------------

constexpr int kPullTile = 64, kPullSlab = 16, kPullLane = 4;  // 16 x 16 threads with 4 x 4 sums each: 8 reads for 16 terms
constexpr int kPullStride = kPullTile + 4;

template <class T>
struct Pull {
  const T *x, *y;            // (rows, d), (columns, d)
  const float* coefficient;  // of x_r and y_j: at (r, j) or, transposed, at (j, r)
  bool transposed;
  int rows, columns;
  int64_t d;
  float factor, *out;  // out (rows, d)
  bool first;          // else out has the sums of the columns before
};

struct PullShared {
  alignas(16) float coefficient[kPullSlab][kPullStride], y[kPullSlab][kPullStride];
};

// out (+)= factor sum_j coefficient_j (x - y_j). One of 0 takes nothing from its row, whatever is in it: 0 * inf would be NaN.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) pull_kernel(Pull<T> p) {
  SIMT_SMEM_STATIC(PullShared, sm);
  const int first_row = blockIdx.y * kPullTile, row = threadIdx.x / 16 * kPullLane, column = threadIdx.x % 16 * kPullLane;
  const int64_t first_l = static_cast<int64_t>(blockIdx.x) * kPullTile;
  float x[kPullLane][kPullLane], total[kPullLane][kPullLane] = {};
#pragma unroll
  for (int a = 0; a < kPullLane; ++a) {
#pragma unroll
    for (int b = 0; b < kPullLane; ++b) {
      const int64_t r = first_row + row + a, l = first_l + column + b;
      x[a][b] = r < p.rows && l < p.d ? widened(p.x[r * p.d + l]) : 0.0f;
    }
  }
  constexpr int kParts = kPullTile * kPullSlab / kThreads;
  float next_coefficient[kParts], next_y[kParts];  // under way while those before are summed
  const auto place = [&](int n, int& r, int& k) {
    const int i = threadIdx.x + n * kThreads;
    r = p.transposed ? i % kPullTile : i / kPullSlab;  // coalesced
    k = p.transposed ? i / kPullTile : i % kPullSlab;
  };
  const auto fetch = [&](int from) {
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      int r, k;
      place(n, r, k);
      const int rr = first_row + r, jj = from + k, at = p.transposed ? jj * p.rows + rr : rr * p.columns + jj;
      next_coefficient[n] = rr < p.rows && jj < p.columns ? p.coefficient[at] : 0.0f;
      const int64_t j = from + (threadIdx.x + n * kThreads) / kPullTile, l = first_l + threadIdx.x % kPullTile;
      next_y[n] = j < p.columns && l < p.d ? widened(p.y[j * p.d + l]) : 0.0f;
    }
  };
  fetch(0);
  for (int from = 0; from < p.columns; from += kPullSlab) {
    __syncthreads();  // the rows before have been read
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
      int r, k;
      place(n, r, k);
      sm.coefficient[k][r] = next_coefficient[n];
      sm.y[(threadIdx.x + n * kThreads) / kPullTile][threadIdx.x % kPullTile] = next_y[n];
    }
    __syncthreads();
    fetch(from + kPullSlab);
    float chain[kPullLane][kPullLane] = {};  // so that 32768 columns round like 2048
#pragma unroll 4
    for (int k = 0; k < kPullSlab; ++k) {
      float y[kPullLane];
#pragma unroll
      for (int b = 0; b < kPullLane; ++b) y[b] = sm.y[k][column + b];
#pragma unroll
      for (int a = 0; a < kPullLane; ++a) {
        const float coefficient = sm.coefficient[k][row + a];
        if (coefficient != 0.0f) {
#pragma unroll
          for (int b = 0; b < kPullLane; ++b) chain[a][b] = fmaf(coefficient, x[a][b] - y[b], chain[a][b]);
        }
      }
    }
#pragma unroll
    for (int a = 0; a < kPullLane; ++a) {
#pragma unroll
      for (int b = 0; b < kPullLane; ++b) total[a][b] += chain[a][b];
    }
  }
#pragma unroll
  for (int a = 0; a < kPullLane; ++a) {
#pragma unroll
    for (int b = 0; b < kPullLane; ++b) {
      const int64_t r = first_row + row + a, l = first_l + column + b;
      if (r < p.rows && l < p.d) p.out[r * p.d + l] = p.factor * total[a][b] + (p.first ? 0.0f : p.out[r * p.d + l]);
    }
  }
}

template <class T>
cudaError_t pull(const Pull<T>& p, cudaStream_t stream) {
  if (p.rows == 0 || p.d == 0) return cudaSuccess;  // an empty grid is a launch error
  const dim3 grid(static_cast<unsigned>(tiles(p.d, kPullTile)), static_cast<unsigned>(tiles(p.rows, kPullTile)));
  return simt::launch(pull_kernel<T>, grid, kThreads, 0, stream, p);
}

template <class T>
cudaError_t run_chunk(const Problem<T>& p, const Chunk& chunk, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  if (chunk.rows > 0 && chunk.columns > 0) {
    const int column_tiles = static_cast<int>(tiles(chunk.columns, kTile));
    const dim3 grid(static_cast<unsigned>(tiles(chunk.rows, kTile)) * column_tiles);
    status = simt::launch(pair_kernel<T>, grid, kThreads, 0, stream, p, chunk, column_tiles);
  }
  if (chunk.rows > 0 && status == cudaSuccess) {
    status = simt::launch(rows_kernel, dim3(static_cast<unsigned>(tiles(chunk.rows, kWarps))), kThreads, 0, stream, p.loss, chunk);
  }
  Pull<T> one{p.mu + chunk.first_row * p.d, p.other + chunk.first_column * p.d, chunk.pair, false, chunk.rows, chunk.columns, p.d,
              static_cast<float>(2.0 * p.loss.scale), nullptr, false};
  if (p.mu_grad && status == cudaSuccess) {
    one.out = p.mu_grad + chunk.first_row * p.d;
    one.first = chunk.first_column == 0;
    status = pull(one, stream);
  }
  if (p.partner_grad && status == cudaSuccess) {
    std::swap(one.x, one.y);
    std::swap(one.rows, one.columns);
    one.transposed = true;
    one.out = p.partner_grad + chunk.first_column * p.d;
    one.first = chunk.first_row == 0;
    status = pull(one, stream);
  }
  return status;
}

// scratch has plan.floats() floats. Without rows or columns there still is a chunk, which writes zeros.
template <class T>
cudaError_t run(const Problem<T>& p, const Plan& plan, float* scratch, cudaStream_t stream) {
  for (int64_t row = 0; row == 0 || row < p.rows; row += plan.rows) {
    for (int64_t column = 0; column == 0 || column < p.columns; column += plan.columns) {
      const int rows = static_cast<int>(std::min(plan.rows, p.rows - row));
      const int columns = static_cast<int>(std::min(plan.columns, p.columns - column));
      const cudaError_t status = run_chunk(p, {row, column, rows, columns, scratch}, stream);
      if (status != cudaSuccess) return status;
    }
  }
  return cudaSuccess;
}

}  // namespace ltkernels::pairwise_pcl
