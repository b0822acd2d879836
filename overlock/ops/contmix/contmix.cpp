// ContMix on CPUs: logits, bias, softmax and aggregation of one pixel at a time, in registers, forward and backward.
//
// The taps of a window row fill one vector, padded to a power of two, so that every step over taps is K vector
// instructions; the channels of a group fill vectors of 16. cpp.py packs the maps accordingly:
//   query, value, grad, their gradients   (B, G, H, W, D), D the channels padded with zeros to a multiple of 16
//   kernel                                (B, G, d, K, P), P the taps of a row, padded with zeros
//   bias                                  (K, P), padded with -inf: the softmax gives padding the weight 0
//   rpb                                   (G, 2K - 1, K - 1 + P), padded with zeros

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#include "../vector.h"

namespace {

using namespace overlock;
using at::Tensor;

constexpr int LANES = 16;  // channels of a vector
constexpr int CHUNK = 8;   // pixels whose share of the kernel's gradient is summed in registers

constexpr int row_lanes(std::int64_t kernel_size) { return kernel_size <= 8 ? 8 : 16; }

struct Shape {
  std::int64_t batch, groups, dims, padded, height, width;
};

inline std::int64_t window_start(std::int64_t query, std::int64_t length, int kernel_size) {
  return std::clamp<std::int64_t>(query - kernel_size / 2, 0, length - kernel_size);
}

// The logits of one pixel; `rpb` points at the bias of its window's first tap.
template <typename T, int K, int P>
inline void compute_logits(const T* query, const T* kernel, const T* bias, const T* rpb, std::int64_t dims,
                           Vector<T, P> (&logits)[K]) {
  typedef Vector<T, P> Row;
  for (int a = 0; a < K; ++a) logits[a] = load<Row>(bias + a * P) + load<Row>(rpb + a * (K - 1 + P));
  for (std::int64_t c = 0; c < dims; ++c) {
    const T q = query[c];
#pragma GCC unroll 16
    for (int a = 0; a < K; ++a) logits[a] += q * load<Row>(kernel + (c * K + a) * P);
  }
}

// Turns the logits of one pixel into exponentials, the largest of which is 1, and returns their sum. A log-sum-exp, which
// is rounded as coarsely as large logits are, would cost the weights digits.
template <typename T, int K, int P>
inline T exponentiate(Vector<T, P> (&logits)[K], T& maximum) {
  typedef Vector<T, P> Row;
  Row largest = logits[0];
  for (int a = 1; a < K; ++a) largest = logits[a] > largest ? logits[a] : largest;
  maximum = largest[0];
  for (int lane = 1; lane < K; ++lane) maximum = std::max(maximum, static_cast<T>(largest[lane]));
  Row totals = {};
  for (int a = 0; a < K; ++a) totals += logits[a] = exponential<P>(Row(logits[a] - maximum));
  return sum<T, P>(totals);
}

template <typename T, int K>
void forward_rows(const Shape& shape, const T* query, const T* kernel, const T* value, const T* bias, const T* rpb,
                  T* out, T* lse, std::int64_t begin, std::int64_t end) {
  constexpr int P = row_lanes(K);
  typedef Vector<T, P> Row;
  typedef Vector<T, LANES> Channels;
  const auto [batch, groups, dims, padded, height, width] = shape;
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t map = task / height, i = task % height, top = window_start(i, height, K);
    const T* rpb_row = rpb + ((map % groups) * (2 * K - 1) + top - i + K - 1) * (K - 1 + P);
    for (std::int64_t j = 0; j < width; ++j) {
      const std::int64_t pixel = task * width + j, left = window_start(j, width, K);
      Row weights[K];
      compute_logits<T, K, P>(query + pixel * padded, kernel + map * dims * K * P, bias, rpb_row + left - j + K - 1,
                              dims, weights);
      T maximum;
      const T total = exponentiate<T, K, P>(weights, maximum);
      lse[pixel] = maximum + std::log(total);
      T taps[K * P];
      std::memcpy(taps, weights, sizeof(taps));
      for (std::int64_t c = 0; c < padded; c += LANES) {
        const T* window = value + ((map * height + top) * width + left) * padded + c;
        Channels sums[2] = {};
        for (int a = 0; a < K; ++a, window += width * padded) {
#pragma GCC unroll 16
          for (int b = 0; b < K; ++b) sums[b % 2] += taps[a * P + b] * load<Channels>(window + b * padded);
        }
        store(out + pixel * padded + c, Channels((sums[0] + sums[1]) / total));
      }
    }
  }
}

