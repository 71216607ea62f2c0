// Kernels that use each part of device.cuh alone, some of them wrongly; test_emulation.py says what must come of them.
// Compiled for the CPU by the emulation's build, and by nvcc, where the same functions run on the GPU.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <vector>

#include "device.cuh"

namespace py = pybind11;

namespace ccl_fast {
namespace {

// ---- Kernels.

__global__ void multiply_kernel(const half_t* a, const half_t* b, float* d) {
  const int lane = threadIdx.x, group = lane / 4, pair = 2 * (lane % 4);
  uint32_t fragment_a[4], fragment_b[2];
  auto two = [](half_t low, half_t high) { return static_cast<uint32_t>(low.bits) | uint32_t(high.bits) << 16; };
  for (int i = 0; i < 4; ++i) {
    const half_t* from = a + (group + 8 * (i % 2)) * 16 + pair + 8 * (i / 2);
    fragment_a[i] = two(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const half_t* from = b + (pair + 8 * i) * 8 + group;
    fragment_b[i] = two(from[0], from[8]);
  }
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = d[(group + 8 * (i / 2)) * 8 + pair + i % 2];
  mma_m16n8k16(sum, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(group + 8 * (i / 2)) * 8 + pair + i % 2] = sum[i];
}

// Copies four 8 x 8 matrices, one after the other in memory, to shared memory, and writes what ldmatrix gives each
// lane.
__global__ void ldmatrix_kernel(const uint4* rows, uint32_t* fragments, int skew) {
  const int lane = threadIdx.x;
  char* row = shared_memory() + 16 * lane;
  *reinterpret_cast<uint4*>(row) = load_128(rows + lane);
  warp_barrier();
  uint32_t r[4];
  ldmatrix_x4(r, row + skew);
  for (int i = 0; i < 4; ++i) fragments[4 * lane + i] = r[i];
}

// Two groups of a copy each; the first is used after waiting for all but the latest `WAIT` groups.
template <int WAIT>
__global__ void copy_kernel(const uint4* from, uint4* to, bool valid) {
  const int i = threadIdx.x;
  auto shared = reinterpret_cast<uint4*>(shared_memory());
  cp_async_16(shared + i, from + i, valid);
  cp_async_commit();
  cp_async_16(shared + blockDim.x + i, from + i, true);
  cp_async_commit();
  cp_async_wait<WAIT>();
  to[i] = shared[i];
}

// A pipeline of one buffer whose consumers may still read it when it is filled again.
__global__ void refill_kernel(const uint4* from, uint4* to, int rounds, bool guarded) {
  const int i = threadIdx.x, n = blockDim.x;
  auto shared = reinterpret_cast<uint4*>(shared_memory());
  for (int round = 0; round < rounds; ++round) {
    cp_async_16(shared + i, from + round * n + i, true);
    cp_async_commit();
    cp_async_wait<0>();
    barrier();
    to[round * n + i] = shared[(i + n / 2) % n];
    if (guarded) barrier();
  }
}

// Reverses the values of a block through shared memory.
__global__ void reverse_kernel(const int* from, int* to, bool guarded) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  auto shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = from[i];
  if (guarded) barrier();
  to[i] = shared[blockDim.x - 1 - threadIdx.x];
}

enum Divergence { NONE, SHUFFLE, RETURN, BARRIER, OTHER_BARRIER, WHOLE_WARP };

// `how` names what goes wrong, if anything: a whole warp may return before the others.
__global__ void diverge_kernel(int how, int* count) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (how == WHOLE_WARP && warp == 0) return;
  if (how == RETURN && lane == 5) return;
  if (how == SHUFFLE && lane < 16)
    atomic_add(count, shuffle_xor(1, 1));
  else
    atomic_add(count, warp_any(true));
  if (how == BARRIER && lane == 0) warp_barrier();
  if (how == OTHER_BARRIER && warp == 0)
    barrier();
  else
    barrier();
}

__global__ void reduce_kernel(const float* x, float* floats, double* doubles, int* integers, int* any) {
  const int i = threadIdx.x;
  float f = x[i];
  double d = x[i];
  int n = i;
  for (int mask = 16; mask; mask /= 2) {
    f += shuffle_xor(f, mask);
    d += shuffle_xor(d, mask);
    n += shuffle_xor(n, mask);
  }
  floats[i] = f;
  doubles[i] = d;
  integers[i] = n;
  any[i] = warp_any(x[i] > 0);
}

// Writes where the thread is, and counts the threads.
__global__ void positions_kernel(int* where, int* count) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  where[block * blockDim.x + threadIdx.x] = 10000 * blockIdx.z + 1000 * blockIdx.y + 100 * blockIdx.x + threadIdx.x;
  atomic_add(count, 1);
}

__global__ void poke_kernel(int byte) { shared_memory()[byte] = 1; }

__global__ void lower_and_higher_kernel(const float* a, const float* b, float* low, float* high, int n) {
  const int i = threadIdx.x;
  if (i < n) low[i] = fminf(a[i], b[i]), high[i] = fmaxf(a[i], b[i]);
}

template <class T>
__global__ void to_float_kernel(const T* from, float* to, int n) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n) to[i] = to_float(from[i]);
}

__global__ void to_half_kernel(const float* from, half_t* to, int n) {
  const int i = threadIdx.x + blockIdx.x * blockDim.x;
  if (i < n) to[i] = to_half(from[i]);
}

