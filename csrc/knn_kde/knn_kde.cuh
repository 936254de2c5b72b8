// k nearest neighbours and the Gaussian kernel density over them, without a query x bank matrix.
//
// The answer is the first k bank rows in the order (f, index), where f is the squared distance by direct differences.
// Four kernels find it for a chunk of queries:
//   prepare  centres the queries
//   filter   approximate keys from tensor-core tiles, each with a proven error bound; whatever may belong to the
//            answer goes to the row's queue
//   finish   f of every queued candidate, the first k, density and score
//   collect  rows whose queue was too small for what the bound lets through (tight clusters, ties). They take filter
//            and finish once more with 3xTF32 keys, and if that fails too, finish computes f over the whole bank.
// So tiles, splits, chunks and bounds decide only how fast the answer comes, never what it is.
#pragma once

#include <algorithm>

#include "filter.cuh"

namespace ltkernels::knn_kde {

constexpr int kMaxK = 256;
constexpr int kFinishThreads = 128;
constexpr int kBest = 512;  // keys held between sorts
static_assert(kBest >= kMaxK + kFinishThreads, "room for the k best and what one round may add");

// What a call reads and writes, all on the device. Optional pointers may be null; log_density and score come and go
// together.
template <class T>
struct Problem {
  const T *queries, *points;                    // (count, d), (bank, d)
  const float *centre, *centred, *sqnorm;       // (d), (bank, d), (bank)
  const int64_t* self_index;                    // (count), -1: none
  const float *bound, *bandwidth, *log_weight;  // (count), (count), (bank)
  int64_t count, bank;
  int d, k;
  float *log_density, *score, *sqdist;  // (count), (count, d), (count, k)
  int64_t* index;                       // (count, k)
};

struct Plan {
  int64_t rows;  // queries a chunk
  int blocks, capacity;

  // With base = nullptr only the size counts.
  int64_t carve(char* base, int d, Workspace& w) const {
    int64_t at = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + at);
      at += (count * static_cast<int64_t>(sizeof *pointer) + 255) / 256 * 256;
    };
    take(w.queue, int64_t{blocks} * kTile * capacity);
    take(w.fill, int64_t{blocks} * kTile);
    take(w.centred, rows * d);
    take(w.sqnorm, rows);
    take(w.state, rows);
    take(w.left, rows);
    take(w.left_count, 1);
    return at;
  }
};

inline Plan make_plan(int64_t count, int64_t bank, int d, int k, int multiprocessors) {
  const int64_t mib = 1 << 20;
  const int capacity = k <= 64 ? 512 : kMaxCapacity;
  const int64_t most_blocks = 192 * mib / (kTile * capacity * static_cast<int64_t>(sizeof(uint2)));
  const int64_t most_tiles = std::max<int64_t>(1, std::min(most_blocks, 48 * mib / (4 * kTile * d)));
  const int64_t tiles = (count + kTile - 1) / kTile, chunks = (tiles + most_tiles - 1) / most_tiles;
  const int64_t rows = (tiles + chunks - 1) / chunks * kTile, splits = (bank + kSplitColumns - 1) / kSplitColumns;
  const int64_t blocks = std::min({most_blocks, int64_t{2} * multiprocessors, rows / kTile * splits});
  return {rows, static_cast<int>(std::max(blocks, rows / kTile)), capacity};
}

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

// One warp a query.
template <class T>
__global__ void __launch_bounds__(kFilterThreads) prepare_kernel(Problem<T> p, Workspace w) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kFilterThreads / 32) + threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) *w.left_count = 0;
  if (row < p.count) {
    float sum = 0.0f;
    bool finite = true;
    for (int l = lane; l < p.d; l += 32) {
      const float q = to_float(p.queries[row * p.d + l]), centred = q - p.centre[l];
      finite = finite && fabsf(q) <= FLT_MAX;
      w.centred[row * p.d + l] = centred;
      sum = fmaf(centred, centred, sum);
    }
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    finite = __all_sync(0xffffffffu, finite);
    if (lane == 0) {
      w.sqnorm[row] = sum;
      w.state[row] = !finite ? kBadQuery : sum <= kTrusted ? kQueued : kDirect;
    }
  }
}

