// The Python module awnet._C. Importing it registers the operators; its functions describe the build.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include "cpu/amx/tiles.h"
#include "cpu/passes.h"
#if defined(AWNET_CUDA)
#include "cuda/launch.h"
#endif

// awnet.ops.backends.native looks for this text in the file before it loads it. When an operator's schema
// changes, the number of the interface changes here and there.
extern "C" __attribute__((visibility("default"), used)) const char awnet_built_for[] =
    "awnet-built-for-torch=" AWNET_TORCH_VERSION ";interface=5;";

namespace {

#if defined(_OPENMP)
constexpr bool kParallel = true;
#else
constexpr bool kParallel = false;
#endif

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = AWNET_TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["instruction_set"] = awnet::cpu::instruction_set();
  info["threads"] = at::get_parallel_info();
  info["parallel"] = kParallel;
#if defined(AWNET_CUDA)
  info["cuda"] = AWNET_CUDA;
#else
  info["cuda"] = false;
#endif
  return info;
}

pybind11::object self_test() {
#if defined(AWNET_CUDA)
  const char* const error = awnet::cuda::awnet_cuda_self_test();
#else
  const char* const error = "this build has no CUDA part";
#endif
  if (error == nullptr) return pybind11::none();
  return pybind11::str(error);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of awnet; importing this module registers torch.ops.awnet.*.";
  m.def("build_info", build_info,
        "How this module was built: torch, compiler, instruction_set, threads, parallel (False: compiled "
        "without OpenMP, so that the passes use one thread), cuda (the toolkit's version, or False without "
        "the CUDA part).");
  m.def("amx_obstacle", awnet::cpu::amx::obstacle,
        "Why this process cannot use AMX for bfloat16; an empty string where it can.");
  m.def("self_test", self_test,
        "Runs a small CUDA kernel on the current device. None if its result is right, else what failed.");
}
