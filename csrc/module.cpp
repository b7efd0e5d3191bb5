// The Python module awnet._C: loading it registers the operators; it tells how it was built.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include "ops.h"

// awnet.ops.native looks for this text in the file before it loads it.
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
        info["cuda"] = false;
        return info;
      },
      "How this module was built and what it found: torch, compiler, instruction_set, threads, cuda.");
}
