// Rows of a bank that stays in a file: what the system should read of it.
#pragma once

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#include <unistd.h>
#define LT_MADVISE 1
#else
#define LT_MADVISE 0
#endif

#include <cstdint>

namespace ltkernels {

// While it exists, rows are read here and there. Otherwise the system reads megabytes around each of them, of which a memory that cannot
// hold the file keeps nothing. `bytes` 0: nothing is told.
class ScatteredReads {
 public:
  ScatteredReads(const void* begin, int64_t bytes) : begin_(reinterpret_cast<uintptr_t>(begin)), bytes_(bytes) {
#if LT_MADVISE
    tell(begin_, bytes_, MADV_RANDOM);
#endif
  }
  ~ScatteredReads() {
#if LT_MADVISE
    tell(begin_, bytes_, MADV_NORMAL);
#endif
  }
  ScatteredReads(const ScatteredReads&) = delete;
  ScatteredReads& operator=(const ScatteredReads&) = delete;

  void fetch(const void* row, int64_t bytes) const {  // and go on: the rows of a query come together
#if LT_MADVISE
    if (bytes_ > 0) tell(reinterpret_cast<uintptr_t>(row), bytes, MADV_WILLNEED);
#endif
  }

 private:
#if LT_MADVISE
  static void tell(uintptr_t begin, int64_t bytes, int advice) {
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    const uintptr_t first = begin / page * page;
    if (bytes > 0) madvise(reinterpret_cast<void*>(first), begin + bytes - first, advice);  // advice: nothing depends on its success
  }
#endif

  const uintptr_t begin_;
  const int64_t bytes_;
};

}  // namespace ltkernels
