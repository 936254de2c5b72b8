// The inner loops of pair_sqdist and pcl_rows on the CPU, compiled once for each instruction set as those of knn_kde are.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../common/cpu_vector.h"

namespace ltkernels::isa {

constexpr int64_t kSub = 32;      // rows and columns of a block of pairs
constexpr int64_t kChain = 12;    // longest chain of float additions in a distance: with it the error is below 16 roundings, 1e-6
constexpr int64_t kSpan = 24;     // vectors of a row that are packed at a time
constexpr int kTileCols = 4;

// ---- distances -----------------------------------------------------------------------------------------------------

// Lanes of a vector as half as many doubles (float), or as they are (double).
template <class W, int Bytes>
LT_INLINE void lanes_of(const typename VectorOf<W, Bytes>::type& v, typename VectorOf<double, Bytes>::type& out) {
  if constexpr (std::is_same_v<W, double>) {
    out = v;
  } else {
    typename VectorOf<float, Bytes / 2>::type low, high;
    std::memcpy(&low, &v, Bytes / 2);
    std::memcpy(&high, (const char*)&v + Bytes / 2, Bytes / 2);
    low += high;
    if constexpr (Bytes == 64) {  // GCC 12 splits __builtin_convertvector in two
      out = typename VectorOf<double, Bytes>::type{low[0], low[1], low[2], low[3], low[4], low[5], low[6], low[7]};
    } else {
      out = __builtin_convertvector(low, typename VectorOf<double, Bytes>::type);
    }
  }
}

// sums of Rows x kTileCols pairs = or += (a[r] - b[c])^2 over up to kSpan vectors: lane by lane, so that the bits of a pair do not
// depend on the tile it is in. Rows of a and b are kSpan vectors apart, rows of sums kSub pairs.
template <class W, int Bytes, int Rows>
LT_INLINE void square_tile(const W* a, const W* b, int64_t vectors, bool accumulate, double* sums) {
  using V = typename VectorOf<W, Bytes>::type;
  using Sum = typename VectorOf<double, Bytes>::type;
  constexpr int64_t kWidth = Bytes / sizeof(W), kLanes = Bytes / 8, kStride = kSpan * kWidth;
  for (int64_t begin = 0; begin < vectors; begin += kChain, accumulate = true) {
    const int64_t end = (begin + kChain < vectors ? begin + kChain : vectors) * kWidth;
    V acc[Rows][kTileCols] = {};
    for (int64_t i = begin * kWidth; i < end; i += kWidth) {
      V row[Rows];
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) row[r] = *(const V*)(a + r * kStride + i);
#pragma GCC unroll 4
      for (int c = 0; c < kTileCols; ++c) {
        const V column = *(const V*)(b + c * kStride + i);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          const V t = row[r] - column;
          acc[r][c] += t * t;
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kTileCols; ++c) {
        Sum* out = (Sum*)(sums + (r * kSub + c) * kLanes);
        Sum sum;
        lanes_of<W, Bytes>(acc[r][c], sum);
        *out = accumulate ? *out + sum : sum;
      }
    }
  }
}

// All tiles of a block; of a block with itself (same) those on and above the diagonal.
template <class W, int Bytes, int Rows>
LT_INLINE void squares(const W* a, int64_t rows, const W* b, int64_t cols, bool same, int64_t vectors, bool accumulate, double* sums) {
  constexpr int64_t kLanes = Bytes / 8, kStride = kSpan * Bytes / sizeof(W);
  for (int64_t r = 0; r < rows; r += Rows) {
    for (int64_t c = same ? r / kTileCols * kTileCols : 0; c < cols; c += kTileCols) {
      square_tile<W, Bytes, Rows>(a + r * kStride, b + c * kStride, vectors, accumulate, sums + (r * kSub + c) * kLanes);
    }
  }
}

// sqdist (kSub, kSub) = the sums of the lanes; of a block with itself both halves.
template <int Lanes>
LT_INLINE void add_lanes(const double* sums, int64_t rows, int64_t cols, bool same, double* sqdist) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = same ? r : 0; c < cols; ++c) {
      double part[Lanes];
      std::memcpy(part, sums + (r * kSub + c) * Lanes, sizeof(part));
#pragma GCC unroll 4
      for (int half = Lanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) part[l] += part[l + half];
      }
      sqdist[r * kSub + c] = part[0];
      if (same) sqdist[c * kSub + r] = part[0];
    }
  }
}

// Whether all |row[i]| <= limit: NaN and inf are not.
template <class T>
LT_INLINE bool bounded(const T* row, int64_t count, Wide<T> limit) {
  int32_t beyond = 0;
  for (int64_t i = 0; i < count; ++i) beyond |= !(std::fabs(static_cast<Wide<T>>(row[i])) <= limit);
  return beyond == 0;
}

