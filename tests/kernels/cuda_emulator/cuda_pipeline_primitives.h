#pragma once
#include "cuda_runtime.h"

// Thread-private copies: carried out at once, or when the thread waits for them.
inline thread_local std::vector<std::vector<std::function<void()>>> emulated_copies;

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (!emulator::lazy) {
    std::memcpy(to, from, bytes);
    return;
  }
  emulated_copies.resize(emulator::block->fibers.size());
  emulated_copies[threadIdx.x].push_back([=] { std::memcpy(to, from, bytes); });
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {
  if (emulated_copies.size() <= threadIdx.x) return;
  for (auto& copy : emulated_copies[threadIdx.x]) copy();
  emulated_copies[threadIdx.x].clear();
}
