// A program that drives the engine hard, to be run under sanitizers
// (tests/test_engine_sanitizers.py):
//
//     stress_test DIRECTORY KIND NUM_ROUNDS SEED
//
// First a backend whose operations wait at a gate shows, step by step, that bytes are forwarded and
// writes cancelled as promised; then a backend that fails, shortens and interrupts operations is
// driven by several threads with requests of random sizes, in random order, with random cancels.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine.h"

namespace {

using namespace ssdtrain;
using ULL = unsigned long long;

constexpr size_t kPage = 4096;
constexpr size_t kSlab = 4 * kPage;
constexpr size_t kThreads = 3;
constexpr std::chrono::duration<double> kLong{600.0};

void check(bool condition, const char* text, int line) {
  if (condition) return;
  std::fprintf(stderr, "line %d: expected %s\n", line, text);
  std::_Exit(1);
}
#define CHECK(condition) check((condition), #condition, __LINE__)

size_t round_up(size_t nbytes, size_t step) { return (nbytes + step - 1) / step * step; }

// Page-aligned memory, unmapped on destruction so that a late access is caught.
class Memory {
 public:
  explicit Memory(size_t nbytes) : nbytes_(round_up(nbytes, kPage)) {
    data_ = static_cast<char*>(
        ::mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(data_ != MAP_FAILED);
  }
  Memory(Memory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), nbytes_(other.nbytes_) {}
  ~Memory() {
    if (data_ != nullptr) ::munmap(data_, nbytes_);
  }
  char* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }

 private:
  char* data_;
  size_t nbytes_;
};

void fill(const Memory& memory, uint32_t seed) {
  std::minstd_rand random(seed + 1);
  uint32_t* words = reinterpret_cast<uint32_t*>(memory.data());
  for (size_t i = 0; i < memory.nbytes() / sizeof *words; ++i) words[i] = random();
}

// Holds writes back until the gate opens. Any backend may be behind it.
class GatedBackend : public IoBackend {
 public:
  struct Gate {
    std::mutex mutex;
    bool is_open = false;
    std::vector<IoOp> held;
    IoBackend* backend = nullptr;

    size_t num_held() {
      std::lock_guard<std::mutex> lock(mutex);
      return held.size();
    }
    void open() {
      std::lock_guard<std::mutex> lock(mutex);
      is_open = true;
      for (const IoOp& op : held) backend->submit(op);
      held.clear();
    }
  };

  GatedBackend(std::unique_ptr<IoBackend> backend, Gate* gate)
      : backend_(std::move(backend)), gate_(gate) {
    gate_->backend = backend_.get();
  }
  const char* kind() const override { return backend_->kind(); }
  size_t depth() const override { return backend_->depth(); }
  void stop() override { backend_->stop(); }
  void submit(const IoOp& op) override {
    std::lock_guard<std::mutex> lock(gate_->mutex);
    if (op.kind == IoOp::Kind::kWrite && !gate_->is_open) {
      gate_->held.push_back(op);
    } else {
      backend_->submit(op);
    }
  }

 private:
  std::unique_ptr<IoBackend> backend_;
  Gate* gate_;
};

// Now and then shortens an operation, or answers EINTR, EAGAIN or EIO without doing it.
class FaultyBackend : public IoBackend {
 public:
  FaultyBackend(const Engine::OpenBackend& open, const EngineOptions& options, StagingSpan staging,
                const std::string& directory, OnComplete on_complete, uint32_t seed)
      : on_complete_(on_complete), random_(seed) {
    backend_ = open(options, staging, directory, [this](void* context, int64_t result) {
      std::unique_ptr<Call> call(static_cast<Call*>(context));
      on_complete_(call->context, call->error != 0 ? -call->error : result);
    });
  }
  const char* kind() const override { return backend_->kind(); }
  size_t depth() const override { return backend_->depth(); }
  void stop() override { backend_->stop(); }
  void submit(const IoOp& op) override {
    IoOp changed = op;
    int error = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      uint32_t dice = random_() % 100;
      if (dice < 10) error = EINTR;
      if (dice >= 10 && dice < 20) error = EAGAIN;
      if (dice >= 20 && dice < 40) error = EIO;
      if (dice >= 40 && dice < 60 && op.nbytes > kPage) {
        changed.nbytes = round_up(1 + random_() % (op.nbytes - kPage), 512);
      }
    }
    // A refused operation still travels, as one that is harmless: completions come from the
    // backend's own threads.
    if (error != 0) changed.kind = IoOp::Kind::kDropCache;
    changed.context = new Call{op.context, error};
    backend_->submit(changed);
  }

 private:
  struct Call {
    void* context;
    int error;
  };
  const OnComplete on_complete_;
  std::mutex mutex_;
  std::minstd_rand random_;
  std::unique_ptr<IoBackend> backend_;
};

