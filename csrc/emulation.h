// The GPU of device.cuh on the CPU, for tests. A block's threads are fibres of one operating-system thread: each runs
// until it meets a collective; once all 32 lanes of a warp have met the same one, it is carried out for all of them.
//
// What a GPU leaves undefined is made visible. Shared memory, and the target of a copy until it is waited for, hold
// NaN; divergence, misaligned or foreign addresses and writes past the end of shared memory are errors, which `launch`
// returns; `set_schedule` changes the order in which blocks, warps and lanes run, so that a missing barrier changes
// the result. Blocks run one after the other, so a block must not wait for another. How tensor cores add is not documented;
// `set_addition` chooses between rounding and the truncation that GPUs have been seen to do.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace ccl_fast {

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

namespace emulation {

constexpr int LANES = 32;
constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t MARGIN = 4096;  // NaN before and after the shared memory
constexpr size_t MOST_SHARED_BYTES = 227 << 10;

// An instruction that all lanes of a warp (or, without `action`, all threads of a block) carry out together.
struct Collective {
  const char* name;
  int line;                               // of the kernel source
  void (*action)(void* const* operands);  // of the 32 lanes
};

struct Copy {
  char* shared;
  const char* global;
  bool valid;
  int group;
};

enum class State { ready, waiting, returned };

struct Fibre {
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  jmp_buf context;
  bool started = false;
  State state = State::ready;
  Collective at = {};
  void* operands = nullptr;
  std::vector<Copy> copies;  // not yet carried out
  int groups = 0;            // of copies, closed
};

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

class Machine {
 public:
  int seed = 0;
  int addends = 0;
  std::string error;

  // Returns whether all went well; if not, `error` says what did not.
  bool run(const std::function<void()>& kernel, dim3 grid, int threads, size_t shared_bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
      prepare(kernel, grid, threads, shared_bytes);
      for (unsigned i : arranged(size_t(grid.x) * grid.y * grid.z)) {
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        run_block();
      }
      return true;
    } catch (const std::exception& exception) {
      error = "emulation: " + where_ + exception.what();
      // What was left in the middle of a kernel starts anew, on the same stack.
      for (Fibre& fibre : fibres_) fibre.started = fibre.started && fibre.state == State::returned;
      return false;
    }
  }

  // Called by a fibre: waits until the other lanes are here and the collective has been carried out.
  void meet(Collective collective, void* operands = nullptr) {
    running_->at = collective;
    running_->operands = operands;
    running_->state = State::waiting;
    suspend();
  }

  Fibre& running() { return *running_; }
  char* shared() { return shared_; }

  void check_shared(const void* address, const char* name) {
    auto bytes = static_cast<const char*>(address);
    if (bytes < shared_ || bytes + 16 > shared_ + shared_bytes_) fail(std::string(name) + " outside shared memory");
    check_aligned(address, name);
  }

