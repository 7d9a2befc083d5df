// Stands in for csrc/cuda/bulk_copy.cuh. A barrier word: bit 0 its phase, the rest the bytes still expected.
#pragma once
#include <deque>
#include <map>

#include "cuda_runtime.h"

namespace igrpo::cuda {

inline thread_local std::map<uint64_t*, std::deque<std::function<void()>>> pending_loads;

inline void barrier_init(uint64_t* barrier) { *barrier = 0; }
inline void barrier_init_fence() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  if (bytes == 0) {
    *barrier ^= 1;
  } else {
    *barrier += static_cast<uint64_t>(bytes) << 1;
  }
}
inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) std::abort();
  const auto copy = [=] {
    std::memcpy(shared, global, bytes);
    *barrier -= static_cast<uint64_t>(bytes) << 1;
    if (*barrier >> 1 == 0) *barrier ^= 1;
  };
  if (emulator::lazy) {
    pending_loads[barrier].push_back(copy);
  } else {
    copy();
  }
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  emulator::wait_until([&] {
    auto& loads = pending_loads[barrier];
    while (!loads.empty()) {
      loads.front()();
      loads.pop_front();
    }
    return (*barrier & 1) != parity;
  });
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) std::abort();
  const auto copy = [=] { std::memcpy(global, shared, bytes); };
  if (emulator::lazy) {
    emulator::block->stores.push_back(copy);
  } else {
    copy();
  }
}
inline void bulk_stores_done() {
  for (auto& copy : emulator::block->stores) copy();
  emulator::block->stores.clear();
}
inline void bulk_stores_read() { bulk_stores_done(); }
inline void fence_for_bulk_copies() {}

}  // namespace igrpo::cuda
