// The [B, C] algebra on CPUs: loops over samples and channels around ../arithmetic.h. Sums over the batch
// are double. docs/equations.md derives what is computed, awnet/ops/coefficients.py is the same in torch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <vector>

#include "../arithmetic.h"
#include "../ops.h"
#include "../tensors.h"

namespace awnet::cpu {
namespace {

constexpr int64_t kGrain = 8192;

const float* floats(const Tensor& x, Sizes shape, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == shape, name,
              " must be contiguous float32 ", shape, ", got ", x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<float>();
}

const float* floats(const MaybeTensor& x, Sizes shape, const char* name) {
  return x ? floats(*x, shape, name) : nullptr;
}

const bool* bools(const MaybeTensor& x, int64_t batch) {
  if (!x) return nullptr;
  TORCH_CHECK(x->scalar_type() == at::kBool && x->is_contiguous() && x->dim() == 1 && x->size(0) == batch,
              "is_clean must be contiguous bool [", batch, "], got ", x->scalar_type(), " ", x->sizes());
  return x->const_data_ptr<bool>();
}

// A [rows, C] table of which sample b uses row 0 or the row of its branch.
struct Table {
  const float* data;
  int64_t rows, channels;

  Table(const Tensor& x, const char* name) : rows(x.size(0)), channels(x.size(1)) {
    TORCH_CHECK(rows == 1 || rows == 2, name, " must have 1 or 2 rows, got ", rows);
    data = floats(x, {rows, channels}, name);
  }
  const float* row(int64_t k) const { return data + (rows == 2 ? k * channels : 0); }
};

std::vector<float> inverse_stds(const Table& var, double eps) {
  std::vector<float> result(var.rows * var.channels);
  for (size_t i = 0; i < result.size(); ++i) result[i] = inverse_std(var.data[i], static_cast<float>(eps));
  return result;
}

struct Norm {
  Table weight, bias, mean;
  std::vector<float> inv_std;

  explicit Norm(const MixNorm& norm)
      : weight(norm.weight, "weight"),
        bias(norm.bias, "bias"),
        mean(norm.mean, "mean"),
        inv_std(inverse_stds(Table(norm.var, "var"), norm.eps)) {}

  Branch branch(int64_t k, int64_t c) const {
    const int64_t s = mean.rows == 2 ? k * mean.channels : 0;
    return {weight.row(k)[c], bias.row(k)[c], mean.row(k)[c], inv_std[s + c]};
  }
  int64_t branches() const { return std::max(weight.rows, mean.rows); }
};

// Threads share the channels, so that a sum over the batch is one thread's.
template <class Body>
void for_channels(int64_t batch, int64_t channels, Body body) {
  at::parallel_for(0, channels, std::max<int64_t>(16, kGrain / std::max<int64_t>(1, batch)), body);
}

float* data(const Tensor& x) { return x.numel() > 0 ? x.data_ptr<float>() : nullptr; }

Tensor new_if(bool needed, Sizes shape, const Tensor& like) {
  return new_tensor(needed ? shape : Sizes({0}), like.options());
}

// The inputs of a layer's coefficients, checked.
struct Inputs {
  const Norm norm;
  const int64_t batch, channels;
  const bool two;  // branches
  const float *filter_scale, *p_clean;
  const bool* is_clean;

  Inputs(const Mix& mix, const MixNorm& of, int64_t batch, bool train)
      : norm(of),
        batch(batch),
        channels(of.weight.size(1)),
        two(norm.branches() == 2),
        filter_scale(floats(mix.filter_scale, {batch, channels}, "filter_scale")),
        p_clean(floats(mix.p_clean, {batch}, "p_clean")),
        is_clean(bools(mix.is_clean, batch)) {
    TORCH_CHECK(!two || train || mix.p_clean, "two branches need p_clean");
    TORCH_CHECK(!two || !train || mix.is_clean, "two branches need is_clean");
  }

  float scale(int64_t i) const { return filter_scale ? filter_scale[i] : 1.0f; }
  float p(int64_t b) const { return two ? p_clean[b] : 0.0f; }
  int64_t branch_of(int64_t b) const { return is_clean != nullptr && is_clean[b]; }

