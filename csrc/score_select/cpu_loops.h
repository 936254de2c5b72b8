// The inner loops of psel, psel_sample and psel_mix on the CPU, compiled once for each instruction set as those of knn_kde are.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../common/cpu_vector.h"
#include "../common/philox.h"

namespace ltkernels::isa {

constexpr int64_t kChunk = 256;        // columns whose logits are normalised together: fixed, for it shows in the last bit
constexpr int64_t kChain = 32;         // longest chain of additions in a distance
constexpr int kTileRows = 4, kTileCols = 4;
constexpr int64_t kMixDepth = 128;     // longest chain of additions in a weighted sum, before the sum of such blocks
constexpr int kMaxMixRows = 12, kMaxMixCols = 32;
constexpr int kLanes = 8;              // partial maxima and sums of a chunk
constexpr int64_t kNoiseBlock = 32;    // columns that get their noise together; 16 take 5 % longer, 64 twice as long where K is small

// ---- distances -----------------------------------------------------------------------------------------------------

// sums[(r * kTileCols + c) * width ..] = or += (x[r] - scale[r] clean[c])^2 over up to kChain vectors: lane by lane, so that the
// bits of a pair do not depend on the tile it is in. Where all scales are 1 the product can be left out: same bits.
template <class W, int Bytes, int Rows, bool Unit>
LT_INLINE void square_tile(const W* const* x, const W* const* clean, const W* scale, int64_t vectors, bool accumulate, W* sums) {
  using V = typename VectorOf<W, Bytes>::type;
  constexpr int64_t kWidth = Bytes / sizeof(W);
  V acc[Rows][kTileCols] = {}, s[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) s[r] = V{} + scale[r];
  const W *x0 = x[0], *x1 = x[1 % Rows], *x2 = x[2 % Rows], *x3 = x[3 % Rows];
  const W *c0 = clean[0], *c1 = clean[1], *c2 = clean[2], *c3 = clean[3];
  for (int64_t i = 0; i < vectors * kWidth; i += kWidth) {
    const V column[kTileCols] = {*(const V*)(c0 + i), *(const V*)(c1 + i), *(const V*)(c2 + i), *(const V*)(c3 + i)};
    const V row[4] = {*(const V*)(x0 + i), *(const V*)(x1 + i), *(const V*)(x2 + i), *(const V*)(x3 + i)};
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kTileCols; ++c) {
        V t;
        if constexpr (!Unit && std::is_same_v<W, float> && Bytes == 16) {  // without FMA: the product must not be rounded on its own
          typedef double Wider __attribute__((vector_size(2 * Bytes)));
          const Wider exact = __builtin_convertvector(row[r], Wider) - __builtin_convertvector(s[r], Wider) * __builtin_convertvector(column[c], Wider);
          t = __builtin_convertvector(exact, V);
        } else {
          t = Unit ? row[r] - column[c] : row[r] - s[r] * column[c];
        }
        acc[r][c] += t * t;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kTileCols; ++c) {
      V* out = (V*)(sums + (r * kTileCols + c) * kWidth);
      *out = accumulate ? *out + acc[r][c] : acc[r][c];
    }
  }
}

template <class W, int Bytes>
LT_INLINE void squares(const W* const* x, int rows, const W* const* clean, const W* scale, int64_t vectors, bool accumulate, W* sums) {
  if (rows == kTileRows) {
    const bool unit = scale[0] == 1 && scale[1] == 1 && scale[2] == 1 && scale[3] == 1;
    if (unit) return square_tile<W, Bytes, 4, true>(x, clean, scale, vectors, accumulate, sums);
    return square_tile<W, Bytes, 4, false>(x, clean, scale, vectors, accumulate, sums);
  }
  for (int r = 0; r < rows; ++r) {
    W* row_sums = sums + r * kTileCols * (Bytes / sizeof(W));
    if (scale[r] == 1) {
      square_tile<W, Bytes, 1, true>(x + r, clean, scale + r, vectors, accumulate, row_sums);
    } else {
      square_tile<W, Bytes, 1, false>(x + r, clean, scale + r, vectors, accumulate, row_sums);
    }
  }
}