__global__ void __launch_bounds__(kFilterThreads) collect_kernel(Workspace w, int count) {
  const int row = blockIdx.x * kFilterThreads + threadIdx.x;
  if (row < count && (w.state[row] == kOverflowed || w.state[row] == kDirect)) {
    w.left[atomicAdd(w.left_count, 1)] = row;  // their order decides nothing
    if (w.state[row] == kOverflowed) w.state[row] = kQueued;
  }
}

// In place of a neighbour if k exceeds the available rows, which only the caller of the raw operator can bring about.
constexpr uint64_t kNobody = 0x7f800000ffffffffu;  // f = +inf, index -1

template <class T>
struct FinishParams {
  Problem<T> p;
  Workspace w;
  const int* rows;       // as in FilterParams
  int blocks, capacity;  // of the filter before
  ErrorBound error;
};

struct FinishShared {
  uint64_t keys[kBest];  // (bits of f, index): unique, so there are no ties to overflow on
  uint64_t worst;        // the k-th, once there are k
  uint32_t list[kFinishThreads];
  int found, listed;
  double logit[kMaxK];
  float weight[kMaxK], partial[kFinishThreads];
  float total;
};

// f: 32 partial sums over 8 lanes in an order that depends on d only. Neither tile nor caller can change a bit of it.
template <class T>
__device__ __forceinline__ float pair_sqdist(const T* query, const T* point, int d) {
  float sum[4] = {};
#pragma unroll 2
  for (int first = threadIdx.x % 8; first < d; first += 32) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int l = first + 8 * c;
      if (l < d) {
        const float difference = to_float(query[l]) - to_float(point[l]);
        sum[c] = fmaf(difference, difference, sum[c]);
      }
    }
  }
  float f = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma unroll
  for (int step = 4; step; step /= 2) f += __shfl_xor_sync(0xffffffffu, f, step);
  return f <= FLT_MAX ? f : INFINITY;  // NaN too: a bank row with one is infinitely far
}

