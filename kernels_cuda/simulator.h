// The kernels of this folder on a CPU, for tests: g++ -DQT_HOST -include simulator.h kernel.cu.
//
// Every CUDA thread is a fiber of its own stack, and the blocks of a launch run one after another. What a warp does together
// waits until all 32 lanes have put down pointers to their registers; the last one computes for all. A schedule chooses what
// hardware leaves open:
//     copies   eager: cp.async copies at once; late: not before the wait for it; mixed: each by chance
//     warps    lockstep: all threads go on in turns; run-ahead: one warp by chance goes as far as it can while others stand still
// Eager copies under run-ahead show a missing barrier before shared memory is written again, late ones a missing wait. Shared
// memory begins as NaN and ends at a page that nothing may touch; the caller gives tensors that end at such pages too.
// What it cannot show: speed, bank conflicts, the order in which other blocks see writes, the hardware's rounding of sums.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#define QT_DEVICE inline
#define QT_KERNEL static
#define QT_BOUNDS(threads, blocks)
#define QT_SHARED(type, name) type* name = reinterpret_cast<type*>(simulator::shared)
#define threadIdx (simulator::current->index)
#define blockIdx simulator::block
#define blockDim simulator::block_size
#define gridDim simulator::grid_size
#define __restrict__
struct uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct float2 { float x, y; };

// Saves the six registers that a function keeps, changes stacks and goes on where the other one stood.
extern "C" void simulator_switch(void** save, void* to);
asm(".text\n.globl simulator_switch\nsimulator_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");

