#pragma once

#include <cstddef>
#include <cstring>

#include "write_state.h"

namespace ssdtrain {

// Fills memory with a chunk: its parts by `copy(to, from, nbytes)`, which gives their checksum, and
// zeros where there are none, so that nothing of an earlier tenant reaches the file.
template <typename Copy>
void fill_slab(WriteState* write, size_t index, char* slab, Copy copy) {
  const Chunk& chunk = write->chunk(index);
  Part* parts = write->chunk_parts(index);
  size_t filled = 0;
  for (size_t i = 0; i < chunk.num_parts; ++i) {
    Part& part = parts[i];
    if (part.is_skipped) continue;
    std::memset(slab + filled, 0, part.chunk_offset - filled);
    const char* from = write->source(part.piece).address + part.piece_offset;
    part.checksum = copy(slab + part.chunk_offset, from, part.nbytes);
    filled = part.chunk_offset + part.nbytes;
  }
  std::memset(slab + filled, 0, chunk.nbytes - filled);
}

}  // namespace ssdtrain
