// The Python face of the engine; see ssdtrain/_C.pyi for the types and ssdtrain/io/engine.py for
// the contract. The only file that knows pybind11.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "crc32c.h"
#include "cuda_driver.h"
#include "device_driver.h"
#include "engine.h"
#include "file_request.h"
#include "fork_guard.h"
#include "named_file.h"
#include "posix_error.h"
#include "read_state.h"
#include "spill_file.h"
#include "write_state.h"

namespace py = pybind11;

namespace ssdtrain {
namespace {

using PySpillFile = ForkGuard<SpillFile>;
using PyEngine = ForkGuard<Engine>;
using PyWrite = ForkGuard<WriteState>;
using PyRead = ForkGuard<ReadState>;
using PyNamedFile = ForkGuard<NamedFile>;
using PyFileRequest = ForkGuard<FileRequest>;
using Seconds = std::chrono::duration<double>;
using PieceTuple = std::tuple<uintptr_t, size_t, uint64_t>;

constexpr Seconds kSignalCheckInterval{0.25};

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing();
#else
  return _Py_IsFinalizing();
#endif
}

bool is_main_thread() { return ::syscall(SYS_gettid) == ::getpid(); }

// Lets go of the GIL for as long as it lives. While the interpreter shuts down, a thread that wants
// it back never gets it: Python ends the thread by unwinding its stack, which ends the process
// where a destructor may not throw, as pybind11's own guard may not. Such a thread stays here until
// the process ends, also when the shutdown begins while it waits.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;
  ~GilReleased() {
    while (is_finalizing() && !is_main_thread()) ::pause();
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // the unwinding of its stack, which Python began
      for (;;) ::pause();
    }
  }

 private:
  PyThreadState* state_;
};

// Sleeps in `wait(slice)` without the GIL. It wakes now and then to let Python handle signals, so
// that Ctrl-C ends a wait on a device that does not answer.
template <typename Wait>
bool wait_interruptibly(std::optional<double> timeout_seconds, Wait wait) {
  using Clock = std::chrono::steady_clock;
  Clock::time_point start = Clock::now();
  for (;;) {
    Seconds slice = kSignalCheckInterval;
    if (timeout_seconds) {
      Seconds left = Seconds(*timeout_seconds) - Seconds(Clock::now() - start);
      slice = std::clamp(left, Seconds(0), kSignalCheckInterval);
    }
    bool is_over;
    {
      GilReleased released;
      is_over = wait(slice);
    }
    if (is_over) return true;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (timeout_seconds && Seconds(Clock::now() - start).count() >= *timeout_seconds) return false;
  }
}

// A driver written in Python. Engine threads call it, which need the GIL for that: see DeviceDriver
// for why none of them holds a lock meanwhile.
class PythonDriver : public DeviceDriver {
 public:
  int index() const override { PYBIND11_OVERRIDE_PURE(int, DeviceDriver, index); }
  Event record(Stream stream) override {
    return call([&] {
      for (Event event : take_released()) method("release")(event);
      return method("record")(stream).template cast<Event>();
    });
  }
  void wait(Stream stream, Event event) override {
    call([&] { method("wait")(stream, event); });
  }
  void copy_out(Stream stream, char* host, uint64_t device, size_t nbytes) override {
    call([&] { method("copy_out")(stream, reinterpret_cast<uintptr_t>(host), device, nbytes); });
  }
  void copy_in(Stream stream, uint64_t device, const char* host, size_t nbytes) override {
    call([&] { method("copy_in")(stream, device, reinterpret_cast<uintptr_t>(host), nbytes); });
  }
  void synchronize(Event event) override {
    call([&] { method("synchronize")(event); });
  }
  bool is_complete(Event event) override {
    return call([&] { return method("is_complete")(event).template cast<bool>(); });
  }
  // Under a lock, perhaps: Python learns of it with the next record().
  void release(Event event) noexcept override {
    std::lock_guard<std::mutex> lock(mutex_);
    released_.push_back(event);
  }
  Stream out_stream() override {
    return call([&] { return method("out_stream")().template cast<Stream>(); });
  }
  Stream in_stream() override {
    return call([&] { return method("in_stream")().template cast<Stream>(); });
  }
  std::string pin(char* address, size_t nbytes) override {
    return call([&] {
      return method("pin")(reinterpret_cast<uintptr_t>(address), nbytes)
          .template cast<std::string>();
    });
  }
  void unpin(char* address) noexcept override {
    call([&] { method("unpin")(reinterpret_cast<uintptr_t>(address)); });
  }

