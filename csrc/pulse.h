#pragma once

#include <cstddef>

#include "monitor.h"

namespace ssdtrain {

// Whether a drive answers: how long it has owed an answer and has said nothing at all. Under
// monitor->mutex.
class Pulse {
 public:
  // The drive is asked for something.
  void begin() {
    if (num_asked_++ == 0) answer();
  }
  // It says something, be it an error.
  void answer() { heard_ = seconds_now(); }
  // It owes one answer less.
  void end() {
    --num_asked_;
    answer();
  }
  // 0 while it owes none.
  double silent_seconds() const { return num_asked_ > 0 ? seconds_now() - heard_ : 0.0; }

 private:
  size_t num_asked_ = 0;
  double heard_ = 0.0;
};

}  // namespace ssdtrain
