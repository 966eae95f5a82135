"""What all kernels stand on: operands, the native extension, counters, regimes, and what was measured of them."""
