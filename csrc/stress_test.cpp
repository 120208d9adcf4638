// A program that drives the engine hard, to be run under sanitizers
// (tests/stress/test_engine_sanitizers.py):
//
//     stress_test DIRECTORY KIND NUM_ROUNDS SEED
//
// First a backend whose operations wait at a gate shows, step by step, that bytes are forwarded and
// writes cancelled as promised; then a backend that fails, shortens and interrupts operations is
// driven by several threads with requests of random sizes, in random order, with random cancels.
// Half of them are of a device whose streams are threads: what computes, copies out and copies in
// is ordered by nothing but the fences, so that a missing one is a race.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
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
constexpr size_t kHostNbytes = 64 * kSlab;
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
                const ProbeFile& probe, OnComplete on_complete, uint32_t seed)
      : on_complete_(on_complete), random_(seed) {
    backend_ = open(options, staging, probe, [this](void* context, int64_t result) {
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
    // A refused operation still goes on, as one that is harmless: completions come from the
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

// Runs what is queued on it, in order, on a thread of its own.
class ThreadStream {
 public:
  using Work = std::function<void()>;

  ThreadStream() : thread_([this] { run(); }) {}
  ~ThreadStream() {
    put(nullptr);
    thread_.join();
  }
  void put(Work work) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_one();
  }

 private:
  void run() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return !queue_.empty(); });
      Work work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      if (!work) return;
      work();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  std::thread thread_;
};

