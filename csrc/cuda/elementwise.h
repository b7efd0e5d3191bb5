// Drives an operation over every value of images; used by apply.cu and propagate.cu:
//
//   using Value               the images' dtype
//   kUnroll                   accesses of each image that a thread has in flight
//   Inputs<V>                 what it reads for V neighboring values
//   Coefficients<V>           what it reads for V neighboring [B, C] entries
//   read<V>(i)                -> Inputs<V>, from value i on
//   coefficients<V>(entry)    -> Coefficients<V>, from that entry on
//   write<V>(i, inputs, of)   computes and stores, where of(j) gives value j's Coefficients<1>, j = 0, …, V -
//   1
#pragma once

#include "device.h"
#include "layout.h"

namespace awnet::cuda {

// Planes: the values in one line, whatever their shape. kWhole: no access straddles two planes.
template <int V, bool kWhole, class Operation>
__global__ void __launch_bounds__(kThreads) over_planes(Operation op, int64_t total, uint32_t pixels) {
  constexpr int kUnroll = Operation::kUnroll;
  const int64_t base = int64_t{blockIdx.x} * (kThreads * kUnroll * V);
  const int64_t plane = base / pixels;
  const uint32_t offset = static_cast<uint32_t>(base - plane * pixels);
  typename Operation::template Inputs<V> inputs[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t i = base + (k * kThreads + threadIdx.x) * V;
    if (i + V <= total) inputs[k] = op.template read<V>(i);
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const uint32_t local = offset + (k * kThreads + threadIdx.x) * V;
    const int64_t i = base + (local - offset);
    if (i >= total) return;
    int64_t entry = plane + local / pixels;
    auto coeffs = op.template coefficients<1>(entry);
    if constexpr (kWhole) {
      op.template write<V>(i, inputs[k], [&](int) { return coeffs; });
    } else {
      uint32_t left = pixels - local % pixels;  // values of the plane from here on
      auto next = [&](int) {
        if (left == 0) {
          coeffs = op.template coefficients<1>(++entry);
          left = pixels;
        }
        --left;
        return coeffs;
      };
      if (i + V <= total) {
        op.template write<V>(i, inputs[k], next);
      } else {
        for (int64_t tail = i; tail < total; ++tail) {
          op.template write<1>(tail, op.template read<1>(tail), next);
        }
      }
    }
  }
}

// channels_last rows: a thread keeps its channels' coefficients and walks down the pixels.
template <int V, class Operation>
__global__ void __launch_bounds__(kThreads) over_rows(Operation op, Rows rows) {
  constexpr int kUnroll = Operation::kUnroll;
  const int64_t channel = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  if (channel >= rows.channels) return;
  const int64_t sample = blockIdx.x / rows.parts;
  const int32_t part = static_cast<int32_t>(blockIdx.x % rows.parts);
  const int32_t end = min(rows.pixels, part * rows.length + rows.length);
  const int64_t top = sample * rows.pixels * rows.channels + channel;
  const auto coeffs = op.template coefficients<V>(sample * rows.channels + channel);
  auto of = [&](int j) { return coeffs.at(j); };
  const int32_t down = blockDim.y;
  for (int32_t pixel = part * rows.length + threadIdx.y; pixel < end; pixel += down * kUnroll) {
    typename Operation::template Inputs<V> inputs[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (pixel + k * down < end) {
        inputs[k] = op.template read<V>(top + int64_t{pixel + k * down} * rows.channels);
      }
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (pixel + k * down < end) {
        op.template write<V>(top + int64_t{pixel + k * down} * rows.channels, inputs[k], of);
      }
    }
  }
}

template <class Operation>
const char* over_images(const Images& images, Operation op, void* stream) {
  if (const char* reason = refusal(images)) return reason;
  const int64_t total = images.batch * images.channels * images.pixels;
  if (total == 0) return nullptr;
  constexpr int kWide = kFull<typename Operation::Value>;
  if (images.channels_last) {
    const Rows rows = rows_of(images, kThreads, kWarp);
    const bool wide = vector_width(images) > 1;
    return launch(wide ? over_rows<kWide, Operation> : over_rows<1, Operation>, images.batch * rows.parts,
                  rows.blocks_y, dim3(rows.lanes, kThreads / rows.lanes), stream, op, rows);
  }
  const uint32_t pixels = static_cast<uint32_t>(images.pixels);
  const int64_t accesses = ceil_div(total, images.aligned ? kWide : 1);
  const int64_t blocks = ceil_div(accesses, kThreads * Operation::kUnroll);
  auto kernel = !images.aligned              ? over_planes<1, true, Operation>
                : images.pixels % kWide == 0 ? over_planes<kWide, true, Operation>
                                             : over_planes<kWide, false, Operation>;
  return launch(kernel, blocks, 1, dim3(kThreads), stream, op, total, pixels);
}

}  // namespace awnet::cuda