// out[c] = sum of the lanes of each of the kTileCols pairs of a row, in double.
template <class W, int Bytes>
LT_INLINE void add_lanes(const W* sums, double* out) {
  constexpr int kWidth = Bytes / sizeof(W);
  for (int c = 0; c < kTileCols; ++c, sums += kWidth) {
    double part[kWidth];
    for (int l = 0; l < kWidth; ++l) part[l] = sums[l];
#pragma GCC unroll 4
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) part[l] += part[l + half];
    }
    out[c] = part[0];
  }
}

// ---- one row of logits, kChunk at a time ---------------------------------------------------------------------------
// Buffers are `padded` long, a multiple of kNoiseBlock; what is beyond the last column holds -inf, which takes part in nothing.

constexpr double kNone = -std::numeric_limits<double>::infinity();

LT_INLINE double largest(const double* values, int64_t count) {  // count: a multiple of kLanes
  double part[kLanes];
  for (int l = 0; l < kLanes; ++l) part[l] = kNone;
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int l = 0; l < kLanes; ++l) part[l] = values[j + l] > part[l] ? values[j + l] : part[l];
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) part[l] = part[l + half] > part[l] ? part[l + half] : part[l];
  }
  return part[0];
}

// logit = -sqdist / (2 std^2) + prior, -inf where sqdist is not finite; answers the largest.
template <class W>
LT_INLINE double make_logits(const double* sqdist, const W* prior, int64_t count, int64_t padded, double std, double* logit) {
  const double factor = 0.5 / std / std;  // of a float: never 0 or infinite
  for (int64_t j = 0; j < count; ++j) {
    const double value = std::is_same_v<W, float> ? sqdist[j] * factor : 0.5 * (sqdist[j] / std / std);
    logit[j] = sqdist[j] <= DBL_MAX && value <= std::numeric_limits<W>::max() ? -value : kNone;
  }
  if (prior != nullptr) {
    for (int64_t j = 0; j < count; ++j) logit[j] += prior[j];
  }
  for (int64_t j = count; j < padded; ++j) logit[j] = kNone;
  return largest(logit, padded);
}

// weight[j] = exp(logit[j] - top); answers their sum.
template <class W>
LT_INLINE double make_weights(const double* logit, int64_t padded, double top, W* shifted, W* weight) {
  for (int64_t j = 0; j < padded; ++j) shifted[j] = static_cast<W>(logit[j] - top);
  for (int64_t j = 0; j < padded; ++j) weight[j] = exp_negative(shifted[j]);
  double part[2 * kLanes] = {};
  for (int64_t j = 0; j < padded; j += 2 * kLanes) {
    for (int l = 0; l < 2 * kLanes; ++l) part[l] += weight[j + l];
  }
  for (int half = kLanes; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  }
  return part[0];
}

// p[j] = exp(p[j] + shift) / total
template <class W>
LT_INLINE void finish_weights(W* p, int64_t count, double shift, double total) {
  const W down = static_cast<W>(shift), factor = static_cast<W>(1 / total);
  for (int64_t j = 0; j < count; ++j) p[j] = exp_negative(p[j] + down) * factor;
}

// ---- noise ---------------------------------------------------------------------------------------------------------

LT_INLINE float twice_atanh(float s) {  // log((1 + s) / (1 - s)), |s| <= 1/3
  const float z = s * s;
  float y = 1.0f / 13 + z * (1.0f / 15);
  y = 1.0f / 11 + z * y;
  y = 1.0f / 9 + z * y;
  y = 1.0f / 7 + z * y;
  y = 1.0f / 5 + z * y;
  y = 1.0f / 3 + z * y;
  return 2 * s + 2 * s * z * y;
}

LT_INLINE float log_normal(float x) {  // log of a normal x > 0
  const int32_t bits = float_to_bits(x), exponent = (bits - 0x3f2aaaab) >> 23;  // mantissa in [2/3, 4/3)
  const float m = bits_to_float(bits - exponent * (1 << 23));
  return static_cast<float>(exponent) * 0.693147182f + twice_atanh((m - 1) / (m + 1));
}

