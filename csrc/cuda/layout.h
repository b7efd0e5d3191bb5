// How images are divided among threads. It follows from a sample's shape, dtype and layout alone, never from
// the batch, so that a sample's sums have the same bits in every batch.
#pragma once

#include <cstdint>

#include "launch.h"

namespace awnet::cuda {

inline int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

inline int power_of_two_from(int64_t x, int most) {
  int power = 1;
  while (power < x && power < most) power *= 2;
  return power;
}

inline int full_vector(const Images& images) { return images.dtype == kFloat32 ? 4 : 8; }

// Values of one access in reductions: a full vector where no vector straddles two planes or rows, else one.
inline int vector_width(const Images& images) {
  const int full = full_vector(images);
  const int64_t run = images.channels_last ? images.channels : images.pixels;
  return images.aligned && run % full == 0 ? full : 1;
}

// Sums over a plane: by `width` neighboring lanes (a warp or a part of it) or by `width` = kThreads, a
// block; planes longer than a block can hold in registers are cut into `parts` of `length` vectors.
struct Planes {
  int64_t entries;   // B * C planes
  int64_t channels;  // C
  int32_t vectors;   // of a plane
  int32_t length;    // vectors of a part, the last of which may be shorter
  int32_t parts;
  int32_t width;
};

// channels_last: a block has `lanes` vectors of channels side by side and kThreads / lanes pixels below each
// other; a sample's pixels are cut into `parts` of `length`.
struct Rows {
  int64_t channels;
  int32_t pixels;
  int32_t length;
  int32_t parts;
  int32_t lanes;
  int32_t blocks_y;  // blocks side by side
};

constexpr int kDepth = 8;  // vectors that a thread of a reduction holds

inline Planes planes_of(const Images& images, int threads, int warp) {
  Planes p;
  p.entries = images.batch * images.channels;
  p.channels = images.channels;
  p.vectors = static_cast<int32_t>(images.pixels / vector_width(images));
  p.width = p.vectors <= warp * kDepth ? power_of_two_from(p.vectors, warp) : threads;
  const int64_t most = static_cast<int64_t>(p.width) * kDepth;
  p.parts = static_cast<int32_t>(ceil_div(p.vectors, most));
  p.length = static_cast<int32_t>(ceil_div(p.vectors, p.parts > 0 ? p.parts : 1));
  if (p.length > 0) p.parts = static_cast<int32_t>(ceil_div(p.vectors, p.length));
  return p;
}

inline Rows rows_of(const Images& images, int threads, int warp) {
  Rows r;
  const int64_t vectors = images.channels / vector_width(images);
  r.channels = images.channels;
  r.pixels = static_cast<int32_t>(images.pixels);
  r.lanes = power_of_two_from(vectors, warp);
  r.blocks_y = static_cast<int32_t>(ceil_div(vectors, r.lanes));
  r.length = threads / r.lanes * kDepth;
  r.parts = static_cast<int32_t>(ceil_div(images.pixels, r.length));
  return r;
}

inline const char* refusal(const Images& images) {
  if (images.pixels >= int64_t{1} << 30) return "an image has 2^30 pixels or more";
  return nullptr;
}

}  // namespace awnet::cuda
