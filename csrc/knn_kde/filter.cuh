// Which bank rows may be among a query's neighbours: approximate keys |c|^2 - 2 q.c from tensor-core tiles, each with a
// proven error bound. A row's queue keeps every candidate whose interval reaches below the k-th smallest upper end.
#pragma once

#include <cfloat>

#include "../simt/simt.h"

namespace ltkernels::knn_kde {

constexpr int kTile = 128;  // queries and bank rows of a tile
constexpr int kDepth = 32;  // dimensions in flight: two buffers of 2 x 128 x 32 floats, two blocks fit on sm_80
constexpr int kFilterThreads = 256;      // 4 x 2 warps of 32 x 64 keys
constexpr int kMaxCapacity = 1024;       // longest queue: 32 entries a lane when a warp compacts it
constexpr int64_t kSplitColumns = 1024;  // a shorter part of the bank would spend its time on filling queues
constexpr float kOpen = FLT_MAX;   // limit of a row that has not seen k candidates; bank rows without a key have +inf
constexpr float kTrusted = 1e37f;  // beyond it fp32 keys may overflow: the row is done by f alone

// Of a query: its queue holds the answer; the queue was too short; no key can be trusted; it is not finite; f was taken
// of the whole bank, after which nothing is left to do.
enum RowState : int { kQueued, kOverflowed, kDirect, kBadQuery, kMeasured };

// Half the width of the interval around the approximate key A that holds f - |q|^2:
//   E = cross |q||c| + self |c|^2 + query |q|^2 + tiny (1 + |q| + |c|),  q and c after centring.
struct ErrorBound {
  float cross, self, query, tiny;
};

inline ErrorBound error_bound(int d, int terms) {
  const double u = 0x1p-24, steps = (d + 7) / 8;
  const double f = ((d + kDepth - 1) / kDepth + 8) * u;  // of f itself: the difference, d / 32 additions, a tree
  // One operand is rounded to tf32, the other truncated; of 3xTF32 one product of rests and two of errors are left out.
  const double operands = terms == 1 ? 0x1p-11 + 0x1p-10 + 0x1p-21 : 3.1 * 0x1p-22;
  // Tensor cores truncate what they add (2^-23): 10 times a step, 8 products, the accumulator, the alignment.
  const double sums = terms == 1 ? 10 * steps * 0x1p-23 : 10.2 * 0x1p-23 + steps * u;
  ErrorBound e;
  // Centring costs 4 u, 2 u and 2 u, the arithmetic of the key and of the interval 8 u in each term.
  e.cross = static_cast<float>(1.01 * (2 * (operands + sums) + 2 * f + 12 * u));
  e.self = static_cast<float>(1.01 * (f + 12 * u));       // sqnorm was summed in double and rounded once
  e.query = static_cast<float>(1.01 * (2 * f + 10 * u));  // f once more: the computed |q|^2
  e.tiny = static_cast<float>((d + 64) * 0x1p-120);  // underflow of any product or square
  return e;
}

// An upper bound of the norm whose computed square, underflow included, is `square`.
__device__ __forceinline__ float norm_above(float square, int d) { return sqrtf(square + d * 0x1p-126f); }

__device__ __forceinline__ float row_error(const ErrorBound& e, float q2, int d) {
  return fmaf(e.query, q2, e.tiny * (1.0f + norm_above(q2, d)));
}

// Unsigned order of floats, NaN aside.
__device__ __forceinline__ uint32_t ordered(float v) {
  const uint32_t bits = __float_as_uint(v);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t v) { return __uint_as_float(v >> 31 ? v & 0x7fffffffu : ~v); }

// Scratch of one chunk of queries.
struct Workspace {
  float *centred, *sqnorm;         // (rows, d), (rows)
  int *state, *left, *left_count;  // (rows), (rows) rows for the second rung, (1)
  int* fill;                       // (blocks, kTile) entries in each queue
  uint2* queue;                    // (blocks, kTile, capacity) of (lower end without the terms of q alone, bank row)
};

// Query tiles come first, then the parts of the bank: block b works on tile b % tiles, part b / tiles.
struct Split {
  int tiles, parts;
  int64_t columns;  // of a part
};

__device__ __forceinline__ Split split_bank(int count, int64_t bank, int blocks) {
  const int tiles = (count + kTile - 1) / kTile;
  const int64_t most = (bank + kSplitColumns - 1) / kSplitColumns;
  const int parts = static_cast<int>(min(most, static_cast<int64_t>(tiles ? blocks / tiles : 1)));
  const int64_t column_tiles = (bank + kTile - 1) / kTile;
  return {tiles, parts, (column_tiles + parts - 1) / parts * kTile};
}

struct FilterParams {
  Workspace w;
  const float *bank, *sqnorm, *bound;
  const int64_t* self_index;
  const int* rows;  // null: all `count` rows; else the *w.left_count rows to do again
  int64_t bank_count;
  int count, d, k, capacity;
  bool vector;  // rows start at 16-byte boundaries
  ErrorBound error;
};

struct FilterShared {
  float tile[2][2][kTile * kDepth];  // [buffer][queries | bank]
  float shift[kTile], norm[kTile];   // of the bank rows at work: lower end of |c|^2, and |c|
  float limit[kTile], slope[kTile];  // of the query rows: largest key of interest, error per unit of |c|
  int row[kTile], fill[kTile];
  uint32_t self[kTile];
};
static_assert(2 * sizeof(FilterShared) <= 163 * 1024 && sizeof(FilterShared) <= 99 * 1024, "sm_80 twice, sm_120 once");

// 16-byte pieces of a tile row are permuted so that the 8-byte fragment reads of a half warp hit all banks once.
__device__ __forceinline__ int piece_offset(int row, int piece) {
  return row * kDepth + ((piece ^ ((row & 3) << 1)) << 2);
}

// Rows that do not start at 16-byte boundaries, number by number.
__device__ __forceinline__ void stage(float* target, const float* source, int64_t row, int l, int d) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const bool valid = row >= 0 && l + e < d;
    ptx::cp_async<4>(target + e, source + (valid ? row * d + l + e : 0), valid);
  }
}

