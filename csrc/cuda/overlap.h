// Whether kernels may begin under the end of the one before them (programmatic dependent launch).
#pragma once

#include <cstdlib>

namespace sgf {

// What SLICEGPT_FAST_PDL says: "0" switches it off, which tells whether a fault has to do with it.
inline bool overlap_allowed(const char* setting) { return setting == nullptr || setting[0] != '0' || setting[1] != 0; }

inline bool overlaps() {
  static const bool allowed = overlap_allowed(std::getenv("SLICEGPT_FAST_PDL"));
  return allowed;
}

}  // namespace sgf
