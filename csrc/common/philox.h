// The one random number generator of all backends: Philox4x32-10 (Salmon et al., 2011), counter based, so a number depends on
// where it is used and not on who draws it or when.
#pragma once
#include <cmath>
#include <cstdint>

#ifndef LT_PHILOX  // kernels define it with the attributes of device code
#define LT_PHILOX inline
#endif

namespace ltkernels {

struct Philox4 {
  uint32_t word[4];
};

// Words of columns 4 * (column / 4) .. + 3 of a row: key = seed, counter = (column / 4, row low, row high, 0).
LT_PHILOX Philox4 philox(uint64_t seed, uint64_t row, uint32_t column_group) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  Philox4 c{{column_group, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0}};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c.word[0], b = uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(a)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c;
}

// -log(-log u) for u = ((word >> 8) + .5) 2^-24. Above 1/2 float has no room for the .5: a word of ones would round to u = 1 and an
// infinite Gumbel number; 1 - u is exact there.
LT_PHILOX float philox_gumbel(uint32_t word) {
  const uint32_t high = word >> 8;
  const float u = (static_cast<float>(high) + 0.5f) * 0x1p-24f;
  const float rest = (static_cast<float>(0xFFFFFFu - high) + 0.5f) * 0x1p-24f;
  return -logf(high < 0x800000u ? -logf(u) : -log1pf(-rest));
}

}  // namespace ltkernels
