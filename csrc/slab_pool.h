#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "doorbell.h"
#include "pinned_region.h"

namespace ssdtrain {

class SlabPool;

// One slab, on loan; it goes back to its pool by itself.
class SlabLease {
 public:
  SlabLease() = default;
  SlabLease(std::shared_ptr<SlabPool> pool, char* data) : pool_(std::move(pool)), data_(data) {}
  SlabLease(SlabLease&& other) noexcept = default;
  SlabLease& operator=(SlabLease&&) = delete;
  ~SlabLease();

  char* data() const { return data_; }
  explicit operator bool() const { return pool_ != nullptr; }
  // The slab, given back with the last copy of the pointer.
  std::shared_ptr<char> share() &&;

 private:
  std::shared_ptr<SlabPool> pool_;
  char* data_ = nullptr;
};

// Staging memory cut into slabs of one size. Its place is fixed; how many slabs are used grows up
// to that. Those used last are used next, so that memory is touched only where many are used at
// once. Thread-safe; its mutex is a leaf.
//
// A lease keeps the pool alive, so a slab that holds rescued bytes may outlive the engine.
//
// [Note: slabs for reads] Reads for a device land in slabs first. Once there is a device, writes
// leave a quarter of the slabs to them: a read never waits for a write.
class SlabPool : public std::enable_shared_from_this<SlabPool> {
 public:
  enum class For { kWrite, kRead };

  // `available` is rung when a slab returns after a lease was refused. `num_usable`: of
  // `num_slabs`, until grow().
  SlabPool(size_t num_slabs, size_t num_usable, size_t slab_nbytes,
           std::shared_ptr<Doorbell> available);

  SlabLease try_lease(For use);
  // At least `num_usable` slabs may be used from now on. Empty, or why they are not pinned.
  std::string grow(size_t num_usable);
  // Slabs are pinned, and some reserved for reads. Empty, or why they are not pinned.
  std::string add_driver(const std::shared_ptr<DeviceDriver>& driver,
                         std::shared_ptr<Doorbell> available);

  char* data() const { return region_.data(); }
  size_t nbytes() const { return region_.limit_nbytes(); }
  size_t usable_nbytes() const { return region_.nbytes(); }
  size_t slab_nbytes() const { return slab_nbytes_; }
  size_t in_use_nbytes() const;
  size_t peak_nbytes() const;

 private:
  friend class SlabLease;
  void put_back(char* data);
  void add_slabs(size_t num_usable);  // mutex_ held, or nobody else knows the pool

  const size_t slab_nbytes_;
  PinnedRegion region_;
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Doorbell>> available_;
  std::vector<char*> free_;   // last in, first out: the slab used last is still in the cache
  std::mutex growing_mutex_;  // taken before mutex_
  bool has_drivers_ = false;
  size_t num_usable_ = 0;
  size_t num_reserved_ = 0;
  size_t num_leased_ = 0;
  size_t peak_leased_ = 0;
  bool is_wanted_ = false;
};

}  // namespace ssdtrain
