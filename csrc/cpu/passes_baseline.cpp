// The passes for any processor: no instruction set beyond the compiler's default.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "passes.h"

#define AWNET_VECTOR_BITS 128

namespace awnet::cpu::baseline {
#include "passes.inl"
}  // namespace awnet::cpu::baseline
