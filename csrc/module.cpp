// The Python module awnet._C: loading it registers the operators; it tells how it was built.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include "cpu/amx/amx.h"
#include "ops.h"
#if defined(AWNET_CUDA)
#include "cuda/launch.h"
#endif

// awnet.ops.backends.native looks for this text in the file before it loads it.
extern "C" __attribute__((visibility("default"), used)) const char awnet_built_for[] =
    "awnet-built-for-torch=" AWNET_TORCH_VERSION ";";

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of awnet; importing this module registers torch.ops.awnet.*.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch"] = AWNET_TORCH_VERSION;
        info["compiler"] = __VERSION__;
        info["instruction_set"] = awnet::cpu::instruction_set();
        info["threads"] = at::get_parallel_info();
#if defined(_OPENMP)
        info["parallel"] = true;
#else
        info["parallel"] = false;
#endif
#if defined(AWNET_CUDA)
        info["cuda"] = AWNET_CUDA;
#else
        info["cuda"] = false;
#endif
        return info;
      },
      "How this module was built and what it found: torch, compiler, instruction_set, threads, parallel "
      "(False: compiled without OpenMP, the passes use one thread), cuda (the toolkit's version, False "
      "without "
      "the CUDA part).");
  m.def(
      "amx_obstacle", [] { return awnet::cpu::amx::obstacle(); },
      "Why this process cannot use AMX for bfloat16; an empty string where it can.");
  m.def(
      "self_test",
      []() -> pybind11::object {
#if defined(AWNET_CUDA)
        const char* error = awnet::cuda::awnet_cuda_self_test();
#else
        const char* error = "this build has no CUDA part";
#endif
        return error == nullptr ? pybind11::none() : pybind11::object(pybind11::str(error));
      },
      "Runs a small CUDA kernel on the current device: None if it gave the right result, else what failed.");
}
