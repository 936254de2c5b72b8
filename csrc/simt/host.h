// What a kernel sees of CUDA when a host compiler builds it: qualifiers, builtins, warp collectives, atomics, fast-math
// names. CUDA's own headers supply vectors, half types and error codes; runtime.cpp supplies the threads.
#pragma once

// That header would declare threadIdx and friends as extern const, which a compiler may cache over a fiber switch.
#define __DEVICE_LAUNCH_PARAMETERS_H__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>

#undef __shared__  // CUDA's header makes it nothing for host compilers: each thread would silently get its own copy
#define __shared__ static_assert(false, "shared memory is declared by SIMT_SMEM_STATIC or SIMT_SMEM_DYNAMIC");
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace simt {

struct Site { const char* file; int line; };
// As last parameter: the call site, for reports and for telling two barriers apart.
#define SIMT_HERE ::simt::Site where = {__builtin_FILE(), __builtin_LINE()}

enum Order : int { kForward, kReverse, kRandom };  // in which warps and lanes take their turns; blocks from either end
struct Options {
  Order order = kForward;
  uint64_t seed = 0;
  // Takes the launches in place of the fibers: mangled name, grid and block (x, y, z each), where each parameter lies.
  int (*executor)(const char* kernel, const unsigned* grid_block, size_t smem, void* const* params) = nullptr;
};
extern Options options;

namespace detail {

[[noreturn]] void fail(const std::string& message);  // from inside a kernel: ends the launch
void* shared_static(size_t bytes, size_t alignment, Site where);
void* shared_dynamic(size_t bytes);
void copy_issue(void* shared, const void* global, int bytes, bool valid, Site where);
void copy_commit();
void copy_wait(int pending);
void preempt();  // lets another thread go first, if the order is random and the dice say so
void fence();
int atomic_order();  // relaxed, and acq_rel after a __threadfence: what ThreadSanitizer goes by

// Every lane of mask brings one value; the last to arrive runs combine over all of them (null outside mask). A null
// combine is a barrier of the lanes; other collectives order no memory.
using Combine = void (*)(void* const* lanes, unsigned mask);
void collective(unsigned mask, void* value, Combine combine, const char* name, Site where);
int barrier(int predicate, int (*fold)(int, int), const char* name, Site where);

cudaError_t run(const void* kernel, void* const* params, dim3 grid, dim3 block, size_t smem, void (*thread)(void*),
                void* context);

// Source()(lane, n): the lane that `lane` reads, itself where CUDA says so.
template <class Source, class T>
T shuffle(unsigned mask, T value, int n, const char* name, Site where) {
  struct Lane { T in, out; int n; } self{value, value, n};
  const auto exchange = [](void* const* lanes, unsigned mask) {
    for (int i = 0; i < 32; ++i) {
      if (!(mask >> i & 1)) continue;
      Lane& lane = *static_cast<Lane*>(lanes[i]);
      const int source = Source()(i, lane.n);
      if (!(mask >> source & 1)) fail("shuffle: lane " + std::to_string(i) + " reads a lane outside the mask");
      lane.out = static_cast<Lane*>(lanes[source])->in;
    }
  };
  collective(mask, &self, +exchange, name, where);
  return self.out;
}

template <class Fold, class T>
T reduce(unsigned mask, T value, const char* name, Site where) {
  const auto fold = [](void* const* lanes, unsigned mask) {
    const int first = __builtin_ctz(mask);
    T total = *static_cast<T*>(lanes[first]);
    for (int i = first + 1; i < 32; ++i) if (mask >> i & 1) total = Fold()(total, *static_cast<T*>(lanes[i]));
    for (int i = first; i < 32; ++i) if (mask >> i & 1) *static_cast<T*>(lanes[i]) = total;
  };
  collective(mask, &value, +fold, name, where);
  return value;
}

struct Index { int operator()(int, int n) const { return n & 31; } };
struct Up { int operator()(int lane, int n) const { return lane < n ? lane : lane - n; } };
struct Down { int operator()(int lane, int n) const { return lane + n > 31 ? lane : lane + n; } };
struct Xor { int operator()(int lane, int n) const { return (lane ^ n) & 31; } };
struct Min { template <class T> T operator()(T a, T b) const { return a < b ? a : b; } };
struct Max { template <class T> T operator()(T a, T b) const { return a < b ? b : a; } };
struct Second { template <class T> T operator()(T, T b) const { return b; } };

// One OS thread runs all fibers, so the builtins are here for ThreadSanitizer; a random order shuffles the arrivals.
template <class Next, class T>
T atomic(T* address, T value) {
  preempt();
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do after = Next()(before, value);
  while (!__atomic_compare_exchange(address, &before, &after, false, atomic_order(), __ATOMIC_RELAXED));
  return before;
}

}  // namespace detail

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem, cudaStream_t, Args... args) {
  static_assert((std::is_trivially_copyable_v<Params> && ...), "kernel parameters are copied as bytes");
  struct Call { void (*kernel)(Params...); std::tuple<Params...> params; } call{kernel, {Params(args)...}};
  const auto thread = [](void* context) {
    Call& call = *static_cast<Call*>(context);
    std::apply(call.kernel, call.params);
  };
  const auto run = [&](Params&... params) {
    void* const addresses[] = {&params..., nullptr};
    return detail::run(reinterpret_cast<const void*>(kernel), addresses, grid, block, smem, +thread, &call);
  };
  return std::apply(run, call.params);
}

}  // namespace simt

