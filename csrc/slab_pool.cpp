#include "slab_pool.h"

#include <algorithm>

namespace ssdtrain {

namespace {

constexpr size_t kReadShare = 4;  // one slab in so many is the reads' own

}  // namespace

SlabLease::~SlabLease() {
  if (pool_) pool_->put_back(data_);
}

std::shared_ptr<char> SlabLease::share() && {
  auto owner = std::make_shared<SlabLease>(std::move(*this));
  return std::shared_ptr<char>(owner, owner->data());
}

SlabPool::SlabPool(size_t num_slabs, size_t num_usable, size_t slab_nbytes,
                   std::shared_ptr<Doorbell> available)
    : slab_nbytes_(slab_nbytes),
      region_(num_slabs * slab_nbytes),
      available_{std::move(available)} {
  free_.reserve(num_slabs);
  region_.grow(num_usable * slab_nbytes);
  add_slabs(num_usable);
}

void SlabPool::add_slabs(size_t num_usable) {
  std::vector<char*> fresh;
  for (size_t i = num_usable; i > num_usable_; --i)
    fresh.push_back(data() + (i - 1) * slab_nbytes_);
  free_.insert(free_.begin(), fresh.begin(), fresh.end());  // used when all others are
  num_usable_ = std::max(num_usable_, num_usable);
  if (has_drivers_) num_reserved_ = num_usable_ / kReadShare;
}

std::string SlabPool::grow(size_t num_usable) {
  std::lock_guard<std::mutex> growing(growing_mutex_);  // pinning takes its time
  size_t nbytes = std::min(num_usable * slab_nbytes_, region_.limit_nbytes());
  if (nbytes <= region_.nbytes()) return "";
  std::string reason = region_.grow(nbytes);
  std::lock_guard<std::mutex> lock(mutex_);
  add_slabs(nbytes / slab_nbytes_);
  if (std::exchange(is_wanted_, false)) {
    for (const std::shared_ptr<Doorbell>& doorbell : available_) doorbell->ring_all();
  }
  return reason;
}

SlabLease SlabPool::try_lease(For use) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (free_.size() <= (use == For::kRead ? 0 : num_reserved_)) {
    is_wanted_ = true;
    return SlabLease();
  }
  char* slab = free_.back();
  free_.pop_back();
  peak_leased_ = std::max(peak_leased_, ++num_leased_);
  return SlabLease(shared_from_this(), slab);
}

std::string SlabPool::add_driver(const std::shared_ptr<DeviceDriver>& driver,
                                 std::shared_ptr<Doorbell> available) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    available_.push_back(std::move(available));
    has_drivers_ = true;
    num_reserved_ = num_usable_ / kReadShare;
  }
  return region_.add_driver(driver);
}

void SlabPool::put_back(char* data) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(data);
  --num_leased_;
  if (!std::exchange(is_wanted_, false)) return;
  for (const std::shared_ptr<Doorbell>& doorbell : available_) doorbell->ring_one();
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