template <typename T>
struct Gradients {
  T *query, *kernel, *value, *bias, *rpb;  // bias and rpb of each map by itself, summed by the caller
};

// Adds the share of `count` pixels to the gradient of the kernel: an outer product over pixels, tiled by registers.
template <typename T, int K, int P>
inline void add_kernel_gradient(const T* query, std::int64_t padded, const T* slopes, int count, std::int64_t dims,
                                T* gradient) {
  typedef Vector<T, P> Row;
  constexpr int TILE = 8;
  for (std::int64_t c = 0; c < dims; c += TILE) {
    const int tile = static_cast<int>(std::min<std::int64_t>(TILE, dims - c));
    for (int a = 0; a < K; ++a) {
      Row sums[TILE] = {};
      for (int p = 0; p < count; ++p) {
        const Row slope = load<Row>(slopes + (p * K + a) * P);
#pragma GCC unroll 8
        for (int t = 0; t < TILE; ++t) sums[t] += query[p * padded + c + t] * slope;  // padded: reads stay inside
      }
      for (int t = 0; t < tile; ++t) {
        T* to = gradient + ((c + t) * K + a) * P;
        store(to, Row(load<Row>(to) + sums[t]));
      }
    }
  }
}

// One whole map: nothing that it adds to is touched by another.
template <typename T, int K>
void backward_map(const Shape& shape, std::int64_t map, const T* grad, const T* query, const T* kernel,
                  const T* kernel_taps, const T* value, const T* bias, const T* rpb, const Gradients<T>& to) {
  constexpr int P = row_lanes(K), R = K - 1 + P;
  typedef Vector<T, P> Row;
  typedef Vector<T, LANES> Channels;
  const auto [batch, groups, dims, padded, height, width] = shape;
  const std::int64_t pixels = height * width, first = map * pixels;
  const T* channels = value + map * dims * (pixels + P);  // channel after channel, each with P zeros behind it
  const T* kernel_here = kernel + map * dims * K * P;
  const T* rpb_here = rpb + (map % groups) * (2 * K - 1) * R;
  const T* taps_here = kernel_taps + map * K * K * padded;
  T* grad_value = to.value + first * padded;
  T* grad_rpb = to.rpb + map * (2 * K - 1) * R;
  T* grad_bias = to.bias + map * K * P;
  T slopes[CHUNK * K * P];
  Row live;  // padding sees pixels outside of the window, and these may be infinite
  for (int lane = 0; lane < P; ++lane) live[lane] = lane < K;
  for (std::int64_t i = 0; i < height; ++i) {
    const std::int64_t top = window_start(i, height, K), bias_row = (top - i + K - 1) * R;
    for (std::int64_t chunk = 0; chunk < width; chunk += CHUNK) {
      const int count = static_cast<int>(std::min<std::int64_t>(CHUNK, width - chunk));
      for (int p = 0; p < count; ++p) {
        const std::int64_t j = chunk + p, pixel = i * width + j, left = window_start(j, width, K);
        const std::int64_t bias_at = bias_row + left - j + K - 1, corner = top * width + left;
        const T* grad_out = grad + (first + pixel) * padded;
        Row weights[K], slope[K];
        compute_logits<T, K, P>(query + (first + pixel) * padded, kernel_here, bias, rpb_here + bias_at, dims, weights);
        T maximum;
        const T inverse = 1 / exponentiate<T, K, P>(weights, maximum);
        for (int a = 0; a < K; ++a) weights[a] *= inverse;
        for (int a = 0; a < K; ++a) slope[a] = Row{};
        for (std::int64_t c = 0; c < dims; ++c) {
          const T* seen = channels + c * (pixels + P) + corner;
#pragma GCC unroll 16
          for (int a = 0; a < K; ++a) slope[a] += grad_out[c] * load<Row>(seen + a * width);
        }
        for (int a = 0; a < K; ++a) slope[a] = live != 0 ? slope[a] : Row{};
        Row products = {};
        for (int a = 0; a < K; ++a) products += weights[a] * slope[a];
        const T mean = sum<T, P>(products);
        for (int a = 0; a < K; ++a) {
          slope[a] = live != 0 ? weights[a] * (slope[a] - mean) : Row{};  // a mean of NaN, too, is for the window alone
          T* bias_to = grad_bias + a * P;
          store(bias_to, Row(load<Row>(bias_to) + slope[a]));
          T* rpb_to = grad_rpb + bias_at + a * R;
          store(rpb_to, Row(load<Row>(rpb_to) + slope[a]));
        }
        T* slopes_here = slopes + p * K * P;
        std::memcpy(slopes_here, slope, sizeof(slope));
        T taps[K * P];
        std::memcpy(taps, weights, sizeof(taps));
        for (std::int64_t c = 0; c < padded; c += LANES) {
          const Channels out_gradient = load<Channels>(grad_out + c);
          Channels sums[2] = {};
          for (int a = 0; a < K; ++a) {
            T* window = grad_value + (corner + a * width) * padded + c;
#pragma GCC unroll 16
            for (int b = 0; b < K; ++b) {
              sums[b % 2] += slopes_here[a * P + b] * load<Channels>(taps_here + (a * K + b) * padded + c);
              store(window + b * padded, Channels(load<Channels>(window + b * padded) + taps[a * P + b] * out_gradient));
            }
          }
          store(to.query + (first + pixel) * padded + c, Channels(sums[0] + sums[1]));
        }
      }
      add_kernel_gradient<T, K, P>(query + (first + i * width + chunk) * padded, padded, slopes, count, dims,
                                   to.kernel + map * dims * K * P);
    }
  }
}