 private:
  // With the GIL; a Python exception becomes one that needs no GIL to be handled.
  template <typename Body>
  static auto call(Body body) -> decltype(body()) {
    py::gil_scoped_acquire acquired;
    try {
      return body();
    } catch (py::error_already_set& error) {
      throw std::runtime_error(error.what());
    }
  }
  py::function method(const char* name) const {
    py::function found = py::get_override(static_cast<const DeviceDriver*>(this), name);
    if (found) return found;
    throw std::runtime_error(std::string("Expected a driver with ") + name + "(), got one without");
  }
  std::vector<Event> take_released() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(released_, {});
  }

  std::mutex mutex_;
  std::vector<Event> released_;
};

// A path is bytes: what is no UTF-8 has characters of its own in Python, as os.fsdecode() says.
py::object text_of(std::string_view bytes) {
  PyObject* text = PyUnicode_DecodeFSDefaultAndSize(bytes.data(), bytes.size());
  if (text == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(text);
}

std::string path_of(const py::object& path) {
  PyObject* bytes = nullptr;
  if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) throw py::error_already_set();
  return py::reinterpret_steal<py::bytes>(bytes);
}

void raise_os_error(const PosixError& error) {
  py::object path = error.path().empty() ? py::none() : text_of(error.path());
  py::tuple arguments = py::make_tuple(error.errnum(), text_of(error.what()), path);
  PyErr_SetObject(PyExc_OSError, arguments.ptr());
}

// What C++ throws, with paths in its messages.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const PosixError& error) {
    raise_os_error(error);
  } catch (const std::invalid_argument& error) {
    PyErr_SetObject(PyExc_ValueError, text_of(error.what()).ptr());
  } catch (const py::builtin_exception&) {
    throw;  // pybind11's own are runtime errors too
  } catch (const std::runtime_error& error) {
    PyErr_SetObject(PyExc_RuntimeError, text_of(error.what()).ptr());
  }
}

size_t checked_piece(const WriteState& write, size_t piece) {
  if (piece < write.num_pieces()) return piece;
  throw py::index_error("Expected a piece below " + std::to_string(write.num_pieces()) + ", got " +
                        std::to_string(piece));
}

PyEngine open_engine(const std::string& kind, const std::vector<PySpillFile*>& files,
                     size_t staging_nbytes, size_t slab_nbytes, bool checksum, size_t num_threads,
                     size_t queue_depth, size_t host_nbytes, size_t first_staging_nbytes) {
  Engine::Files shared;
  for (const PySpillFile* file : files) shared.push_back(file->get());
  EngineOptions options{kind,     staging_nbytes, first_staging_nbytes, slab_nbytes,
                        checksum, num_threads,    queue_depth,          host_nbytes};
  // The destructor waits for what is in flight, which must not stop other Python threads.
  auto destroy = [](Engine* engine) {
    GilReleased released;
    delete engine;
  };
  GilReleased released;
  return PyEngine(std::shared_ptr<Engine>(new Engine(std::move(shared), options), destroy),
                  "an engine");
}

PyWrite start_write(const PyEngine& engine, size_t file, uint64_t offset, uint64_t nbytes,
                    const std::vector<PieceTuple>& pieces, std::shared_ptr<Fence> producer) {
  std::vector<PieceSource> sources;
  sources.reserve(pieces.size());
  for (const auto& [address, piece_nbytes, piece_offset] : pieces) {
    sources.push_back({reinterpret_cast<const char*>(address), piece_nbytes, piece_offset});
  }
  return PyWrite(engine->write({file, offset, nbytes}, std::move(sources), std::move(producer)),
                 "a write");
}

PyRead start_read(const PyEngine& engine, const PyWrite& write, size_t piece, uintptr_t address,
                  size_t capacity, std::shared_ptr<Fence> ready) {
  checked_piece(*write.get(), piece);
  Destination destination{reinterpret_cast<char*>(address), capacity, std::move(ready)};
  return PyRead(engine->read(write.get(), piece, destination), "a read");
}

py::object write_error(const PyWrite& write) {
  std::optional<WriteError> error = write->error();
  if (!error) return py::none();
  return py::make_tuple(error->errnum, error->offset, error->nbytes);
}