// philox_gumbel of philox.h without branches: the two agree to 1e-5.
LT_INLINE float gumbel(uint32_t word) {
  const int32_t high = static_cast<int32_t>(word >> 8);
  const float u = (static_cast<float>(high) + 0.5f) * 0x1p-24f;
  const float rest = (static_cast<float>(0xFFFFFF - high) + 0.5f) * 0x1p-24f;
  const float near_one = twice_atanh(rest / (2 - rest)), below = -log_normal(u);
  return -log_normal(high < 0x800000 ? below : near_one);
}

// Gumbel numbers of columns first .. first + kNoiseBlock; first is a multiple of 4.
LT_INLINE void gumbel_block(uint64_t seed, uint64_t row, int64_t first, float* out) {
  constexpr int kGroups = kNoiseBlock / 4;
  uint32_t a[kGroups], b[kGroups], c[kGroups], e[kGroups];
  for (int i = 0; i < kGroups; ++i) {
    a[i] = static_cast<uint32_t>(first / 4 + i), b[i] = static_cast<uint32_t>(row);
    c[i] = static_cast<uint32_t>(row >> 32), e[i] = 0;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    for (int i = 0; i < kGroups; ++i) {
      const uint64_t p = uint64_t{0xD2511F53u} * a[i], q = uint64_t{0xCD9E8D57u} * c[i];
      a[i] = static_cast<uint32_t>(q >> 32) ^ b[i] ^ key0;
      c[i] = static_cast<uint32_t>(p >> 32) ^ e[i] ^ key1;
      b[i] = static_cast<uint32_t>(q), e[i] = static_cast<uint32_t>(p);
    }
  }
  uint32_t words[kNoiseBlock];
  for (int i = 0; i < kGroups; ++i) words[4 * i] = a[i], words[4 * i + 1] = b[i], words[4 * i + 2] = c[i], words[4 * i + 3] = e[i];
  for (int i = 0; i < kNoiseBlock; ++i) out[i] = gumbel(words[i]);
}

struct Best {
  double value = kNone;
  int64_t column = -1;
};

// The first of the largest perturbed logits of a chunk. The noise lies in (-2.9, 17.4): what is further below the largest logit
// than that cannot win, and blocks of such columns are passed over.
LT_INLINE Best draw(const double* logit, int64_t padded, double top, uint64_t seed, uint64_t row, int64_t first) {
  Best best;
  for (int64_t block = 0; block < padded; block += kNoiseBlock) {
    if (!(largest(logit + block, kNoiseBlock) >= top - 20.5) || top == kNone) continue;
    float noise[kNoiseBlock];
    double perturbed[kNoiseBlock];
    gumbel_block(seed, row, first + block, noise);
    for (int j = 0; j < kNoiseBlock; ++j) perturbed[j] = logit[block + j] + noise[j];
    const double value = largest(perturbed, kNoiseBlock);
    if (!(value > best.value)) continue;
    int64_t j = 0;
    while (perturbed[j] != value) ++j;
    best = {value, first + block + j};
  }
  return best;
}

// ---- weighted sums -------------------------------------------------------------------------------------------------

// c (Rows, Vectors * width) += a (depth, Rows) transposed times b (depth, Vectors * width)
template <class W, int Bytes, int Rows, int Vectors>
LT_INLINE void add_product(const W* a, const W* b, int64_t depth, W* c) {
  using V = typename VectorOf<W, Bytes>::type;
  constexpr int kWidth = Bytes / sizeof(W);
  V acc[Rows][Vectors] = {};
  for (int64_t i = 0; i < depth; ++i, a += Rows, b += Vectors * kWidth) {
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
    for (int v = 0; v < Vectors; ++v) *(V*)(c + (r * Vectors + v) * kWidth) += acc[r][v];
  }
}

// Widens `count` entries; false if one of them is NaN or inf.
template <class T>
LT_INLINE bool widen_finite(const T* row, int64_t count, Wide<T>* out) {
  int32_t broken = 0;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<Wide<T>>(row[i]);
    broken |= !(out[i] - out[i] == 0);
  }
  return broken == 0;
}

