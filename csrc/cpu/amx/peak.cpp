// The rate of AMX tile products with operands in the first-level cache: the ceiling of the benchmarks.
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "amx.h"

namespace awnet::cpu::amx {
namespace {

constexpr int64_t kSteps = 1000;                          // between two looks at the clock
constexpr double kFlopsPerStep = 4 * 2.0 * 16 * 16 * 32;  // four products of [16][32] and [32][16]

// Steps of 2 x 2 tiles, four loads and four products each, as in a convolution.
void run_steps([[maybe_unused]] const Bits* cells) {
#if defined(__x86_64__)
  for (int64_t i = 0; i < kSteps; ++i) {
    asm volatile(
        "tileloadd (%0,%1,1), %%tmm4\n\t"
        "tileloadd 1024(%0,%1,1), %%tmm5\n\t"
        "tileloadd 2048(%0,%1,1), %%tmm6\n\t"
        "tileloadd 3072(%0,%1,1), %%tmm7\n\t"
        "tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\t"
        "tdpbf16ps %%tmm7, %%tmm4, %%tmm1\n\t"
        "tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n\t"
        "tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::"r"(cells),
        "r"(int64_t{64})
        : "memory");
  }
#endif
}

}  // namespace

// Operations per second of all threads together, from the first one's start to the last one's end.
double peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  struct Run {
    Clock::time_point start, end;
    int64_t steps = 0;
  };
  const Kernels& tiles = kernels(false);
  std::vector<Run> runs(at::get_num_threads());
  at::parallel_for(0, static_cast<int64_t>(runs.size()), 1, [&](int64_t begin, int64_t end) {
    alignas(64) Bits cells[4 * kCell];
    std::fill(cells, cells + 4 * kCell, Bits{0x3f80});  // ones
    tiles.configure();
    for (int64_t thread = begin; thread < end; ++thread) {
      Run& run = runs[thread];
      run.start = Clock::now();
      do {
        run_steps(cells);
        run.steps += kSteps;
        run.end = Clock::now();
      } while (std::chrono::duration<double>(run.end - run.start).count() < seconds);
    }
    tiles.release();
  });
  Run all = runs.front();
  all.steps = 0;
  for (const Run& run : runs) {
    all.start = std::min(all.start, run.start);
    all.end = std::max(all.end, run.end);
    all.steps += run.steps;
  }
  return all.steps * kFlopsPerStep / std::chrono::duration<double>(all.end - all.start).count();
}

}  // namespace awnet::cpu::amx
