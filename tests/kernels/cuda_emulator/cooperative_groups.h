#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  unsigned block_rank() const {
    const auto& blocks = emulator::block->cluster->blocks;
    return std::find(blocks.begin(), blocks.end(), emulator::block) - blocks.begin();
  }
  unsigned num_blocks() const { return emulator::block->cluster->blocks.size(); }
  // All fibers of the block first; the last of them meets the other blocks.
  void sync() const {
    emulator::Block& b = *emulator::block;
    const unsigned mine = b.cluster_generation;
    if (++b.cluster_arrived == b.fibers.size()) {
      b.cluster->barrier->arrive_and_wait();
      b.cluster_arrived = 0;
      ++b.cluster_generation;
    } else {
      emulator::wait_until([&] { return b.cluster_generation != mine; });
    }
  }
  template <class T>
  T* map_shared_rank(T* p, unsigned rank) const {
    emulator::Block& peer = *emulator::block->cluster->blocks[rank];
    return reinterpret_cast<T*>(peer.anchor + (reinterpret_cast<char*>(p) - emulator::block->anchor));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
