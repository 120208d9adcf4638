#include "crc32c.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace ssdtrain {

namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // reflected Castagnoli

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// kTables[k][b] is the CRC of byte b followed by k zero bytes, so eight bytes fold in one step.
constexpr Tables make_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = tables[k - 1][byte];
      tables[k][byte] = (crc >> 8) ^ tables[0][crc & 0xFF];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

uint32_t fold_eight(uint32_t crc, const unsigned char* bytes) {
  uint32_t result = 0;
  for (size_t i = 0; i < 4; ++i) result ^= kTables[7 - i][bytes[i] ^ ((crc >> (8 * i)) & 0xFF)];
  for (size_t i = 4; i < 8; ++i) result ^= kTables[7 - i][bytes[i]];
  return result;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(uint32_t crc, const void* data,
                                                        size_t nbytes) {
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  uint64_t state = ~crc;
  for (; nbytes >= 8; bytes += 8, nbytes -= 8) {
    uint64_t word;
    std::memcpy(&word, bytes, sizeof word);
    state = _mm_crc32_u64(state, word);
  }
  uint32_t tail = static_cast<uint32_t>(state);
  for (; nbytes > 0; ++bytes, --nbytes) tail = _mm_crc32_u8(tail, *bytes);
  return ~tail;
}
#endif

}  // namespace

uint32_t crc32c_table(uint32_t crc, const void* data, size_t nbytes) {
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; nbytes >= 8; bytes += 8, nbytes -= 8) crc = fold_eight(crc, bytes);
  for (; nbytes > 0; ++bytes, --nbytes) crc = (crc >> 8) ^ kTables[0][(crc ^ *bytes) & 0xFF];
  return ~crc;
}

uint32_t crc32c(uint32_t crc, const void* data, size_t nbytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return crc32c_sse42(crc, data, nbytes);
#endif
  return crc32c_table(crc, data, nbytes);
}

}  // namespace ssdtrain
