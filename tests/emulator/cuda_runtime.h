// The part of the CUDA runtime and of CUDA C++ that csrc/cuda uses, for kernels that the emulator runs.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ thread_local
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {
template <auto kRead>
struct Coordinate {
  operator unsigned() const { return kRead(); }
};
template <auto kRead>
struct Coordinates {
  Coordinate<[] { return kRead().x; }> x;
  Coordinate<[] { return kRead().y; }> y;
  Coordinate<[] { return kRead().z; }> z;
};
}  // namespace emulator
inline constexpr emulator::Coordinates<[] { return emulator::here().thread; }> threadIdx;
inline constexpr emulator::Coordinates<[] { return emulator::here().block; }> blockIdx;
inline constexpr emulator::Coordinates<[] { return emulator::launched().block; }> blockDim;
inline constexpr emulator::Coordinates<[] { return emulator::launched().grid; }> gridDim;

struct dim3 : emulator::Index {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Index{x, y, z} {}
};

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline void __syncthreads() { emulator::meet(0, 0); }
inline void __syncwarp() { emulator::exchange(emulator::kWarp, nullptr); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  void* const* shown = emulator::exchange(emulator::kWarp, &value);
  const T other = *static_cast<const T*>(shown[(threadIdx.x % emulator::kWarp) ^ mask]);
  emulator::exchange(emulator::kWarp, nullptr);
  return other;
}

template <class T>
T __shfl_sync(uint32_t, T value, int lane) {
  void* const* shown = emulator::exchange(emulator::kWarp, &value);
  const T other = *static_cast<const T*>(shown[lane]);
  emulator::exchange(emulator::kWarp, nullptr);
  return other;
}

inline int32_t atomicAdd(int32_t* to, int32_t value) {
  const int32_t before = *to;
  *to += value;
  return before;
}

template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __int_as_float(int32_t x) { return std::bit_cast<float>(x); }
inline int32_t __float_as_int(float x) { return std::bit_cast<int32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }

enum cudaError_t : int { cudaSuccess = 0, cudaErrorNotSupported = 801, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

namespace emulator {
inline std::string message;
inline cudaError_t last = cudaSuccess;
}  // namespace emulator

inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::message.c_str(); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {cudaMemoryTypeDevice, 0};
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion, binaryVersion;
};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  *attributes = {__CUDA_ARCH__ / 10, __CUDA_ARCH__ / 10};
  return cudaSuccess;
}
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    emulator::Index clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::Launch launch{config->gridDim, config->blockDim, {}, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& each = config->attrs[i];
    if (each.id == cudaLaunchAttributeClusterDimension) launch.cluster = each.val.clusterDim;
    if (each.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      launch.early = each.val.programmaticStreamSerializationAllowed != 0;
  }
  const std::tuple<Parameters...> parameters{arguments...};
  emulator::message = emulator::run(launch, [&] { std::apply(kernel, parameters); });
  return emulator::last = emulator::message.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version, int flags,
                                             cudaDriverEntryPointQueryResult* found);