EngineOptions options_of(const std::string& kind, size_t num_slabs) {
  EngineOptions options;
  options.kind = kind;
  options.staging_nbytes = num_slabs * kSlab;
  options.slab_nbytes = kSlab;
  options.has_checksum = true;
  options.num_threads = 2;
  options.queue_depth = 3;
  return options;
}

std::shared_ptr<SpillFile> open_file(const std::string& directory, size_t nbytes) {
  auto file = std::make_shared<SpillFile>(directory, std::nullopt);
  file->grow(nbytes);
  return file;
}

void check_gate(const std::string& directory, const std::string& kind) {
  GatedBackend::Gate gate;
  auto open = [&](const EngineOptions& options, StagingSpan staging, const std::string& where,
                  IoBackend::OnComplete on_complete) {
    auto backend = Engine::open_backend(options, staging, where, std::move(on_complete));
    return std::make_unique<GatedBackend>(std::move(backend), &gate);
  };
  Engine engine({open_file(directory, 64 * kSlab)}, options_of(kind, 6), open);
  Memory source(6 * kSlab), back(6 * kSlab);
  fill(source, 7);

  std::vector<PieceSource> pieces;
  for (size_t i = 0; i < 6; ++i) pieces.push_back({source.data() + i * kSlab, kSlab, i * kSlab});
  std::shared_ptr<WriteState> write = engine.write({0, 0, 6 * kSlab}, pieces);
  CHECK(write->wait_copied(kLong));
  CHECK(!write->is_done());
  while (gate.num_held() < (kind == "threads" ? 2 : 3)) std::this_thread::yield();

  // All six chunks are in slabs, none in the file.
  std::shared_ptr<ReadState> read = engine.read(write, 5, {back.data(), kSlab});
  CHECK(read->wait_done(kLong));
  CHECK(read->forwarded_nbytes() == kSlab && read->read_nbytes() == 0);
  CHECK(std::memcmp(back.data(), source.data() + 5 * kSlab, kSlab) == 0);

  // The last has not begun: it is dropped at once. The first has: it finishes.
  write->cancel(5);
  write->cancel(0);
  CHECK(write->cancelled_nbytes() == kSlab);
  CHECK(engine.staging_in_use_nbytes() == 5 * kSlab);
  CHECK(!engine.wait_inflight(0, std::chrono::duration<double>(0)));
  gate.open();
  CHECK(write->wait_done(kLong));
  CHECK(write->written_nbytes() == 5 * kSlab);
  CHECK(engine.staging_in_use_nbytes() == 0);

  read = engine.read(write, 1, {back.data(), kSlab});
  CHECK(read->wait_done(kLong) && !read->error());
  CHECK(read->read_nbytes() == kSlab && read->forwarded_nbytes() == 0);
  CHECK(std::memcmp(back.data(), source.data() + kSlab, kSlab) == 0);
}

// One thread's random traffic in its own part of the file.
class Worker {
 public:
  Worker(Engine* engine, uint64_t base, uint32_t seed)
      : engine_(engine), base_(base), random_(seed) {}

  void run(size_t num_rounds) {
    for (size_t i = 0; i < num_rounds; ++i) round();
  }

  size_t num_failed_reads = 0;

 private:
  struct Request {
    Memory source;
    std::vector<PieceSource> pieces;
    std::vector<bool> is_cancelled;
    std::shared_ptr<WriteState> write;
  };

  uint32_t up_to(uint32_t most) { return random_() % (most + 1); }

  void round() {
    std::vector<std::unique_ptr<Request>> requests;
    uint64_t offset = base_;
    for (size_t i = 0; i < 4; ++i) requests.push_back(start(&offset));
    for (auto& request : requests) cancel_some(request.get());
    std::shuffle(requests.begin(), requests.end(), random_);
    for (auto& request : requests) read_back(request.get());
    for (auto& request : requests) {
      for (size_t i = 0; i < request->pieces.size(); ++i) request->write->cancel(i);
    }
    for (auto& request : requests) CHECK(request->write->wait_done(kLong));
  }

  std::unique_ptr<Request> start(uint64_t* offset) {
    size_t num_pieces = 1 + up_to(4);
    std::vector<size_t> sizes;
    size_t extent = 0;
    for (size_t i = 0; i < num_pieces; ++i) {
      sizes.push_back(1 + up_to(up_to(1) == 0 ? 600 : 3 * kSlab));
      extent += round_up(sizes.back(), kPage);
    }
    auto request = std::make_unique<Request>(
        Request{Memory(extent), {}, std::vector<bool>(num_pieces), nullptr});
    fill(request->source, random_());
    size_t at = 0;
    for (size_t nbytes : sizes) {
      request->pieces.push_back({request->source.data() + at, nbytes, at});
      at += round_up(nbytes, kPage);
    }
    request->write = engine_->write({0, *offset, extent}, request->pieces);
    *offset += extent;
    return request;
  }