  static void check_aligned(const void* address, const char* name) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail(std::string(name) + " not aligned to 16 bytes");
  }

 private:
  void prepare(const std::function<void()>& kernel, dim3 grid, int threads, size_t shared_bytes) {
    where_.clear();
    if (threads <= 0 || threads > 1024 || threads % LANES) fail("a block has 32, 64, ... 1024 threads");
    if (shared_bytes > MOST_SHARED_BYTES) fail("a block has at most 227 KiB of shared memory");
    if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("the grid is too large");
    kernel_ = &kernel;
    random_ = 0x9e3779b97f4a7c15u * (uint64_t(seed) + 1);
    gridDim = grid;
    blockDim = dim3(threads);
    if (fibres_.size() < size_t(threads)) fibres_.resize(threads);
    storage_.resize(128 + MARGIN + shared_bytes + MARGIN);
    shared_ = storage_.data() + MARGIN;
    shared_ += -reinterpret_cast<uintptr_t>(shared_) % 128;
    shared_bytes_ = shared_bytes;
  }

  void run_block() {
    where_ = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
             std::to_string(blockIdx.z) + "): ";
    std::memset(storage_.data(), 0xFF, storage_.size());
    for (Fibre& fibre : fibres_) {
      fibre.state = State::ready;
      fibre.copies.clear();
      fibre.groups = 0;
    }
    std::vector<unsigned> ready = arranged(blockDim.x / LANES), waiting;
    while (!ready.empty()) {
      // At random, but with some patience, so that a warp also gets far ahead of the others.
      if (seed > 0 && draw(8) == 0) std::swap(ready[0], ready[draw(ready.size())]);
      const State state = advance(ready[0]);
      if (state == State::ready) continue;
      if (state == State::waiting) waiting.push_back(ready[0]);
      ready.erase(ready.begin());
      if (ready.empty()) {
        release(waiting);
        ready.swap(waiting);
      }
    }
    check_untouched(storage_.data(), shared_);
    check_untouched(shared_ + shared_bytes_, storage_.data() + storage_.size());
  }

  // Runs each lane of the warp to its next collective, and carries that out.
  State advance(unsigned warp) {
    Fibre* lanes = &fibres_[warp * LANES];
    for (unsigned lane : arranged(LANES)) {
      threadIdx = dim3(warp * LANES + lane, 0, 0);
      resume(lanes[lane]);
      if (exception_) std::rethrow_exception(std::exchange(exception_, nullptr));
    }
    void* operands[LANES];
    for (int i = 0; i < LANES; ++i) {
      check_same(warp * LANES, warp * LANES + i);
      operands[i] = lanes[i].operands;
    }
    if (lanes[0].state == State::returned) return State::returned;
    if (!lanes[0].at.action) return State::waiting;
    lanes[0].at.action(operands);
    for (int i = 0; i < LANES; ++i) lanes[i].state = State::ready;
    return State::ready;
  }

  // Lets the warps go on from the barrier that all have reached which have not returned.
  void release(std::vector<unsigned>& warps) {
    for (unsigned warp : warps) check_same(warps[0] * LANES, warp * LANES);
    for (unsigned warp : warps)
      for (int i = 0; i < LANES; ++i) fibres_[warp * LANES + i].state = State::ready;
  }

  // Two threads that must be at the same place are.
  void check_same(unsigned first, unsigned second) {
    const Fibre &a = fibres_[first], &b = fibres_[second];
    const bool returned = a.state == State::returned && b.state == State::returned;
    if (returned || (a.state == b.state && a.at.action == b.at.action && a.at.line == b.at.line)) return;
    auto describe = [](unsigned thread, const Fibre& fibre) {
      return "thread " + std::to_string(thread) +
             (fibre.state == State::returned
                  ? " has returned"
                  : " is at " + std::string(fibre.at.name) + " of line " + std::to_string(fibre.at.line));
    };
    fail("divergence: " + describe(first, a) + ", " + describe(second, b));
  }

  void check_untouched(const char* begin, const char* end) {
    const char* byte = std::find_if(begin, end, [](char c) { return c != '\xFF'; });
    if (byte != end)
      fail("a write at byte " + std::to_string(byte - shared_) + " of " + std::to_string(shared_bytes_) +
           " of shared memory");
  }

  // 0, 1, ... count - 1 in the order of the schedule.
  std::vector<unsigned> arranged(size_t count) {
    std::vector<unsigned> order(count);
    std::iota(order.begin(), order.end(), 0u);
    if (seed < 0) std::reverse(order.begin(), order.end());
    if (seed > 0)
      for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[draw(i)]);
    return order;
  }

  size_t draw(size_t count) {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_ % count;
  }

  // A fibre is entered once, by its ucontext, and then runs one kernel after the other: a switch by setjmp and
  // longjmp needs no system call. Not inlined, so that setjmp does not spoil the code of the kernels.
  __attribute__((noinline)) void resume(Fibre& fibre) {
    running_ = &fibre;
    if (_setjmp(scheduler_)) return;
    if (fibre.started) _longjmp(fibre.context, 1);
    fibre.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibre.stack.get();
    context.uc_stack.ss_size = STACK_BYTES;
    context.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);  // makecontext hands over nothing wider than int
    makecontext(&context, reinterpret_cast<void (*)()>(&Machine::enter), 2, static_cast<unsigned>(address),
                static_cast<unsigned>(address >> 32));
    setcontext(&context);
  }

  __attribute__((noinline)) void suspend() {
    if (!_setjmp(running_->context)) _longjmp(scheduler_, 1);
  }

  static void enter(unsigned low, unsigned high) {
    auto& machine = *reinterpret_cast<Machine*>(uintptr_t(high) << 32 | low);
    for (;;) {
      try {
        (*machine.kernel_)();
      } catch (...) {
        machine.exception_ = std::current_exception();
      }
      machine.running_->state = State::returned;
      machine.suspend();
    }
  }

  std::mutex mutex_;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<Fibre> fibres_;  // kept, with their stacks, from block to block
  std::string where_;
  std::vector<char> storage_;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  uint64_t random_ = 0;
  jmp_buf scheduler_;
  Fibre* running_ = nullptr;
  std::exception_ptr exception_;
};

