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

const float* floats(const Tensor& x, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == shape, name,
              " must be contiguous float32 ", shape, ", got ", x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<float>();
}

const float* floats(const MaybeTensor& x, at::IntArrayRef shape, const char* name) {
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

  explicit Norm(const MixNorm& of)
      : weight(of.weight, "weight"),
        bias(of.bias, "bias"),
        mean(of.mean, "mean"),
        inv_std(inverse_stds(Table(of.var, "var"), of.eps)) {}

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

}  // namespace

std::tuple<Tensor, Tensor> eval_coefficients(const Mix& mix, const MixNorm& of, int64_t batch) {
  const Tensor& weight = of.weight;
  const Norm norm(of);
  const int64_t channels = weight.size(1);
  const float* w = floats(mix.filter_scale, {batch, channels}, "filter_scale");
  const float* p = floats(mix.p_clean, {batch}, "p_clean");
  const bool two = norm.branches() == 2;
  TORCH_CHECK(!two || mix.p_clean.has_value(), "two branches need p_clean");
  Tensor scale = new_tensor({batch, channels}, weight.options()), shift = new_tensor_like(scale);
  float *scale_p = scale.data_ptr<float>(), *shift_p = shift.data_ptr<float>();
  for_channels(batch, channels, [&](int64_t first, int64_t last) {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = first, i = b * channels + first; c < last; ++c, ++i) {
        const Affine a = awnet::eval_coefficients(w ? w[i] : 1.0f, two ? p[b] : 0.0f, norm.branch(0, c),
                                                  norm.branch(two ? 1 : 0, c));
        scale_p[i] = a.scale;
        shift_p[i] = a.shift;
      }
    }
  });
  return {scale, shift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> eval_gradients(const Reduced& reduced, const Mix& mix,
                                                          const MixNorm& of, const Needs& needs) {
  const Tensor& weight = of.weight;
  const Norm norm(of);
  const int64_t batch = reduced.g1.size(0), channels = weight.size(1), rows = weight.size(0);
  const float* g1_p = floats(reduced.g1, {batch, channels}, "g1");
  const float* gc_p = floats(reduced.gc, {batch, channels}, "gc");
  const float* centre_p = floats(reduced.centre, {batch, channels}, "centre");
  const float *w = floats(mix.filter_scale, {batch, channels}, "filter_scale"),
              *p = floats(mix.p_clean, {batch}, "p_clean");
  const bool two = norm.branches() == 2;
  TORCH_CHECK(!two || mix.p_clean.has_value(), "two branches need p_clean");
  const auto new_if = [&](bool needed, at::IntArrayRef shape) {
    return new_tensor(needed ? shape : at::IntArrayRef({0}), weight.options());
  };
  const bool need_tables = needs.bn_weight || needs.bn_bias;
  Tensor d_filter_scale = new_if(needs.filter_scale, {batch, channels}),
         p_share = new_if(needs.p_clean, {batch, channels});
  Tensor d_weight = new_if(need_tables, weight.sizes()), d_bias = new_if(need_tables, weight.sizes());
  float* d_filter_scale_p = needs.filter_scale ? d_filter_scale.data_ptr<float>() : nullptr;
  float* share = needs.p_clean ? p_share.data_ptr<float>() : nullptr;
  float *d_weight_p = d_weight.data_ptr<float>(), *d_bias_p = d_bias.data_ptr<float>();
  for_channels(batch, channels, [&](int64_t first, int64_t last) {
    std::vector<double> sums(need_tables ? 4 * (last - first) : 0, 0.0);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t c = first, i = b * channels + first; c < last; ++c, ++i) {
        const EvalGradients d =
            awnet::eval_gradients(g1_p[i], gc_p[i], centre_p[i], w ? w[i] : 1.0f, two ? p[b] : 0.0f,
                                  norm.branch(0, c), norm.branch(two ? 1 : 0, c));
        if (d_filter_scale_p != nullptr) d_filter_scale_p[i] = d.filter_scale;
        if (share != nullptr) share[i] = d.p;
        if (!need_tables) continue;
        double* sum = sums.data() + 4 * (c - first);
        sum[0] += d.weight[0];
        sum[1] += d.weight[1];
        sum[2] += d.bias[0];
        sum[3] += d.bias[1];
      }
    }
    for (int64_t c = first; c < last && need_tables; ++c) {
      const double* sum = sums.data() + 4 * (c - first);
      if (rows == 2) {
        d_weight_p[c] = sum[0];
        d_weight_p[channels + c] = sum[1];
        d_bias_p[c] = sum[2];
        d_bias_p[channels + c] = sum[3];
      } else {
        d_weight_p[c] = sum[0] + (two ? sum[1] : 0.0);
        d_bias_p[c] = sum[2] + (two ? sum[3] : 0.0);
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
  float *mu_p = mu.data_ptr<float>(), *var_p = var.data_ptr<float>();
  double samples[2] = {0.0, 0.0};
  for (int64_t b = 0; b < batch; ++b) samples[rows == 2 && clean[b]] += 1.0;
  for (int64_t k = 0; k < rows; ++k) n.data_ptr<float>()[k] = static_cast<float>(samples[k] * hw);
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
                              : spread(m[i], squares[i], static_cast<float>(hw), scale, branch_mean[c]);
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

std::tuple<Tensor, Tensor> train_coefficients(const Mix& mix, const MixNorm& of, int64_t batch) {
  const Tensor& weight = of.weight;
  const Norm norm(of);
  const int64_t channels = weight.size(1);
  const float* w = floats(mix.filter_scale, {batch, channels}, "filter_scale");
  const bool* clean = bools(mix.is_clean, batch);
  TORCH_CHECK(norm.branches() == 1 || mix.is_clean.has_value(), "two branches need is_clean");
  Tensor scale = new_tensor({batch, channels}, weight.options()), shift = new_tensor_like(scale);
  float *scale_p = scale.data_ptr<float>(), *shift_p = shift.data_ptr<float>();
  for_channels(batch, channels, [&](int64_t first, int64_t last) {
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t k = clean != nullptr && clean[b];
      for (int64_t c = first, i = b * channels + first; c < last; ++c, ++i) {
        const Affine a = awnet::train_coefficients(w ? w[i] : 1.0f, norm.branch(k, c));
        scale_p[i] = a.scale;
        shift_p[i] = a.shift;
      }
    }
  });
  return {scale, shift};
}

namespace {

// The batch of a backward in training, checked.
struct Backward {
  const Norm norm;
  const int64_t batch, channels, affine_rows, stat_rows;
  const float *g1, *gc, *mean, *filter_scale;
  const bool* clean;

  Backward(const Reduced& sums, const Mix& mix, const MixNorm& of)
      : norm(of),
        batch(sums.g1.size(0)),
        channels(of.weight.size(1)),
        affine_rows(of.weight.size(0)),
        stat_rows(of.mean.size(0)),
        g1(floats(sums.g1, {batch, channels}, "g1")),
        gc(floats(sums.gc, {batch, channels}, "gc")),
        mean(floats(sums.centre, {batch, channels}, "mean")),
        filter_scale(floats(mix.filter_scale, {batch, channels}, "filter_scale")),
        clean(bools(mix.is_clean, batch)) {
    TORCH_CHECK(norm.branches() == 1 || mix.is_clean.has_value(), "two branches need is_clean");
  }

  int64_t branch_of(int64_t b) const { return clean != nullptr && clean[b]; }
  int64_t stat_row_of(int64_t b) const { return stat_rows == 2 ? branch_of(b) : 0; }
  float scale(int64_t i) const { return filter_scale ? filter_scale[i] : 1.0f; }

  // For channels [first, last): d_weight and d_bias, and sums over each row of the statistics, times the
  // weight: 4 a channel, of g for both rows, then of g . normalized.
  std::vector<double> sums(int64_t first, int64_t last, float* d_weight, float* d_bias) const {
    const int64_t width = last - first;
    std::vector<double> tables(4 * width, 0.0), through(4 * width, 0.0);
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t k = branch_of(b), row = affine_rows == 2 ? k : 0, stat_row = stat_row_of(b);
      for (int64_t c = first, i = b * channels + first; c < last; ++c, ++i) {
        const Branch branch = norm.branch(k, c);
        const float a = along(g1[i], gc[i], mean[i], scale(i), branch);
        double *table = tables.data() + 4 * (c - first), *sum = through.data() + 4 * (c - first);
        table[row] += g1[i];
        table[2 + row] += a;
        sum[stat_row] += branch.weight * g1[i];
        sum[2 + stat_row] += branch.weight * a;
      }
    }
    for (int64_t c = first; c < last; ++c) {
      for (int64_t row = 0; row < affine_rows; ++row) {
        d_bias[row * channels + c] = tables[4 * (c - first) + row];
        d_weight[row * channels + c] = tables[4 * (c - first) + 2 + row];
      }
    }
    return through;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> train_sums(const Reduced& reduced, const Mix& mix, const MixNorm& norm) {
  const Tensor& weight = norm.weight;
  const Backward of(reduced, mix, norm);
  Tensor d_weight = new_tensor_like(weight), d_bias = new_tensor_like(weight);
  Tensor through = new_tensor({2, of.stat_rows, of.channels}, weight.options());
  float *d_weight_p = d_weight.data_ptr<float>(), *d_bias_p = d_bias.data_ptr<float>(),
        *through_p = through.data_ptr<float>();
  for_channels(of.batch, of.channels, [&](int64_t first, int64_t last) {
    const std::vector<double> sums = of.sums(first, last, d_weight_p, d_bias_p);
    for (int64_t c = first; c < last; ++c) {
      for (int64_t half = 0; half < 2; ++half) {
        for (int64_t k = 0; k < of.stat_rows; ++k) {
          through_p[(half * of.stat_rows + k) * of.channels + c] = sums[4 * (c - first) + 2 * half + k];
        }
      }
    }
  });
  return {d_weight, d_bias, through};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> train_gradients(
    const Reduced& reduced, const SampleStats& stats, const Mix& mix, const MixNorm& norm, const Tensor& n,
    bool need_filter_scale, const MaybeTensor& through) {
  const Tensor& weight = norm.weight;
  const Backward of(reduced, mix, norm);
  const int64_t batch = of.batch, channels = of.channels, stat_rows = of.stat_rows;
  const float *squares = floats(stats.m2, {batch, channels}, "m2"), *n_p = floats(n, {stat_rows}, "n");
  const float* through_p = floats(through, {2, stat_rows, channels}, "through");
  const auto options = weight.options();
  const auto new_if = [&](bool needed, at::IntArrayRef shape) {
    return new_tensor(needed ? shape : at::IntArrayRef({0}), options);
  };
  Tensor d_filter_scale = new_if(need_filter_scale, {batch, channels}),
         by_grad = new_tensor({batch, channels}, options), by_input = new_tensor_like(by_grad),
         constant = new_tensor_like(by_grad);
  Tensor d_weight = new_if(!through, weight.sizes()), d_bias = new_if(!through, weight.sizes());
  float *d_filter_scale_p = d_filter_scale.data_ptr<float>(), *by_grad_p = by_grad.data_ptr<float>(),
        *by_input_p = by_input.data_ptr<float>(), *constant_p = constant.data_ptr<float>();
  float *d_weight_p = d_weight.data_ptr<float>(), *d_bias_p = d_bias.data_ptr<float>();
  const float hw_f = static_cast<float>(stats.hw);
  for_channels(batch, channels, [&](int64_t first, int64_t last) {
    std::vector<double> sums;
    if (through_p == nullptr) {
      sums = of.sums(first, last, d_weight_p, d_bias_p);
    } else {
      sums.resize(4 * (last - first));
      for (int64_t c = first; c < last; ++c) {
        for (int64_t half = 0; half < 2; ++half) {
          for (int64_t k = 0; k < stat_rows; ++k) {
            sums[4 * (c - first) + 2 * half + k] = through_p[(half * stat_rows + k) * channels + c];
          }
        }
      }
    }
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t k = of.branch_of(b), stat_row = of.stat_row_of(b);
      const float count = std::max(n_p[stat_row], 1.0f);
      for (int64_t c = first, i = b * channels + first; c < last; ++c, ++i) {
        const Branch branch = of.norm.branch(k, c);
        const double* sum = sums.data() + 4 * (c - first);
        const TrainGradients d =
            awnet::train_gradients(of.g1[i], of.gc[i], of.mean[i], squares[i], hw_f, of.scale(i), branch,
                                   static_cast<float>(sum[stat_row]) / count,
                                   static_cast<float>(sum[2 + stat_row]) * branch.inv_std / count);
        if (need_filter_scale) d_filter_scale_p[i] = d.filter_scale;
        by_grad_p[i] = d.by_grad;
        by_input_p[i] = d.by_input;
        constant_p[i] = d.constant;
      }
    }
  });
  return {d_filter_scale, d_weight, d_bias, by_grad, by_input, constant};
}

}  // namespace awnet::cpu