// v = v + rest + error, |rest| <= 2^-11 |v|, |error| <= 2^-22 |v|: both rounded to the 10 bits of tf32.
template <int kCount>
__device__ __forceinline__ void split_tf32(uint32_t (&v)[kCount], uint32_t (&rest)[kCount]) {
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    const uint32_t high = (v[e] + 0x1000u) & 0xffffe000u;
    rest[e] = __float_as_uint(__uint_as_float(v[e]) - __uint_as_float(high)) + 0x1000u;
    v[e] = high;
  }
}

// acc += queries x bank^T over one chunk of dimensions. A sum does not care in which order dimensions come, so the
// fragments take neighbouring columns (2t, 2t+1) where the instruction says (t, t+4): one 8-byte read instead of two.
template <int kTerms>
__device__ __forceinline__ void multiply(float (&acc)[2][8][4], const float* queries, const float* bank, int depth) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const auto fragment = [&](const float* tile, int row, int step, uint32_t& x, uint32_t& y) {
    const float2 pair = *reinterpret_cast<const float2*>(tile + piece_offset(row, 2 * step + t / 2) + t % 2 * 2);
    x = __float_as_uint(pair.x);
    y = __float_as_uint(pair.y);
  };
#pragma unroll
  for (int step = 0; step < kDepth / 8; ++step) {
    if (8 * step >= depth) break;
    uint32_t a[2][4], a_rest[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int row = warp / 2 * 32 + m * 16 + g;
      fragment(queries, row, step, a[m][0], a[m][2]);
      fragment(queries, row + 8, step, a[m][1], a[m][3]);
      if constexpr (kTerms == 3) {
        split_tf32(a[m], a_rest[m]);
      } else {
        // Rounded, since the tensor core would truncate. Unchanged, the pairs read above are moved into fours before each product: 64 moves
        // for 16 of them.
#pragma unroll
        for (int e = 0; e < 4; ++e) a[m][e] += 0x1000u;
      }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      uint32_t b[2], b_rest[2];
      fragment(bank, warp % 2 * 64 + n * 8 + g, step, b[0], b[1]);
      if constexpr (kTerms == 3) split_tf32(b, b_rest);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        if constexpr (kTerms == 1) {
          ptx::mma_tf32(acc[m][n], a[m], b);
        } else {
          float sum[4] = {};
          ptx::mma_tf32(sum, a_rest[m], b);
          ptx::mma_tf32(sum, a[m], b_rest);
          ptx::mma_tf32(sum, a[m], b);
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][n][e] += sum[e];
        }
      }
    }
  }
}

