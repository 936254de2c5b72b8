// Every inline-PTX wrapper, next to its host twin. Pointers are generic. Each asm that moves or orders memory is
// volatile with a "memory" clobber, so that the compiler cannot carry a shared-memory access across it.
#pragma once

namespace ptx {

#ifdef __CUDACC__

// Copies Bytes (4, 8, 16; both pointers aligned to it) from global to shared memory, or writes zeros when !valid.
// Cached: keep the line in L1, for data that this block reads again.
template <int Bytes, bool Cached = false>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid) {
  const uint32_t dst = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint64_t src = __cvta_generic_to_global(global);
  const int size = valid ? Bytes : 0;
  if constexpr (Bytes == 16 && !Cached) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;"
                 ::"r"(dst), "l"(src), "r"(size), "n"(Bytes) : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most Pending of this thread's committed groups are in flight; other threads need a barrier on top.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// c (16x8, fp32) += a (16x8, tf32) b (8x8, tf32). With g = lane / 4, t = lane % 4, a lane holds
// a (g, t) (g+8, t) (g, t+4) (g+8, t+4), b (t, g) (t+4, g), c (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1).
// The low 13 bits of a and b are ignored.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

template <int Bytes, bool Cached = false>
inline void cp_async(void* shared, const void* global, bool valid, SIMT_HERE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::detail::copy_issue(shared, global, Bytes, valid, where);
}

inline void cp_async_commit() { simt::detail::copy_commit(); }

template <int Pending>
inline void cp_async_wait() { simt::detail::copy_wait(Pending); }

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_HERE) {
  struct Lane { float* c; const uint32_t *a, *b; } self{c, a, b};
  const auto multiply = [](void* const* lanes, unsigned) {
    const auto lane = [&](int i) -> Lane& { return *static_cast<Lane*>(lanes[i]); };
    const auto tf32 = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
    float a[16][8], b[8][8];
    for (int i = 0; i < 32; ++i) {
      const int g = i / 4, t = i % 4;
      for (int e = 0; e < 4; ++e) a[g + 8 * (e & 1)][t + 4 * (e >> 1)] = tf32(lane(i).a[e]);
      for (int e = 0; e < 2; ++e) b[t + 4 * e][g] = tf32(lane(i).b[e]);
    }
    for (int i = 0; i < 32; ++i) {
      for (int e = 0; e < 4; ++e) {
        const int row = i / 4 + 8 * (e >> 1), col = 2 * (i % 4) + (e & 1);
        float sum = lane(i).c[e];
        for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][col];
        lane(i).c[e] = sum;
      }
    }
  };
  simt::detail::collective(0xffffffffu, &self, +multiply, "mma_tf32", where);
}

#endif

}  // namespace ptx