py::object read_error(const PyRead& read) {
  std::optional<ReadError> error = read->error();
  if (!error) return py::none();
  return py::make_tuple(error->errnum, error->offset, error->nbytes, error->message);
}

py::tuple write_moments(const PyWrite& write) {
  WriteMoments at = write->moments();
  return py::make_tuple(at.queued, at.copy_begun, at.copied, at.write_begun, at.done);
}

py::tuple read_moments(const PyRead& read) {
  ReadMoments at = read->moments();
  return py::make_tuple(at.queued, at.read_begun, at.done);
}

void bind_devices(py::module_& module) {
  using Released = py::call_guard<GilReleased>;
  py::class_<DeviceDriver, PythonDriver, std::shared_ptr<DeviceDriver>>(module, "DeviceDriver")
      .def(py::init<>())
      .def("index", &DeviceDriver::index);
  py::class_<CudaDriver, DeviceDriver, std::shared_ptr<CudaDriver>>(module, "CudaDriver")
      .def(py::init<int>(), py::arg("index"), Released());
  py::class_<Fence, std::shared_ptr<Fence>>(module, "Fence")
      // A driver whose queue is full blocks whoever adds to it.
      .def(py::init<std::shared_ptr<DeviceDriver>, uint64_t>(), py::arg("driver"),
           py::arg("stream"), Released())
      .def("synchronize", &Fence::synchronize, Released())
      .def("make_wait", &Fence::make_wait, py::arg("stream"), Released())
      .def_property_readonly("is_complete", &Fence::is_complete)
      .def_property_readonly("device_index", [](const Fence& f) { return f.driver()->index(); });
}

PySpillFile open_spill_file(const py::object& directory, std::optional<uint64_t> cap_nbytes,
                            size_t user) {
  std::string path = path_of(directory);
  // Closing may block for as long as the drive does, which must not stop other Python threads. The
  // last owner may be an engine that has let go of the interpreter.
  auto destroy = [](SpillFile* file) {
    if (is_finalizing()) return;  // the end of the process closes it
    std::optional<GilReleased> released;
    if (PyGILState_Check()) released.emplace();
    delete file;
  };
  GilReleased released;  // the probe writes a block
  return PySpillFile(std::shared_ptr<SpillFile>(new SpillFile(path, cap_nbytes, user), destroy),
                     "a spill file");
}

void bind_spill_file(py::module_& module) {
  py::class_<PySpillFile>(module, "SpillFile")
      .def(py::init(&open_spill_file), py::arg("directory"), py::arg("cap_nbytes") = py::none(),
           py::arg("user") = 0)
      .def(
          "grow",
          [](const PySpillFile& file, uint64_t nbytes) {
            SpillFile* target = file.get().get();
            GilReleased released;
            target->grow(nbytes);
          },
          py::arg("nbytes"))
      .def("shrink_to_nothing",
           [](const PySpillFile& file) {
             SpillFile* target = file.get().get();
             GilReleased released;
             target->shrink_to_nothing();
           })
      .def("close",
           [](const PySpillFile& file) {
             SpillFile* target = file.get().get();
             GilReleased released;
             target->close();
           })
      .def_property_readonly("directory",
                             [](const PySpillFile& f) { return text_of(f->directory()); })
      .def_property_readonly("fd", [](const PySpillFile& f) { return f->fd(); })
      .def_property_readonly("user", [](const PySpillFile& f) { return f->user(); })
      .def_property_readonly("block_nbytes",
                             [](const PySpillFile& f) { return f->io().block_nbytes; })
      .def_property_readonly("memory_alignment",
                             [](const PySpillFile& f) { return f->io().memory_alignment; })
      .def_property_readonly("is_direct", [](const PySpillFile& f) { return f->io().is_direct; })
      .def_property_readonly("direct_reason", [](const PySpillFile& f) { return f->io().reason; })
      .def_property_readonly("nbytes", [](const PySpillFile& f) { return f->nbytes(); })
      .def_property_readonly("cap_nbytes", [](const PySpillFile& f) { return f->cap_nbytes(); })
      .def_property_readonly("fallocate_reason",
                             [](const PySpillFile& f) { return f->fallocate_reason(); });
}