  // body(sample, channel, entry of a [B, C] table) for channels [first, last)
  template <class Body>
  void for_entries(int64_t first, int64_t last, Body body) const {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = first, i = b * channels + first; c < last; ++c, ++i) body(b, c, i);
    }
  }

  // scale and shift [B, C] by coefficients(sample, channel, entry)
  template <class Coefficients>
  std::tuple<Tensor, Tensor> tables(const at::TensorOptions& options, Coefficients coefficients) const {
    const Tensor scale = new_tensor({batch, channels}, options), shift = new_tensor_like(scale);
    float *scale_p = data(scale), *shift_p = data(shift);
    for_channels(batch, channels, [&](int64_t first, int64_t last) {
      for_entries(first, last, [&](int64_t b, int64_t c, int64_t i) {
        const Affine a = coefficients(b, c, i);
        scale_p[i] = a.scale;
        shift_p[i] = a.shift;
      });
    });
    return {scale, shift};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> eval_coefficients(const Mix& mix, const MixNorm& norm, int64_t batch) {
  const Inputs in(mix, norm, batch, false);
  return in.tables(norm.weight.options(), [&](int64_t b, int64_t c, int64_t i) {
    return awnet::eval_coefficients(in.scale(i), in.p(b), in.norm.branch(0, c), in.norm.branch(in.two, c));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> eval_gradients(const Reduced& sums, const Mix& mix,
                                                          const MixNorm& norm, const Needs& needs) {
  const Tensor& weight = norm.weight;
  const int64_t batch = sums.g1.size(0), channels = weight.size(1), rows = weight.size(0);
  const Inputs in(mix, norm, batch, false);
  const float* g1 = floats(sums.g1, {batch, channels}, "g1");
  const float* gc = floats(sums.gc, {batch, channels}, "gc");
  const float* center = floats(sums.center, {batch, channels}, "center");
  const bool need_tables = needs.bn_weight || needs.bn_bias;
  const Tensor d_filter_scale = new_if(needs.filter_scale, {batch, channels}, weight),
               p_share = new_if(needs.p_clean, {batch, channels}, weight),
               d_weight = new_if(need_tables, weight.sizes(), weight),
               d_bias = new_if(need_tables, weight.sizes(), weight);
  float *d_filter_scale_p = data(d_filter_scale), *p_share_p = data(p_share), *d_weight_p = data(d_weight),
        *d_bias_p = data(d_bias);
  for_channels(batch, channels, [&](int64_t first, int64_t last) {
    std::vector<double> totals(need_tables ? 4 * (last - first) : 0, 0.0);
    in.for_entries(first, last, [&](int64_t b, int64_t c, int64_t i) {
      const EvalGradients d = awnet::eval_gradients(g1[i], gc[i], center[i], in.scale(i), in.p(b),
                                                    in.norm.branch(0, c), in.norm.branch(in.two, c));
      if (d_filter_scale_p != nullptr) d_filter_scale_p[i] = d.filter_scale;
      if (p_share_p != nullptr) p_share_p[i] = d.p;
      if (!need_tables) return;
      double* total = totals.data() + 4 * (c - first);
      for (int k = 0; k < 2; ++k) {
        total[k] += d.weight[k];
        total[2 + k] += d.bias[k];
      }
    });
    for (int64_t c = first; c < last && need_tables; ++c) {
      const double* total = totals.data() + 4 * (c - first);
      if (rows == 2) {
        for (int64_t k = 0; k < 2; ++k) {
          d_weight_p[k * channels + c] = total[k];
          d_bias_p[k * channels + c] = total[2 + k];
        }
      } else {
        d_weight_p[c] = total[0] + (in.two ? total[1] : 0.0);
        d_bias_p[c] = total[2] + (in.two ? total[3] : 0.0);
      }
    }
  });
  return {d_filter_scale, needs.p_clean ? p_share.sum(1) : p_share, d_weight, d_bias};
}

std::tuple<Tensor, Tensor, Tensor> batch_statistics(const SampleStats& stats, const Mix& mix, int64_t rows) {
  const Tensor &mean = stats.mean, &m2 = stats.m2;
  const int64_t hw = stats.hw;
  const int64_t batch = mean.size(0), channels = mean.size(1);
  const float *m = floats(mean, {batch, channels}, "mean"), *squares = floats(m2, {batch, channels}, "m2");
  const float* w = floats(mix.filter_scale, {batch, channels}, "filter_scale");
  const bool* clean = bools(mix.is_clean, batch);
  TORCH_CHECK(rows == 1 || (rows == 2 && mix.is_clean.has_value()), "two rows of statistics need is_clean");
  Tensor mu = new_tensor({rows, channels}, mean.options()), var = new_tensor_like(mu),
         n = new_tensor({rows}, mean.options());
  float *mu_p = data(mu), *var_p = data(var);
  double samples[2] = {0.0, 0.0};
  for (int64_t b = 0; b < batch; ++b) samples[rows == 2 && clean[b]] += 1.0;
  for (int64_t k = 0; k < rows; ++k) data(n)[k] = static_cast<float>(samples[k] * hw);
  for_channels(batch, channels, [&](int64_t first, int64_t last) {
    const int64_t width = last - first;
    std::vector<double> sums(rows * width);
    for (int pass = 0; pass < 2; ++pass) {
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t k = rows == 2 && clean[b];
        double* sum = sums.data() + k * width - first;
        const float* branch_mean = mu_p + k * channels;
        for (int64_t c = first, i = b * channels + first; c < last; ++c, ++i) {
          const float scale = w ? w[i] : 1.0f;
          sum[c] += pass == 0 ? scale * m[i]
                              : sample_m2(m[i], squares[i], static_cast<float>(hw), scale, branch_mean[c]);
        }
      }
      for (int64_t k = 0; k < rows; ++k) {
        const double divisor = std::max(samples[k], 1.0) * (pass == 0 ? 1.0 : static_cast<double>(hw));
        float* out = (pass == 0 ? mu_p : var_p) + k * channels;
        for (int64_t c = first; c < last; ++c) out[c] = sums[k * width + c - first] / divisor;
      }
    }
  });
  return {mu, var, n};
}

std::tuple<Tensor, Tensor> train_coefficients(const Mix& mix, const MixNorm& norm, int64_t batch) {
  const Inputs in(mix, norm, batch, true);
  return in.tables(norm.weight.options(), [&](int64_t b, int64_t c, int64_t i) {
    return awnet::train_coefficients(in.scale(i), in.norm.branch(in.branch_of(b), c));
  });
}

namespace {

struct TrainBackward : Inputs {
  const int64_t affine_rows, stat_rows;
  const float *g1, *gc, *mean;

  TrainBackward(const Reduced& sums, const Mix& mix, const MixNorm& norm)
      : Inputs(mix, norm, sums.g1.size(0), true),
        affine_rows(norm.weight.size(0)),
        stat_rows(norm.mean.size(0)),
        g1(floats(sums.g1, {batch, channels}, "g1")),
        gc(floats(sums.gc, {batch, channels}, "gc")),
        mean(floats(sums.center, {batch, channels}, "mean")) {}

  int64_t stat_row_of(int64_t b) const { return stat_rows == 2 ? branch_of(b) : 0; }

  // For channels [first, last): d_weight and d_bias, and sums over each row of the statistics, times the
  // weight: 4 per channel, of g for both rows, then of g . normalized.
  std::vector<double> sums(int64_t first, int64_t last, float* d_weight, float* d_bias) const {
    std::vector<double> tables(4 * (last - first), 0.0), through(4 * (last - first), 0.0);
    for_entries(first, last, [&](int64_t b, int64_t c, int64_t i) {
      const int64_t k = branch_of(b), row = affine_rows == 2 ? k : 0, stat_row = stat_row_of(b);
      const Branch branch = norm.branch(k, c);
      const float product = grad_dot_normalized(g1[i], gc[i], mean[i], scale(i), branch);
      double *table = tables.data() + 4 * (c - first), *sum = through.data() + 4 * (c - first);
      table[row] += g1[i];
      table[2 + row] += product;
      sum[stat_row] += branch.weight * g1[i];
      sum[2 + stat_row] += branch.weight * product;
    });
    for (int64_t c = first; c < last; ++c) {
      for (int64_t row = 0; row < affine_rows; ++row) {
        d_bias[row * channels + c] = tables[4 * (c - first) + row];
        d_weight[row * channels + c] = tables[4 * (c - first) + 2 + row];
      }
    }
    return through;
  }

  // body(entry of a [2, stat_rows, C] table, entry of `sums`) for channels [first, last)
  template <class Body>
  void for_sums(int64_t first, int64_t last, Body body) const {
    for (int64_t c = first; c < last; ++c) {
      for (int64_t i = 0; i < 2 * stat_rows; ++i) {
        body(i * channels + c, 4 * (c - first) + i / stat_rows * 2 + i % stat_rows);
      }
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> train_sums(const Reduced& reduced, const Mix& mix, const MixNorm& norm) {
  const TrainBackward in(reduced, mix, norm);
  const Tensor d_weight = new_tensor_like(norm.weight), d_bias = new_tensor_like(norm.weight),
               through = new_tensor({2, in.stat_rows, in.channels}, norm.weight.options());
  float *d_weight_p = data(d_weight), *d_bias_p = data(d_bias), *through_p = data(through);
  for_channels(in.batch, in.channels, [&](int64_t first, int64_t last) {
    const std::vector<double> sums = in.sums(first, last, d_weight_p, d_bias_p);
    in.for_sums(first, last, [&](int64_t to, int64_t from) { through_p[to] = sums[from]; });
  });
  return {d_weight, d_bias, through};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_gradients(
    const Reduced& reduced, const SampleStats& stats, const Mix& mix, const MixNorm& norm, const Tensor& n,
    bool need_filter_scale, const MaybeTensor& through) {
  const Tensor& weight = norm.weight;
  const TrainBackward in(reduced, mix, norm);
  const Sizes table = reduced.g1.sizes();
  const float *m2 = floats(stats.m2, table, "m2"), *n_p = floats(n, {in.stat_rows}, "n");
  const float* through_p = floats(through, {2, in.stat_rows, in.channels}, "through");
  const Tensor d_filter_scale = new_if(need_filter_scale, table, weight),
               d_weight = new_if(!through, weight.sizes(), weight),
               d_bias = new_if(!through, weight.sizes(), weight), by_grad = new_if(true, table, weight),
               by_input = new_tensor_like(by_grad), constant = new_tensor_like(by_grad);
  float *d_filter_scale_p = data(d_filter_scale), *d_weight_p = data(d_weight), *d_bias_p = data(d_bias),
        *by_grad_p = data(by_grad), *by_input_p = data(by_input), *constant_p = data(constant);
  const float hw = static_cast<float>(stats.hw);
  for_channels(in.batch, in.channels, [&](int64_t first, int64_t last) {
    std::vector<double> sums;
    if (through_p == nullptr) {
      sums = in.sums(first, last, d_weight_p, d_bias_p);
    } else {
      sums.resize(4 * (last - first));
      in.for_sums(first, last, [&](int64_t from, int64_t to) { sums[to] = through_p[from]; });
    }
    in.for_entries(first, last, [&](int64_t b, int64_t c, int64_t i) {
      const int64_t stat_row = in.stat_row_of(b);
      const float count = std::max(n_p[stat_row], 1.0f);
      const Branch branch = in.norm.branch(in.branch_of(b), c);
      const double* sum = sums.data() + 4 * (c - first);
      const TrainGradients d =
          awnet::train_gradients(in.g1[i], in.gc[i], in.mean[i], m2[i], hw, in.scale(i), branch,
                                 static_cast<float>(sum[stat_row]) / count,
                                 static_cast<float>(sum[2 + stat_row]) * branch.inv_std / count);
      if (d_filter_scale_p != nullptr) d_filter_scale_p[i] = d.filter_scale;
      by_grad_p[i] = d.by_grad;
      by_input_p[i] = d.by_input;
      constant_p[i] = d.constant;
    });
  });
  return {d_filter_scale, d_weight, d_bias, by_grad, by_input, constant};
}

}  // namespace awnet::cpu
