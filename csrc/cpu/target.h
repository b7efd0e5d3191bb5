// Compiles a region of a file for more instruction sets than the rest of the program, on GCC and clang:
//
//   AWNET_BEGIN_TARGET("avx2,fma", "")  // features, and options that only GCC knows
//   ...
//   AWNET_END_TARGET
//
// Headers of the standard library and of torch are included before the region: an inline function compiled in
// it could replace the program's copy and then run on a processor without the instructions.
#pragma once

#define AWNET_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define AWNET_BEGIN_TARGET(features, gcc_options) \
  AWNET_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define AWNET_END_TARGET AWNET_PRAGMA(clang attribute pop)
#else
#define AWNET_BEGIN_TARGET(features, gcc_options) \
  AWNET_PRAGMA(GCC push_options) AWNET_PRAGMA(GCC target(features gcc_options))
#define AWNET_END_TARGET AWNET_PRAGMA(GCC pop_options)
#endif
