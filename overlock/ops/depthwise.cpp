// Statistics and gradients of parallel depthwise convolutions on CPUs, with no map of a branch kept. Maps are
// (B, H, W, C), kernels as PyTorch has them.

#include <torch/library.h>

#include <tuple>

#include "plane.h"

namespace {

using namespace overlock;

// Mean and sum of squared deviations of 16 channels, extended row after row (Chan et al., 1983).
struct Moments {
  Channels<double> mean = {}, squares = {};
  double count = 0;

  template <typename T>
  void add_row(const T* row, Index width) {
    const Channels<T> center = sum(row, width, [](const Channels<T>& v) { return v; }) / static_cast<T>(width);
    const Channels<T> spread = sum(row, width, [&](const Channels<T>& v) { return (v - center) * (v - center); });
    const double total = count + width;
    const auto step = __builtin_convertvector(center, Channels<double>) - mean;
    mean += step * (width / total);
    squares += __builtin_convertvector(spread, Channels<double>) + step * step * (count * width / total);
    count = total;
  }

 private:
  // Four sums, as each addition waits for the one before.
  template <typename T, typename F>
  static Channels<T> sum(const T* row, Index width, const F& of) {
    Channels<T> sums[4] = {};
    Index p = 0;
    for (; p + 4 <= width; p += 4)
      for (int i = 0; i < 4; ++i) sums[i] += of(load<Channels<T>>(row + (p + i) * LANES));
    for (; p < width; ++p) sums[0] += of(load<Channels<T>>(row + p * LANES));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

void check_maps(const Tensor& x, const Tensor& grad) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "x must be contiguous, (B, H, W, C)");
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.is_contiguous(),
              "grad must be as x");
}

// Parallel convolutions of a map: their kernels, (C, 1, k, k), and where these look in a plane.
struct Kernels {
  Plane plane;
  std::vector<Tensor> weights;
  std::vector<Branch> branches;
  Index taps = 0;  // of all

  Kernels(const Tensor& x, at::TensorList given, at::IntArrayRef dilations) : plane{x.size(1), x.size(2), 0} {
    TORCH_CHECK(given.size() == dilations.size() && !given.empty(), "each kernel has a dilation");
    for (std::size_t i = 0; i < given.size(); ++i) {
      const Index size = given[i].size(-1);
      TORCH_CHECK(given[i].sizes() == at::IntArrayRef({x.size(3), 1, size, size}), "kernels must be (C, 1, k, k)");
      TORCH_CHECK(size % 2 == 1 && dilations[i] > 0, "kernels are odd");
      weights.push_back(given[i].to(x.scalar_type()).contiguous());
      plane.reach = std::max(plane.reach, size / 2 * dilations[i]);
      taps += size * size;
    }
    for (std::size_t i = 0; i < given.size(); ++i) add_branch(branches, given[i].size(-1), dilations[i], plane);
  }

  // Packs the taps of 16 channels, or of the `count` that are left.
  template <typename T>
  void pack_taps(Index first, Index count, T* to) const {
    std::fill_n(to, taps * LANES, T(0));
    for (const Tensor& weight : weights) {
      const Index size = weight.size(2) * weight.size(3);
      const T* from = weight.const_data_ptr<T>() + first * size;
      for (Index c = 0; c < count; ++c)
        for (Index t = 0; t < size; ++t) to[t * LANES + c] = from[c * size + t];
      to += size * LANES;
    }
  }
};

// For each tap of a branch the sum over pixels of 16 channels of `grad`, (H, W, C), times shifted `input`, a plane.
template <typename T>
void correlate_unit(const T* input, const Plane& plane, const Branch& branch, const T* grad, Index channels,
                    Index count, T* row, T* sums) {
  std::fill_n(sums, branch.offsets.size() * LANES, T(0));
  for (Index r = 0; r < plane.height; ++r) {
    pack(grad + r * plane.width * channels, 1, plane.width, channels, count, row, 0);
    correlate_row(input + plane.row(r), branch, row, plane.width, sums);
  }
}

// From sums of units, (B, blocks, T, 16), to those over the batch, (C, T).
Tensor sum_units(const Tensor& sums, Index channels) {
  return sums.sum(0).transpose(1, 2).reshape({-1, sums.size(2)}).narrow(0, 0, channels).contiguous();
}