// A device in host memory. Streams 0 and 1 copy out and in, the others compute. Now and then a copy
// out is refused.
class ThreadDevice : public DeviceDriver {
 public:
  explicit ThreadDevice(uint32_t seed) : random_(seed) {
    for (size_t i = 0; i < 2 + kThreads; ++i) streams_.push_back(std::make_unique<ThreadStream>());
  }
  void compute(Stream stream, ThreadStream::Work kernel) {
    streams_[stream]->put(std::move(kernel));
  }
  int index() const override { return 0; }
  Event record(Stream stream) override {
    auto flag = std::make_shared<Flag>();
    streams_[stream]->put([flag] { flag->set(); });
    std::lock_guard<std::mutex> lock(mutex_);
    events_[++last_event_] = flag;
    return last_event_;
  }
  void wait(Stream stream, Event event) override {
    std::shared_ptr<Flag> flag = find(event);
    streams_[stream]->put([flag] { flag->wait(); });
  }
  void copy_out(Stream stream, char* host, uint64_t device, size_t nbytes) override {
    std::chrono::microseconds delay;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (random_() % 100 == 0) throw std::runtime_error("refused");
      delay = std::chrono::microseconds(random_() % 500);
    }
    streams_[stream]->put([=] {
      std::this_thread::sleep_for(delay);  // so that reads come before it
      std::memcpy(host, reinterpret_cast<const char*>(device), nbytes);
    });
  }
  void copy_in(Stream stream, uint64_t device, const char* host, size_t nbytes) override {
    streams_[stream]->put([=] { std::memcpy(reinterpret_cast<char*>(device), host, nbytes); });
  }
  void synchronize(Event event) override { find(event)->wait(); }
  bool is_complete(Event event) override { return find(event)->is_set(); }
  void release(Event event) noexcept override {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.erase(event);
  }
  Stream out_stream() override { return 0; }
  Stream in_stream() override { return 1; }
  std::string pin(char*, size_t) override { return ""; }
  void unpin(char*) noexcept override {}

 private:
  class Flag {
   public:
    void set() {
      std::lock_guard<std::mutex> lock(mutex_);
      is_set_ = true;
      changed_.notify_all();
    }
    bool is_set() {
      std::lock_guard<std::mutex> lock(mutex_);
      return is_set_;
    }
    void wait() {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return is_set_; });
    }

   private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool is_set_ = false;
  };
  std::shared_ptr<Flag> find(Event event) {
    std::lock_guard<std::mutex> lock(mutex_);
    return events_.at(event);
  }

  std::mutex mutex_;
  std::minstd_rand random_;
  Event last_event_ = 0;
  std::map<Event, std::shared_ptr<Flag>> events_;
  std::vector<std::unique_ptr<ThreadStream>> streams_;
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
  auto open = [&](const EngineOptions& options, StagingSpan staging, const ProbeFile& probe,
                  IoBackend::OnComplete on_complete) {
    auto backend = Engine::open_backend(options, staging, probe, std::move(on_complete));
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
  Worker(Engine* engine, std::shared_ptr<ThreadDevice> device, size_t index, uint64_t base,
         uint32_t seed)
      : engine_(engine),
        device_(std::move(device)),
        stream_(2 + index),
        base_(base),
        random_(seed) {}

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
    Memory expected;  // what the source holds once it is computed
    bool is_device;
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
    Fence(device_, stream_).synchronize();  // the sources go
  }

  std::unique_ptr<Request> start(uint64_t* offset) {
    size_t num_pieces = 1 + up_to(4);
    std::vector<size_t> sizes;
    size_t extent = 0;
    for (size_t i = 0; i < num_pieces; ++i) {
      sizes.push_back(1 + up_to(up_to(1) == 0 ? 600 : 3 * kSlab));
      extent += round_up(sizes.back(), kPage);
    }
    auto request = std::make_unique<Request>(Request{
        Memory(extent), {}, std::vector<bool>(num_pieces), nullptr, Memory(extent), up_to(1) == 0});
    uint32_t seed = random_();
    fill(request->expected, seed);
    if (!request->is_device) fill(request->source, seed);
    size_t at = 0;
    for (size_t nbytes : sizes) {
      request->pieces.push_back({request->source.data() + at, nbytes, at});
      at += round_up(nbytes, kPage);
    }
    std::shared_ptr<Fence> producer;
    if (request->is_device) {
      device_->compute(stream_, [source = &request->source, seed] { fill(*source, seed); });
      producer = std::make_shared<Fence>(device_, stream_);
    }
    bool is_host = up_to(3) == 0;  // to the host tier
    uint64_t at_file = is_host ? *offset % kHostNbytes : *offset;
    is_host = is_host && at_file + extent <= kHostNbytes && base_ == 0;
    request->write =
        engine_->write({is_host ? size_t{1} : size_t{0}, is_host ? at_file : *offset, extent},
                       request->pieces, std::move(producer));
    *offset += extent;
    return request;
  }

  // In the order of streams the source is free once its copies are queued: later work has it.
  void reuse_source(Request* request) {
    request->write->make_wait(stream_);
    device_->compute(stream_, [source = &request->source] { fill(*source, 0); });
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
    if (request->is_device) {
      while (!request->write->is_issued()) std::this_thread::yield();
      if (up_to(1) == 0) reuse_source(request);
    } else {
      CHECK(request->write->wait_copied(kLong));
    }
    std::vector<std::pair<Memory, std::shared_ptr<ReadState>>> reads;
    for (size_t i = 0; i < request->pieces.size(); ++i) {
      Memory back(request->pieces[i].nbytes);
      std::shared_ptr<ReadState> read;
      Destination destination{back.data(), back.nbytes()};
      if (request->is_device && !request->is_cancelled[i]) {
        device_->compute(stream_, [data = back.data(), nbytes = back.nbytes()] {
          std::memset(data, 0xEE, nbytes);  // what had the memory before
        });
        destination.ready = std::make_shared<Fence>(device_, stream_);
      }
      if (!request->is_cancelled[i]) read = engine_->read(request->write, i, destination);
      reads.emplace_back(std::move(back), std::move(read));
    }
    for (size_t i = 0; i < reads.size(); ++i) {
      auto& [back, read] = reads[i];
      if (!read) continue;
      CHECK(read->wait_issued(kLong));
      const char* expected = request->expected.data() + request->pieces[i].offset;
      bool is_equal =
          compare(request->is_device, *read, back.data(), expected, request->pieces[i].nbytes);
      CHECK(read->wait_done(kLong));
      CHECK(is_equal || read->error());
      if (read->error() && !request->write->is_lost()) ++num_failed_reads;
    }
  }

  // On the stream that computes, for a device: after what `read` brings.
  bool compare(bool is_device, const ReadState& read, const char* actual, const char* expected,
               size_t nbytes) {
    if (!is_device) return std::memcmp(actual, expected, nbytes) == 0;
    read.make_wait(stream_);
    bool is_equal = false;
    device_->compute(stream_, [&] { is_equal = std::memcmp(actual, expected, nbytes) == 0; });
    Fence(device_, stream_).synchronize();
    return is_equal;
  }

  Engine* engine_;
  const std::shared_ptr<ThreadDevice> device_;
  const DeviceDriver::Stream stream_;
  const uint64_t base_;
  std::minstd_rand random_;
};

