#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "doorbell.h"
#include "mapped_region.h"

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

 private:
  std::shared_ptr<SlabPool> pool_;
  char* data_ = nullptr;
};

// Staging memory cut into slabs of one size. Never grows. Thread-safe; its mutex is a leaf.
//
// A lease keeps the pool alive, so a slab that holds rescued bytes may outlive the engine.
class SlabPool : public std::enable_shared_from_this<SlabPool> {
 public:
  // `available` is rung when a slab returns after a lease was refused.
  SlabPool(size_t num_slabs, size_t slab_nbytes, std::shared_ptr<Doorbell> available);

  SlabLease try_lease();

  char* data() const { return region_.data(); }
  size_t nbytes() const { return region_.nbytes(); }
  size_t slab_nbytes() const { return slab_nbytes_; }
  size_t in_use_nbytes() const;
  size_t peak_nbytes() const;

 private:
  friend class SlabLease;
  void put_back(char* data);

  const size_t slab_nbytes_;
  MappedRegion region_;
  std::shared_ptr<Doorbell> available_;
  mutable std::mutex mutex_;
  std::vector<char*> free_;  // last in, first out: the slab used last is still in the cache
  size_t num_leased_ = 0;
  size_t peak_leased_ = 0;
  bool is_wanted_ = false;
};

}  // namespace ssdtrain
