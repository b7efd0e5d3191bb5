// The rate of AMX tile products with operands in the first-level cache: the ceiling of the benchmarks.
#include <ATen/Parallel.h>
#include <torch/library.h>

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

// Operations per second of all threads together.
double peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  const Kernels& tiles = kernels(false);
  std::vector<double> rates(at::get_num_threads());
  at::parallel_for(0, static_cast<int64_t>(rates.size()), 1, [&](int64_t begin, int64_t end) {
    alignas(64) Bits cells[4 * kCell];
    std::fill(cells, cells + 4 * kCell, Bits{0x3f80});  // ones
    tiles.configure();
    for (int64_t thread = begin; thread < end; ++thread) {
      const auto start = Clock::now();
      int64_t steps = 0;
      double elapsed = 0;
      do {
        run_steps(cells);
        steps += kSteps;
        elapsed = std::chrono::duration<double>(Clock::now() - start).count();
      } while (elapsed < seconds);
      rates[thread] = steps * kFlopsPerStep / elapsed;
    }
    tiles.release();
  });
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(awnet, m) { m.def("amx_peak(float seconds) -> float", &peak); }

}  // namespace awnet::cpu::amx
