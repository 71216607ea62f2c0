// Everything of a GPU that the kernels use, under one name for two machines: with nvcc it is the GPU itself, with
// CCL_FAST_EMULATE it is emulation.h, which runs the same kernel source on the CPU and notices races and divergence.
//
// Fragments and addresses are those of the PTX ISA (mma.m16n8k16, ldmatrix, cp.async). Warps are always full.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ccl_fast {

// Elements as they lie in memory. bfloat16 is the upper half of a float.
struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

}  // namespace ccl_fast

#ifdef CCL_FAST_EMULATE

#include "emulation.h"

#else

#include <cuda_runtime.h>

#include <stdexcept>

namespace ccl_fast {

// ---- Host.

inline const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// The launch's own error, 0 for none; nothing is left behind for the next caller of cudaGetLastError.
inline int take(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return static_cast<int>(error);
}

// Makes the device the current one, and the previous one again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    int error = take(cudaGetDevice(&previous_));
    if (!error && index != previous_) error = take(cudaSetDevice(index));
    if (error) throw std::runtime_error(error_string(error));
  }
  ~DeviceGuard() { (void)cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

#ifdef __CUDACC__

// 0, or an error for error_string. The arguments are converted to the kernel's parameter types.
template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, int block_threads, size_t shared_bytes, void* stream, A... args) {
  if (!grid.x || !grid.y || !grid.z) return 0;
  if (shared_bytes > 48 * 1024) {  // beyond what every kernel may have without asking
    int error =
        take(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
    if (error) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(block_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return take(cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

// ---- Scalars.

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(bfloat16_t x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float to_float(half_t x) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
}

__device__ __forceinline__ uint32_t to_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }

// To nearest, ties to even; beyond 65519 infinite.
__device__ __forceinline__ half_t to_half(float x) {
  half_t value;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
  return value;
}

// ---- Memory.

// The block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

// 16 bytes, aligned to 16.
__device__ __forceinline__ uint4 load_128(const void* address) { return *static_cast<const uint4*>(address); }

// Adds, and returns what was there before.
__device__ __forceinline__ int atomic_add(int* address, int value) { return atomicAdd(address, value); }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes to shared memory; zeros if not valid, and then `global` is not read.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the N latest.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- The block and the warp.

__device__ __forceinline__ void barrier() { __syncthreads(); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
__device__ __forceinline__ bool warp_any(bool value) { return __any_sync(0xffffffffu, value); }

__device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ double shuffle_xor(double x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8], halfs in, floats out.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif  // __CUDACC__

}  // namespace ccl_fast

#endif  // CCL_FAST_EMULATE
