// The inner loops of the CPU kernels, compiled once for each instruction set and chosen at run time.
//
// The loops are written with the compiler's vector types (GCC and Clang, any processor) as always-inline templates; a thin
// wrapper with a target attribute gives each its AVX-512, AVX2+FMA or baseline body, so one binary fits every
// machine. With AVX-512 VNNI the filter multiplies rows rounded to 16-bit integers, two products where a float has one.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/cpu_level.h"

namespace ltkernels::isa {

template <int Bytes>
struct FloatVector {
  typedef float type __attribute__((vector_size(Bytes), aligned(4), may_alias));
};
typedef float float4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float float8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef double double8 __attribute__((vector_size(64), aligned(8), may_alias));

constexpr int64_t kDepth = 128;     // longest chain of additions in a tile: bounds the error, keeps a panel slice in L1
constexpr int kMaxTileRows = 12, kMaxTileCols = 32;

// ---- filter tiles --------------------------------------------------------------------------------------------------

// out[r] = (a[r], b[r], c[r], e[r]): a 4 x 4 transpose, out rows `stride` apart.
LT_INLINE void transpose4(const float* a, const float* b, const float* c, const float* e, int64_t stride, float* out) {
#if __has_builtin(__builtin_shufflevector)
  const float4 va = *(const float4*)a, vb = *(const float4*)b, vc = *(const float4*)c, ve = *(const float4*)e;
  const float4 ab_low = __builtin_shufflevector(va, vb, 0, 4, 1, 5), ab_high = __builtin_shufflevector(va, vb, 2, 6, 3, 7);
  const float4 ce_low = __builtin_shufflevector(vc, ve, 0, 4, 1, 5), ce_high = __builtin_shufflevector(vc, ve, 2, 6, 3, 7);
  *(float4*)(out) = __builtin_shufflevector(ab_low, ce_low, 0, 1, 4, 5);
  *(float4*)(out + stride) = __builtin_shufflevector(ab_low, ce_low, 2, 3, 6, 7);
  *(float4*)(out + 2 * stride) = __builtin_shufflevector(ab_high, ce_high, 0, 1, 4, 5);
  *(float4*)(out + 3 * stride) = __builtin_shufflevector(ab_high, ce_high, 2, 3, 6, 7);
#else
  for (int r = 0; r < 4; ++r) *(float4*)(out + r * stride) = float4{a[r], b[r], c[r], e[r]};
#endif
}

// Interleaves a slice of Width rows: out[i * Width + r] = rows[r][first + i].
template <int Width>
LT_INLINE void pack_panel(const float* const* rows, int64_t first, int64_t count, float* out) {
  for (int64_t begin = 0; begin < count; begin += 16) {  // one cache line of every row at a time
    const int64_t end = begin + 16 < count ? begin + 16 : count;
    for (int r = 0; r < Width; r += 4) {
      const float *a = rows[r] + first, *b = rows[r + 1] + first, *c = rows[r + 2] + first, *e = rows[r + 3] + first;
      int64_t i = begin;
      for (; i + 4 <= end; i += 4) transpose4(a + i, b + i, c + i, e + i, Width, out + i * Width + r);
      for (; i < end; ++i) *(float4*)(out + i * Width + r) = float4{a[i], b[i], c[i], e[i]};
    }
  }
}

// c (Rows, Vectors * width) = or += a-panel slice times b-panel slice; the accumulators live in registers.
template <int Bytes, int Rows, int Vectors>
LT_INLINE void multiply_panels(const float* a, const float* b, int64_t depth, bool accumulate, float* c) {
  using V = typename FloatVector<Bytes>::type;
  constexpr int kWidth = Bytes / 4;
  V acc[Rows][Vectors] = {};
  for (int64_t i = 0; i < depth; ++i, a += Rows, b += Vectors * kWidth) {
    __builtin_prefetch(a + 16 * Rows);  // the a-panels come from L2, one after the other
    V column[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) column[v] = *(const V*)(b + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) acc[r][v] += a[r] * column[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      V* out = (V*)(c + (r * Vectors + v) * kWidth);
      *out = accumulate ? *out + acc[r][v] : acc[r][v];
    }
  }
}

// The same products for few queries, straight from unpacked rows: c[r * stride] = rows[r] . point for Rows rows at once.
template <int Bytes, int Rows>
LT_INLINE void multiply_rows(const float* rows, int64_t d, const float* point, int64_t stride, float* c) {
  using V = typename FloatVector<Bytes>::type;
  constexpr int kWidth = Bytes / 4;
  V acc[Rows] = {};
  int64_t i = 0;
  for (; i + kWidth <= d; i += kWidth) {
    const V z = *(const V*)(point + i);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) acc[r] += *(const V*)(rows + r * d + i) * z;
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
    float4 part[Bytes / 16];
    std::memcpy(part, &acc[r], Bytes);
#pragma GCC unroll 4
    for (int p = 1; p < Bytes / 16; ++p) part[0] += part[p];
    float sum = (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
    for (int64_t j = i; j < d; ++j) sum += rows[r * d + j] * point[j];
    c[r * stride] = sum;
  }
}

template <int Bytes>
LT_INLINE void multiply_thin(const float* rows, int64_t count, int64_t d, const float* point, int64_t stride, float* c) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) multiply_rows<Bytes, 4>(rows + r * d, d, point, stride, c + r * stride);
  for (; r < count; ++r) multiply_rows<Bytes, 1>(rows + r * d, d, point, stride, c + r * stride);
}

