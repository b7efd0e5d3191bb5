// Packs filters in the order in which the tiles read them.
#include <ATen/Parallel.h>

#include "../../tensors.h"
#include "amx.h"

namespace awnet::cpu::amx {

Tensor pack_weight(const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == at::kBFloat16 && weight.numel() > 0,
              "expected bfloat16 filters [C_out, C_in, kh, kw], got ", weight.scalar_type(), " ",
              weight.sizes());
  const int64_t outs = weight.size(0), ins = weight.size(1), width = weight.size(3);
  const int64_t positions = weight.size(2) * width;
  const int64_t out_blocks = ceil_div(outs, kChannels), in_blocks = ceil_div(ins, kChannels);
  const int64_t cell = 2 * kCell;  // of filters: 32 inputs by 32 outputs
  const int64_t half = out_blocks * in_blocks * positions * cell;
  const Tensor packed = new_tensor({2, half}, weight.options().memory_format(at::MemoryFormat::Contiguous));
  auto* const forward = reinterpret_cast<Bits*>(packed.mutable_data_ptr());
  auto* const backward = forward + half;
  const auto* const from = static_cast<const Bits*>(weight.const_data_ptr());
  const Sizes step = weight.strides();
  const Kernels* const chosen = kernels_for_layers();
  const Kernels& order = chosen != nullptr ? *chosen : kernels(true);
  at::parallel_for(0, out_blocks * in_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<Bits> block(kChannels * kChannels * positions);  // [position][output][input]
    for (int64_t i = begin; i < end; ++i) {
      const int64_t out = i / in_blocks, in = i % in_blocks;
      std::fill(block.begin(), block.end(), 0);
      const int64_t channels = std::min(kChannels, ins - in * kChannels);
      for (int64_t o = 0; o < std::min(kChannels, outs - out * kChannels); ++o) {
        if (step[1] == 1) {
          for (int64_t p = 0; p < positions; ++p) {
            std::copy_n(from + (out * kChannels + o) * step[0] + in * kChannels + p / width * step[2] +
                            p % width * step[3],
                        channels, block.data() + (p * kChannels + o) * kChannels);
          }
          continue;
        }
        for (int64_t c = 0; c < channels; ++c) {
          const Bits* const filter = from + (out * kChannels + o) * step[0] + (in * kChannels + c) * step[1];
          for (int64_t p = 0; p < positions; ++p) {
            block[(p * kChannels + o) * kChannels + c] = filter[p / width * step[2] + p % width * step[3]];
          }
        }
      }
      for (int64_t p = 0; p < positions; ++p) {
        const Bits* rows[kChannels];
        for (int64_t o = 0; o < kChannels; ++o) rows[o] = block.data() + (p * kChannels + o) * kChannels;
        order.pair_columns(forward + ((out * in_blocks + in) * positions + p) * cell, rows);
        order.pair_rows(backward + ((in * out_blocks + out) * positions + p) * cell, rows);
      }
    }
  });
  return packed;
}

}  // namespace awnet::cpu::amx
