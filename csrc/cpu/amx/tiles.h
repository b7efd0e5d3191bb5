// Convolutions of bfloat16 images on AMX tiles, with the layer's element-wise work in the epilogue.
//
// A cell holds one pixel of 16 images in 32 channels, [16][32] bfloat16: 1 KB, exactly one tile. A tensor of
// images is [group of 16 images][block of 32 channels][pixel] cells; images and channels after the last ones
// are zero. A convolution is a sum over taps of (input cell times filter cell). Size, stride, padding and
// dilation only change which cells a tap reads; a tap outside the image is skipped.
#pragma once

#include <cstdint>
#include <string>

namespace awnet::cpu::amx {

constexpr int64_t kImages = 16, kChannels = 32;
constexpr int64_t kCell = kImages * kChannels;  // values

using Bits = uint16_t;  // of a bfloat16

// The input pixels that two output pixels read at one filter position; -1 for none (outside of the image).
struct Tap {
  int32_t first, second, position;
};

// act(u * scale + shift + residual). Pointers are to the cells of one group and channel block, by pixel;
// scale and shift are [16][32]. Optional outputs and inputs are null where absent.
struct Apply {
  Bits* y;
  Bits* u;
  uint32_t* relu_mask;  // [pixel][16], one bit per channel: set where the input of the ReLU is not <= 0
  const Bits* residual;
  const float *scale, *shift;
  bool relu;
};

// What is done with a gradient d = acc + before + d_mean of a layer's output. If further gradients are to be
// added, d is written to `total`. Else total is null and d is complete: g = d where relu_mask is set,
// d_residual (+)= g, d_u = g * scale, g1 += g, g2 += g * u.
struct Propagate {
  const Bits* before;
  const float* d_mean;  // [16][32], the same for every pixel
  Bits* total;
  const uint32_t* relu_mask;
  const float* scale;
  Bits *d_u, *d_residual;
  bool add_to_residual;
  const Bits* u;
  float *g1, *g2;  // [16][32]
};

// A range of pairs of output pixels, in one group and one block of 32 output channels.
struct Convolution {
  const Bits* input;  // the group's cells
  int64_t blocks;     // of 32 input channels
  int64_t plane;      // cells of an input block
  const Tap* taps;
  const int32_t* begin;         // taps of pair p are [begin[p], begin[p + 1])
  const int32_t (*outputs)[2];  // pixels of a pair; -1 for no second one
  int64_t first, last;          // pairs
  const Bits* weights;          // [input block][position][2][16 pairs of input channels][16 outputs][2]
  int64_t positions;
  bool half;  // there are at most 16 output channels
};

// Of one filter position, 32 outputs and 32 inputs: sums[output][input] += g[output] x[input] over images and
// pairs of pixels. g is [pixel][2][16 outputs][32 images], x [pixel][2][16 pairs of images][16 inputs][2].
struct WeightGradient {
  const Bits *g, *x;
  const int32_t (*pixels)[2];  // of g, of x
  int64_t count;
  float* sums;  // [32][32]
};

struct Kernels {
  void (*configure)();  // on each thread, before the others
  void (*release)();
  void (*apply)(const Convolution& convolution, const Apply& to);
  void (*propagate)(const Convolution& convolution, const Propagate& to);
  void (*finish)(const Propagate& to, int64_t first, int64_t last);  // pixels; acc = 0
  void (*weight_gradient)(const WeightGradient& w);
  // Of 32 rows of 32 values: [2][16 pairs of rows][16 columns][2]
  void (*pair_rows)(Bits* to, const Bits* const rows[kChannels]);
  // [2][16 columns][32 rows]
  void (*transpose)(Bits* to, const Bits* const rows[kChannels]);
  // [2][16 pairs of columns][16 rows][2]
  void (*pair_columns)(Bits* to, const Bits* const rows[kChannels]);
};

// Why this process cannot use AMX: the processor has none, or the operating system refuses it; empty where it
// can.
const std::string& obstacle();

namespace hardware {
extern const Kernels kernels;
}
namespace emulated {
extern const Kernels kernels;
}

}  // namespace awnet::cpu::amx
