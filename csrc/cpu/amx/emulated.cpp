// The kernels on plain loops: what tests run where there is no AMX (AWNET_AMX=emulate).
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstring>

#include "tiles.h"

namespace awnet::cpu::amx::emulated {
namespace {

using c10::detail::f32_from_bits;

Bits narrow(float value) {  // to nearest, ties to even
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if (value != value) return static_cast<Bits>(word >> 16 | 0x40);
  return static_cast<Bits>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

struct Tiles {
  union Tile {
    float sums[16][16];
    Bits values[16][32];
  };
  static Tile* tiles() {
    thread_local Tile tiles[8];
    return tiles;
  }

  template <int tile>
  static void clear() {
    std::memset(&tiles()[tile], 0, sizeof(Tile));
  }
  template <int tile>
  static void load(const Bits* from) {
    std::memcpy(tiles()[tile].values, from, sizeof(Tile));
  }
  template <int tile>
  static void load_sums(const float* from) {
    for (int row = 0; row < 16; ++row) std::copy_n(from + 32 * row, 16, tiles()[tile].sums[row]);
  }
  template <int sum, int a, int b>
  static void multiply() {
    Tile* const t = tiles();
    for (int row = 0; row < 16; ++row) {
      for (int pair = 0; pair < 16; ++pair) {
        const float even = f32_from_bits(t[a].values[row][2 * pair]),
                    odd = f32_from_bits(t[a].values[row][2 * pair + 1]);
        for (int column = 0; column < 16; ++column) {
          t[sum].sums[row][column] += even * f32_from_bits(t[b].values[pair][2 * column]);
          t[sum].sums[row][column] += odd * f32_from_bits(t[b].values[pair][2 * column + 1]);
        }
      }
    }
  }
  template <int tile>
  static void store(float* to) {
    for (int row = 0; row < 16; ++row) std::copy_n(tiles()[tile].sums[row], 16, to + 32 * row);
  }
};

struct Row {
  float values[kChannels];

  template <class F>
  static Row each(F f) {
    Row row;
    for (int i = 0; i < kChannels; ++i) row.values[i] = f(i);
    return row;
  }
  static Row zero() {
    return each([](int) { return 0.0f; });
  }
  static Row load(const float* from) {
    return each([&](int i) { return from[i]; });
  }
  static Row load(const Bits* from) {
    return each([&](int i) { return f32_from_bits(from[i]); });
  }
  void store(float* to) const { std::copy_n(values, kChannels, to); }
  void store(Bits* to) const { std::transform(values, values + kChannels, to, narrow); }
  Row plus(const Row& b) const {
    return each([&](int i) { return values[i] + b.values[i]; });
  }
  Row times(const Row& b) const {
    return each([&](int i) { return values[i] * b.values[i]; });
  }
  uint32_t relu_mask() const {
    uint32_t bits = 0;
    for (int i = 0; i < kChannels; ++i) bits |= static_cast<uint32_t>(!(values[i] <= 0.0f)) << i;
    return bits;
  }
  Row where(uint32_t bits) const {
    return each([&](int i) { return bits >> i & 1 ? values[i] : 0.0f; });
  }
};

struct Words {
  static void interleave(Bits* low, Bits* high, const Bits* even, const Bits* odd) {
    for (int i = 0; i < 16; ++i) {
      low[2 * i] = even[i];
      low[2 * i + 1] = odd[i];
      high[2 * i] = even[16 + i];
      high[2 * i + 1] = odd[16 + i];
    }
  }
  static void transpose(Bits* to, const Bits* const rows[16]) {
    for (int row = 0; row < 16; ++row) {
      for (int word = 0; word < 16; ++word) std::copy_n(rows[row] + 2 * word, 2, to + 32 * word + 2 * row);
    }
  }
};

void configure() {}
void release() {}

#include "kernels.inl"

}  // namespace

extern const Kernels kernels = table();

}  // namespace awnet::cpu::amx::emulated
