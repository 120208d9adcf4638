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
// The instruction takes three cycles and can begin every cycle: three lanes side by side keep it
// busy.
constexpr size_t kLaneNbytes = 2048;

// What a state becomes after a lane of zero bytes, for each byte of the state: a CRC is linear.
Tables make_shift_tables() {
  Tables tables{};
  for (size_t place = 0; place < 4; ++place) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t state = byte << (8 * place);
      for (size_t i = 0; i < kLaneNbytes; ++i) state = (state >> 8) ^ kTables[0][state & 0xFF];
      tables[place][byte] = state;
    }
  }
  return tables;
}

uint32_t shifted(const Tables& shift, uint32_t state) {
  return shift[0][state & 0xFF] ^ shift[1][(state >> 8) & 0xFF] ^ shift[2][(state >> 16) & 0xFF] ^
         shift[3][state >> 24];
}

uint64_t word_at(const unsigned char* bytes) {
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  return word;
}

__attribute__((target("sse4.2"))) uint32_t three_lanes(uint32_t state, const unsigned char* bytes) {
  static const Tables kShift = make_shift_tables();
  uint64_t first = state;
  uint64_t second = 0;
  uint64_t third = 0;
  for (size_t i = 0; i < kLaneNbytes; i += 8) {
    first = _mm_crc32_u64(first, word_at(bytes + i));
    second = _mm_crc32_u64(second, word_at(bytes + kLaneNbytes + i));
    third = _mm_crc32_u64(third, word_at(bytes + 2 * kLaneNbytes + i));
  }
  uint32_t both = shifted(kShift, static_cast<uint32_t>(first)) ^ static_cast<uint32_t>(second);
  return shifted(kShift, both) ^ static_cast<uint32_t>(third);
}

__attribute__((target("sse4.2"))) uint32_t crc32c_sse42(uint32_t crc, const void* data,
                                                        size_t nbytes) {
  const unsigned char* bytes = static_cast<const unsigned char*>(data);
  uint32_t lanes = ~crc;
  for (; nbytes >= 3 * kLaneNbytes; bytes += 3 * kLaneNbytes, nbytes -= 3 * kLaneNbytes) {
    lanes = three_lanes(lanes, bytes);
  }
  uint64_t state = lanes;
  for (; nbytes >= 8; bytes += 8, nbytes -= 8) state = _mm_crc32_u64(state, word_at(bytes));
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