inline Machine machine;

template <class Operands>
void warp_collective(const char* name, int line, Operands& mine, void (*action)(void* const*)) {
  machine.meet({name, line, action}, &mine);
}

template <class T>
T& of(void* operands) {
  return *static_cast<T*>(operands);
}

template <class To, class From>
To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
T shuffle_xor(T x, int mask, int line) {
  struct Operands {
    T x;
    int mask;
    T result;
  } mine = {x, mask, {}};
  warp_collective("shuffle_xor", line, mine, [](void* const* lanes) {
    for (int i = 0; i < LANES; ++i) {
      auto& lane = of<Operands>(lanes[i]);
      if (lane.mask < 0 || lane.mask >= LANES) fail("the mask of shuffle_xor is beyond the warp");
      lane.result = of<Operands>(lanes[i ^ lane.mask]).x;
    }
  });
  return mine.result;
}

// sum + a[0] b[0] + a[1] b[stride] + ..., `count` products. All are aligned to the largest, and what lies below the last
// of its 24 digits is cut off, and so it is from the result.
inline float add_truncated(float sum, const float* a, const float* b, int stride, int count) {
  double terms[17] = {sum}, largest = std::fabs(sum);
  for (int k = 0; k < count; ++k) {
    terms[k + 1] = double(a[k]) * b[k * stride];
    largest = max(largest, std::fabs(terms[k + 1]));
  }
  if (largest == 0.0 || !isfinite(largest)) return sum + float(largest);
  const double last = std::ldexp(1.0, std::ilogb(largest) - 23);
  double total = 0.0;  // in units of the last digit
  for (int k = 0; k <= count; ++k) total += std::trunc(terms[k] / last);
  const double carry = std::fabs(total) < 0x1p24 ? 1.0 : std::ldexp(1.0, std::ilogb(total) - 23);
  return float(std::trunc(total / carry) * carry * last);
}

}  // namespace emulation

// ---- Host.

// 0: forward; -1: reverse; above 0: at random, with this seed.
inline void set_schedule(int seed) { emulation::machine.seed = seed; }

// Of products by tensor cores, so many to the sum at a time, each cut off at the last digit of the largest of them and of
// the sum; a divisor of 16. 0: rounded, as floats are.
inline void set_addition(int addends) { emulation::machine.addends = addends; }

inline const char* error_string(int error) { return error ? emulation::machine.error.c_str() : "no error"; }

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, int block_threads, size_t shared_bytes, void*, A... args) {
  if (!grid.x || !grid.y || !grid.z) return 0;
  const std::function<void()> thread = [&] { kernel(static_cast<P>(args)...); };
  return emulation::machine.run(thread, grid, block_threads, shared_bytes) ? 0 : 1;
}

// ---- Scalars.

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(bfloat16_t x) { return emulation::bits_of<float>(uint32_t(x.bits) << 16); }
inline float to_float(half_t x) {
  // The exponent's bias differs by 112; the multiplication also makes subnormals normal.
  float magnitude = emulation::bits_of<float>(uint32_t(x.bits & 0x7fff) << 13) * 0x1p112f;
  uint32_t bits = emulation::bits_of<uint32_t>(magnitude);
  if (magnitude >= 65536.0f) bits |= 0x7f800000u;  // infinite, or not a number
  return emulation::bits_of<float>(bits | (uint32_t(x.bits & 0x8000) << 16));
}

// A GPU takes every NaN for a quiet one, so these pass it over; those of C need not.
inline float fminf(float a, float b) { return a < b || isnan(b) ? a : b; }
inline float fmaxf(float a, float b) { return a > b || isnan(b) ? a : b; }

inline uint32_t to_bits(float x) { return emulation::bits_of<uint32_t>(x); }
inline float from_bits(uint32_t bits) { return emulation::bits_of<float>(bits); }

inline half_t to_half(float x) {
  const uint32_t bits = emulation::bits_of<uint32_t>(x);
  const uint16_t sign = bits >> 16 & 0x8000;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};  // as the GPU does, whatever the payload
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
  // Below the smallest normal half, an addition rounds to multiples of 2^-24.
  if (magnitude < 0x1p-14f) return {uint16_t(sign | (emulation::bits_of<uint32_t>(magnitude + 0.5f) - 0x3f000000u))};
  const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + (bits >> 13 & 1);  // 13 bits go, ties to even
  return {uint16_t(sign | ((rounded >> 13) - (112u << 10)))};
}

// ---- Memory.

inline char* shared_memory() { return emulation::machine.shared(); }