// out (strips, count, stride) = entries first .. first + n of each row in strips of `stride`, 0 beyond; the n after them are fetched.
template <class T, int Bytes>
LT_INLINE void pack(const T* const* rows, int64_t count, int64_t first, int64_t n, int64_t stride, Wide<T>* __restrict out) {
  constexpr int64_t kWidth = Bytes / sizeof(Wide<T>);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t strip = 0; strip < n; strip += stride) {
      const T* row = rows[r] + first + strip;
      Wide<T>* to = out + strip * count + r * stride;
      const int64_t here = n - strip < stride ? n - strip : stride;
      int64_t i = 0;
      for (; i + kWidth <= here; i += kWidth) {
        __builtin_prefetch(row + n + i, 0, 2);
        for (int64_t l = 0; l < kWidth; ++l) to[i + l] = static_cast<Wide<T>>(row[i + l]);
      }
      for (; i < here; ++i) to[i] = static_cast<Wide<T>>(row[i]);
      for (; i < stride; ++i) to[i] = 0;
    }
  }
}

// ---- terms ---------------------------------------------------------------------------------------------------------

enum Form : int64_t { kExponential, kReciprocal, kHinge, kNegativeL2 };  // reference.PCL_FORMS

struct Side {  // kSub rows of a block of pairs
  const int32_t *key, *group;  // a pair counts where keys differ and groups are equal
  const double *weight, *margin;
};

struct Sums {  // of each of those rows, over the other side of the block
  double row[kSub];
  int32_t pairs[kSub], active[kSub];
};

// phi and its derivative, of kSub pairs.
template <class W>
LT_INLINE void term(int64_t form, const double* d, const double* margin, double* value, double* slope) {
  if (form == kExponential) {
    W x[kSub];
    for (int c = 0; c < kSub; ++c) x[c] = static_cast<W>(-d[c]);
    for (int c = 0; c < kSub; ++c) x[c] = exp_negative(x[c]);
    for (int c = 0; c < kSub; ++c) value[c] = x[c], slope[c] = -value[c];
  } else if (form == kReciprocal) {
    for (int c = 0; c < kSub; ++c) value[c] = 1 / (1 + d[c]), slope[c] = -value[c] * value[c];
  } else if (form == kHinge) {
    for (int c = 0; c < kSub; ++c) value[c] = d[c] < margin[c] ? margin[c] - d[c] : 0, slope[c] = d[c] < margin[c] ? -1 : 0;
  } else {
    for (int c = 0; c < kSub; ++c) value[c] = -d[c], slope[c] = -1;
  }
}

// The terms of a block of pairs: own = what they add to its rows, theirs (or null) = what the pairs the other way round add to its
// columns, pull (kSub, kSub) = the weighted derivatives, those of the pairs the other way round included where `among`; answers
// whether one of these is not 0.
template <class W>
LT_INLINE bool pair_terms(int64_t form, double scale, const double* sqdist, const Side& rows, const Side& cols, bool among, Sums* own,
                          Sums* theirs, W* pull) {
  int32_t some = 0;
  if (theirs) *theirs = {};
  for (int r = 0; r < kSub; ++r, sqdist += kSub, pull += kSub) {
    double d[kSub], margin[kSub], value[kSub], slope[kSub], back_value[kSub], back_slope[kSub];
    int32_t counts[kSub];
    const int32_t key = rows.key[r], group = rows.group[r];
    for (int c = 0; c < kSub; ++c) counts[c] = (cols.key[c] != key) & (cols.group[c] == group);
    for (int c = 0; c < kSub; ++c) d[c] = scale * sqdist[c], margin[c] = rows.margin[r];
    term<W>(form, d, margin, value, slope);
    if (form == kHinge) {
      term<W>(form, d, cols.margin, back_value, back_slope);
    } else {
      std::memcpy(back_value, value, sizeof(value)), std::memcpy(back_slope, slope, sizeof(slope));
    }
    double part[8] = {};
    int32_t pairs = 0, active = 0;
    for (int c = 0; c < kSub; c += 8) {
      for (int l = 0; l < 8; ++l) part[l] += counts[c + l] ? value[c + l] : 0;
    }
    for (int c = 0; c < kSub; ++c) pairs += counts[c], active += counts[c] & (slope[c] != 0);
    own->row[r] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
    own->pairs[r] = pairs, own->active[r] = active;
    if (theirs) {
      for (int c = 0; c < kSub; ++c) theirs->row[c] += counts[c] ? back_value[c] : 0;
      for (int c = 0; c < kSub; ++c) theirs->pairs[c] += counts[c], theirs->active[c] += counts[c] & (back_slope[c] != 0);
    }
    const double weight = rows.weight[r], back = among;
    for (int c = 0; c < kSub; ++c) {
      const double whole = weight * slope[c] + back * cols.weight[c] * back_slope[c];
      pull[c] = counts[c] ? static_cast<W>(whole) : 0;
      some |= pull[c] != 0;
    }
  }
  return some != 0;
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// c (Rows, Vectors * width) += sum_j pull[j][r] (own[r] - theirs[j])
template <class W, int Bytes, int Rows, int Vectors>
LT_INLINE void add_pull(const W* pull, const W* own, const W* theirs, int64_t depth, W* c) {
  using V = typename VectorOf<W, Bytes>::type;
  constexpr int kWidth = Bytes / sizeof(W), kCols = Vectors * kWidth;
  V acc[Rows][Vectors] = {}, x[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) x[r][v] = *(const V*)(own + r * kCols + v * kWidth);
  }
  for (int64_t j = 0; j < depth; ++j, pull += Rows, theirs += kCols) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const V column = *(const V*)(theirs + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[r][v] += pull[r] * (x[r][v] - column);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) *(V*)(c + r * kCols + v * kWidth) += acc[r][v];
  }
}

