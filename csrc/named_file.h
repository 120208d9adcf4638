#pragma once

#include <sys/types.h>

#include <memory>
#include <mutex>
#include <string>

#include "spill_file.h"

namespace ssdtrain {

// A file that others know too: opened by its name, or anew from a descriptor, and read and written
// where it is. Nothing is written to find out how it can be used.
//
// [Note: edges] Direct I/O moves whole blocks. What is left of a range before its first page
// boundary and after its last goes through the page cache, in exactly its own bytes: so a file is
// never longer than what was written, bytes beside a range are never read and written back, and
// ranges that share a block do not disturb each other. The two ways never share a page, nor a block
// of the file system, of which the cache writes back all.
class NamedFile {
 public:
  static constexpr size_t kPageNbytes = 4096;

  // `flags` and `mode` as of open(2). Throws PosixError; what is no regular file is refused.
  NamedFile(const std::string& path, int flags, mode_t mode, bool wants_direct);
  NamedFile(const NamedFile&) = delete;
  NamedFile& operator=(const NamedFile&) = delete;

  // What is in flight keeps its descriptor.
  void close();
  const std::string& path() const { return path_; }
  bool is_writable() const { return is_writable_; }
  const DirectIo& io() const { return io_; }
  int fd() const { return buffered()->fd.get(); }
  // Offsets and lengths that take the direct way are multiples of it.
  size_t unit_nbytes() const { return unit_nbytes_; }
  // Throws when the file is closed.
  std::shared_ptr<const OpenFile> buffered() const;
  // Null where there is no direct I/O.
  std::shared_ptr<const OpenFile> direct() const;

 private:
  void open_direct(int flags);

  const std::string path_;
  const bool is_writable_;
  DirectIo io_;
  size_t unit_nbytes_ = kPageNbytes;
  mutable std::mutex mutex_;
  std::shared_ptr<const OpenFile> buffered_;
  std::shared_ptr<const OpenFile> direct_;
};

}  // namespace ssdtrain