inline uint4 load_128(const void* address) {
  emulation::Machine::check_aligned(address, "load_128");
  uint4 value;
  std::memcpy(&value, address, sizeof(value));
  return value;
}

inline int atomic_add(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::machine.check_shared(shared, "the target of cp_async_16");
  emulation::Machine::check_aligned(global, "the source of cp_async_16");
  std::memset(shared, 0xFF, 16);
  auto& fibre = emulation::machine.running();
  fibre.copies.push_back({static_cast<char*>(shared), static_cast<const char*>(global), valid, fibre.groups});
}

inline void cp_async_commit() { ++emulation::machine.running().groups; }

template <int N>
void cp_async_wait() {
  auto& fibre = emulation::machine.running();
  size_t done = 0;
  for (; done < fibre.copies.size() && fibre.copies[done].group < fibre.groups - N; ++done) {
    const emulation::Copy& copy = fibre.copies[done];
    if (copy.valid)
      std::memcpy(copy.shared, copy.global, 16);
    else
      std::memset(copy.shared, 0, 16);
  }
  fibre.copies.erase(fibre.copies.begin(), fibre.copies.begin() + done);
}

// ---- The block and the warp. `line` is the caller's.

inline void barrier(int line = __builtin_LINE()) { emulation::machine.meet({"barrier", line, nullptr}); }

inline void warp_barrier(int line = __builtin_LINE()) {
  emulation::machine.meet({"warp_barrier", line, [](void* const*) {}});
}

inline bool warp_any(bool value, int line = __builtin_LINE()) {
  emulation::warp_collective("warp_any", line, value, [](void* const* lanes) {
    bool any = false;
    for (int i = 0; i < emulation::LANES; ++i) any |= emulation::of<bool>(lanes[i]);
    for (int i = 0; i < emulation::LANES; ++i) emulation::of<bool>(lanes[i]) = any;
  });
  return value;
}

inline float shuffle_xor(float x, int mask, int line = __builtin_LINE()) {
  return emulation::shuffle_xor(x, mask, line);
}
inline int shuffle_xor(int x, int mask, int line = __builtin_LINE()) { return emulation::shuffle_xor(x, mask, line); }
inline double shuffle_xor(double x, int mask, int line = __builtin_LINE()) {
  return emulation::shuffle_xor(x, mask, line);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, int line = __builtin_LINE()) {
  struct Operands {
    uint32_t* r;
    const void* row;
  } mine = {r, shared};
  emulation::warp_collective("ldmatrix_x4", line, mine, [](void* const* lanes) {
    using emulation::of;
    for (int i = 0; i < emulation::LANES; ++i)
      emulation::machine.check_shared(of<Operands>(lanes[i]).row, "a row of ldmatrix_x4");
    for (int lane = 0; lane < emulation::LANES; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        auto row = static_cast<const char*>(of<Operands>(lanes[8 * matrix + lane / 4]).row);
        std::memcpy(&of<Operands>(lanes[lane]).r[matrix], row + 4 * (lane % 4), 4);
      }
  });
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], int line = __builtin_LINE()) {
  struct Operands {
    float* d;
    const uint32_t *a, *b;
  } mine = {d, a, b};
  emulation::warp_collective("mma_m16n8k16", line, mine, [](void* const* lanes) {
    const int addends = emulation::machine.addends;
    float a[16][16], b[16][8], d[16][8] = {};
    auto unpack = [](uint32_t pair, float& low, float& high) {
      low = to_float(half_t{uint16_t(pair)});
      high = to_float(half_t{uint16_t(pair >> 16)});
    };
    for (int lane = 0; lane < emulation::LANES; ++lane) {
      const auto& mine = emulation::of<Operands>(lanes[lane]);
      const int group = lane / 4, pair = 2 * (lane % 4);
      for (int i = 0; i < 4; ++i) {
        float* to = &a[group + 8 * (i % 2)][pair + 8 * (i / 2)];
        unpack(mine.a[i], to[0], to[1]);
      }
      for (int i = 0; i < 2; ++i) unpack(mine.b[i], b[pair + 8 * i][group], b[pair + 8 * i + 1][group]);
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < emulation::LANES; ++lane) {
      const auto& mine = emulation::of<Operands>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        if (!addends) mine.d[i] += d[row][column];
        for (int k = 0; addends && k < 16; k += addends)
          mine.d[i] = emulation::add_truncated(mine.d[i], &a[row][k], &b[k][column], 8, addends);
      }
    }
  });
}

}  // namespace ccl_fast
