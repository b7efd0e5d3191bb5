// Which values a block of a reduction reads, and where it stores its sums. Where a sample is split into
// several parts, the sums are stored in [B, parts, C] tables, which a second kernel combines in order, in
// double.
#pragma once

#include "device.h"
#include "layout.h"

namespace awnet::cuda {

constexpr int kAhead = 2;  // accesses of each image that a thread of a reduction has in flight

// One group's share of a plane: `count` vectors from value `first` on, every `width`-th of them from `lane`.
struct Slice {
  int64_t entry;  // of the sums: b * C + c, or (b * parts + part) * C + c
  int64_t first;
  int32_t count;  // 0 for a group without work, whose lanes still take part in the sums
  int32_t lane, width;
};

// kWide: a block for each part of a plane; else p.width lanes for each plane.
template <int V, bool kWide>
__device__ __forceinline__ Slice slice_of(const Planes& p) {
  if constexpr (kWide) {
    const int64_t plane = blockIdx.x / p.parts;
    const int32_t part = static_cast<int32_t>(blockIdx.x % p.parts), from = part * p.length;
    const int64_t sample = plane / p.channels;
    return {(sample * p.parts + part) * p.channels + plane % p.channels, (plane * p.vectors + from) * V,
            min(p.length, p.vectors - from), static_cast<int32_t>(threadIdx.x), kThreads};
  } else {
    const int64_t plane = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / p.width;
    return {plane, plane * p.vectors * V, plane < p.entries ? p.vectors : 0,
            static_cast<int32_t>(threadIdx.x) % p.width, p.width};
  }
}

template <bool kWide>
__device__ __forceinline__ float group_sum(float value, int width) {
  return kWide ? block_sum(value) : lane_sum(value, width);
}

// One thread's share of channels_last rows: V channels of the pixels [begin, end), every blockDim.y-th.
struct Column {
  int64_t entry;  // as above, of the first channel
  int64_t table;  // b * C + c, of the first channel
  int64_t first;  // value at pixel 0
  int32_t begin, end;
  int32_t pixels;  // of the part
};

template <int V>
__device__ __forceinline__ Column column_of(const Rows& r) {
  const int64_t channel = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V;
  const int64_t sample = blockIdx.x / r.parts;
  const int32_t part = static_cast<int32_t>(blockIdx.x % r.parts), from = part * r.length;
  const int32_t end = min(r.pixels, from + r.length);
  return {blockIdx.x * r.channels + channel,
          sample * r.channels + channel,
          sample * r.pixels * r.channels + channel,
          from + static_cast<int32_t>(threadIdx.y),
          channel < r.channels ? end : 0,  // lanes past the last channel take part in the sums only
          end - from};
}

// Launches a kernel for planes (narrow or wide) or rows over all parts of all samples.
template <class Kernel, class... Arguments>
const char* over_planes_parts(Kernel narrow, Kernel wide, const Planes& p, void* stream,
                              Arguments... arguments) {
  if (p.width == kThreads) {
    return launch(wide, p.entries * p.parts, 1, dim3(kThreads), stream, arguments..., p);
  }
  return launch(narrow, ceil_div(p.entries * p.width, kThreads), 1, dim3(kThreads), stream, arguments..., p);
}

template <class Kernel, class... Arguments>
const char* over_rows_parts(Kernel kernel, const Images& images, const Rows& r, void* stream,
                            Arguments... arguments) {
  return launch(kernel, images.batch * r.parts, r.blocks_y, dim3(r.lanes, kThreads / r.lanes), stream,
                arguments..., r);
}

inline int64_t parts_of(const Images& images) {
  return images.channels_last ? rows_of(images, kThreads, kWarp).parts
                              : planes_of(images, kThreads, kWarp).parts;
}

}  // namespace awnet::cuda