// What the filter knows of the rows or columns of a tile; scale of rows as integers only.
struct TileSide {
  const float *floor, *limit, *scale;
};

// Which entries of a tile may belong to the answer of their row (bit = column): floor[col] - c <= limit[row]; and, where
// the tile serves its columns as well, to the answer of their column: floor[row] - c <= limit[col]. NaN never passes.
// Returns whether any may.
template <class Isa>
LT_INLINE bool filter_tile(const float* c, TileSide row, TileSide col, bool both, uint32_t* row_mask, uint32_t* col_mask) {
  uint32_t any = 0;
  for (int r = 0; r < Isa::kRows; ++r, c += Isa::kCols) {
    row_mask[r] = Isa::below(col.floor, c, row.limit[r]);
    col_mask[r] = both ? Isa::above(col.limit, c, row.floor[r]) : 0;
    any |= row_mask[r] | col_mask[r];
  }
  return any != 0;
}

LT_INLINE int32_t ordered(float x) {  // an integer that compares as the float does
  int32_t i;
  std::memcpy(&i, &x, 4);
  return i ^ ((i >> 31) & INT32_MAX);
}

LT_INLINE int64_t count_up_to(const float* x, int64_t count, float value) {
  int32_t below = 0;
  for (int64_t i = 0; i < count; ++i) below += x[i] <= value;
  return below;
}

// A value that at least `wanted` of the x reach down to and, ties apart, at most wanted + slack: bisection on the bits.
LT_INLINE float bisect(const float* x, int64_t count, int64_t wanted, int64_t slack) {
  int32_t low = INT32_MAX, high = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t key = ordered(x[i]);
    low = key < low ? key : low, high = key > high ? key : high;
  }
  float value = 0;
  while (true) {
    const int32_t middle = low + static_cast<int32_t>((int64_t(high) - low) / 2);
    const int32_t bits = middle ^ ((middle >> 31) & INT32_MAX);
    std::memcpy(&value, &bits, 4);
    const int64_t below = low < high ? count_up_to(x, count, value) : wanted;
    if (below >= wanted && below <= wanted + slack) return value;
    (below < wanted ? low : high) = below < wanted ? middle + 1 : middle;
  }
}

// ---- rows: centred, exact distances, weighted sums -----------------------------------------------------------------

template <class T>
LT_INLINE const Wide<T>* widen(const T* row, int64_t d, Wide<T>* buffer) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return row;
  } else {
    for (int64_t i = 0; i < d; ++i) buffer[i] = static_cast<float>(row[i]);
    return buffer;
  }
}

// out = row - centre, subtracted in the input's arithmetic and rounded to float. Returns |out|^2: NaN or inf if the row has such.
template <class T>
LT_INLINE double centre_row(const T* row, const float* centre, int64_t d, float* out) {
  using W = Wide<T>;
  double8 acc[2] = {};
  int64_t i = 0;
  for (; i + 16 <= d; i += 16) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float8 x;
      if constexpr (std::is_same_v<T, float>) {
        x = *(const float8*)(row + i + 8 * v) - *(const float8*)(centre + i + 8 * v);
      } else {
        for (int l = 0; l < 8; ++l) {
          x[l] = static_cast<float>(static_cast<W>(row[i + 8 * v + l]) - static_cast<W>(centre[i + 8 * v + l]));
        }
      }
      *(float8*)(out + i + 8 * v) = x;
      const double8 wide{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]};
      acc[v] += wide * wide;
    }
  }
  const double8 s = acc[0] + acc[1];
  double sum = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  for (; i < d; ++i) {
    out[i] = static_cast<float>(static_cast<W>(row[i]) - static_cast<W>(centre[i]));
    sum += double(out[i]) * out[i];
  }
  return sum;
}

