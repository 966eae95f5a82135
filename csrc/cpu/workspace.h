// Memory for the length of one call. Not for kernels, whose files share no functions: their entries hand it to them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "arithmetic.h"

namespace sgf {

using Workspace = std::unique_ptr<float, decltype(&std::free)>;

// That many numbers, from the start of a cache line on; null where there is no memory left.
inline Workspace workspace(int64_t floats) {
  constexpr int64_t kLineBytes = 64;
  const int64_t bytes = ceil_div(floats * static_cast<int64_t>(sizeof(float)), kLineBytes) * kLineBytes;
  return {static_cast<float*>(std::aligned_alloc(kLineBytes, static_cast<std::size_t>(bytes))), &std::free};
}

}  // namespace sgf
