// Enough of CUDA to run this project's kernels on a CPU, for their arithmetic and their ordering - not for their speed.
//
// A block is an operating-system thread and its CUDA threads are fibers in it, so __shared__ variables are thread_local.
// A fiber runs until it meets a barrier: a missing __syncthreads shows as a wrong result when the order of fibers is
// turned around (emulator::reversed). Bulk copies happen either at once or as late as their barriers allow
// (emulator::lazy); a kernel must not notice.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static thread_local
#define __CUDA_ARCH__ 900

struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::isinf;
using std::max;
using std::min;

namespace emulator {

inline bool lazy = false, reversed = false;
constexpr size_t kStackBytes = 48 << 10;

struct Fiber {
  ucontext_t context;  // to enter it the first time
  jmp_buf resume;      // ever after: swapcontext would make a system call per switch
  std::unique_ptr<char[]> stack;
  unsigned thread;
  bool started = false, finished = false;
};

struct Cluster;

struct Block {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  Fiber* current = nullptr;
  unsigned index = 0, grid = 0, arrived = 0, generation = 0, cluster_arrived = 0, cluster_generation = 0;
  std::vector<std::array<float, 32>> lanes;              // what a warp exchanges
  std::vector<unsigned> warp_arrived, warp_generation;
  std::unique_ptr<char[]> dynamic;
  char* anchor = nullptr;
  Cluster* cluster = nullptr;
  std::vector<std::function<void()>> stores;             // bulk stores not yet carried out
};

struct Cluster {
  std::vector<Block*> blocks;
  std::unique_ptr<std::barrier<>> barrier;
};

inline thread_local Block* block = nullptr;
inline thread_local char anchor = 0;  // a __shared__ variable lies at the same distance from it in every block

inline void yield() {
  if (_setjmp(block->current->resume) == 0) _longjmp(block->scheduler, 1);
}

inline void enter(Fiber& fiber) {
  block->current = &fiber;
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

template <class Done>
void wait_until(Done done) {
  while (!done()) yield();
}

// The last of `count` fibers to arrive lets all of them go.
inline void meet(unsigned& arrived, unsigned& generation, unsigned count) {
  const unsigned mine = generation;
  if (++arrived == count) {
    arrived = 0;
    ++generation;
  } else {
    wait_until([&] { return generation != mine; });
  }
}

inline uint4* dynamic_shared() { return reinterpret_cast<uint4*>(block->dynamic.get()); }

inline std::function<void()>* entry = nullptr;
inline void fiber_main() {
  (*entry)();
  block->current->finished = true;
  _longjmp(block->scheduler, 1);
}

inline void run_block(Block& self, unsigned threads, size_t shared_bytes) {
  block = &self;
  self.anchor = &anchor;
  const size_t warps = threads / 32;
  self.lanes.resize(warps);
  self.warp_arrived.assign(warps, 0);
  self.warp_generation.assign(warps, 0);
  self.dynamic.reset(new (std::align_val_t(128)) char[shared_bytes + 128]);
  std::memset(self.dynamic.get(), 0xFF, shared_bytes + 128);  // NaN
  self.fibers = std::vector<Fiber>(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = self.fibers[t];
    fiber.thread = t;
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, fiber_main, 0);
  }
  if (self.cluster) self.cluster->barrier->arrive_and_wait();  // every block exists before any runs
  for (bool busy = true; busy;) {
    busy = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = self.fibers[reversed ? threads - 1 - i : i];
      if (fiber.finished) continue;
      busy = true;
      enter(fiber);
    }
  }
}

// Clusters run one after the other, the blocks of a cluster side by side.
inline void launch(unsigned grid, unsigned threads, unsigned cluster_size, size_t shared_bytes,
                   std::function<void()> kernel) {
  entry = &kernel;
  for (unsigned first = 0; first < grid; first += cluster_size) {
    Cluster cluster;
    cluster.barrier = std::make_unique<std::barrier<>>(cluster_size);
    std::vector<Block> blocks(cluster_size);
    for (Block& b : blocks) cluster.blocks.push_back(&b);
    std::vector<std::thread> workers;
    for (unsigned i = 0; i < cluster_size; ++i) {
      blocks[i].index = first + i;
      blocks[i].grid = grid;
      blocks[i].cluster = &cluster;
      workers.emplace_back([&, i] { run_block(blocks[i], threads, shared_bytes); });
    }
    for (std::thread& worker : workers) worker.join();
  }
}

inline uint3 thread_index() { return {block->current->thread, 0, 0}; }
inline uint3 block_index() { return {block->index, 0, 0}; }
inline uint3 block_size() { return {static_cast<unsigned>(block->fibers.size()), 1, 1}; }
inline uint3 grid_size() { return {block->grid, 1, 1}; }

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())

inline void __syncthreads() {
  emulator::Block& b = *emulator::block;
  emulator::meet(b.arrived, b.generation, b.fibers.size());
}

inline float __shfl_xor_sync(unsigned, float value, unsigned offset) {
  emulator::Block& b = *emulator::block;
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  b.lanes[warp][lane] = value;
  emulator::meet(b.warp_arrived[warp], b.warp_generation[warp], 32);
  const float result = b.lanes[warp][lane ^ offset];
  emulator::meet(b.warp_arrived[warp], b.warp_generation[warp], 32);
  return result;
}

inline float __int_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
void __stcs(T* p, T value) { *p = value; }
