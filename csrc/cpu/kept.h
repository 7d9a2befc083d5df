// Memory that is handed out again after its last owner has let go of it. Torch-free.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace igrpo::cpu {

// Blocks that nobody uses, the one that has waited longest in front. Any thread may call. One that finds the lock taken
// does without: so does a child that was forked meanwhile, in whose copy nobody would ever open it.
template <class Block>
class Kept {
 public:
  // The smallest block of at least `bytes` and at most twice as many. Where there is none the caller makes one, and the
  // next smaller block goes for it: without that, lengths that grow from call to call would leave a block each.
  std::optional<Block> take(int64_t bytes, int64_t limit) {
    std::vector<Entry> gone;  // released after the lock
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return std::nullopt;
    trim(limit, gone);
    auto found = entries_.end(), smaller = entries_.end();
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      const bool fits = it->bytes >= bytes;
      if (fits && it->bytes / 2 <= bytes && (found == entries_.end() || it->bytes < found->bytes)) found = it;
      if (!fits && it->bytes >= bytes / 2 && (smaller == entries_.end() || it->bytes > smaller->bytes)) smaller = it;
    }
    if (found == entries_.end()) {
      if (smaller != entries_.end()) remove(smaller, gone);
      return std::nullopt;
    }
    remove(found, gone);
    std::optional<Block> block(std::move(gone.back().block));
    gone.pop_back();
    return block;
  }

  void give_back(Block block, int64_t bytes, int64_t limit) {
    std::vector<Entry> gone;
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    entries_.push_back({std::move(block), bytes});
    bytes_ += bytes;
    trim(limit, gone);
  }

  // Releases what is more than `limit` bytes, now. Returns how many are left, -1 where the lock was taken.
  int64_t keep_at_most(int64_t limit) {
    std::vector<Entry> gone;
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return -1;
    trim(limit, gone);
    return bytes_;
  }

 private:
  struct Entry {
    Block block;
    int64_t bytes;
  };

  void trim(int64_t limit, std::vector<Entry>& gone) {
    while (!entries_.empty() && bytes_ > limit) remove(entries_.begin(), gone);
  }

  void remove(typename std::vector<Entry>::iterator it, std::vector<Entry>& gone) {
    bytes_ -= it->bytes;
    gone.push_back(std::move(*it));
    entries_.erase(it);
  }

  std::mutex mutex_;
  std::vector<Entry> entries_;
  int64_t bytes_ = 0;
};

}  // namespace igrpo::cpu