// ---- Their launches. An array comes as NumPy's and goes back in place.

void check(int error) {
  if (error) throw std::runtime_error(error_string(error));
}

#ifdef CCL_FAST_EMULATE

template <class T>
class Array {
 public:
  explicit Array(py::array array) : data_(static_cast<T*>(array.mutable_data())) {}
  operator T*() { return data_; }

 private:
  T* data_;
};

void synchronize() {}

#else

template <class T>
class Array {
 public:
  explicit Array(py::array array) : array_(std::move(array)) {
    check(cudaMalloc(&data_, array_.nbytes()));
    check(cudaMemcpy(data_, array_.data(), array_.nbytes(), cudaMemcpyHostToDevice));
  }
  ~Array() {
    (void)cudaMemcpy(array_.mutable_data(), data_, array_.nbytes(), cudaMemcpyDeviceToHost);
    (void)cudaFree(data_);
  }
  operator T*() { return data_; }

 private:
  py::array array_;
  T* data_ = nullptr;
};

void synchronize() { check(cudaDeviceSynchronize()); }

#endif

template <class... P, class... A>
void run(void (*kernel)(P...), dim3 grid, int threads, size_t shared_bytes, A&&... args) {
  DeviceGuard guard(0);
  check(launch(kernel, grid, threads, shared_bytes, nullptr, static_cast<P>(args)...));
  synchronize();
}

void multiply(py::array a, py::array b, py::array d) {
  run(multiply_kernel, 1, 32, 0, Array<half_t>(a), Array<half_t>(b), Array<float>(d));
}

void ldmatrix(py::array rows, py::array fragments, int skew) {
  run(ldmatrix_kernel, 1, 32, 512, Array<uint4>(rows), Array<uint32_t>(fragments), skew);
}

void copy(py::array from, py::array to, bool valid, int wait) {
  const int threads = static_cast<int>(from.nbytes() / 16);
  auto kernel = wait == 0 ? copy_kernel<0> : wait == 1 ? copy_kernel<1> : copy_kernel<2>;
  run(kernel, 1, threads, 32 * threads, Array<uint4>(from), Array<uint4>(to), valid);
}

void refill(py::array from, py::array to, int threads, bool guarded) {
  const int rounds = static_cast<int>(from.nbytes() / 16 / threads);
  run(refill_kernel, 1, threads, 16 * threads, Array<uint4>(from), Array<uint4>(to), rounds, guarded);
}

void reverse(py::array from, py::array to, int threads, bool guarded, size_t shared_bytes) {
  const int blocks = static_cast<int>(from.size()) / threads;
  run(reverse_kernel, blocks, threads, shared_bytes, Array<int>(from), Array<int>(to), guarded);
}

void diverge(int how, py::array count) { run(diverge_kernel, 1, 64, 0, how, Array<int>(count)); }

void reduce(py::array x, py::array floats, py::array doubles, py::array integers, py::array any) {
  const int threads = static_cast<int>(x.size());
  run(reduce_kernel, 1, threads, 0, Array<float>(x), Array<float>(floats), Array<double>(doubles), Array<int>(integers),
      Array<int>(any));
}

void positions(unsigned x, unsigned y, unsigned z, int threads, py::array where, py::array count) {
  run(positions_kernel, dim3(x, y, z), threads, 0, Array<int>(where), Array<int>(count));
}

void poke(int byte, size_t shared_bytes) { run(poke_kernel, 1, 32, shared_bytes, byte); }

void lower_and_higher(py::array a, py::array b, py::array low, py::array high) {
  run(lower_and_higher_kernel, 1, 32, 0, Array<float>(a), Array<float>(b), Array<float>(low), Array<float>(high),
      static_cast<int>(a.size()));
}

template <class T>
void convert(void (*kernel)(const T*, float*, int), py::array from, py::array to) {
  const int n = static_cast<int>(from.size());
  run(kernel, (n + 255) / 256, 256, 0, Array<T>(from), Array<float>(to), n);
}

void round_to_half(py::array from, py::array to) {
  const int n = static_cast<int>(from.size());
  run(to_half_kernel, (n + 255) / 256, 256, 0, Array<float>(from), Array<half_t>(to), n);
}

}  // namespace
}  // namespace ccl_fast

PYBIND11_MODULE(_selftest, module) {
  using namespace ccl_fast;
  module.def("multiply", multiply);
  module.def("ldmatrix", ldmatrix);
  module.def("copy", copy);
  module.def("refill", refill);
  module.def("reverse", reverse);
  module.def("diverge", diverge);
  module.def("reduce", reduce);
  module.def("positions", positions);
  module.def("poke", poke);
  module.def("lower_and_higher", lower_and_higher);
  module.def("float_of_half", [](py::array a, py::array b) { convert<half_t>(to_float_kernel, a, b); });
  module.def("float_of_bfloat16", [](py::array a, py::array b) { convert<bfloat16_t>(to_float_kernel, a, b); });
  module.def("float_of_double", [](py::array a, py::array b) { convert<double>(to_float_kernel, a, b); });
  module.def("round_to_half", round_to_half);
#ifdef CCL_FAST_EMULATE
  module.def("set_schedule", set_schedule);
  module.def("set_addition", set_addition);
#endif
}
