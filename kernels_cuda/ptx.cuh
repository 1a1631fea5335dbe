// Every instruction that C++ has no word for. On a CPU simulator.h holds a twin of each under the same name.
#pragma once
#ifndef QT_HOST
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
#define QT_DEVICE __device__ __forceinline__
#define QT_KERNEL __global__
#define QT_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define QT_SHARED(type, name)                                        \
  extern __shared__ __align__(16) unsigned char qt_shared_memory[]; \
  type* name = reinterpret_cast<type*>(qt_shared_memory)

namespace ptx {
// Weights: read once, past L1.
QT_DEVICE uint4 load_once(const void* from) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3},[%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
QT_DEVICE uint2 load_once8(const void* from) {
  uint2 v;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
// What many threads read.
QT_DEVICE uint4 load16(const void* from) {
  uint4 v;
  asm("ld.global.nc.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
QT_DEVICE uint2 load8(const void* from) {
  uint2 v;
  asm("ld.global.nc.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}
QT_DEVICE uint32_t load4(const void* from) {
  uint32_t v;
  asm("ld.global.nc.u32 %0,[%1];" : "=r"(v) : "l"(from));
  return v;
}
// What other blocks wrote.
QT_DEVICE float load_fresh(const float* from) {
  float v;
  asm volatile("ld.global.cg.f32 %0,[%1];" : "=f"(v) : "l"(from) : "memory");
  return v;
}
QT_DEVICE int load_fresh(const int* from) {
  int v;
  asm volatile("ld.global.cg.s32 %0,[%1];" : "=r"(v) : "l"(from) : "memory");
  return v;
}

// 16 bytes to shared memory, zeros where not valid; they are there after wait<N>, N later commits aside, and a barrier.
QT_DEVICE void copy16(void* to, const void* from, bool valid) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}
QT_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> QT_DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// TABLE is f(0xF0, 0xCC, 0xAA) of the wanted f(a, b, c).
template <int TABLE> QT_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("lop3.b32 %0,%1,%2,%3,%4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return r;
}
QT_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
QT_DEVICE float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
QT_DEVICE uint32_t float_to_bits(float value) { return __float_as_uint(value); }
QT_DEVICE float half_to_float(uint32_t bits) {  // of the lower half
  float r;
  asm("{.reg .b16 h, x; mov.b32 {h, x}, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(bits));
  return r;
}
QT_DEVICE uint32_t half_pair(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
QT_DEVICE uint32_t bfloat_pair(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
QT_DEVICE uint32_t half_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
QT_DEVICE uint32_t bfloat_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

// C [16, 8] += A [16, 16] B [16, 8], float32 sums; lane 4 g + t holds of C rows g (c0, c1) and g + 8, columns 2 t, 2 t + 1.
QT_DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
QT_DEVICE void mma_bfloat(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same of int8, k 32, whole sums.
QT_DEVICE void mma_int8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
QT_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

QT_DEVICE void fence() { __threadfence(); }
QT_DEVICE int count_up(int* counter) { return atomicAdd(counter, 1); }  // the count before
}  // namespace ptx
#endif