// ---- one table of functions an instruction set ---------------------------------------------------------------------

template <class T>
struct SelectOps {
  using W = Wide<T>;
  int64_t width;  // lanes of a vector
  int mix_rows, mix_cols;
  void (*squares)(const W* const* x, int rows, const W* const* clean, const W* scale, int64_t vectors, bool accumulate, W* sums);
  void (*add_lanes)(const W* sums, double* out);
  double (*make_logits)(const double* sqdist, const W* prior, int64_t count, int64_t padded, double std, double* logit);
  double (*make_weights)(const double* logit, int64_t padded, double top, W* shifted, W* weight);
  void (*finish_weights)(W* p, int64_t count, double shift, double total);
  Best (*draw)(const double* logit, int64_t padded, double top, uint64_t seed, uint64_t row, int64_t first);
  void (*add_product)(const W* a, const W* b, int64_t depth, W* c);
  bool (*widen_finite)(const T* row, int64_t count, W* out);
};

#define LT_SELECT_BODY(NAME, TARGET, BYTES, ROWS, VECTORS)                                                             \
  template <class T>                                                                                                   \
  struct NAME {                                                                                                        \
    using W = Wide<T>;                                                                                                 \
    static constexpr int kRows = ROWS, kWidth = BYTES / sizeof(W), kCols = VECTORS * kWidth;                           \
    static_assert(kRows <= kMaxMixRows && kCols <= kMaxMixCols);                                                       \
    TARGET static void squares(const W* const* x, int rows, const W* const* c, const W* s, int64_t n, bool more, W* o) { \
      isa::squares<W, BYTES>(x, rows, c, s, n, more, o);                                                               \
    }                                                                                                                  \
    TARGET static void add_lanes(const W* sums, double* out) { isa::add_lanes<W, BYTES>(sums, out); }                  \
    TARGET static double make_logits(const double* d, const W* prior, int64_t n, int64_t all, double std, double* logit) { \
      return isa::make_logits<W>(d, prior, n, all, std, logit);                                                        \
    }                                                                                                                  \
    TARGET static double make_weights(const double* logit, int64_t n, double top, W* shifted, W* weight) {             \
      return isa::make_weights<W>(logit, n, top, shifted, weight);                                                     \
    }                                                                                                                  \
    TARGET static void finish_weights(W* p, int64_t n, double shift, double total) {                                   \
      isa::finish_weights<W>(p, n, shift, total);                                                                      \
    }                                                                                                                  \
    TARGET static Best draw(const double* logit, int64_t n, double top, uint64_t seed, uint64_t row, int64_t first) {  \
      return isa::draw(logit, n, top, seed, row, first);                                                               \
    }                                                                                                                  \
    TARGET static void add_product(const W* a, const W* b, int64_t depth, W* c) {                                      \
      isa::add_product<W, BYTES, ROWS, VECTORS>(a, b, depth, c);                                                       \
    }                                                                                                                  \
    TARGET static bool widen_finite(const T* row, int64_t n, W* out) { return isa::widen_finite<T>(row, n, out); }     \
    static SelectOps<T> table() {                                                                                      \
      return {kWidth, kRows, kCols, squares, add_lanes, make_logits, make_weights, finish_weights, draw, add_product,  \
              widen_finite};                                                                                           \
    }                                                                                                                  \
  };

LT_SELECT_BODY(SelectBaseline, , 16, 4, 2)
#if LT_X86
LT_SELECT_BODY(SelectAvx2, LT_AVX2, 32, 4, 3)
LT_SELECT_BODY(SelectAvx512, LT_AVX512, 64, 12, 2)
#endif

template <class T>
SelectOps<T> select_ops(Level level) {
#if LT_X86
  if (level >= Level::kAvx512) return SelectAvx512<T>::table();
  if (level == Level::kAvx2) return SelectAvx2<T>::table();
#endif
  return SelectBaseline<T>::table();
}

}  // namespace ltkernels::isa