void check_random(const std::string& directory, const std::string& kind, size_t num_rounds,
                  uint32_t seed) {
  const uint64_t share = 64 * kSlab * 2;
  auto open = [&](const EngineOptions& options, StagingSpan staging, const ProbeFile& probe,
                  IoBackend::OnComplete on_complete) {
    return std::make_unique<FaultyBackend>(Engine::open_backend, options, staging, probe,
                                           std::move(on_complete), seed);
  };
  EngineOptions options = options_of(kind, 4);
  options.host_nbytes = kHostNbytes;
  auto device = std::make_shared<ThreadDevice>(seed);
  Engine engine({open_file(directory, kThreads * share)}, options, open);
  CHECK(engine.add_device(device).empty() && engine.grow_host(kHostNbytes).empty());
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < kThreads; ++i) {
    workers.push_back(std::make_unique<Worker>(&engine, device, i, i * share, seed + i));
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

// One thread's ranges of a file that others write to as well, beside them, from and to any address.
void use_named(Engine* engine, const NamedFile& file, uint32_t thread, size_t num_rounds,
               uint32_t seed) {
  std::minstd_rand random(seed + thread);
  auto up_to = [&](uint32_t most) { return static_cast<uint32_t>(random() % (most + 1)); };
  constexpr size_t kMost = 3 * kSlab;
  for (size_t round = 0; round < num_rounds; ++round) {
    uint64_t offset = (thread + kThreads * round) * kMost + up_to(kPage);
    size_t nbytes = up_to(up_to(1) == 0 ? 600 : kMost - kPage);
    Memory source(kMost + kPage), back(kMost + kPage);
    fill(source, seed + static_cast<uint32_t>(round));
    size_t from = up_to(3) == 0 ? 0 : up_to(600), to = up_to(3) == 0 ? 0 : up_to(600);
    auto write = engine->transfer(file, IoOp::Kind::kWrite, source.data() + from, nbytes, offset);
    if (up_to(7) == 0) write->cancel();
    CHECK(write->wait_done(kLong));
    auto read = engine->transfer(file, IoOp::Kind::kRead, back.data() + to, nbytes, offset);
    if (up_to(7) == 0) read->cancel();
    CHECK(read->wait_done(kLong));
    std::optional<FileError> failed = write->error();
    CHECK(!failed || failed->moved_nbytes <= nbytes);
    bool is_equal = std::memcmp(source.data() + from, back.data() + to, nbytes) == 0;
    CHECK(is_equal || failed || read->error());
  }
}

void check_named(const std::string& directory, const std::string& kind, size_t num_rounds,
                 uint32_t seed) {
  auto open = [&](const EngineOptions& options, StagingSpan staging, const ProbeFile& probe,
                  IoBackend::OnComplete on_complete) {
    return std::make_unique<FaultyBackend>(Engine::open_backend, options, staging, probe,
                                           std::move(on_complete), seed);
  };
  EngineOptions options = options_of(kind, 4);
  options.queue_depth = 4;
  Engine engine({}, options, open);
  std::string path = directory + "/named";
  NamedFile file(path, O_RDWR | O_CREAT, 0600, true);
  CHECK(::unlink(path.c_str()) == 0);
  std::vector<std::thread> threads;
  for (uint32_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] { use_named(&engine, file, i, num_rounds, seed); });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(engine.wait_idle(kLong) && engine.staging_in_use_nbytes() == 0);
  Memory memory(64 * kSlab);
  auto late = engine.transfer(file, IoOp::Kind::kWrite, memory.data() + 1, 63 * kSlab, 0);
  file.close();
  engine.close();
  CHECK(late->is_done());
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
  check_named(directory, kind, num_rounds, seed);
  return 0;
}
