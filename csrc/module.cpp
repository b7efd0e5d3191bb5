// The Python module awnet._C. Importing it registers the operators; its functions describe the build. It uses
// Python's C API: pybind11 alone took ten seconds to compile.
#define PY_SSIZE_T_CLEAN
#include <Python.h>
// Python.h comes first, as its documentation requires.
#include <ATen/Parallel.h>

#include <string>

#include "cpu/amx/tiles.h"
#include "cpu/passes.h"
#if defined(AWNET_CUDA)
#include "cuda/launch.h"
#endif

// awnet.ops.backends.native looks for this text in the file before it loads it. When an operator's schema
// changes, the number of the interface changes here and there.
extern "C" __attribute__((visibility("default"), used)) const char awnet_built_for[] =
    "awnet-built-for-torch=" AWNET_TORCH_VERSION ";interface=2;";

namespace {

#if defined(_OPENMP)
constexpr bool kParallel = true;
#else
constexpr bool kParallel = false;
#endif

PyObject* build_info(PyObject*, PyObject*) {
  const std::string threads = at::get_parallel_info();
#if defined(AWNET_CUDA)
  PyObject* const cuda = PyUnicode_FromString(AWNET_CUDA);
#else
  PyObject* const cuda = PyBool_FromLong(0);
#endif
  // "N" takes over the reference
  return Py_BuildValue("{s:s,s:s,s:s,s:s#,s:N,s:N}", "torch", AWNET_TORCH_VERSION, "compiler", __VERSION__,
                       "instruction_set", awnet::cpu::instruction_set(), "threads", threads.data(),
                       static_cast<Py_ssize_t>(threads.size()), "parallel", PyBool_FromLong(kParallel),
                       "cuda", cuda);
}

PyObject* amx_obstacle(PyObject*, PyObject*) {
  return PyUnicode_FromString(awnet::cpu::amx::obstacle().c_str());
}

PyObject* self_test(PyObject*, PyObject*) {
#if defined(AWNET_CUDA)
  const char* const error = awnet::cuda::awnet_cuda_self_test();
#else
  const char* const error = "this build has no CUDA part";
#endif
  if (error == nullptr) Py_RETURN_NONE;
  return PyUnicode_FromString(error);
}

PyMethodDef functions[] = {
    {"build_info", build_info, METH_NOARGS,
     "build_info() -> dict\n\nHow this module was built: torch, compiler, instruction_set, threads, parallel "
     "(False: compiled without OpenMP, so that the passes use one thread), cuda (the toolkit's version, or "
     "False without the CUDA part)."},
    {"amx_obstacle", amx_obstacle, METH_NOARGS,
     "amx_obstacle() -> str\n\nWhy this process cannot use AMX for bfloat16; an empty string where it can."},
    {"self_test", self_test, METH_NOARGS,
     "self_test() -> str | None\n\nRuns a small CUDA kernel on the current device. None if its result is "
     "right, else what failed."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                          "_C",
                          "Native kernels of awnet; importing this module registers torch.ops.awnet.*.",
                          -1,
                          functions,
                          nullptr,
                          nullptr,
                          nullptr,
                          nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