  void cancel_some(Request* request) {
    for (size_t i = 0; i < request->pieces.size(); ++i) {
      if (up_to(3) != 0) continue;
      request->write->cancel(i);
      request->is_cancelled[i] = true;
    }
  }

  void read_back(Request* request) {
    if (up_to(1) == 0) CHECK(request->write->wait_done(kLong));
    CHECK(request->write->wait_copied(kLong));
    std::vector<std::pair<Memory, std::shared_ptr<ReadState>>> reads;
    for (size_t i = 0; i < request->pieces.size(); ++i) {
      Memory back(request->pieces[i].nbytes);
      std::shared_ptr<ReadState> read;
      Destination destination{back.data(), back.nbytes()};
      if (!request->is_cancelled[i]) read = engine_->read(request->write, i, destination);
      reads.emplace_back(std::move(back), std::move(read));
    }
    for (size_t i = 0; i < reads.size(); ++i) {
      auto& [back, read] = reads[i];
      if (!read) continue;
      CHECK(read->wait_done(kLong));
      bool is_equal =
          std::memcmp(back.data(), request->pieces[i].address, request->pieces[i].nbytes) == 0;
      CHECK(is_equal || read->error());
      if (read->error()) ++num_failed_reads;
    }
  }

  Engine* engine_;
  const uint64_t base_;
  std::minstd_rand random_;
};

void check_random(const std::string& directory, const std::string& kind, size_t num_rounds,
                  uint32_t seed) {
  const uint64_t share = 64 * kSlab * 2;
  auto open = [&](const EngineOptions& options, StagingSpan staging, const std::string& where,
                  IoBackend::OnComplete on_complete) {
    return std::make_unique<FaultyBackend>(Engine::open_backend, options, staging, where,
                                           std::move(on_complete), seed);
  };
  Engine engine({open_file(directory, kThreads * share)}, options_of(kind, 3), open);
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < kThreads; ++i) {
    workers.push_back(std::make_unique<Worker>(&engine, i * share, seed + i));
    threads.emplace_back([worker = workers.back().get(), num_rounds] { worker->run(num_rounds); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(engine.wait_idle(kLong));
  const Monitor& counters = engine.counters();
  CHECK(counters.inflight_nbytes == 0 && counters.rescued_nbytes == 0);
  CHECK(engine.staging_in_use_nbytes() == 0);
  size_t num_failed = 0;
  for (const auto& worker : workers) num_failed += worker->num_failed_reads;
  CHECK(counters.num_read_errors >= num_failed);
  std::printf("%s: %llu written, %llu read, %llu retries, %llu write errors, %llu read errors\n",
              kind.c_str(), (ULL)counters.written_nbytes, (ULL)counters.read_nbytes,
              (ULL)counters.num_retries, (ULL)counters.num_write_errors,
              (ULL)counters.num_read_errors);
}

// Closing in the middle, from several threads at once, with requests in every state.
void check_close(const std::string& directory, const std::string& kind, uint32_t seed) {
  auto engine = std::make_unique<Engine>(Engine::Files{open_file(directory, 256 * kSlab)},
                                         options_of(kind, 2));
  Memory source(8 * kSlab), back(8 * kSlab);
  fill(source, seed);
  std::vector<std::shared_ptr<WriteState>> writes;
  for (uint64_t i = 0; i < 20; ++i) {
    writes.push_back(engine->write({0, i * 8 * kSlab, 8 * kSlab}, {{source.data(), 8 * kSlab, 0}}));
  }
  CHECK(writes[0]->wait_copied(kLong));
  std::shared_ptr<ReadState> read = engine->read(writes[0], 0, {back.data(), back.nbytes()});
  std::vector<std::thread> closers;
  for (int i = 0; i < 3; ++i) closers.emplace_back([&] { engine->close(); });
  for (std::thread& closer : closers) closer.join();
  engine.reset();
  for (const auto& write : writes) CHECK(write->is_done() && write->is_copied());
  CHECK(read->is_done());
  CHECK(read->error() || std::memcmp(source.data(), back.data(), back.nbytes()) == 0);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: stress_test DIRECTORY KIND NUM_ROUNDS SEED\n");
    return 2;
  }
  std::string directory = argv[1], kind = argv[2];
  size_t num_rounds = std::strtoul(argv[3], nullptr, 10);
  uint32_t seed = static_cast<uint32_t>(std::strtoul(argv[4], nullptr, 10));
  check_gate(directory, kind);
  for (uint32_t i = 0; i < 10; ++i) check_close(directory, kind, seed + i);
  check_random(directory, kind, num_rounds, seed);
  return 0;
}