template <class T>
bool finite(const T* row, int64_t d) {
  for (int64_t i = 0; i < d; ++i) {
    if (!std::isfinite(static_cast<Wide<T>>(row[i]))) return false;
  }
  return true;
}

// (a - b) of 8 entries: subtracted in the input's arithmetic, widened after.
template <class W>
LT_INLINE void difference(const W* a, const W* b, double8& out) {
  if constexpr (std::is_same_v<W, double>) {
    out = *(const double8*)a - *(const double8*)b;
  } else {
    const float8 x = *(const float8*)a - *(const float8*)b;
    out = double8{x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]};  // GCC 12 splits __builtin_convertvector in two
  }
}

// acc (32 partial sums) += (a - b)^2 of 32 entries. A product of two floats is exact in double: fused or not, same bits.
template <class W>
LT_INLINE void add_squares(const W* a, const W* b, double8* acc) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) {
    double8 delta;
    difference<W>(a + 8 * v, b + 8 * v, delta);
    acc[v] += delta * delta;
  }
}

// out[c] = |q - points[ids[c]]|^2 in double, 32 partial sums in a fixed order: a function of the pair of rows alone.
template <class T>
LT_INLINE void exact_distances(const Wide<T>* q, const T* points, int64_t d, const uint32_t* ids, int64_t count,
                               Wide<T>* buffer, double* out) {
  using W = Wide<T>;
  const int64_t whole = d / 32 * 32;
  W q_tail[32] = {}, z_tail[32] = {};
  std::memcpy(q_tail, q + whole, (d - whole) * sizeof(W));
  for (int64_t c = 0; c < count; ++c) {
    if (c + 1 < count) {  // candidates are scattered over the bank: fetch the next while this one is summed
      const char* next = (const char*)(points + ids[c + 1] * d);
      for (int64_t byte = 0; byte < d * int64_t(sizeof(T)) && byte < 4096; byte += 64) __builtin_prefetch(next + byte);
    }
    const W* z = widen(points + ids[c] * d, d, buffer);
    double8 acc[4] = {};
    for (int64_t i = 0; i < whole; i += 32) add_squares<W>(q + i, z + i, acc);
    if (whole < d) {
      std::memcpy(z_tail, z + whole, (d - whole) * sizeof(W));
      add_squares<W>(q_tail, z_tail, acc);
    }
    const double8 s = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    out[c] = ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }
}

// One strip of weighted_difference: its sums stay in registers while the rows stream by.
constexpr int64_t kStrip = 64;

