#include "slab_pool.h"

#include <algorithm>

namespace ssdtrain {

SlabLease::~SlabLease() {
  if (pool_) pool_->put_back(data_);
}

SlabPool::SlabPool(size_t num_slabs, size_t slab_nbytes, std::shared_ptr<Doorbell> available)
    : slab_nbytes_(slab_nbytes),
      region_(num_slabs * slab_nbytes),
      available_(std::move(available)) {
  free_.reserve(num_slabs);
  for (size_t i = num_slabs; i > 0; --i) free_.push_back(data() + (i - 1) * slab_nbytes);
}

SlabLease SlabPool::try_lease() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (free_.empty()) {
    is_wanted_ = true;
    return SlabLease();
  }
  char* slab = free_.back();
  free_.pop_back();
  peak_leased_ = std::max(peak_leased_, ++num_leased_);
  return SlabLease(shared_from_this(), slab);
}

void SlabPool::put_back(char* data) {
  bool was_wanted;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(data);
    --num_leased_;
    was_wanted = std::exchange(is_wanted_, false);
  }
  if (was_wanted) available_->ring_one();
}

size_t SlabPool::in_use_nbytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_leased_ * slab_nbytes_;
}

size_t SlabPool::peak_nbytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return peak_leased_ * slab_nbytes_;
}

}  // namespace ssdtrain