void bind_write(py::module_& module) {
  py::class_<PyWrite>(module, "Write")
      .def(
          "is_piece_copied",
          [](const PyWrite& write, size_t piece) {
            return write->is_piece_copied(checked_piece(*write.get(), piece));
          },
          py::arg("piece"))
      .def(
          "cancel",
          [](const PyWrite& write, size_t piece) {
            write->cancel(checked_piece(*write.get(), piece));
          },
          py::arg("piece"))
      .def(
          "wait",
          [](const PyWrite& write, std::optional<double> timeout_seconds) {
            WriteState* state = write.get().get();
            return wait_interruptibly(timeout_seconds,
                                      [&](Seconds t) { return state->wait_done(t); });
          },
          py::arg("timeout_seconds") = py::none())
      .def(
          "wait_copied",
          [](const PyWrite& write, std::optional<double> timeout_seconds) {
            WriteState* state = write.get().get();
            return wait_interruptibly(timeout_seconds,
                                      [&](Seconds t) { return state->wait_copied(t); });
          },
          py::arg("timeout_seconds") = py::none())
      .def(
          "wait_issued",
          [](const PyWrite& write, std::optional<double> timeout_seconds) {
            WriteState* state = write.get().get();
            return wait_interruptibly(timeout_seconds,
                                      [&](Seconds t) { return state->wait_issued(t); });
          },
          py::arg("timeout_seconds") = py::none())
      .def(
          "make_wait",
          [](const PyWrite& write, uint64_t stream) {
            WriteState* state = write.get().get();
            GilReleased released;
            state->make_wait(stream);
          },
          py::arg("stream"))
      .def_property_readonly("is_copied", [](const PyWrite& w) { return w->is_copied(); })
      .def_property_readonly("is_issued", [](const PyWrite& w) { return w->is_issued(); })
      .def_property_readonly("is_lost", [](const PyWrite& w) { return w->is_lost(); })
      .def_property_readonly("is_done", [](const PyWrite& w) { return w->is_done(); })
      .def_property_readonly("error", &write_error)
      .def_property_readonly("moments", &write_moments)
      .def_property_readonly("written_nbytes", [](const PyWrite& w) { return w->written_nbytes(); })
      .def_property_readonly("cancelled_nbytes",
                             [](const PyWrite& w) { return w->cancelled_nbytes(); })
      .def_property_readonly("rescued_nbytes",
                             [](const PyWrite& w) { return w->rescued_nbytes(); });
}

void bind_read(py::module_& module) {
  py::class_<PyRead>(module, "Read")
      .def(
          "wait",
          [](const PyRead& read, std::optional<double> timeout_seconds) {
            ReadState* state = read.get().get();
            return wait_interruptibly(timeout_seconds,
                                      [&](Seconds t) { return state->wait_done(t); });
          },
          py::arg("timeout_seconds") = py::none())
      .def(
          "wait_issued",
          [](const PyRead& read, std::optional<double> timeout_seconds) {
            ReadState* state = read.get().get();
            return wait_interruptibly(timeout_seconds,
                                      [&](Seconds t) { return state->wait_issued(t); });
          },
          py::arg("timeout_seconds") = py::none())
      .def("expedite", [](const PyRead& read) { read->expedite(); })
      .def(
          "make_wait",
          [](const PyRead& read, uint64_t stream) {
            ReadState* state = read.get().get();
            GilReleased released;
            state->make_wait(stream);
          },
          py::arg("stream"))
      .def_property_readonly("is_done", [](const PyRead& r) { return r->is_done(); })
      .def_property_readonly("is_issued", [](const PyRead& r) { return r->is_issued(); })
      .def_property_readonly("error", &read_error)
      .def_property_readonly("moments", &read_moments)
      .def_property_readonly("read_nbytes", [](const PyRead& r) { return r->read_nbytes(); })
      .def_property_readonly("forwarded_nbytes",
                             [](const PyRead& r) { return r->forwarded_nbytes(); });
}

PyNamedFile open_named_file(const py::object& path, int flags, int mode, bool direct) {
  std::string name = path_of(path);
  GilReleased released;
  return PyNamedFile(std::make_shared<NamedFile>(name, flags, mode, direct), "a file");
}

