#include "thread_group.h"

#include <pthread.h>
#include <signal.h>

#include <utility>

namespace ssdtrain {

namespace {

// Blocks every signal while it lives; threads started meanwhile inherit the mask.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous_);
  }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &previous_, nullptr); }

 private:
  sigset_t previous_;
};

}  // namespace

void ThreadGroup::spawn(const char* name, std::function<void()> body) {
  SignalsBlocked blocked;
  threads_.emplace_back(std::move(body));
  pthread_setname_np(threads_.back().native_handle(), name);
}

void ThreadGroup::join() {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

}  // namespace ssdtrain