// One warp: lowers the limit of tile row r to the k-th smallest upper end of its candidates and drops what lies above
// it. The k-th smallest is found bit by bit; candidates have no order in the queue and need none.
__device__ __forceinline__ void compact(const FilterParams& p, FilterShared& sm, int r, uint2* queue, bool needs_room) {
  const int lane = threadIdx.x % 32, n = sm.fill[r];
  const float slope = sm.slope[r], q2 = p.w.sqnorm[sm.row[r]], old_limit = sm.limit[r];
  uint32_t upper[kMaxCapacity / 32], least = 0xffffffffu, most = 0;
#pragma unroll
  for (int i = 0; i < kMaxCapacity / 32; ++i) {
    upper[i] = 0xffffffffu;
    if (32 * i + lane < n) {
      const uint2 entry = queue[32 * i + lane];
      const float s = p.sqnorm[entry.y], width = fmaf(slope, norm_above(s, p.d), p.error.self * s);
      upper[i] = ordered(fmaf(2.0f, width, __uint_as_float(entry.x)));
      least = min(least, upper[i]);
      most = max(most, upper[i]);
    }
  }
  least = __reduce_min_sync(0xffffffffu, least);
  most = __reduce_max_sync(0xffffffffu, most);
  const int bits = 32 - __clz(static_cast<int>(least ^ most));  // above them all agree
  uint32_t kth = bits == 32 ? 0 : least >> bits << bits;
  for (int bit = bits - 1; bit >= 0; --bit) {
    const uint32_t trial = kth | 1u << bit;
    int below = 0;
#pragma unroll
    for (int i = 0; i < kMaxCapacity / 32; ++i) below += upper[i] < trial;
    if (__reduce_add_sync(0xffffffffu, below) < p.k) kth = trial;
  }
  float limit = fmaf(2.0f, row_error(p.error, q2, p.d), from_ordered(kth));
  limit = fminf(limit + fabsf(limit) * 0x1p-22f, old_limit);

  int kept = 0;
  for (int first = 0; first < n; first += 32) {
    const bool mine = first + lane < n;
    const uint2 entry = mine ? queue[first + lane] : uint2{0, 0};
    const bool keep = mine && __uint_as_float(entry.x) <= limit;
    const unsigned keepers = __ballot_sync(0xffffffffu, keep);
    __syncwarp();  // all have read before anybody writes over it
    if (keep) queue[kept + __popc(keepers & ((1u << lane) - 1))] = entry;  // below whatever is still to be read
    kept += __popc(keepers);
  }
  if (lane == 0) {
    const bool overflow = needs_room && kept > p.capacity - kTile;
    if (overflow) atomicExch(&p.w.state[sm.row[r]], static_cast<int>(kOverflowed));
    sm.limit[r] = overflow ? -INFINITY : limit;
    sm.fill[r] = overflow ? 0 : kept;
  }
}