// The loops read raw memory: refuses what is not laid out as the top of this file says.
void check(const char* name, const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes) {
  TORCH_CHECK(tensor.scalar_type() == dtype, "contmix: ", name, " must have dtype ", dtype, " like query, got ",
              tensor.scalar_type());
  TORCH_CHECK(tensor.sizes() == sizes, "contmix: ", name, " must have shape ", sizes, ", got ", tensor.sizes());
  TORCH_CHECK(tensor.is_contiguous(), "contmix: ", name, " must be contiguous, got strides ", tensor.strides());
  TORCH_CHECK(tensor.device().is_cpu(), "contmix: ", name, " must be on the CPU, got ", tensor.device());
}

// Checks the inputs that forward and backward have in common, and returns the sizes of the maps.
Shape checked_shape(const Tensor& query, const Tensor& kernel, const Tensor& bias, const Tensor& rpb) {
  TORCH_CHECK(query.dim() == 5, "contmix: query must be (B, G, H, W, D), got shape ", query.sizes());
  TORCH_CHECK(kernel.dim() == 5, "contmix: kernel must be (B, G, d, K, P), got shape ", kernel.sizes());
  const std::int64_t dims = kernel.size(2), size = kernel.size(3), lanes = row_lanes(size);
  const Shape shape = {query.size(0), query.size(1), dims, (dims + LANES - 1) / LANES * LANES, query.size(2),
                       query.size(3)};
  TORCH_CHECK(std::min(shape.height, shape.width) >= size, "contmix: the map must be at least ", size,
              " pixels high and wide, got ", shape.height, "x", shape.width);
  const at::ScalarType dtype = query.scalar_type();
  check("query", query, dtype, {shape.batch, shape.groups, shape.height, shape.width, shape.padded});
  check("kernel", kernel, dtype, {shape.batch, shape.groups, dims, size, lanes});
  check("bias", bias, dtype, {size, lanes});
  check("rpb", rpb, dtype, {shape.groups, 2 * size - 1, size - 1 + lanes});
  return shape;
}

