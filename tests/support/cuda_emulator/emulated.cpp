// All kernels in one library for the CPU. self_test.cu needs a real device.
#include "../../../csrc/cuda/apply.cu"
#include "../../../csrc/cuda/coefficients.cu"
#include "../../../csrc/cuda/eval_backward.cu"
#include "../../../csrc/cuda/propagate.cu"
#include "../../../csrc/cuda/reduce.cu"
#include "../../../csrc/cuda/statistics.cu"

extern "C" void awnet_emulator_order(int backwards) { emulator::backwards = backwards != 0; }
extern "C" int awnet_emulator_diverged() { return emulator::diverged; }