// kTerms 1: tf32 keys. 3: 3xTF32, sums leave the tensor core after each step so that its truncation cannot pile up.
template <int kTerms>
__global__ void __launch_bounds__(kFilterThreads, kTerms == 1 ? 2 : 1) filter_kernel(FilterParams p) {
  SIMT_SMEM_DYNAMIC(FilterShared, sm);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int count = p.rows ? *p.w.left_count : p.count;
  const Split split = split_bank(count, p.bank_count, gridDim.x);
  const int part = split.tiles ? blockIdx.x / split.tiles : split.parts;
  const int64_t first = min(part * split.columns, p.bank_count);
  const int64_t last = part < split.parts ? min(first + split.columns, p.bank_count) : first;
  const int64_t region = static_cast<int64_t>(blockIdx.x) * kTile;

  if (tid < kTile) {
    const int slot = first < last ? blockIdx.x % split.tiles * kTile + tid : count;
    const int row = slot >= count ? -1 : p.rows ? p.rows[slot] : slot;
    float limit = -INFINITY, slope = 0.0f;
    if (row >= 0 && p.w.state[row] == kQueued) {
      const float q2 = p.w.sqnorm[row], bound = p.bound ? p.bound[row] : INFINITY;
      slope = fmaf(p.error.cross, norm_above(q2, p.d), p.error.tiny);
      limit = bound < kTrusted ? bound - q2 + row_error(p.error, q2, p.d) + (bound + q2) * 0x1p-21f : kOpen;
    }
    sm.row[tid] = row;
    sm.fill[tid] = 0;
    sm.limit[tid] = limit;
    sm.slope[tid] = slope;
    sm.self[tid] =
        static_cast<uint32_t>(row >= 0 && p.self_index ? p.self_index[row] : -1);  // no bank has 2^32 - 1 rows
  }
  __syncthreads();

  const auto fetch = [&](int64_t column, int chunk, int buffer) {
    constexpr int kPieces = kDepth / 4, kRows = kFilterThreads / kPieces;  // of a row, and rows that all threads fetch at once
    static_assert(kRows % 4 == 0, "a thread's rows are permuted alike");
    const int r0 = tid / kPieces, l = chunk * kDepth + tid % kPieces * 4;
    float *queries = sm.tile[buffer][0] + piece_offset(r0, tid % kPieces), *bank = sm.tile[buffer][1] + piece_offset(r0, tid % kPieces);
    if (p.vector) {
      const float* from = p.bank + (column + r0) * p.d + l;
      const int rows = static_cast<int>(min(last - column, int64_t{kTile}));
#pragma unroll
      for (int r = 0; r < kTile; r += kRows) {
        const int row = sm.row[r0 + r];
        const bool mine = row >= 0 && l < p.d, theirs = r0 + r < rows && l < p.d;
        ptx::cp_async<16, true>(queries + r * kDepth, mine ? p.w.centred + static_cast<int64_t>(row) * p.d + l : p.w.centred, mine);
        ptx::cp_async<16>(bank + r * kDepth, theirs ? from + int64_t{r} * p.d : p.bank, theirs);
      }
    } else {
#pragma unroll 1
      for (int r = 0; r < kTile; r += kRows) {
        stage(queries + r * kDepth, p.w.centred, sm.row[r0 + r], l, p.d);
        stage(bank + r * kDepth, p.bank, column + r0 + r < last ? column + r0 + r : -1, l, p.d);
      }
    }
  };
  const int chunks = (p.d + kDepth - 1) / kDepth;
  int buffer = 0;
  if (first < last) fetch(first, 0, 0);
  ptx::cp_async_commit();
  for (int64_t column = first; column < last; column += kTile) {
    float acc[2][8][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk, buffer ^= 1) {
      const bool same = chunk + 1 < chunks;
      if (same || column + kTile < last) fetch(same ? column : column + kTile, same ? chunk + 1 : 0, buffer ^ 1);
      ptx::cp_async_commit();
      if (chunk == 0 && tid < kTile) {
        const float s = column + tid < last ? p.sqnorm[column + tid] : INFINITY;
        const bool usable = s <= FLT_MAX;
        sm.shift[tid] = usable ? fmaf(-p.error.self, s, s) : INFINITY;
        sm.norm[tid] = usable ? norm_above(s, p.d) : 0.0f;
      }
      ptx::cp_async_wait<1>();
      __syncthreads();
      multiply<kTerms>(acc, sm.tile[buffer][0], sm.tile[buffer][1], p.d - chunk * kDepth);
      if (same) __syncthreads();
    }
    const int r0 = warp / 2 * 32 + lane / 4, c0 = warp % 2 * 64 + lane % 4 * 2;
    const uint32_t j0 = static_cast<uint32_t>(column) + c0;
    float slope[4], limit[4];  // read here: the stores below might alias shared memory for all the compiler knows
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      slope[i] = sm.slope[r0 + 8 * i];
      limit[i] = sm.limit[r0 + 8 * i];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int c = i / 2 * 8 + i % 2;
      const float shift = sm.shift[c0 + c], norm = sm.norm[c0 + c];
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        const int r = r0 + 8 * h;
        const float key = fmaf(-slope[h], norm, fmaf(-2.0f, acc[h / 2][i / 2][h % 2 * 2 + i % 2], shift));
        if (key <= limit[h] && j0 + c != sm.self[r]) {
          const int at = atomicAdd(&sm.fill[r], 1);
          p.w.queue[(region + r) * p.capacity + at] = uint2{__float_as_uint(key), j0 + c};
        }
      }
    }
    if (!__syncthreads_or(tid < kTile && sm.limit[tid] > -INFINITY)) break;  // every row has overflowed
    for (int r = warp; r < kTile; r += kFilterThreads / 32) {
      const int n = sm.fill[r];
      const bool full = n > p.capacity - kTile;
      if (full || (n >= p.k && sm.limit[r] == kOpen)) compact(p, sm, r, p.w.queue + (region + r) * p.capacity, full);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int r = warp; r < kTile; r += kFilterThreads / 32) {
    if (sm.fill[r] >= p.k) compact(p, sm, r, p.w.queue + (region + r) * p.capacity, false);
    if (lane == 0) p.w.fill[region + r] = sm.fill[r];  // lane 0 wrote it
  }
}

}  // namespace ltkernels::knn_kde
