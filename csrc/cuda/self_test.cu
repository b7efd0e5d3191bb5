// A small kernel that shows that this module's machine code runs on the current device.
#include "device.h"

namespace awnet::cuda {
namespace {

__global__ void add_up(float* sum) {
  const float total = block_sum(static_cast<float>(threadIdx.x));
  if (threadIdx.x == 0) *sum = total;
}

}  // namespace

extern "C" const char* awnet_cuda_self_test() {
  float *device = nullptr, host = 0.0f;
  cudaError_t error = cudaMalloc(&device, sizeof(float));
  if (error == cudaSuccess) {
    add_up<<<1, kThreads>>>(device);
    error = cudaGetLastError();
    if (error == cudaSuccess) error = cudaMemcpy(&host, device, sizeof(float), cudaMemcpyDeviceToHost);
    cudaFree(device);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
  return host == kThreads * (kThreads - 1) / 2 ? nullptr : "a kernel ran and gave a wrong sum";
}

}  // namespace awnet::cuda
