#pragma once

#include <cstddef>
#include <cstdint>

namespace ssdtrain {

// CRC-32C (Castagnoli) of `nbytes` at `data`, continued from `crc` (0 to begin). Uses the SSE4.2
// instruction where the processor has it.
uint32_t crc32c(uint32_t crc, const void* data, size_t nbytes);

// The portable version, for comparison.
uint32_t crc32c_table(uint32_t crc, const void* data, size_t nbytes);

}  // namespace ssdtrain