void bind_named_file(py::module_& module) {
  py::class_<PyNamedFile>(module, "NamedFile")
      .def(py::init(&open_named_file), py::arg("path"), py::arg("flags"), py::arg("mode") = 0666,
           py::arg("direct") = true)
      .def("close",
           [](const PyNamedFile& file) {
             NamedFile* target = file.get().get();
             GilReleased released;
             target->close();
           })
      .def_property_readonly("fd", [](const PyNamedFile& f) { return f->fd(); })
      .def_property_readonly("is_direct", [](const PyNamedFile& f) { return f->io().is_direct; })
      .def_property_readonly("direct_reason", [](const PyNamedFile& f) { return f->io().reason; })
      .def_property_readonly("memory_alignment",
                             [](const PyNamedFile& f) { return f->io().memory_alignment; });
  py::class_<PyFileRequest>(module, "FileRequest")
      .def(
          "wait",
          [](const PyFileRequest& request, std::optional<double> timeout_seconds) {
            FileRequest* state = request.get().get();
            return wait_interruptibly(timeout_seconds,
                                      [&](Seconds t) { return state->wait_done(t); });
          },
          py::arg("timeout_seconds") = py::none())
      .def("cancel", [](const PyFileRequest& r) { r->cancel(); })
      .def_property_readonly("is_done", [](const PyFileRequest& r) { return r->is_done(); })
      .def_property_readonly("error", [](const PyFileRequest& r) -> py::object {
        std::optional<FileError> error = r->error();
        if (!error) return py::none();
        return py::make_tuple(error->errnum, error->moved_nbytes, error->message);
      });
}

PyFileRequest start_transfer(const PyEngine& engine, const PyNamedFile& file, bool is_write,
                             uintptr_t address, size_t nbytes, uint64_t offset) {
  Engine* target = engine.get().get();
  const NamedFile& own = *file.get();
  IoOp::Kind kind = is_write ? IoOp::Kind::kWrite : IoOp::Kind::kRead;
  GilReleased released;
  return PyFileRequest(
      target->transfer(own, kind, reinterpret_cast<char*>(address), nbytes, offset), "a request");
}

void bind_engine_methods(py::class_<PyEngine>& engine) {
  engine
      .def(py::init(&open_engine), py::arg("kind"), py::arg("files"), py::arg("staging_nbytes"),
           py::arg("slab_nbytes"), py::arg("checksum") = false, py::arg("num_threads") = 4,
           py::arg("queue_depth") = 64, py::arg("host_nbytes") = 0,
           py::arg("first_staging_nbytes") = 0)
      .def(
          "add_device",
          [](const PyEngine& engine, std::shared_ptr<DeviceDriver> driver) {
            Engine* target = engine.get().get();
            GilReleased released;
            return target->add_device(std::move(driver));
          },
          py::arg("driver"))
      .def(
          "grow_staging",
          [](const PyEngine& engine, size_t nbytes) {
            Engine* target = engine.get().get();
            GilReleased released;
            return target->grow_staging(nbytes);
          },
          py::arg("nbytes"))
      .def(
          "grow_host",
          [](const PyEngine& engine, size_t nbytes) {
            Engine* target = engine.get().get();
            GilReleased released;
            return target->grow_host(nbytes);
          },
          py::arg("nbytes"))
      .def("write", &start_write, py::arg("file"), py::arg("offset"), py::arg("nbytes"),
           py::arg("pieces"), py::arg("producer") = nullptr)
      .def("read", &start_read, py::arg("write"), py::arg("piece"), py::arg("address"),
           py::arg("capacity"), py::arg("ready") = nullptr)
      .def("transfer", &start_transfer, py::arg("file"), py::arg("is_write"), py::arg("address"),
           py::arg("nbytes"), py::arg("offset"))
      .def(
          "wait_event",
          [](const PyEngine& engine, uint64_t num_events, std::optional<double> timeout_seconds) {
            Engine* target = engine.get().get();
            return wait_interruptibly(timeout_seconds,
                                      [&](Seconds t) { return target->wait_event(num_events, t); });
          },
          py::arg("num_events"), py::arg("timeout_seconds") = py::none())
      .def(
          "wait_inflight",
          [](const PyEngine& engine, uint64_t max_nbytes, std::optional<double> timeout_seconds) {
            Engine* target = engine.get().get();
            target->expect_open();
            return wait_interruptibly(
                timeout_seconds, [&](Seconds t) { return target->wait_inflight(max_nbytes, t); });
          },
          py::arg("max_nbytes"), py::arg("timeout_seconds") = py::none())
      .def(
          "wait_idle",
          [](const PyEngine& engine, std::optional<double> timeout_seconds) {
            Engine* target = engine.get().get();
            target->expect_open();
            return wait_interruptibly(timeout_seconds,
                                      [&](Seconds t) { return target->wait_idle(t); });
          },
          py::arg("timeout_seconds") = py::none())
      .def(
          "silent_seconds",
          [](const PyEngine& engine, size_t file) { return engine->silent_seconds(file); },
          py::arg("file"))
      .def("drain",
           [](const PyEngine& engine) {
             Engine* target = engine.get().get();
             target->expect_open();
             wait_interruptibly(std::nullopt, [&](Seconds t) { return target->wait_idle(t); });
           })
      .def("close", [](const PyEngine& engine) {
        Engine* target = engine.get().get();
        GilReleased released;
        target->close();
      });
}