// All threads: sorts the keys and keeps the first k.
__device__ __forceinline__ void settle(FinishShared& sm, int k) {
  const int found = sm.found;
  int size = 2;
  while (size < found) size *= 2;
  for (int i = threadIdx.x; i < size; i += kFinishThreads) {
    if (i >= found) sm.keys[i] = ~uint64_t{0};
  }
  for (int run = 2; run <= size; run *= 2) {
    for (int gap = run / 2; gap; gap /= 2) {
      __syncthreads();
      for (int i = threadIdx.x; i < size / 2; i += kFinishThreads) {
        const int low = 2 * i - (i & (gap - 1)), high = low + gap;
        const uint64_t a = sm.keys[low], b = sm.keys[high];
        if ((a > b) == !(low & run)) {
          sm.keys[low] = b;
          sm.keys[high] = a;
        }
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    sm.found = min(found, k);
    sm.worst = found >= k ? sm.keys[k - 1] : ~uint64_t{0};
  }
  __syncthreads();
}

// All threads, each with one bank row or none (valid = false): keeps those below the k-th so far.
template <class T>
__device__ __forceinline__ void offer(FinishShared& sm, const Problem<T>& p, const T* query, int64_t j, bool valid) {
  if (valid) sm.list[atomicAdd(&sm.listed, 1)] = static_cast<uint32_t>(j);
  __syncthreads();
  const int listed = sm.listed;
  for (int first = threadIdx.x / 32 * 4; first < listed; first += kFinishThreads / 8) {
    const int e = first + threadIdx.x % 32 / 8;  // a warp stays together, idle groups repeat the last pair
    const uint32_t index = sm.list[min(e, listed - 1)];
    const float f = pair_sqdist(query, p.points + static_cast<int64_t>(index) * p.d, p.d);
    const uint64_t key = static_cast<uint64_t>(__float_as_uint(f)) << 32 | index;
    if (e < listed && threadIdx.x % 8 == 0 && key < sm.worst) sm.keys[atomicAdd(&sm.found, 1)] = key;
  }
  __syncthreads();
  if (threadIdx.x == 0) sm.listed = 0;
  if (sm.found > kBest - kFinishThreads)
    settle(sm, p.k);  // all see the same count: nobody adds before the next barrier
  __syncthreads();
}

template <class T>
__device__ __forceinline__ void find(FinishShared& sm, const FinishParams<T>& f, int64_t row, int slot, int slots) {
  const Problem<T>& p = f.p;
  const T* query = p.queries + row * p.d;
  const int64_t self = p.self_index ? p.self_index[row] : -1;
  const int state = f.w.state[row];
  const auto clear = [&] {
    __syncthreads();
    if (threadIdx.x == 0) {
      sm.found = sm.listed = 0;
      sm.worst = ~uint64_t{0};
    }
    __syncthreads();
  };
  clear();
  if (state == kQueued) {
    const float q2 = f.w.sqnorm[row], error = row_error(f.error, q2, p.d);
    const Split split = split_bank(slots, p.bank, f.blocks);
    for (int part = 0; part < split.parts; ++part) {
      const int64_t region = (static_cast<int64_t>(part) * split.tiles + slot / kTile) * kTile + slot % kTile;
      const int n = f.w.fill[region];
      for (int first = 0; first < n; first += kFinishThreads) {
        const int i = first + threadIdx.x;
        const uint2 entry = i < n ? f.w.queue[region * f.capacity + i] : uint2{0, 0};
        const float kth = __uint_as_float(static_cast<uint32_t>(sm.worst >> 32));  // NaN while there are fewer than k
        const bool hopeless = __uint_as_float(entry.x) > kth - q2 + error + (kth + q2) * 0x1p-21f;
        offer(sm, p, query, entry.y, i < n && !hopeless);
      }
    }
    settle(sm, p.k);
    if (__uint_as_float(static_cast<uint32_t>(sm.worst >> 32)) <= kTrusted) return;
  }
  clear();
  if (threadIdx.x == 0 && state != kBadQuery) f.w.state[row] = kMeasured;
  const int64_t end = state == kBadQuery ? min(p.bank, static_cast<int64_t>(p.k) + 1) : p.bank;  // all f are +inf
  for (int64_t first = 0; first < end; first += kFinishThreads) {
    const int64_t j = first + threadIdx.x;
    offer(sm, p, query, j, j < end && j != self);
  }
  settle(sm, p.k);
}

// log_density = logsumexp_i(log_weight_i - r_i^2 / 2 h^2) - log k and its gradient. Logits in double: r^2 / h^2 may be
// 1e6, and h^2 may leave the range of fp32.
template <class T>
__device__ __forceinline__ void density(FinishShared& sm, const Problem<T>& p, int64_t row, bool bad) {
  const int tid = threadIdx.x, lane = tid % 32;
  const double h = p.bandwidth[row];
  for (int i = tid; i < p.k; i += kFinishThreads) {  // as in finish_kernel: keys[i] may be fresh from this very thread
    const double sqdist = __uint_as_float(static_cast<uint32_t>(sm.keys[i] >> 32));
    const bool counts = sqdist <= FLT_MAX;
    const double log_weight = p.log_weight && counts ? p.log_weight[static_cast<uint32_t>(sm.keys[i])] : 0.0f;
    sm.logit[i] = counts ? log_weight - sqdist / (2.0 * h * h) : -INFINITY;
  }
  __syncthreads();
  if (tid < 32) {
    double most = -INFINITY;
    for (int i = lane; i < p.k; i += 32) most = fmax(most, sm.logit[i]);
    for (int step = 16; step; step /= 2) most = fmax(most, __shfl_xor_sync(0xffffffffu, most, step));
    float total = 0.0f;
    for (int i = lane; i < p.k; i += 32) {
      const float weight = expf(static_cast<float>(sm.logit[i] - most));
      sm.weight[i] = weight;
      total += weight;
    }
    for (int step = 16; step; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    if (lane == 0) {
      const bool none = most == -INFINITY;
      sm.total = none || bad ? NAN : total;
      p.log_density[row] = bad ? NAN : none ? -INFINITY : static_cast<float>(most + logf(total / p.k));
    }
  }
  __syncthreads();
  int width = 8;
  while (width < p.d && width < kFinishThreads) width *= 2;
  // For small d several threads share a dimension, and the loop below has one turn; with more turns nobody shares.
  const int share = tid / width, shares = kFinishThreads / width;
  for (int first = 0; first < p.d; first += width) {
    const int l = first + tid % width;
    float sum = 0.0f;
    if (l < p.d) {
      const float q = to_float(p.queries[row * p.d + l]);
      for (int i = share; i < p.k; i += shares) {
        const int64_t j = static_cast<uint32_t>(sm.keys[i]);
        const float weight = sm.weight[i];
        if (weight > 0.0f) sum = fmaf(weight, to_float(p.points[j * p.d + l]) - q, sum);  // 0 * inf would be NaN
      }
    }
    sm.partial[tid] = sum;
    __syncthreads();
    if (share == 0 && l < p.d) {
      for (int other = 1; other < shares; ++other) sum += sm.partial[tid + other * width];
      p.score[row * p.d + l] = static_cast<float>(sum / static_cast<double>(sm.total) / (h * h));
    }
  }
}

// One block a query. The first pass leaves out what collect gives to the second.
template <class T>
__global__ void __launch_bounds__(kFinishThreads, 8) finish_kernel(FinishParams<T> f) {
  SIMT_SMEM_STATIC(FinishShared, sm);
  const int slot = blockIdx.x, slots = f.rows ? *f.w.left_count : static_cast<int>(f.p.count);
  const int64_t row = slot >= slots ? -1 : f.rows ? f.rows[slot] : slot;
  const int state = row < 0 ? kOverflowed : f.w.state[row];
  if (row >= 0 && (f.rows || state == kQueued || state == kBadQuery)) {
    find(sm, f, row, slot, slots);
    for (int i = threadIdx.x; i < f.p.k; i += kFinishThreads) {
      if (i >= sm.found) sm.keys[i] = kNobody;
      f.p.index[row * f.p.k + i] = static_cast<int32_t>(sm.keys[i]);
      f.p.sqdist[row * f.p.k + i] = state == kBadQuery ? NAN : __uint_as_float(static_cast<uint32_t>(sm.keys[i] >> 32));
    }
    if (f.p.log_density) density(sm, f.p, row, state == kBadQuery);
  }
}

// Everything for one call; scratch has plan.carve(...) bytes. Nothing waits for the device.
template <class T>
cudaError_t run(Problem<T> all, const Plan& plan, char* scratch, cudaStream_t stream) {
  Workspace w;
  plan.carve(scratch, all.d, w);
  const bool vector = all.d % 4 == 0 && reinterpret_cast<uintptr_t>(all.centred) % 16 == 0;
  for (int64_t first = 0; first < all.count; first += plan.rows) {
    Problem<T> p = all;
    p.count = std::min(plan.rows, all.count - first);
    const auto advance = [&](auto*& pointer, int64_t stride) {
      if (pointer) pointer += first * stride;
    };
    advance(p.queries, p.d);
    advance(p.self_index, 1);
    advance(p.bound, 1);
    advance(p.bandwidth, 1);
    advance(p.log_density, 1);
    advance(p.score, p.d);
    advance(p.sqdist, p.k);
    advance(p.index, p.k);
    const int count = static_cast<int>(p.count);
    const auto blocks = [&](int per_block) { return dim3((count + per_block - 1) / per_block); };
    cudaError_t status = simt::launch(prepare_kernel<T>, blocks(kFilterThreads / 32), kFilterThreads, 0, stream, p, w);
    for (const int* rows : {static_cast<const int*>(nullptr), static_cast<const int*>(w.left)}) {
      if (rows && status == cudaSuccess)
        status = simt::launch(collect_kernel, blocks(kFilterThreads), kFilterThreads, 0, stream, w, count);
      const ErrorBound error = error_bound(p.d, rows ? 3 : 1);
      const FilterParams filter{w,     p.centred, p.sqnorm, p.bound,       p.self_index, rows, p.bank,
                                count, p.d,       p.k,      plan.capacity, vector,       error};
      if (status == cudaSuccess) {
        status = simt::launch(rows ? filter_kernel<3> : filter_kernel<1>, plan.blocks, kFilterThreads,
                              sizeof(FilterShared), stream, filter);
      }
      const FinishParams<T> finish{p, w, rows, plan.blocks, plan.capacity, error};
      if (status == cudaSuccess) status = simt::launch(finish_kernel<T>, blocks(1), kFinishThreads, 0, stream, finish);
    }
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace ltkernels::knn_kde
