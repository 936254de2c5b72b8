// Memory of the CPU kernels.
#pragma once
#include <cstddef>
#include <new>
#include <utility>
#include <vector>

namespace ltkernels {

template <class T>
struct CacheLines {  // allocator: a vector register loaded from a packed panel must not straddle two lines; no zeros that nobody reads
  using value_type = T;
  CacheLines() = default;
  template <class U>
  CacheLines(const CacheLines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  void construct(T* p) { ::new (static_cast<void*>(p)) T; }
  template <class... Args>
  void construct(T* p, Args&&... args) {
    ::new (static_cast<void*>(p)) T(std::forward<Args>(args)...);
  }
  bool operator==(const CacheLines&) const { return true; }
};
template <class T>
using AlignedVector = std::vector<T, CacheLines<T>>;

}  // namespace ltkernels