// Calls `run` with the kernel size as a compile-time constant.
template <typename Run>
void with_kernel_size(std::int64_t kernel_size, const Run& run) {
  switch (kernel_size) {
    case 3: return run(std::integral_constant<int, 3>());
    case 5: return run(std::integral_constant<int, 5>());
    case 7: return run(std::integral_constant<int, 7>());
    case 9: return run(std::integral_constant<int, 9>());
    case 11: return run(std::integral_constant<int, 11>());
    case 13: return run(std::integral_constant<int, 13>());
    case 15: return run(std::integral_constant<int, 15>());
    default: TORCH_CHECK(false, "kernel size must be odd and between 3 and 15, got ", kernel_size);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& kernel, const Tensor& value, const Tensor& bias,
                                   const Tensor& rpb) {
  const Shape shape = checked_shape(query, kernel, bias, rpb);
  check("value", value, query.scalar_type(), query.sizes());
  Tensor out = at::empty_like(value);
  Tensor lse = at::empty({shape.batch, shape.groups, shape.height, shape.width}, query.options());
  AT_DISPATCH_FLOATING_TYPES(query.scalar_type(), "contmix_forward", [&] {
    with_kernel_size(kernel.size(3), [&](auto kernel_size) {
      at::parallel_for(0, shape.batch * shape.groups * shape.height, 1, [&](std::int64_t begin, std::int64_t end) {
        forward_rows<scalar_t, decltype(kernel_size)::value>(
            shape, query.const_data_ptr<scalar_t>(), kernel.const_data_ptr<scalar_t>(),
            value.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), rpb.const_data_ptr<scalar_t>(),
            out.mutable_data_ptr<scalar_t>(), lse.mutable_data_ptr<scalar_t>(), begin, end);
      });
    });
  });
  return {out, lse};
}

// `value` is (B, G, d, H W + P) here, `kernel_taps` (B, G, K^2, D). The gradients come packed as the inputs of
// `forward`, those of bias and rpb for each map: (B, G, K, P) and (B, G, 2K - 1, K - 1 + P).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& query, const Tensor& kernel, const Tensor& kernel_taps, const Tensor& value,
    const Tensor& bias, const Tensor& rpb) {
  const auto shape = checked_shape(query, kernel, bias, rpb);
  const auto [batch, groups, dims, padded, height, width] = shape;
  const std::int64_t maps = batch * groups, size = kernel.size(3), lanes = kernel.size(4);
  const at::ScalarType dtype = query.scalar_type();
  check("grad", grad, dtype, query.sizes());
  check("kernel_taps", kernel_taps, dtype, {batch, groups, size * size, padded});
  check("value", value, dtype, {batch, groups, dims, height * width + lanes});
  Tensor grad_query = at::empty_like(query), grad_kernel = at::zeros_like(kernel), grad_value = at::zeros_like(grad);
  Tensor grad_bias = at::zeros({batch, groups, size, lanes}, query.options());
  Tensor grad_rpb = at::zeros({batch, groups, rpb.size(1), rpb.size(2)}, query.options());
  AT_DISPATCH_FLOATING_TYPES(query.scalar_type(), "contmix_backward", [&] {
    const Gradients<scalar_t> to = {
        grad_query.mutable_data_ptr<scalar_t>(), grad_kernel.mutable_data_ptr<scalar_t>(),
        grad_value.mutable_data_ptr<scalar_t>(), grad_bias.mutable_data_ptr<scalar_t>(),
        grad_rpb.mutable_data_ptr<scalar_t>()};
    with_kernel_size(size, [&](auto kernel_size) {
      at::parallel_for(0, maps, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t map = begin; map < end; ++map)
          backward_map<scalar_t, decltype(kernel_size)::value>(
              shape, map, grad.const_data_ptr<scalar_t>(), query.const_data_ptr<scalar_t>(),
              kernel.const_data_ptr<scalar_t>(), kernel_taps.const_data_ptr<scalar_t>(),
              value.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), rpb.const_data_ptr<scalar_t>(), to);
      });
    });
  });
  return {grad_query, grad_kernel, grad_value, grad_bias, grad_rpb};
}

}  // namespace

TORCH_LIBRARY(overlock_cpu, library) {
  library.def("contmix_forward(Tensor query, Tensor kernel, Tensor value, Tensor bias, Tensor rpb) -> (Tensor, Tensor)");
  library.def(
      "contmix_backward(Tensor grad, Tensor query, Tensor kernel, Tensor kernel_taps, Tensor value, Tensor bias, "
      "Tensor rpb) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_cpu, CPU, library) {
  library.impl("contmix_forward", forward);
  library.impl("contmix_backward", backward);
}