py::tuple traffic(const PyEngine& engine, size_t user) {
  Traffic own = engine->traffic(user);
  auto as_tuple = [](const Direction& d) {
    return py::make_tuple(d.nbytes(), d.busy_seconds(), d.sustained_nbytes(),
                          d.sustained_seconds());
  };
  return py::make_tuple(as_tuple(own.written), as_tuple(own.read));
}

py::tuple copies(const PyEngine& engine) {
  auto [out, in] = engine->copies();
  return py::make_tuple(py::make_tuple(out.nbytes, out.seconds),
                        py::make_tuple(in.nbytes, in.seconds));
}

template <auto Counter>
uint64_t counter(const PyEngine& engine) {
  return (engine->counters().*Counter).load();
}

void bind_engine_counters(py::class_<PyEngine>& engine) {
  engine.def_property_readonly("num_events", &counter<&Monitor::num_events>)
      .def_property_readonly("inflight_nbytes", &counter<&Monitor::inflight_nbytes>)
      .def_property_readonly("written_nbytes", &counter<&Monitor::written_nbytes>)
      .def_property_readonly("read_nbytes", &counter<&Monitor::read_nbytes>)
      .def_property_readonly("num_retries", &counter<&Monitor::num_retries>)
      .def_property_readonly("num_write_errors", &counter<&Monitor::num_write_errors>)
      .def_property_readonly("num_read_errors", &counter<&Monitor::num_read_errors>)
      .def_property_readonly("rescued_nbytes", &counter<&Monitor::rescued_nbytes>)
      .def_property_readonly("write_busy_seconds",
                             [](const PyEngine& e) { return e->write_busy_seconds(); })
      .def_property_readonly("read_busy_seconds",
                             [](const PyEngine& e) { return e->read_busy_seconds(); })
      .def("traffic", &traffic, py::arg("user"))
      .def("copies", &copies);
}

void bind_engine_properties(py::class_<PyEngine>& engine) {
  engine.def_property_readonly("kind", [](const PyEngine& e) { return e->kind(); })
      .def_property_readonly("is_closed", [](const PyEngine& e) { return e->is_closed(); })
      .def_property_readonly("notes", [](const PyEngine& e) { return e->notes(); })
      .def_property_readonly("registered_buffers",
                             [](const PyEngine& e) { return e->has_registered_buffers(); })
      .def_property_readonly("host_nbytes", [](const PyEngine& e) { return e->host_nbytes(); })
      .def_property_readonly("staging_nbytes",
                             [](const PyEngine& e) { return e->staging_nbytes(); })
      .def_property_readonly("slab_nbytes", [](const PyEngine& e) { return e->slab_nbytes(); })
      .def_property_readonly("staging_in_use_nbytes",
                             [](const PyEngine& e) { return e->staging_in_use_nbytes(); })
      .def_property_readonly("peak_staging_nbytes",
                             [](const PyEngine& e) { return e->peak_staging_nbytes(); });
}

}  // namespace
}  // namespace ssdtrain

PYBIND11_MODULE(_C, module) {
  using namespace ssdtrain;
  module.doc() = "Moves bytes between memory and spill files.";
  module.attr("INTERFACE") = 2;  // as in ssdtrain/io/extension.py
  py::register_exception_translator(&translate);
  bind_devices(module);
  bind_spill_file(module);
  bind_write(module);
  bind_read(module);
  bind_named_file(module);
  py::class_<PyEngine> engine(module, "Engine");
  bind_engine_methods(engine);
  bind_engine_counters(engine);
  bind_engine_properties(engine);
  module.def(
      "crc32c",
      [](const py::bytes& data, bool use_table) {
        std::string_view view = data;
        return use_table ? crc32c_table(0, view.data(), view.size())
                         : crc32c(0, view.data(), view.size());
      },
      py::arg("data"), py::arg("use_table") = false);
}
