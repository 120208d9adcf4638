#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "device_driver.h"
#include "monitor.h"

namespace ssdtrain {

// Where a failed transfer lies and why it failed.
struct WriteError {
  int errnum;
  uint64_t offset;
  uint64_t nbytes;
};

// One stretch of source memory and where it goes in the extent.
struct PieceSource {
  const char* address;
  size_t nbytes;
  uint64_t offset;
};

struct Extent {
  size_t file;
  uint64_t offset;
  uint64_t nbytes;
};

// When a write got where, by seconds_now(); 0 for what has not happened.
struct WriteMoments {
  double queued = 0.0;
  double copy_begun = 0.0;   // of the first chunk
  double copied = 0.0;       // the last source is free
  double write_begun = 0.0;  // of the first chunk
  double done = 0.0;
};

// The part of one piece that lies in one chunk.
struct Part {
  size_t piece;
  size_t chunk;
  size_t piece_offset;
  size_t chunk_offset;
  size_t nbytes;
  uint32_t checksum = 0;
  bool is_skipped = false;  // cancelled before it was copied
};

enum class ChunkState : uint8_t {
  kQueued,   // waits for memory to be copied to
  kCopying,  // its sources are being read, or will be by a stream
  kCopied,   // in a slab, waits for its turn to be written
  kWriting,  // handed to the backend
  kWritten,
  kHeld,     // in host memory for good
  kFailed,   // the write failed and the bytes are kept in memory, or the copy failed and they are
             // not
  kDropped,  // nobody wants it any more
};

// One slab's worth of the extent: written by one request.
struct Chunk {
  uint64_t offset = 0;  // in the extent
  size_t nbytes = 0;
  size_t first_part = 0;
  size_t num_parts = 0;
  size_t num_live = 0;  // parts whose piece is not cancelled
  ChunkState state = ChunkState::kQueued;
  std::shared_ptr<const char> bytes;  // slab, host or rescued memory while it holds the bytes
  std::shared_ptr<Fence> copied;      // while a stream copies: `bytes` are there after this point
};

// The life of one write request. Thread-safe where it says so; the transitions are the engine's and
// need monitor->mutex held (see [Note: locking]).
class WriteState {
 public:
  // `producer`: the point in a stream after which sources in device memory may be read; null for
  // host memory, which may be read at once.
  WriteState(std::shared_ptr<Monitor> monitor, Extent extent, std::vector<PieceSource> sources,
             size_t chunk_nbytes, std::shared_ptr<Fence> producer = nullptr);
  WriteState(const WriteState&) = delete;
  WriteState& operator=(const WriteState&) = delete;

  // For the owner of the request: any thread, no lock held.
  size_t num_pieces() const { return sources_.size(); }
  bool is_piece_copied(size_t piece) const { return pieces_[piece].num_unread.load() == 0; }
  bool is_copied() const { return num_uncopied_.load() == 0; }
  // Whether every copy is done or queued on a stream: in the order of streams the sources are free
  // after make_wait().
  bool is_issued() const { return producer_ ? num_unissued_.load() == 0 : is_copied(); }
  // Work queued on `stream` later comes after the copies issued so far.
  void make_wait(DeviceDriver::Stream stream) const;
  // Whether some source could not be read.
  bool is_lost() const { return is_lost_.load(); }
  bool is_done() const { return num_unfinished_.load() == 0; }
  void cancel(size_t piece);
  bool wait_done(std::chrono::duration<double> timeout);
  bool wait_copied(std::chrono::duration<double> timeout);
  bool wait_issued(std::chrono::duration<double> timeout);
  std::optional<WriteError> error() const;
  WriteMoments moments() const;
  uint64_t written_nbytes() const { return written_nbytes_.load(); }
  uint64_t cancelled_nbytes() const { return cancelled_nbytes_.load(); }
  uint64_t rescued_nbytes() const { return rescued_nbytes_.load(); }

  // For the engine: monitor->mutex held.
  bool is_readable(size_t piece) const {
    const Piece& it = pieces_[piece];
    return (producer_ ? it.num_unissued : it.num_unread).load() == 0 && !it.is_cancelled;
  }
  // The next chunk that waits for a slab, or nullopt.
  std::optional<size_t> next_queued();
  void begin_copy(size_t chunk, std::shared_ptr<const char> bytes);
  // A stream will have copied the chunk after `copied`.
  void note_issued(size_t chunk, std::shared_ptr<Fence> copied);
  // False when the chunk was cancelled meanwhile and is dropped.
  bool end_copy(size_t chunk);
  // The sources could not be read: the chunk holds nothing.
  void fail_copy(size_t chunk, int errnum);
  // The chunk stays where it was copied to.
  void settle_in_memory(size_t chunk);
  // False when the chunk was dropped before its turn.
  bool begin_write(size_t chunk);
  void end_write(size_t chunk);
  // `rescued` replaces the slab; where it is null the slab is kept.
  void fail_write(size_t chunk, int errnum, std::shared_ptr<const char> rescued);
  void cancel_locked(size_t piece);
  void cancel_all();

  const Extent& extent() const { return extent_; }
  const std::shared_ptr<Fence>& producer() const { return producer_; }
  const PieceSource& source(size_t piece) const { return sources_[piece]; }
  const Chunk& chunk(size_t index) const { return chunks_[index]; }
  // The parts of a piece or a chunk are neighbours in one array, which never changes its length.
  Part* chunk_parts(size_t chunk) { return &parts_[chunks_[chunk].first_part]; }
  const Part* piece_parts(size_t piece) const { return &parts_[pieces_[piece].first_part]; }
  size_t num_piece_parts(size_t piece) const { return pieces_[piece].num_parts; }
  uint64_t file_offset(size_t chunk) const { return extent_.offset + chunks_[chunk].offset; }

 private:
  struct Piece {
    size_t first_part = 0;
    size_t num_parts = 0;
    bool is_cancelled = false;
    std::atomic<size_t> num_unread{0};    // parts whose source may still be read
    std::atomic<size_t> num_unissued{0};  // parts whose copy is not even queued on a stream
  };

  void add_chunks(size_t chunk_nbytes);
  void add_parts(size_t piece, size_t chunk_nbytes);
  void mark_issued(const Part& part);
  void mark_read(const Part& part);
  void skip(Part* part);
  void drop_unwanted(Chunk* chunk);
  void drop(Chunk* chunk);
  void finish(Chunk* chunk, ChunkState state);

  const std::shared_ptr<Monitor> monitor_;
  const Extent extent_;
  const std::vector<PieceSource> sources_;
  const std::shared_ptr<Fence> producer_;
  std::vector<Chunk> chunks_;
  std::vector<Part> parts_;
  std::vector<Piece> pieces_;
  size_t next_chunk_ = 0;
  std::optional<WriteError> error_;
  WriteMoments moments_;
  std::shared_ptr<Fence> last_copy_;  // a stream runs in order: covers all earlier ones
  std::condition_variable changed_;   // issued, copied or done

  std::atomic<bool> is_lost_{false};
  std::atomic<size_t> num_unissued_{0};  // pieces
  std::atomic<size_t> num_uncopied_{0};
  std::atomic<size_t> num_unfinished_{0};
  std::atomic<uint64_t> written_nbytes_{0};
  std::atomic<uint64_t> cancelled_nbytes_{0};
  std::atomic<uint64_t> rescued_nbytes_{0};
};

}  // namespace ssdtrain