// Returns the means and the sums of squared deviations of each branch's map, (B, branches, C), float64.
std::tuple<Tensor, Tensor> moments(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations) {
  check_maps(x, x);
  const Kernels kernels(x, weights, dilations);
  const Plane& plane = kernels.plane;
  const Index count = weights.size(), pixels = plane.height * plane.width;
  Tensor means = at::empty({x.size(0), count, x.size(3)}, x.options().dtype(at::kDouble));
  Tensor squares = at::empty_like(means);
  double* const mean_to = means.mutable_data_ptr<double>();
  double* const square_to = squares.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_moments", [&] {
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, plane.size() + (plane.tiled() + kernels.taps) * LANES,
        [&](Index sample, Index first, Index channels, scalar_t* input) {
          scalar_t* const row = input + plane.size();
          scalar_t* const taps = row + plane.tiled() * LANES;
          pack(from + sample * pixels * x.size(3) + first, plane.height, plane.width, x.size(3), channels,
               input + plane.row(0), plane.stride());
          kernels.pack_taps(first, channels, taps);
          for (Index i = 0; i < count; ++i) {
            Moments found;
            for (Index r = 0; r < plane.height; ++r) {
              convolve_row<scalar_t, 1, false>(input + plane.row(r), kernels.branches[i], taps, plane.tiled(), row);
              found.add_row(row, plane.width);
            }
            const Index to = (sample * count + i) * x.size(3) + first;
            store_some(mean_to + to, channels, found.mean);
            store_some(square_to + to, channels, found.squares);
          }
        });
  });
  return {means, squares};
}

// Returns for each tap of a kernel the sum over batch and pixels of `grad` times shifted `x`, (C, T).
Tensor correlate(const Tensor& x, const Tensor& grad, Index size, Index dilation) {
  check_maps(x, grad);
  TORCH_CHECK(size > 0 && size % 2 == 1 && dilation > 0, "kernels are odd");
  const Plane plane = {x.size(1), x.size(2), size / 2 * dilation};
  std::vector<Branch> branches;
  add_branch(branches, size, dilation, plane);
  const Index pixels = plane.height * plane.width, blocks = (x.size(3) + LANES - 1) / LANES;
  Tensor sums = at::empty({x.size(0), blocks, size * size, LANES}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_correlate", [&] {
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const slopes = grad.const_data_ptr<scalar_t>();
    scalar_t* const to = sums.mutable_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, plane.size() + plane.width * LANES, [&](Index sample, Index first, Index channels, scalar_t* input) {
          const Index start = sample * pixels * x.size(3) + first;
          pack(from + start, plane.height, plane.width, x.size(3), channels, input + plane.row(0), plane.stride());
          correlate_unit(input, plane, branches[0], slopes + start, x.size(3), channels, input + plane.size(),
                         to + (sample * blocks * LANES + first) * size * size);
        });
  });
  return sum_units(sums, x.size(3));
}

// Returns the sum over batch and pixels of `grad` times each branch's map, (branches, C), float64.
Tensor products(const Tensor& x, const Tensor& grad, at::TensorList weights, at::IntArrayRef dilations) {
  check_maps(x, grad);
  const Kernels kernels(x, weights, dilations);
  const Plane& plane = kernels.plane;
  // The correlation at the taps of a kernel that holds those of all branches.
  std::vector<Branch> all;
  add_branch(all, 2 * plane.reach + 1, 1, plane);
  const Index count = weights.size(), pixels = plane.height * plane.width, places = all[0].offsets.size();
  Tensor found = at::empty({x.size(0), count, x.size(3)}, x.options().dtype(at::kDouble));
  double* const to = found.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_products", [&] {
    using Lanes = Channels<scalar_t>;
    const auto widen = [](const Lanes& v) { return __builtin_convertvector(v, Channels<double>); };
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const slopes = grad.const_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, plane.size() + (plane.width + places + kernels.taps) * LANES,
        [&](Index sample, Index first, Index channels, scalar_t* input) {
          scalar_t* const row = input + plane.size();
          scalar_t* const sums = row + plane.width * LANES;
          scalar_t* const taps = sums + places * LANES;
          const Index start = sample * pixels * x.size(3) + first;
          pack(from + start, plane.height, plane.width, x.size(3), channels, input + plane.row(0), plane.stride());
          correlate_unit(input, plane, all[0], slopes + start, x.size(3), channels, row, sums);
          kernels.pack_taps(first, channels, taps);
          for (Index i = 0; i < count; ++i) {
            const Branch& branch = kernels.branches[i];
            Channels<double> total = {};
            for (std::size_t t = 0; t < branch.places.size(); ++t)
              total += widen(load<Lanes>(taps + (branch.first + t) * LANES)) *
                       widen(load<Lanes>(sums + branch.places[t] * LANES));
            store_some(to + (sample * count + i) * x.size(3) + first, channels, total);
          }
        });
  });
  return found.sum(0);
}

