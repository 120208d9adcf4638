#include "write_state.h"

#include <algorithm>
#include <utility>

namespace ssdtrain {

WriteState::WriteState(std::shared_ptr<Monitor> monitor, Extent extent,
                       std::vector<PieceSource> sources, size_t chunk_nbytes,
                       std::shared_ptr<Fence> producer)
    : monitor_(std::move(monitor)),
      extent_(extent),
      sources_(std::move(sources)),
      producer_(std::move(producer)),
      pieces_(sources_.size()) {
  add_chunks(chunk_nbytes);
  for (size_t i = 0; i < sources_.size(); ++i) add_parts(i, chunk_nbytes);
  num_unissued_ = num_uncopied_ = sources_.size();
  moments_.queued = seconds_now();
  for (Chunk& chunk : chunks_) {
    // A chunk between two pieces holds nothing that anyone could read.
    if (chunk.num_parts == 0) chunk.state = ChunkState::kDropped;
    if (chunk.num_parts > 0) ++num_unfinished_;
  }
}

void WriteState::add_chunks(size_t chunk_nbytes) {
  for (uint64_t at = 0; at < extent_.nbytes; at += chunk_nbytes) {
    Chunk chunk;
    chunk.offset = at;
    chunk.nbytes = std::min<uint64_t>(chunk_nbytes, extent_.nbytes - at);
    chunks_.push_back(std::move(chunk));
  }
}

void WriteState::add_parts(size_t piece, size_t chunk_nbytes) {
  const PieceSource& source = sources_[piece];
  pieces_[piece].first_part = parts_.size();
  for (size_t done = 0; done < source.nbytes;) {
    uint64_t at = source.offset + done;
    size_t index = at / chunk_nbytes;
    Chunk& chunk = chunks_[index];
    size_t nbytes = std::min<uint64_t>(source.nbytes - done, chunk.offset + chunk.nbytes - at);
    if (chunk.num_parts++ == 0) chunk.first_part = parts_.size();
    ++chunk.num_live;
    parts_.push_back({piece, index, done, static_cast<size_t>(at - chunk.offset), nbytes});
    done += nbytes;
  }
  pieces_[piece].num_parts = parts_.size() - pieces_[piece].first_part;
  pieces_[piece].num_unread = pieces_[piece].num_unissued = pieces_[piece].num_parts;
}

void WriteState::cancel(size_t piece) {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  cancel_locked(piece);
}

void WriteState::cancel_all() {
  for (size_t i = 0; i < pieces_.size(); ++i) cancel_locked(i);
}

void WriteState::cancel_locked(size_t piece) {
  if (std::exchange(pieces_[piece].is_cancelled, true)) return;
  Part* parts = &parts_[pieces_[piece].first_part];
  for (size_t i = 0; i < pieces_[piece].num_parts; ++i) {
    Chunk& chunk = chunks_[parts[i].chunk];
    --chunk.num_live;
    if (chunk.state == ChunkState::kQueued) skip(&parts[i]);
    if (chunk.num_live == 0) drop_unwanted(&chunk);
  }
}

// The part is not copied any more: its source is free at once.
void WriteState::skip(Part* part) {
  part->is_skipped = true;
  cancelled_nbytes_ += part->nbytes;
  mark_issued(*part);
  mark_read(*part);
}

void WriteState::mark_issued(const Part& part) {
  if (--pieces_[part.piece].num_unissued > 0) return;
  ++monitor_->num_events;
  if (--num_unissued_ == 0) changed_.notify_all();
}

void WriteState::mark_read(const Part& part) {
  if (--pieces_[part.piece].num_unread > 0) return;
  ++monitor_->num_events;
  if (num_uncopied_ == 1) moments_.copied = seconds_now();  // before anyone sees that it is
  if (--num_uncopied_ == 0) changed_.notify_all();
}

// A chunk without live pieces. While it is copied or written it finishes that first.
void WriteState::drop_unwanted(Chunk* chunk) {
  switch (chunk->state) {
    case ChunkState::kQueued:
    case ChunkState::kCopied:
      drop(chunk);
      break;
    case ChunkState::kFailed:
      if (chunk->bytes) rescued_nbytes_ -= chunk->nbytes;
      chunk->bytes.reset();
      break;
    case ChunkState::kHeld:
      chunk->bytes.reset();
      break;
    case ChunkState::kCopying:
    case ChunkState::kWriting:
    case ChunkState::kWritten:
    case ChunkState::kDropped:
      break;
  }
}

void WriteState::drop(Chunk* chunk) {
  for (size_t i = 0; i < chunk->num_parts; ++i) {
    const Part& part = parts_[chunk->first_part + i];
    if (!part.is_skipped) cancelled_nbytes_ += part.nbytes;
  }
  chunk->bytes.reset();
  finish(chunk, ChunkState::kDropped);
}

void WriteState::finish(Chunk* chunk, ChunkState state) {
  chunk->state = state;
  if (num_unfinished_ > 1) {
    --num_unfinished_;
    return;
  }
  moments_.done = seconds_now();
  // Counters first: whoever sees is_done sees them too.
  monitor_->inflight_nbytes -= extent_.nbytes;
  --monitor_->num_pending;
  num_unfinished_ = 0;
  ++monitor_->num_events;
  changed_.notify_all();
  monitor_->progress.notify_all();
}

std::optional<size_t> WriteState::next_queued() {
  while (next_chunk_ < chunks_.size() && chunks_[next_chunk_].state != ChunkState::kQueued) {
    ++next_chunk_;
  }
  if (next_chunk_ == chunks_.size()) return std::nullopt;
  return next_chunk_;
}

void WriteState::begin_copy(size_t index, std::shared_ptr<const char> bytes) {
  if (moments_.copy_begun == 0.0) moments_.copy_begun = seconds_now();
  chunks_[index].state = ChunkState::kCopying;
  chunks_[index].bytes = std::move(bytes);
}

void WriteState::note_issued(size_t index, std::shared_ptr<Fence> copied) {
  Chunk& chunk = chunks_[index];
  chunk.copied = std::move(copied);
  if (chunk.copied) last_copy_ = chunk.copied;
  for (size_t i = 0; i < chunk.num_parts; ++i) {
    const Part& part = parts_[chunk.first_part + i];
    if (!part.is_skipped) mark_issued(part);
  }
}

bool WriteState::end_copy(size_t index) {
  Chunk& chunk = chunks_[index];
  chunk.state = ChunkState::kCopied;
  for (size_t i = 0; i < chunk.num_parts; ++i) {
    const Part& part = parts_[chunk.first_part + i];
    if (!part.is_skipped) mark_read(part);
  }
  chunk.copied.reset();
  if (chunk.num_live == 0) drop(&chunk);
  return chunk.state == ChunkState::kCopied;
}

void WriteState::fail_copy(size_t index, int errnum) {
  Chunk& chunk = chunks_[index];
  if (!error_) error_ = WriteError{errnum, file_offset(index), chunk.nbytes};
  is_lost_ = true;
  ++monitor_->num_write_errors;
  if (!chunk.copied) note_issued(index, nullptr);
  end_copy(index);
  if (chunk.state != ChunkState::kCopied) return;  // nobody wanted it
  chunk.bytes.reset();
  finish(&chunk, ChunkState::kFailed);
}

void WriteState::settle_in_memory(size_t index) { finish(&chunks_[index], ChunkState::kHeld); }

bool WriteState::begin_write(size_t index) {
  if (chunks_[index].state != ChunkState::kCopied) return false;
  if (moments_.write_begun == 0.0) moments_.write_begun = seconds_now();
  chunks_[index].state = ChunkState::kWriting;
  return true;
}

void WriteState::end_write(size_t index) {
  Chunk& chunk = chunks_[index];
  chunk.bytes.reset();
  written_nbytes_ += chunk.nbytes;
  finish(&chunk, ChunkState::kWritten);
}

void WriteState::fail_write(size_t index, int errnum, std::shared_ptr<const char> rescued) {
  Chunk& chunk = chunks_[index];
  if (!error_) error_ = WriteError{errnum, file_offset(index), chunk.nbytes};
  ++monitor_->num_write_errors;
  if (rescued) chunk.bytes = std::move(rescued);
  if (chunk.num_live == 0) chunk.bytes.reset();
  if (chunk.bytes) rescued_nbytes_ += chunk.nbytes;
  finish(&chunk, ChunkState::kFailed);
}

bool WriteState::wait_done(std::chrono::duration<double> timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  return changed_.wait_for(lock, timeout, [this] { return is_done(); });
}

bool WriteState::wait_copied(std::chrono::duration<double> timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  return changed_.wait_for(lock, timeout, [this] { return is_copied() || is_done(); });
}

bool WriteState::wait_issued(std::chrono::duration<double> timeout) {
  std::unique_lock<std::mutex> lock(monitor_->mutex);
  return changed_.wait_for(lock, timeout, [this] { return is_issued() || is_done(); });
}

void WriteState::make_wait(DeviceDriver::Stream stream) const {
  std::shared_ptr<Fence> last;
  {
    std::lock_guard<std::mutex> lock(monitor_->mutex);
    last = last_copy_;
  }
  if (last) last->make_wait(stream);
}

std::optional<WriteError> WriteState::error() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return error_;
}

WriteMoments WriteState::moments() const {
  std::lock_guard<std::mutex> lock(monitor_->mutex);
  return moments_;
}

}  // namespace ssdtrain