#define SIMT_SMEM_STATIC(T, name) \
  T& name = *static_cast<T*>(::simt::detail::shared_static(sizeof(T), alignof(T), {__FILE__, __LINE__}))
#define SIMT_SMEM_DYNAMIC(T, name) T& name = *static_cast<T*>(::simt::detail::shared_dynamic(sizeof(T)))

// Barriers, warp collectives, atomics ---------------------------------------------------------------------------------
inline void __syncthreads(SIMT_HERE) { simt::detail::barrier(0, nullptr, "__syncthreads", where); }
#define SIMT_BARRIER(name, op) \
  inline int name(int p, SIMT_HERE) {    \
    return simt::detail::barrier(!!p, [](int a, int b) { return a op b; }, #name, where); \
  }
SIMT_BARRIER(__syncthreads_or, |) SIMT_BARRIER(__syncthreads_and, &) SIMT_BARRIER(__syncthreads_count, +)

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) {
  simt::detail::collective(mask, nullptr, nullptr, "__syncwarp", where);
}
#define SIMT_SHUFFLE(name, Source) /* without CUDA's width: a mask and an index say the same */ \
  template <class T> T name(unsigned mask, T v, int n, SIMT_HERE) {                         \
    return simt::detail::shuffle<simt::detail::Source>(mask, v, n, #name, where);             \
  }
SIMT_SHUFFLE(__shfl_sync, Index) SIMT_SHUFFLE(__shfl_up_sync, Up)
SIMT_SHUFFLE(__shfl_down_sync, Down) SIMT_SHUFFLE(__shfl_xor_sync, Xor)
#define SIMT_REDUCE(name, T, Fold) \
  inline T name(unsigned mask, T v, SIMT_HERE) { return simt::detail::reduce<Fold>(mask, v, #name, where); }
SIMT_REDUCE(__reduce_add_sync, unsigned, std::plus<>) SIMT_REDUCE(__reduce_add_sync, int, std::plus<>)
SIMT_REDUCE(__reduce_min_sync, unsigned, simt::detail::Min) SIMT_REDUCE(__reduce_min_sync, int, simt::detail::Min)
SIMT_REDUCE(__reduce_max_sync, unsigned, simt::detail::Max) SIMT_REDUCE(__reduce_max_sync, int, simt::detail::Max)
SIMT_REDUCE(__reduce_or_sync, unsigned, std::bit_or<>) SIMT_REDUCE(__reduce_and_sync, unsigned, std::bit_and<>)
SIMT_REDUCE(__any_sync, int, std::logical_or<>) SIMT_REDUCE(__all_sync, int, std::logical_and<>)
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_HERE) {
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  return simt::detail::reduce<std::bit_or<>>(mask, p ? 1u << thread % 32 : 0u, "__ballot_sync", where);
}

#define SIMT_ATOMIC(name, Next) \
  template <class T> T name(T* p, std::type_identity_t<T> v) { return simt::detail::atomic<Next>(p, v); }
SIMT_ATOMIC(atomicAdd, std::plus<>) SIMT_ATOMIC(atomicExch, simt::detail::Second)
SIMT_ATOMIC(atomicMin, simt::detail::Min) SIMT_ATOMIC(atomicMax, simt::detail::Max)
SIMT_ATOMIC(atomicOr, std::bit_or<>) SIMT_ATOMIC(atomicAnd, std::bit_and<>)
inline void __threadfence() { simt::detail::fence(); }

// Bits and arithmetic -------------------------------------------------------------------------------------------------
inline unsigned __float_as_uint(float v) { return std::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return std::bit_cast<float>(v); }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(static_cast<unsigned>(v)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
template <class T> T __ldg(const T* p) { return *p; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
#define __expf(v) std::exp(static_cast<float>(v))  // glibc declares functions of these names
#define __logf(v) std::log(static_cast<float>(v))
using std::max;
using std::min;
