// The passes over images, one entry for each dtype and instruction set; kernels in passes.inl.
//
// A plane is one image channel, `n` contiguous values. Rows are a channels_last image: `pixels` rows of
// `channels` values, of which the kernel computes columns [first, last). Sums and coefficients are float,
// images T.
#pragma once

#include <cstdint>
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

// How the activation passes the gradient. The ReLU: where y is not <= 0, or where mask is 1, not 0. Another
// activation: times its slope. Null where absent; all are without an activation.
template <class T>
struct Gate {
  const T* y = nullptr;
  const uint8_t* mask = nullptr;
  const T* slope = nullptr;

  Gate from(int64_t i) const {
    return {y ? y + i : nullptr, mask ? mask + i : nullptr, slope ? slope + i : nullptr};
  }
};

// d_u = by_grad * g + by_input * (u - centre) + constant: of a plane (Value is float) or of every channel of
// rows (const float*).
template <class Value>
struct PropagateCoeffs {
  Value centre, by_grad, by_input, constant;
};

template <class T>
struct Kernels {
  // y = act(u * scale + shift + residual); residual and relu_mask may be null, y may be u
  void (*apply_plane)(T* y, uint8_t* relu_mask, const T* u, const T* residual, int64_t n, float scale,
                      float shift, bool relu);
  void (*apply_rows)(T* y, uint8_t* relu_mask, const T* u, const T* residual, int64_t pixels,
                     int64_t channels, const float* scale, const float* shift, bool relu);
  // the same with an activation other than the ReLU, and its slope, which may be null
  void (*activate_plane)(T* y, T* slope, const T* u, const T* residual, int64_t n, float scale, float shift,
                         Activation activation);
  void (*activate_rows)(T* y, T* slope, const T* u, const T* residual, int64_t pixels, int64_t channels,
                        const float* scale, const float* shift, Activation activation);
  // mean and centred sum of squares
  void (*statistics_plane)(const T* u, int64_t n, float* mean, float* m2);
  void (*statistics_rows)(const T* u, int64_t pixels, int64_t channels, int64_t first, int64_t last,
                          float* mean, float* m2);
  // g1 = sum g, gc = sum g (u - centre), where g is grad as the gate passes it
  void (*reduce_plane)(const T* grad, const T* u, Gate<T> gate, int64_t n, float centre, float* g1,
                       float* gc);
  void (*reduce_rows)(const T* grad, const T* u, Gate<T> gate, int64_t pixels, int64_t channels,
                      int64_t first, int64_t last, const float* centre, float* g1, float* gc);
  // d_u by PropagateCoeffs and d_residual = g. d_residual may be null; u is null where d_u = by_grad * g
  void (*propagate_plane)(T* d_u, T* d_residual, const T* grad, const T* u, Gate<T> gate, int64_t n,
                          PropagateCoeffs<float> coeffs);
  void (*propagate_rows)(T* d_u, T* d_residual, const T* grad, const T* u, Gate<T> gate, int64_t pixels,
                         int64_t channels, PropagateCoeffs<const float*> coeffs);
};

#define AWNET_DECLARE_KERNELS(isa)                 \
  namespace isa {                                  \
  extern const Kernels<float> float32_kernels;     \
  extern const Kernels<BFloat16> bfloat16_kernels; \
  extern const Kernels<Float16> float16_kernels;   \
  }

AWNET_DECLARE_KERNELS(baseline)
AWNET_DECLARE_KERNELS(avx2)
AWNET_DECLARE_KERNELS(avx512)

// The float32 kernels for this processor.
const Kernels<float>& float32_passes();

constexpr int64_t kConvolveRows = 8;
constexpr int64_t kLanes = 16, kHalf = 8;

// The positions of a dense plane's values in a packed plane, 16 at a time: value 16 v is at at[v], value 16 v
// + 8 at at[v] + second. `second` is kHalf if all 16 are consecutive.
struct Vectors {
  std::vector<int64_t> at;
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

// u[r][q] = sum over c, t of weights[c][t][r] * image[c * plane + at[q] + offsets[t]]
struct ConvolveInput {
  const float* image;
  int64_t plane, channels;
  const int64_t* at;  // of `vectors`, as in Vectors
  int64_t second, vectors;
  const int64_t* offsets;
  int64_t taps;
  const float* weights;
};

// Winograd's F(4, 3) along the columns: four output rows, a band, are computed from six sums, the points.
// Each sums the products of a combination of the band's six input rows with a filter of one row. This takes
// half the multiplications of a direct 3x3 convolution.
constexpr int64_t kPoints = 6, kBand = 4;

// The combinations of some samples: [band, or two bands of half vectors][point][channel][lanes].
struct WinogradInput {
  const float* values;
  int64_t point, channels, lanes;
  const int64_t* at;  // of `vectors` of point 0, `per_sample` of each sample; as in Vectors
  int64_t second, vectors, per_sample;
  int64_t width;         // of the outputs' rows
  const float* weights;  // [point][channel][3][row]
};

// Reduce and propagate of a plane, of a gate without a slope. The sums are computed if g1 is not null. u is
// read for the sums and if `through` is true.
struct PlaneGradient {
  const float *grad, *u;
  Gate<float> gate;
  PropagateCoeffs<float> coeffs;
  bool through;  // whether by_input and constant are used
  float *d_u, *d_residual, *g1, *gc;
};

struct ConvolutionKernels {
  // entry i computes i + 1 channels
  void (*convolve[kConvolveRows])(const ConvolveOutput& to, const ConvolveInput& from);
  void (*winograd)(const ConvolveOutput& to, const WinogradInput& from);  // kConvolveRows channels
  // the combinations of a band of one channel, whose rows of `columns` values are `pitch` apart
  void (*winograd_rows)(float* to, int64_t point, const float* from, int64_t pitch, int64_t columns);
  // of kConvolveRows filters `stride` apart, whose taps are read in the order `taps`: [3][row] of each point
  void (*winograd_weights)(float* to, int64_t point, const float* from, int64_t stride, const int64_t* taps);
  void (*propagate)(float* to, const Vectors& where, const PlaneGradient& plane);
  void (*scatter)(float* to, const Vectors& where, const float* from);
  void (*every_second)(float* to, const float* from, int64_t count);  // to[j] = from[2 j]
  void (*interleave)(float* to, const float* even, const float* odd, int64_t pairs, bool add);
};

namespace avx512 {
extern const ConvolutionKernels convolution;
}

}  // namespace awnet::cpu
