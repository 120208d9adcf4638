#include "copy_past_cache.h"

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace ssdtrain {

#if defined(__SSE2__)

namespace {

constexpr size_t kLineNbytes = 64;
constexpr size_t kLeastNbytes = size_t{64} << 10;  // below, the cache is the better place

void stream_line(char* to, const char* from) {
  auto* target = reinterpret_cast<__m128i*>(to);
  const auto* source = reinterpret_cast<const __m128i*>(from);
  __m128i a = _mm_loadu_si128(source);
  __m128i b = _mm_loadu_si128(source + 1);
  __m128i c = _mm_loadu_si128(source + 2);
  __m128i d = _mm_loadu_si128(source + 3);
  _mm_stream_si128(target, a);
  _mm_stream_si128(target + 1, b);
  _mm_stream_si128(target + 2, c);
  _mm_stream_si128(target + 3, d);
}

}  // namespace

void copy_past_cache(char* to, const char* from, size_t nbytes) {
  bool is_aligned = reinterpret_cast<uintptr_t>(to) % kLineNbytes == 0;
  if (!is_aligned || nbytes < kLeastNbytes) {
    std::memcpy(to, from, nbytes);
    return;
  }
  size_t at = 0;
  for (; at + kLineNbytes <= nbytes; at += kLineNbytes) stream_line(to + at, from + at);
  _mm_sfence();  // the bytes are there before anybody is told
  std::memcpy(to + at, from + at, nbytes - at);
}

#else

void copy_past_cache(char* to, const char* from, size_t nbytes) { std::memcpy(to, from, nbytes); }

#endif

}  // namespace ssdtrain
