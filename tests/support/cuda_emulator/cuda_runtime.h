// Just enough of CUDA to run csrc/cuda/*.cu on a CPU, as C++: each thread of a block is a fiber, blocks run
// one after the other. __syncthreads and shuffles switch fibers; between the block's barriers a warp runs as
// far as it can before the next one starts. The order of warps and lanes is forwards or backwards
// (awnet_emulator_order), so that a missing barrier shows as a wrong or a different result.
//
// Compiled with this folder before CUDA's own on the include path; see tests/support/cuda_on_cpu.py.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "the emulator refuses this launch"; }

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

constexpr size_t kStack = 64 * 1024;

// A thread of the block at hand. Fibers live as long as the process and serve one launch after the other;
// setjmp switches them, since swapcontext, which starts them, costs two system calls.
struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  bool at_block = false, at_warp = false;  // the barrier where it waits
  int blocks = 0, warps = 0;               // barriers reached
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline ucontext_t caller;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<float> mailbox[2];
inline int current = 0;
inline bool backwards = false;
inline int diverged = 0;  // blocks in which a thread skipped a barrier that another one reached

inline void leave() {
  if (_setjmp(fibers[current]->here) == 0) _longjmp(scheduler, 1);
}

inline void live() {
  for (;;) {
    body();
    fibers[current]->done = true;
    leave();
  }
}

// All threads of the block come here before one continues.
inline void block_barrier() {
  ++fibers[current]->blocks;
  fibers[current]->at_block = true;
  leave();
}

// All threads of the warp come here before one continues.
inline void warp_barrier() {
  ++fibers[current]->warps;
  fibers[current]->at_warp = true;
  leave();
}

// Goes on with a thread until its next barrier or its end.
inline void resume(int thread) {
  current = thread;
  Fiber& fiber = *fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, live, 0);
  swapcontext(&caller, &fiber.start);
}

// Runs a warp until all its threads are at the block's barrier or done.
inline void run_warp(int first, int count) {
  const int last = std::min(first + 32, count);
  for (bool busy = true; busy;) {
    busy = false;
    for (int k = first; k < last; ++k) {
      const int i = backwards ? last - 1 - (k - first) : k;
      Fiber& fiber = *fibers[i];
      if (fiber.done || fiber.at_block) continue;
      fiber.at_warp = false;
      threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
      resume(i);
      busy |= fiber.at_warp;
    }
  }
}

inline void run(dim3 grid, dim3 threads, std::function<void()> kernel) {
  const int count = static_cast<int>(threads.x * threads.y * threads.z);
  while (static_cast<int>(fibers.size()) < count) {
    fibers.push_back(std::make_unique<Fiber>());
    fibers.back()->stack.reset(new char[kStack]);
  }
  for (auto& box : mailbox) box.assign(count, 0.0f);
  body = std::move(kernel);
  blockDim = threads;
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      for (int i = 0; i < count; ++i) {
        fibers[i]->done = fibers[i]->at_block = fibers[i]->at_warp = false;
        fibers[i]->blocks = fibers[i]->warps = 0;
      }
      for (bool busy = true; busy;) {
        busy = false;
        for (int first = 0; first < count; first += 32) {
          run_warp(backwards ? (count - 1) / 32 * 32 - first : first, count);
        }
        for (int i = 0; i < count; ++i) {
          fibers[i]->at_block = false;
          busy |= !fibers[i]->done;
        }
      }
      for (int i = 1; i < count; ++i) {
        const Fiber &own = *fibers[i], &other = *fibers[i - 1];
        if (own.blocks != other.blocks || (i % 32 != 0 && own.warps != other.warps)) {
          ++diverged;
          break;
        }
      }
    }
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::block_barrier(); }

// The mailboxes take turns, so that no thread overwrites what another has yet to read.
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  auto& box = emulator::mailbox[emulator::fibers[emulator::current]->warps % 2];
  const int own = emulator::current;
  box[own] = value;
  emulator::warp_barrier();
  return box[own ^ mask];
}

// Blocks run one after the other.
inline void __threadfence() {}
inline int atomicAdd(int* to, int value) {
  const int before = *to;
  *to += value;
  return before;
}
inline float __ldcg(const float* from) { return *from; }

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

using std::min;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const dim3 grid = config->gridDim, threads = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || threads.x * threads.y * threads.z > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  emulator::run(grid, threads, [=] { kernel(arguments...); });
  return cudaSuccess;
}
