// The kernels of tiles.h. The including file defines Tiles (eight tiles: clear, load, multiply, store) and
// Row (the 32 channels of one image in float32).

alignas(64) const Bits kZeros[kCell] = {};

inline void apply_row(const Apply& to, Row u, int64_t pixel, int64_t image) {
  const int64_t at = pixel * kCell + image * kChannels, entry = image * kChannels;
  if (to.u) u.store(to.u + at);
  Row v = u.times(Row::load(to.scale + entry)).plus(Row::load(to.shift + entry));
  if (to.residual) v = v.plus(Row::load(to.residual + at));
  if (to.relu) {
    const uint32_t relu_mask = v.relu_mask();
    if (to.relu_mask) to.relu_mask[pixel * kImages + image] = relu_mask;
    v = v.where(relu_mask);
  }
  v.store(to.y + at);
}

inline void propagate_row(const Propagate& to, Row d, int64_t pixel, int64_t image) {
  const int64_t at = pixel * kCell + image * kChannels, entry = image * kChannels;
  if (to.before) d = d.plus(Row::load(to.before + at));
  if (to.d_mean) d = d.plus(Row::load(to.d_mean + entry));
  if (to.total) {
    d.store(to.total + at);
    return;
  }
  if (to.relu_mask) d = d.where(to.relu_mask[pixel * kImages + image]);
  if (to.d_residual) {
    Row sum = d;
    if (to.add_to_residual) sum = sum.plus(Row::load(to.d_residual + at));
    sum.store(to.d_residual + at);
  }
  d.times(Row::load(to.scale + entry)).store(to.d_u + at);
  if (to.g1) {
    Row::load(to.g1 + entry).plus(d).store(to.g1 + entry);
    Row::load(to.g2 + entry).plus(d.times(Row::load(to.u + at))).store(to.g2 + entry);
  }
}

inline void finish_row(const Apply& to, Row acc, int64_t pixel, int64_t image) {
  apply_row(to, acc, pixel, image);
}
inline void finish_row(const Propagate& to, Row acc, int64_t pixel, int64_t image) {
  propagate_row(to, acc, pixel, image);
}

// The epilogue of a finished pair. The products of the next pair occupy the tiles, not the vector units, so a
// few of its rows are done after each step.
template <class Epilogue>
struct Pending {
  const Epilogue* to;
  const float* sums;  // [2][16][32]
  int32_t pixels[2];
  int64_t done, rows;

  void run(int64_t count) {
    for (const int64_t end = done + count < rows ? done + count : rows; done < end; ++done) {
      finish_row(*to, Row::load(sums + done * kChannels), pixels[done / kImages], done % kImages);
    }
  }
};

template <bool two, bool half, class Epilogue>
inline void convolve_pair(const Convolution& c, int64_t pair, float* sums, Pending<Epilogue>& pending) {
  Tiles::template clear<0>();
  if constexpr (!half) Tiles::template clear<1>();
  if constexpr (two) {
    Tiles::template clear<2>();
    if constexpr (!half) Tiles::template clear<3>();
  }
  const Tap *begin = c.taps + c.begin[pair], *end = c.taps + c.begin[pair + 1];
  const int64_t steps = (end - begin) * c.blocks;
  const int64_t rows = steps > 0 ? (pending.rows - pending.done + steps - 1) / steps : 0;
  for (int64_t block = 0; block < c.blocks; ++block) {
    const Bits* const weights = c.weights + block * c.positions * 2 * kCell;
    const Bits* const input = c.input + block * c.plane * kCell;
    for (const Tap* tap = begin; tap < end; ++tap) {
      const Bits* const b = weights + tap->position * 2 * kCell;
      Tiles::template load<4>(tap->first < 0 ? kZeros : input + tap->first * kCell);
      Tiles::template load<6>(b);
      Tiles::template multiply<0, 4, 6>();
      if constexpr (!half) {
        Tiles::template load<7>(b + kCell);
        Tiles::template multiply<1, 4, 7>();
      }
      if constexpr (two) {
        Tiles::template load<5>(tap->second < 0 ? kZeros : input + tap->second * kCell);
        Tiles::template multiply<2, 5, 6>();
        if constexpr (!half) Tiles::template multiply<3, 5, 7>();
      }
      pending.run(rows);
    }
  }
  pending.run(pending.rows);
  Tiles::template store<0>(sums);
  if constexpr (!half) Tiles::template store<1>(sums + 16);
  if constexpr (two) {
    Tiles::template store<2>(sums + kCell);
    if constexpr (!half) Tiles::template store<3>(sums + kCell + 16);
  }
}

