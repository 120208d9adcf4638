#pragma once

#include <cstddef>

namespace ssdtrain {

// memcpy for bytes that this processor will not look at again: large copies leave the caches to the
// training, and do not read what they overwrite.
void copy_past_cache(char* to, const char* from, size_t nbytes);

}  // namespace ssdtrain