// ---- one table of functions an instruction set ---------------------------------------------------------------------

template <class T>
struct PairOps {
  using W = Wide<T>;
  int64_t width;  // lanes of a vector
  int lanes, pull_rows, pull_cols;
  void (*squares)(const W* a, int64_t rows, const W* b, int64_t cols, bool same, int64_t vectors, bool accumulate, double* sums);
  void (*add_lanes)(const double* sums, int64_t rows, int64_t cols, bool same, double* sqdist);
  bool (*bounded)(const T* row, int64_t count, W limit);
  void (*pack)(const T* const* rows, int64_t count, int64_t first, int64_t n, int64_t stride, W* out);
  bool (*terms)(int64_t form, double scale, const double* sqdist, const Side& rows, const Side& cols, bool among, Sums* own, Sums* theirs,
                W* pull);
  void (*add_pull)(const W* pull, const W* own, const W* theirs, int64_t depth, W* c);
};

#define LT_PAIR_BODY(NAME, TARGET, BYTES, TILE_ROWS, PULL_ROWS, PULL_VECTORS)                                                       \
  template <class T>                                                                                                               \
  struct NAME {                                                                                                                    \
    using W = Wide<T>;                                                                                                             \
    static constexpr int kWidth = BYTES / sizeof(W), kLanes = BYTES / 8;                                                           \
    static_assert(kSub % TILE_ROWS == 0 && kTileCols % TILE_ROWS == 0 && kSub % PULL_ROWS == 0);                                   \
    TARGET static void squares(const W* a, int64_t rows, const W* b, int64_t cols, bool same, int64_t n, bool more, double* sums) { \
      isa::squares<W, BYTES, TILE_ROWS>(a, rows, b, cols, same, n, more, sums);                                                    \
    }                                                                                                                              \
    TARGET static void add_lanes(const double* sums, int64_t rows, int64_t cols, bool same, double* sqdist) {                      \
      isa::add_lanes<kLanes>(sums, rows, cols, same, sqdist);                                                                      \
    }                                                                                                                              \
    TARGET static bool bounded(const T* row, int64_t n, W limit) { return isa::bounded<T>(row, n, limit); }                        \
    TARGET static void pack(const T* const* rows, int64_t count, int64_t first, int64_t n, int64_t stride, W* out) {               \
      isa::pack<T, BYTES>(rows, count, first, n, stride, out);                                                                     \
    }                                                                                                                              \
    TARGET static bool terms(int64_t form, double scale, const double* d, const Side& rows, const Side& cols, bool among, Sums* o, \
                             Sums* t, W* pull) {                                                                                   \
      return isa::pair_terms<W>(form, scale, d, rows, cols, among, o, t, pull);                                                    \
    }                                                                                                                              \
    TARGET static void add_pull(const W* pull, const W* own, const W* theirs, int64_t depth, W* c) {                               \
      isa::add_pull<W, BYTES, PULL_ROWS, PULL_VECTORS>(pull, own, theirs, depth, c);                                               \
    }                                                                                                                              \
    static PairOps<T> table() {                                                                                                    \
      return {kWidth, kLanes, PULL_ROWS, PULL_VECTORS * kWidth, squares, add_lanes, bounded, pack, terms, add_pull};               \
    }                                                                                                                              \
  };

LT_PAIR_BODY(PairBaseline, , 16, 2, 4, 1)
#if LT_X86
LT_PAIR_BODY(PairAvx2, LT_AVX2, 32, 2, 4, 1)
LT_PAIR_BODY(PairAvx512, LT_AVX512, 64, 4, 8, 1)
#endif

template <class T>
PairOps<T> pair_ops(Level level) {
#if LT_X86
  if (level >= Level::kAvx512) return PairAvx512<T>::table();
  if (level == Level::kAvx2) return PairAvx2<T>::table();
#endif
  return PairBaseline<T>::table();
}

}  // namespace ltkernels::isa