template <bool half, class Epilogue>
void convolve(const Convolution& c, const Epilogue& to) {
  alignas(64) float sums[2][2 * kCell];
  if constexpr (half) {
    for (auto& of_pair : sums) {
      for (float& value : of_pair) value = 0.0f;
    }
  }
  Pending<Epilogue> pending{&to, sums[0], {0, 0}, 0, 0};
  for (int64_t pair = c.first; pair < c.last; ++pair) {
    float* const of_pair = sums[pair % 2];
    const bool two = c.outputs[pair][1] >= 0;
    if (two) {
      convolve_pair<true, half>(c, pair, of_pair, pending);
    } else {
      convolve_pair<false, half>(c, pair, of_pair, pending);
    }
    pending = {&to, of_pair, {c.outputs[pair][0], c.outputs[pair][1]}, 0, two ? 2 * kImages : kImages};
  }
  pending.run(pending.rows);
}

void apply(const Convolution& c, const Apply& to) { c.half ? convolve<true>(c, to) : convolve<false>(c, to); }

void propagate(const Convolution& c, const Propagate& to) {
  c.half ? convolve<true>(c, to) : convolve<false>(c, to);
}

void finish(const Propagate& to, int64_t first, int64_t last) {
  for (int64_t pixel = first; pixel < last; ++pixel) {
    for (int64_t image = 0; image < kImages; ++image) propagate_row(to, Row::zero(), pixel, image);
  }
}

void weight_gradient(const WeightGradient& w) {
  Tiles::template load_sums<0>(w.sums);
  Tiles::template load_sums<1>(w.sums + 16);
  Tiles::template load_sums<2>(w.sums + kCell);
  Tiles::template load_sums<3>(w.sums + kCell + 16);
  for (int64_t i = 0; i < w.count; ++i) {
    const Bits* const g = w.g + w.pixels[i][0] * 2 * kCell;
    const Bits* const x = w.x + w.pixels[i][1] * 2 * kCell;
    Tiles::template load<4>(g);
    Tiles::template load<6>(x);
    Tiles::template multiply<0, 4, 6>();
    Tiles::template load<7>(x + kCell);
    Tiles::template multiply<1, 4, 7>();
    Tiles::template load<5>(g + kCell);
    Tiles::template multiply<2, 5, 6>();
    Tiles::template multiply<3, 5, 7>();
  }
  Tiles::template store<0>(w.sums);
  Tiles::template store<1>(w.sums + 16);
  Tiles::template store<2>(w.sums + kCell);
  Tiles::template store<3>(w.sums + kCell + 16);
}

void pair_rows(Bits* to, const Bits* const rows[kChannels]) {
  for (int64_t pair = 0; pair < 16; ++pair) {
    Words::interleave(to + pair * 32, to + kCell + pair * 32, rows[2 * pair], rows[2 * pair + 1]);
  }
}

void transpose(Bits* to, const Bits* const rows[kChannels]) {
  alignas(64) Bits pairs[2 * kCell];
  pair_rows(pairs, rows);
  for (int64_t half = 0; half < 2; ++half) {
    const Bits* pair_of[16];
    for (int64_t pair = 0; pair < 16; ++pair) pair_of[pair] = pairs + half * kCell + pair * 32;
    Words::transpose(to + half * kCell, pair_of);
  }
}

void pair_columns(Bits* to, const Bits* const rows[kChannels]) {
  Words::transpose(to, rows);
  Words::transpose(to + kCell, rows + 16);
}

constexpr Kernels table() {
  return {configure, release, apply, propagate, finish, weight_gradient, pair_rows, transpose, pair_columns};
}
