#pragma once

#include <cstddef>
#include <string>

namespace ssdtrain {

// What a file asks of transfers, and why.
struct DirectIo {
  bool is_direct = false;
  size_t block_nbytes = 512;    // alignment of offsets and lengths in the file
  size_t memory_alignment = 1;  // alignment of addresses
  std::string reason;
};

// Switches the empty file `fd` to direct I/O where its file system can do it, checked by writing
// and reading one block, and leaves it empty. Throws PosixError when the check fails for a reason
// that is not about alignment (a full disk, a broken one).
DirectIo enable_direct_io(int fd, const std::string& directory);

// What a descriptor that was opened with O_DIRECT asks of transfers, as far as the kernel says;
// nothing is written to find out.
DirectIo direct_io_of(int fd);

}  // namespace ssdtrain