namespace simulator {
struct Dim { unsigned x, y, z; };
struct Copy { void* to; const void* from; int bytes; };  // of 16: the rest becomes zeros
struct Warp {
  void* slot[32][4];
  uint64_t value[32];
  int arrived = 0;
  unsigned generation = 0;
};
struct Fiber {
  void* stack;
  Dim index;
  int lane;
  Warp* warp;
  bool done;
  std::vector<Copy> open;                 // copies since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, not waited for
  const char* at = "the start";
};

constexpr size_t STACK = 128 << 10, PAGE = 4096, MAX_THREADS = 1024, MAX_SHARED = 256 << 10;
enum Copies { LATE, EAGER, MIXED };
inline Fiber* current = nullptr;
inline Dim block, block_size, grid_size;
inline unsigned char* shared = nullptr;
inline void* main_stack;
inline std::function<void()>* body = nullptr;
inline int waiting = 0, alive = 0, copies = LATE;
inline unsigned barrier = 0;
inline std::mt19937 chance;
inline sigjmp_buf failure;
inline char message[256];

[[noreturn]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  siglongjmp(failure, 1);
}

inline void on_fault(int, siginfo_t* info, void*) {
  fail("block %u,%u thread %u: touches memory that is not its own, at %p", block.x, block.y, current ? current->index.x : 0,
       info->si_addr);
}

inline void pause() { simulator_switch(&current->stack, main_stack); }

inline void sync_block() {
  current->at = "__syncthreads";
  unsigned before = barrier;
  if (++waiting == alive) {
    waiting = 0;
    barrier++;
    return;
  }
  while (barrier == before) pause();
}

// Runs `together` once all lanes of the warp are here.
template <class F> inline void with_warp(const char* what, F&& together) {
  Warp* warp = current->warp;
  unsigned before = warp->generation;
  current->at = what;
  if (++warp->arrived == 32) {
    together(*warp);
    warp->arrived = 0;
    warp->generation++;
    return;
  }
  while (warp->generation == before) pause();
}

inline void perform(const Copy& copy) {
  if (copy.bytes) memcpy(copy.to, copy.from, copy.bytes);
  memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
}

inline void enter() {
  (*body)();
  if (!current->groups.empty() || !current->open.empty()) current->at = "the end, with copies never waited for";
  current->done = true;
  alive--;
  for (;;) pause();
}

inline void step(Fiber& fiber) {
  if (fiber.done) return;
  current = &fiber;
  simulator_switch(&main_stack, fiber.stack);
}

// 0, or 1 with `message`.
inline int launch(Dim grid, unsigned threads, size_t shared_bytes, int copy_mode, bool run_ahead, unsigned seed,
                  std::function<void()> kernel) {
  static char* stacks = static_cast<char*>(
      mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  static unsigned char* shared_area = [] {
    auto* area = static_cast<unsigned char*>(
        mmap(nullptr, MAX_SHARED + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(area + MAX_SHARED, PAGE, PROT_NONE);
    return area;
  }();
  static std::vector<Fiber> fibers(MAX_THREADS);
  static std::vector<Warp> warps(MAX_THREADS / 32);
  static char signal_stack[64 << 10];
  stack_t alternative{signal_stack, 0, sizeof signal_stack};
  sigaltstack(&alternative, nullptr);
  struct sigaction action{}, before_segv, before_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &before_segv);
  sigaction(SIGBUS, &action, &before_bus);

  chance.seed(seed);
  std::mt19937 turns(seed + 1);
  copies = copy_mode;
  body = &kernel;
  grid_size = grid;
  block_size = {threads, 1, 1};
  shared_bytes = (shared_bytes + 15) & ~size_t(15);
  shared = shared_area + MAX_SHARED - shared_bytes;
  message[0] = 0;
  int result = sigsetjmp(failure, 1);
  if (!result) {
    std::vector<unsigned> blocks(grid.x * grid.y * grid.z), order(threads);
    for (unsigned i = 0; i < blocks.size(); i++) blocks[i] = i;
    for (unsigned i = 0; i < threads; i++) order[i] = i;
    if (run_ahead) std::shuffle(blocks.begin(), blocks.end(), turns);
    for (unsigned number : blocks) {
      block = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
      memset(shared, 0xFF, shared_bytes);
      waiting = 0;
      alive = threads;
      for (unsigned i = 0; i < threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.done = false;
        fiber.open.clear();
        fiber.groups.clear();
        fiber.index = {i, 0, 0};
        fiber.lane = i & 31;
        fiber.warp = &warps[i >> 5];
        fiber.warp->arrived = 0;
        void** top = reinterpret_cast<void**>(stacks + STACK * (i + 1));
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(enter);
        for (int r = 0; r < 6; r++) *--top = nullptr;
        fiber.stack = top;
      }
      int idle = 0;
      while (alive) {
        auto progress = [&] {
          uint64_t sum = barrier + uint64_t(waiting) * 7919 - uint64_t(alive) * 104729;
          for (unsigned w = 0; w < threads / 32; w++) sum += uint64_t(warps[w].generation) * 64 + warps[w].arrived;
          return sum;
        };
        uint64_t before = progress();
        if (run_ahead) {
          std::shuffle(order.begin(), order.end(), turns);
          unsigned chosen = turns() % (threads / 32);
          for (uint64_t last = ~before; last != progress();) {
            last = progress();
            for (unsigned i : order)
              if (i / 32 == chosen) step(fibers[i]);
          }
        } else {
          for (unsigned i = 0; i < threads; i++) step(fibers[i]);
        }
        idle = progress() == before ? idle + 1 : 0;
        if (idle > 300) {
          const Fiber* stuck = &fibers[0];
          for (unsigned i = 0; i < threads; i++)
            if (!fibers[i].done) stuck = &fibers[i];
          fail("block %u,%u: nothing moves; thread %u waits at %s", block.x, block.y, stuck->index.x, stuck->at);
        }
      }
    }
  }
  sigaction(SIGSEGV, &before_segv, nullptr);
  sigaction(SIGBUS, &before_bus, nullptr);
  current = nullptr;
  return result;
}

// Calls a kernel with pointers to its arguments, as a launch on a GPU gives them.
template <class... A, size_t... I> void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::decay_t<A>*>(arguments[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<A...>());
}

inline float half_to_float(uint16_t bits) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return value;
}
inline uint16_t float_to_half(float value) {
  _Float16 half = value;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline float bfloat_to_float(uint16_t bits) {
  uint32_t word = uint32_t(bits) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
inline uint16_t float_to_bfloat(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return value != value ? 0x7FFF : (word + 0x7FFF + (word >> 16 & 1)) >> 16;
}
inline void must_align(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail("%s at %p, which is no multiple of %zu", what, pointer, bytes);
}
}  // namespace simulator

#define __syncthreads() simulator::sync_block()

// The twins of ptx.cuh.
namespace ptx {
template <class V> inline V load(const void* from) {
  simulator::must_align(from, sizeof(V), "a load");
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}
inline uint4 load_once(const void* from) { return load<uint4>(from); }
inline uint2 load_once8(const void* from) { return load<uint2>(from); }
inline uint4 load16(const void* from) { return load<uint4>(from); }
inline uint2 load8(const void* from) { return load<uint2>(from); }
inline uint32_t load4(const void* from) { return load<uint32_t>(from); }
template <class V> inline V load_fresh(const V* from) { return load<V>(from); }

inline void copy16(void* to, const void* from, bool valid) {
  simulator::must_align(to, 16, "cp.async to");
  if (valid) simulator::must_align(from, 16, "cp.async from");
  simulator::Copy copy{to, from, valid ? 16 : 0};
  bool now = simulator::copies == simulator::EAGER || (simulator::copies == simulator::MIXED && (simulator::chance() & 1));
  if (now) simulator::perform(copy);
  else simulator::current->open.push_back(copy);
}
inline void commit() {
  simulator::current->groups.push_back(std::move(simulator::current->open));
  simulator::current->open.clear();
}
template <int N> inline void wait() {
  auto& groups = simulator::current->groups;
  while (groups.size() > N) {
    for (const auto& copy : groups.front()) simulator::perform(copy);
    groups.erase(groups.begin());
  }
}

template <int TABLE> inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (TABLE >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t nibble = selector >> 4 * i & 15;
    uint32_t byte = bytes >> 8 * (nibble & 7) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline float half_to_float(uint32_t bits) { return simulator::half_to_float(bits); }
inline uint32_t half_pair(float low, float high) {
  return uint32_t(simulator::float_to_half(high)) << 16 | simulator::float_to_half(low);
}
inline uint32_t bfloat_pair(float low, float high) {
  return uint32_t(simulator::float_to_bfloat(high)) << 16 | simulator::float_to_bfloat(low);
}
inline uint32_t half_fma(uint32_t a, uint32_t b, uint32_t c) {
  using simulator::half_to_float;
  return half_pair(std::fma(half_to_float(a), half_to_float(b), half_to_float(c)),
                   std::fma(half_to_float(a >> 16), half_to_float(b >> 16), half_to_float(c >> 16)));
}
inline uint32_t bfloat_fma(uint32_t a, uint32_t b, uint32_t c) {
  using simulator::bfloat_to_float;
  return bfloat_pair(std::fma(bfloat_to_float(a), bfloat_to_float(b), bfloat_to_float(c)),
                     std::fma(bfloat_to_float(a >> 16), bfloat_to_float(b >> 16), bfloat_to_float(c >> 16)));
}

template <float (*CONVERT)(uint16_t)>
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  void** slot = simulator::current->warp->slot[simulator::current->lane];
  slot[0] = c;
  slot[1] = const_cast<uint32_t*>(a);
  slot[2] = const_cast<uint32_t*>(b);
  simulator::with_warp("mma", [](simulator::Warp& warp) {
    static float A[16][16], B[16][8];
    for (int lane = 0; lane < 32; lane++) {
      int g = lane / 4, t = lane % 4;
      auto* a = static_cast<uint32_t*>(warp.slot[lane][1]);
      auto* b = static_cast<uint32_t*>(warp.slot[lane][2]);
      for (int e = 0; e < 2; e++) {
        for (int r = 0; r < 4; r++) A[g + 8 * (r & 1)][2 * t + 8 * (r >> 1) + e] = CONVERT(a[r] >> 16 * e);
        for (int r = 0; r < 2; r++) B[2 * t + 8 * r + e][g] = CONVERT(b[r] >> 16 * e);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      int g = lane / 4, t = lane % 4;
      auto* c = static_cast<float*>(warp.slot[lane][0]);
      for (int r = 0; r < 4; r++) {
        float sum = c[r];
        for (int k = 0; k < 16; k++) sum += A[g + 8 * (r >> 1)][k] * B[k][2 * t + (r & 1)];
        c[r] = sum;
      }
    }
  });
}
inline void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma<simulator::half_to_float>(c, a, b); }
inline void mma_bfloat(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<simulator::bfloat_to_float>(c, a, b);
}
inline void mma_int8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  void** slot = simulator::current->warp->slot[simulator::current->lane];
  slot[0] = c;
  slot[1] = const_cast<uint32_t*>(a);
  slot[2] = const_cast<uint32_t*>(b);
  simulator::with_warp("mma", [](simulator::Warp& warp) {
    static int A[16][32], B[32][8];
    for (int lane = 0; lane < 32; lane++) {
      int g = lane / 4, t = lane % 4;
      auto* a = static_cast<uint32_t*>(warp.slot[lane][1]);
      auto* b = static_cast<uint32_t*>(warp.slot[lane][2]);
      for (int e = 0; e < 4; e++) {
        for (int r = 0; r < 4; r++) A[g + 8 * (r & 1)][4 * t + 16 * (r >> 1) + e] = int8_t(a[r] >> 8 * e);
        for (int r = 0; r < 2; r++) B[4 * t + 16 * r + e][g] = int8_t(b[r] >> 8 * e);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      int g = lane / 4, t = lane % 4;
      auto* c = static_cast<int*>(warp.slot[lane][0]);
      for (int r = 0; r < 4; r++)
        for (int k = 0; k < 32; k++) c[r] += A[g + 8 * (r >> 1)][k] * B[k][2 * t + (r & 1)];
    }
  });
}

inline float shuffle_xor(float value, int mask) {
  auto* fiber = simulator::current;
  float result = value;
  fiber->warp->slot[fiber->lane][0] = &result;
  fiber->warp->value[fiber->lane] = float_to_bits(value);
  simulator::with_warp("shfl", [mask](simulator::Warp& warp) {
    for (int lane = 0; lane < 32; lane++) *static_cast<float*>(warp.slot[lane][0]) = bits_to_float(warp.value[lane ^ mask]);
    for (int lane = 0; lane < 32; lane++) warp.slot[lane][0] = nullptr;
  });
  return result;
}

inline void fence() {}
inline int count_up(int* counter) { return (*counter)++; }
}  // namespace ptx