template <class T, bool Whole>
LT_INLINE void weighted_strip(const Wide<T>* q, const T* points, int64_t d, int64_t n, const int64_t* ids,
                              const double* weight, int64_t count, double* out) {
  using W = Wide<T>;
  W z_strip[kStrip] = {};
  double8 sum[kStrip / 8] = {};
  for (int64_t c = 0; c < count; ++c) {
    if (weight[c] == 0) continue;
    const W* z = z_strip;
    if constexpr (Whole && std::is_same_v<T, W>) {
      z = points + ids[c] * d;
    } else {
      for (int64_t i = 0; i < n; ++i) z_strip[i] = static_cast<W>(points[ids[c] * d + i]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < kStrip / 8; ++v) {
      double8 delta;
      difference<W>(z + 8 * v, q + 8 * v, delta);
      sum[v] += weight[c] * delta;
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kStrip / 8; ++v) *(double8*)(out + 8 * v) = sum[v];
}

// out = sum_c weight[c] (points[ids[c]] - q) in double; rows of weight 0 may hold NaN and are not read.
template <class T>
LT_INLINE void weighted_difference(const Wide<T>* q, const T* points, int64_t d, const int64_t* ids,
                                   const double* weight, int64_t count, double* out) {
  int64_t i = 0;
  for (; i + kStrip <= d; i += kStrip) {
    weighted_strip<T, true>(q + i, points + i, d, kStrip, ids, weight, count, out + i);
  }
  if (i == d) return;
  Wide<T> q_tail[kStrip] = {};
  double out_tail[kStrip];
  std::memcpy(q_tail, q + i, (d - i) * sizeof(Wide<T>));
  weighted_strip<T, false>(q_tail, points + i, d, d - i, ids, weight, count, out_tail);
  std::memcpy(out + i, out_tail, (d - i) * sizeof(double));
}

// ---- one table of functions an instruction set ---------------------------------------------------------------------

struct TileOps {
  int rows, cols, width;  // tile shape; width = lanes of a vector
  int entries;            // of a row in one word of a panel: 1 float or, where there is `quantise`, 2 integers
  float (*quantise)(const float* row, float sqnorm, int64_t d, float* words);
  float product(float entry) const {  // what `multiply` left in an entry, in units of the row and the column
    int32_t sum;
    std::memcpy(&sum, &entry, 4);
    return quantise ? static_cast<float>(sum) : entry;
  }
  void (*pack_rows)(const float* const* rows, int64_t first, int64_t count, float* out);
  void (*pack_cols)(const float* const* rows, int64_t first, int64_t count, float* out);
  void (*multiply)(const float* a, const float* b, int64_t depth, bool accumulate, float* c);
  void (*thin)(const float* rows, int64_t count, int64_t d, const float* point, int64_t stride, float* c);
  bool (*filter)(float* c, TileSide row, TileSide col, bool both, uint32_t* row_mask, uint32_t* col_mask);
  int64_t (*count_up_to)(const float* x, int64_t count, float value);
  float (*bisect)(const float* x, int64_t count, int64_t wanted, int64_t slack);
};

// A panel of rows for `multiply`, a slice of kDepth words after the other at place(first word, words): rows as they are or, where there
// is `quantise`, as integers, which go through `words` (width rows of them) and whose units go to `scale`. Changes `rows`.
template <class Pack, class Place>
void make_panel(const TileOps& ops, Pack pack, const float** rows, const float* sqnorm, int width, int64_t d, float* words, float* scale,
                const Place& place) {
  const int64_t length = (d + ops.entries - 1) / ops.entries;
  for (int r = 0; ops.quantise && r < width; ++r) {
    scale[r] = ops.quantise(rows[r], sqnorm[r], d, words + r * length);
    rows[r] = words + r * length;
  }
  for (int64_t first = 0; first < length; first += kDepth) {
    const int64_t count = length - first < kDepth ? length - first : kDepth;
    pack(rows, first, count, place(first, count));
  }
}

template <class T>
struct RowOps {
  double (*centre)(const T* row, const float* centre, int64_t d, float* out);
  void (*distances)(const Wide<T>* q, const T* points, int64_t d, const uint32_t* ids, int64_t count, Wide<T>* buffer,
                    double* out);
  void (*weighted)(const Wide<T>* q, const T* points, int64_t d, const int64_t* ids, const double* weight,
                   int64_t count, double* out);
};

// An instruction set: vector bytes, tile shape that fills its registers, and how it turns a comparison into bits.
#define LT_ISA_BODY(NAME, TARGET, BYTES, ROWS, VECTORS)                                                                \
  static constexpr int kRows = ROWS, kWidth = BYTES / 4, kCols = VECTORS * kWidth;                                     \
  TARGET static void pack_rows(const float* const* rows, int64_t first, int64_t n, float* out) {                       \
    pack_panel<kRows>(rows, first, n, out);                                                                            \
  }                                                                                                                    \
  TARGET static void pack_cols(const float* const* rows, int64_t first, int64_t n, float* out) {                       \
    pack_panel<kCols>(rows, first, n, out);                                                                            \
  }                                                                                                                    \
  TARGET static void multiply(const float* a, const float* b, int64_t n, bool more, float* c) {                        \
    multiply_panels<BYTES, ROWS, VECTORS>(a, b, n, more, c);                                                           \
  }                                                                                                                    \
  TARGET static void thin(const float* rows, int64_t n, int64_t d, const float* point, int64_t stride, float* c) {     \
    multiply_thin<BYTES>(rows, n, d, point, stride, c);                                                                \
  }                                                                                                                    \
  TARGET static bool filter(float* c, TileSide row, TileSide col, bool both, uint32_t* rm, uint32_t* cm) {             \
    return filter_tile<NAME>(c, row, col, both, rm, cm);                                                               \
  }                                                                                                                    \
  TARGET static int64_t count_up_to(const float* x, int64_t n, float value) { return isa::count_up_to(x, n, value); }  \
  TARGET static float bisect(const float* x, int64_t n, int64_t wanted, int64_t slack) {                               \
    return isa::bisect(x, n, wanted, slack);                                                                           \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  TARGET static double centre(const T* row, const float* c, int64_t d, float* out) {                                   \
    return centre_row<T>(row, c, d, out);                                                                              \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  TARGET static void distances(const Wide<T>* q, const T* p, int64_t d, const uint32_t* ids, int64_t n,                \
                               Wide<T>* buffer, double* o) {                                                           \
    exact_distances<T>(q, p, d, ids, n, buffer, o);                                                                    \
  }                                                                                                                    \
  template <class T>                                                                                                   \
  TARGET static void weighted(const Wide<T>* q, const T* p, int64_t d, const int64_t* ids, const double* w,            \
                              int64_t n, double* o) {                                                                  \
    weighted_difference<T>(q, p, d, ids, w, n, o);                                                                     \
  }

struct Baseline {
  LT_ISA_BODY(Baseline, , 16, 4, 2)
  static uint32_t below(const float* floor, const float* c, float limit) {
    uint32_t mask = 0;
    for (int i = 0; i < kCols; ++i) mask |= uint32_t(floor[i] - c[i] <= limit) << i;
    return mask;
  }
  static uint32_t above(const float* limit, const float* c, float floor) {
    uint32_t mask = 0;
    for (int i = 0; i < kCols; ++i) mask |= uint32_t(floor - c[i] <= limit[i]) << i;
    return mask;
  }
};

#if LT_X86
struct Avx2 {
  LT_ISA_BODY(Avx2, LT_AVX2, 32, 4, 3)
  LT_AVX2 static uint32_t bits(__m256 low, __m256 limit) {
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(low, limit, _CMP_LE_OQ)));
  }
  LT_AVX2 static uint32_t below(const float* floor, const float* c, float limit) {
    uint32_t mask = 0;
    for (int i = 0; i < kCols; i += 8) {
      mask |= bits(_mm256_sub_ps(_mm256_loadu_ps(floor + i), _mm256_loadu_ps(c + i)), _mm256_set1_ps(limit)) << i;
    }
    return mask;
  }
  LT_AVX2 static uint32_t above(const float* limit, const float* c, float floor) {
    uint32_t mask = 0;
    for (int i = 0; i < kCols; i += 8) {
      mask |= bits(_mm256_sub_ps(_mm256_set1_ps(floor), _mm256_loadu_ps(c + i)), _mm256_loadu_ps(limit + i)) << i;
    }
    return mask;
  }
};

struct Avx512 {
  LT_ISA_BODY(Avx512, LT_AVX512, 64, 12, 2)
  LT_AVX512 static uint32_t below(const float* floor, const float* c, float limit) {
    uint32_t mask = 0;
    for (int i = 0; i < kCols; i += 16) {
      const __m512 low = _mm512_sub_ps(_mm512_loadu_ps(floor + i), _mm512_loadu_ps(c + i));
      mask |= uint32_t(_mm512_cmp_ps_mask(low, _mm512_set1_ps(limit), _CMP_LE_OQ)) << i;
    }
    return mask;
  }
  LT_AVX512 static uint32_t above(const float* limit, const float* c, float floor) {
    uint32_t mask = 0;
    for (int i = 0; i < kCols; i += 16) {
      const __m512 low = _mm512_sub_ps(_mm512_set1_ps(floor), _mm512_loadu_ps(c + i));
      mask |= uint32_t(_mm512_cmp_ps_mask(low, _mm512_loadu_ps(limit + i), _CMP_LE_OQ)) << i;
    }
    return mask;
  }
};

// Products of rows rounded to multiples of |row| / 32767: integers of 16 bits, two of a row in a word. Their sums are
// exact in 32 bits, whatever the order: by Cauchy and Schwarz none passes (32767 + sqrt(d) / 2)^2.
struct Avx512Vnni {
  static constexpr int kRows = Avx512::kRows, kCols = Avx512::kCols;

  // Writes the integers, padded with a zero to whole words, and returns what one unit of them is worth. A row of norm 0, or
  // of one whose square is near the end of the normal range, is rounded to zero: `underflow_` pays for it.
  LT_AVX512_VNNI static float quantise(const float* row, float sqnorm, int64_t d, float* words) {
    const bool zero = !(sqnorm >= 0x1p-120f);
    const float inverse = zero ? 0.f : 32767 * (1 - 0x1p-20f) / std::sqrt(sqnorm);
    const auto rounded = [&](__m512 x) LT_AVX512_VNNI {
      return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse))));
    };
    int16_t* out = (int16_t*)words;
    int64_t i = 0;
    for (; i + 16 <= d; i += 16) _mm256_storeu_si256((__m256i*)(out + i), rounded(_mm512_loadu_ps(row + i)));
    if (i < d) {
      const int left = static_cast<int>(d - i);
      const __m256i tail = rounded(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << left) - 1), row + i));
      _mm256_mask_storeu_epi16(out + i, static_cast<__mmask16>((1 << (left + left % 2)) - 1), tail);
    }
    return zero ? 0.f : 1 / inverse;
  }

  // GCC 12 copies every accumulator around the intrinsic _mm512_dpwssd_epi32, at half of the speed.
  LT_AVX512_VNNI __attribute__((always_inline)) static inline void add_products(__m512i& acc, __m512i x, __m512i y) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y));
  }

  LT_AVX512_VNNI static void multiply(const float* a, const float* b, int64_t n, bool more, float* c) {
    __m512i acc[kRows][2] = {};
    for (int64_t i = 0; i < n; ++i, a += kRows, b += kCols) {
      __builtin_prefetch(a + 16 * kRows);
      const __m512i low = _mm512_load_si512(b), high = _mm512_load_si512(b + 16);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r, 4);
        add_products(acc[r][0], _mm512_set1_epi32(pair), low);
        add_products(acc[r][1], _mm512_set1_epi32(pair), high);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r, c += kCols) {
      const __m512i low = more ? _mm512_loadu_si512(c) : __m512i{}, high = more ? _mm512_loadu_si512(c + 16) : __m512i{};
      _mm512_storeu_si512(c, _mm512_add_epi32(acc[r][0], low));
      _mm512_storeu_si512(c + 16, _mm512_add_epi32(acc[r][1], high));
    }
  }

  // The integers of the tile become the products they stand for, in place.
  LT_AVX512_VNNI static bool filter(float* c, TileSide row, TileSide col, bool both, uint32_t* rm, uint32_t* cm) {
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kCols; i += 16) {
        float* entry = c + r * kCols + i;
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(entry)), _mm512_set1_ps(row.scale[r]));
        _mm512_storeu_ps(entry, _mm512_mul_ps(product, _mm512_loadu_ps(col.scale + i)));
      }
    }
    return filter_tile<Avx512>(c, row, col, both, rm, cm);
  }
};
#endif

