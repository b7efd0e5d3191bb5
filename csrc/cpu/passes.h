// The passes over images, one entry for each dtype, layout and instruction set; kernels in passes.inl. Sums
// and coefficients are float, images T.
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

#include "../arithmetic.h"

namespace awnet::cpu {

const char* instruction_set();  // of the passes: "avx512", "avx2" or "baseline"

// Throws unless the number is an activation's, and one that leaves a mask if one is required.
void check_activation(int64_t activation, bool keep_mask);

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class P>
P* offset_by(P* pointer, int64_t count) {
  return pointer ? pointer + count : nullptr;
}

// What the backward needs of the activation. The ReLU passes the gradient where y is not <= 0, or where mask
// is 1, not 0. Another activation multiplies it by its slope. All are null without an activation.
template <class T>
struct SavedActivation {
  const T* y = nullptr;
  const uint8_t* mask = nullptr;
  const T* slope = nullptr;

  SavedActivation from(int64_t values) const {
    return {offset_by(y, values), offset_by(mask, values), offset_by(slope, values)};
  }
};

// The arguments of a kernel. `from` moves them on by `values` of the images and `channels` of the tables.

// y = act(u * scale + shift + residual); y may be u. Null where absent: residual, relu_mask and slope.
template <class T>
struct ApplyArgs {
  T* y;
  const T *u, *residual;
  const float *scale, *shift;
  Activation activation;
  uint8_t* relu_mask;
  T* slope;  // of another activation

  ApplyArgs from(int64_t values, int64_t channels) const {
    return {y + values,       u + values, offset_by(residual, values),  scale + channels,
            shift + channels, activation, offset_by(relu_mask, values), offset_by(slope, values)};
  }
};

// The mean of u, and its centered sum of squares.
template <class T>
struct StatisticsArgs {
  const T* u;
  float *mean, *m2;

  StatisticsArgs from(int64_t values, int64_t channels) const {
    return {u + values, mean + channels, m2 + channels};
  }
};

// For g, the gradient of the activation's input: d_residual = g, d_u = by_grad * g + by_input * (u - center)
// + constant, or d_u = by_grad * g where by_input is null; g1 = sum g and gc = sum g (u - center). Null where
// absent: whatever a kernel does not need, and d_residual.
template <class T>
struct BackwardArgs {
  const T *grad, *u;
  SavedActivation<T> activation;
  const float *center, *by_grad, *by_input, *constant;
  T *d_u, *d_residual;
  float *g1, *gc;

  BackwardArgs from(int64_t values, int64_t channels) const {
    BackwardArgs args = *this;
    args.activation = activation.from(values);
    for (const T** x : {&args.grad, &args.u}) *x = offset_by(*x, values);
    for (T** x : {&args.d_u, &args.d_residual}) *x = offset_by(*x, values);
    for (const float** x : {&args.center, &args.by_grad, &args.by_input, &args.constant}) {
      *x = offset_by(*x, channels);
    }
    for (float** x : {&args.g1, &args.gc}) *x = offset_by(*x, channels);
    return args;
  }
};

// NCHW: planes [first, last) of `pixels` values each. channels_last: columns [first, last) of `pixels` rows
// of `channels` values; apply and propagate take whole rows.
struct Extent {
  int64_t pixels, channels, first, last;
};

template <class T>
struct Kernels {
  void (*apply)(const ApplyArgs<T>&, Extent);
  void (*statistics)(const StatisticsArgs<T>&, Extent);
  void (*reduce)(const BackwardArgs<T>&, Extent);     // g1 and gc
  void (*propagate)(const BackwardArgs<T>&, Extent);  // d_u and d_residual
};

template <class T>
struct Layouts {
  Kernels<T> nchw, channels_last;
};

using Dtypes = std::tuple<Layouts<float>, Layouts<BFloat16>, Layouts<Float16>>;

namespace baseline {
extern const Dtypes kernels;
}
namespace avx2 {
extern const Dtypes kernels;
}

// The NCHW kernels in float32 for this processor.
const Kernels<float>& float32_kernels();

constexpr int64_t kConvolveRows = 8;
constexpr int64_t kLanes = 16, kHalf = 8;

// The offsets of a dense plane's values in a packed plane, 16 at a time: value 16 v is at offsets[v], value
// 16 v + 8 at offsets[v] + second. `second` is kHalf if all 16 are consecutive.
struct Vectors {
  std::vector<int64_t> offsets;
  int64_t second;
};

// Outputs computed from u, in dense planes with stride `plane`; null if not requested.
struct ConvolveOutput {
  float* u = nullptr;
  float* y = nullptr;  // act(u * scale + shift + residual)
  uint8_t* relu_mask = nullptr;
  const float* residual = nullptr;
  const float* scale = nullptr;
  const float* shift = nullptr;
  int64_t plane;
  bool relu = false;
  int64_t sample = 0;  // channels from one sample to the next
  bool add = false;    // accumulate into u
};

// u[r][q] = sum over c, t of weights[c][t][r] * image[c * plane + vectors[q] + taps[t]]
struct ConvolveInput {
  const float* image;
  int64_t plane, channels;
  const int64_t* vectors;  // `count` offsets, as in Vectors
  int64_t second, count;
  const int64_t* taps;  // `tap_count` offsets
  int64_t tap_count;
  const float* weights;
};

// Winograd's F(4, 3) along the columns: four output rows, a band, are computed from six sums, the points.
// Each sums the products of the transformed input, a combination of the band's six input rows, with a
// transformed filter of one row. This takes half the multiplications of a direct 3x3 convolution.
constexpr int64_t kPoints = 6, kBand = 4;

// The transformed input of some samples: [band, or two bands of half vectors][point][channel][lanes].
struct WinogradInput {
  const float* values;
  int64_t point, channels, lanes;
  const int64_t* vectors;  // `count` offsets of point 0, `per_sample` of each sample; as in Vectors
  int64_t second, count, per_sample;
  int64_t width;         // of the outputs' rows
  const float* weights;  // [point][channel][3][row]
};

struct ConvolutionKernels {
  // entry i computes i + 1 channels
  void (*convolve[kConvolveRows])(const ConvolveOutput& to, const ConvolveInput& from);
  void (*winograd)(const ConvolveOutput& to, const WinogradInput& from);  // kConvolveRows channels
  // a band of one channel, whose rows of `columns` values are `pitch` apart
  void (*winograd_input_transform)(float* to, int64_t point, const float* from, int64_t pitch,
                                   int64_t columns);
  // kConvolveRows filters `stride` apart, whose taps are read in the order `taps`: [3][row] of each point
  void (*winograd_filter_transform)(float* to, int64_t point, const float* from, int64_t stride,
                                    const int64_t* taps);
  // d_u of one plane goes to `to` as well, whose values are at `where`. There is no slope. Without g1 there
  // are no sums.
  void (*propagate)(float* to, const Vectors& where, const BackwardArgs<float>& plane);
  void (*scatter)(float* to, const Vectors& where, const float* from);
  void (*every_second)(float* to, const float* from, int64_t count);  // to[j] = from[2 j]
  void (*interleave)(float* to, const float* even, const float* odd, int64_t pairs, bool add);
};

namespace avx512 {
extern const Dtypes kernels;
extern const ConvolutionKernels convolution;
}  // namespace avx512

}  // namespace awnet::cpu
