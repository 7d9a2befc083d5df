// How a token-level loss walks its rows on a device: host code without CUDA.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace igrpo::cuda {

enum class Plan {
  cluster,   // the row in the shared memory of a cluster of blocks
  resident,  // as much of the row as fits in one block's shared memory and registers
  two_pass,  // registers alone: what they do not hold is read twice
};

// The best plan that is possible, or the one that IGRPO_CUDA_PLAN names. `against_cluster`: why a cluster cannot be had,
// nullptr = it can. Throws std::runtime_error for a plan that is unknown or cannot be had.
inline Plan choose_plan(const char* against_cluster) {
  const char* variable = std::getenv("IGRPO_CUDA_PLAN");
  const std::string forced = variable == nullptr ? "" : variable;
  if (forced == "resident") return Plan::resident;
  if (forced == "two_pass") return Plan::two_pass;
  if (forced == "cluster" && against_cluster != nullptr) {
    throw std::runtime_error(std::string("IGRPO_CUDA_PLAN=cluster cannot be had: ") + against_cluster +
                             "; write resident or two_pass, or leave it out");
  }
  if (forced != "" && forced != "cluster") {
    throw std::runtime_error("IGRPO_CUDA_PLAN=" + forced +
                             " is unknown; write cluster, resident or two_pass, or leave it out");
  }
  return against_cluster == nullptr ? Plan::cluster : Plan::resident;
}

}  // namespace igrpo::cuda