template <class Isa>
TileOps tile_ops_of() {
  static_assert(Isa::kRows <= kMaxTileRows && Isa::kCols <= kMaxTileCols);
  return {Isa::kRows, Isa::kCols, Isa::kWidth, 1, nullptr, Isa::pack_rows, Isa::pack_cols,
          Isa::multiply, Isa::thin, Isa::filter, Isa::count_up_to, Isa::bisect};
}

inline TileOps tile_ops(Level level) {
#if LT_X86
  if (level == Level::kAvx512Vnni) {
    TileOps ops = tile_ops_of<Avx512>();
    ops.entries = 2;
    ops.quantise = Avx512Vnni::quantise, ops.multiply = Avx512Vnni::multiply, ops.filter = Avx512Vnni::filter;
    return ops;
  }
  if (level == Level::kAvx512) return tile_ops_of<Avx512>();
  if (level == Level::kAvx2) return tile_ops_of<Avx2>();
#endif
  return tile_ops_of<Baseline>();
}

template <class T>
RowOps<T> row_ops(Level level) {
#if LT_X86
  if (level >= Level::kAvx512) return {Avx512::centre<T>, Avx512::distances<T>, Avx512::weighted<T>};
  if (level == Level::kAvx2) return {Avx2::centre<T>, Avx2::distances<T>, Avx2::weighted<T>};
#endif
  return {Baseline::centre<T>, Baseline::distances<T>, Baseline::weighted<T>};
}

}  // namespace ltkernels::isa