// Gradients of branches z whose own gradients are `c_0 grad + c_1 z + c_2`, coefficients (3, branches, C). Returns the
// gradient of x, (B, H, W, C), and of the taps of all branches, (C, T).
std::tuple<Tensor, Tensor> backward(const Tensor& x, const Tensor& grad, at::TensorList weights,
                                    at::IntArrayRef dilations, const Tensor& coefficients) {
  check_maps(x, grad);
  const Kernels kernels(x, weights, dilations);
  const Plane& plane = kernels.plane;
  const Index count = weights.size(), pixels = plane.height * plane.width, blocks = (x.size(3) + LANES - 1) / LANES;
  TORCH_CHECK(coefficients.sizes() == at::IntArrayRef({3, count, x.size(3)}) && coefficients.is_contiguous() &&
                  coefficients.scalar_type() == x.scalar_type(),
              "coefficients must be contiguous, (3, ", count, ", ", x.size(3), ")");
  Tensor grad_x = at::empty_like(x), grad_taps = at::empty({x.size(0), blocks, kernels.taps, LANES}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_backward", [&] {
    using Lanes = Channels<scalar_t>;
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const slopes = grad.const_data_ptr<scalar_t>();
    const scalar_t* const factors = coefficients.const_data_ptr<scalar_t>();
    scalar_t* const to = grad_x.mutable_data_ptr<scalar_t>();
    scalar_t* const taps_to = grad_taps.mutable_data_ptr<scalar_t>();
    const Index packed = pixels * LANES, summed = plane.height * plane.tiled() * LANES;
    for_each_unit<scalar_t>(
        x, 2 * plane.size() + packed + summed + kernels.taps * LANES,
        [&](Index sample, Index first, Index channels, scalar_t* input) {
          scalar_t* const branch_slopes = input + plane.size();
          scalar_t* const output_slopes = branch_slopes + plane.size();
          scalar_t* const sums = output_slopes + packed;
          scalar_t* const taps = sums + summed;
          scalar_t* const grad_of_taps = taps_to + (sample * blocks * LANES + first) * kernels.taps;
          const Index start = sample * pixels * x.size(3) + first;
          pack(from + start, plane.height, plane.width, x.size(3), channels, input + plane.row(0), plane.stride());
          pack(slopes + start, plane.height, plane.width, x.size(3), channels, output_slopes, plane.width * LANES);
          kernels.pack_taps(first, channels, taps);
          std::fill_n(sums, summed, scalar_t(0));
          std::fill_n(grad_of_taps, kernels.taps * LANES, scalar_t(0));
          for (Index i = 0; i < count; ++i) {
            const auto factor = [&](Index k) {
              return load_some(factors + (k * count + i) * x.size(3) + first, channels);
            };
            const Lanes a = factor(0), b = factor(1), c = factor(2);
            for (Index r = 0; r < plane.height; ++r) {
              scalar_t* const row = branch_slopes + plane.row(r);
              const scalar_t* const slope = output_slopes + r * plane.width * LANES;
              convolve_row<scalar_t, 1, false>(input + plane.row(r), kernels.branches[i], taps, plane.tiled(), row);
              for (Index p = 0; p < plane.width * LANES; p += LANES)
                store(row + p, Lanes(a * load<Lanes>(slope + p) + b * load<Lanes>(row + p) + c));
              std::fill(row + plane.width * LANES, row + plane.tiled() * LANES, scalar_t(0));
              correlate_row(input + plane.row(r), kernels.branches[i], row, plane.width, grad_of_taps);
            }
            for (Index r = 0; r < plane.height; ++r)
              convolve_row<scalar_t, -1, true>(branch_slopes + plane.row(r), kernels.branches[i], taps, plane.tiled(),
                                               sums + r * plane.tiled() * LANES);
          }
          for (Index r = 0; r < plane.height; ++r)
            for (Index p = 0; p < plane.width; ++p)
              std::copy_n(sums + (r * plane.tiled() + p) * LANES, channels,
                          to + start + (r * plane.width + p) * x.size(3));
        });
  });
  return {grad_x, sum_units(grad_taps, x.size(3))};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_cpu, library) {
  library.def("depthwise_moments(Tensor x, Tensor[] weights, int[] dilations) -> (Tensor, Tensor)");
  library.def("depthwise_correlate(Tensor x, Tensor grad, int size, int dilation) -> Tensor");
  library.def("depthwise_products(Tensor x, Tensor grad, Tensor[] weights, int[] dilations) -> Tensor");
  library.def(
      "depthwise_backward(Tensor x, Tensor grad, Tensor[] weights, int[] dilations, Tensor coefficients) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_cpu, CPU, library) {
  library.impl("depthwise_moments", moments);
  library.impl("depthwise_correlate", correlate);
  library.impl("depthwise_products", products);
  library.impl("depthwise_backward", backward);
}
