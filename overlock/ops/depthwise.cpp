// Statistics and gradients of parallel depthwise convolutions on CPUs, with no map of a branch kept. depthwise.py and
// dilated.py pack maps as (B, H, W, C) and the taps of all branches, one after another, as plane.h says.

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

Plane checked_plane(const Tensor& x, const Tensor& taps, at::IntArrayRef sizes, at::IntArrayRef dilations) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "x must be contiguous, (B, H, W, C)");
  TORCH_CHECK(sizes.size() == dilations.size() && !sizes.empty(), "each branch has a size and a dilation");
  Index count = 0, reach = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    TORCH_CHECK(sizes[i] > 0 && sizes[i] % 2 == 1 && dilations[i] > 0, "kernels are odd");
    count += sizes[i] * sizes[i];
    reach = std::max(reach, sizes[i] / 2 * dilations[i]);
  }
  const Index lanes = (x.size(3) + LANES - 1) / LANES * LANES;
  TORCH_CHECK(taps.scalar_type() == x.scalar_type() && taps.is_contiguous(), "taps must be contiguous, of x's dtype");
  TORCH_CHECK(taps.sizes() == at::IntArrayRef({count, lanes}), "taps must be (", count, ", ", lanes, ")");
  return {x.size(1), x.size(2), reach};
}

// Returns the means and the sums of squared deviations of each branch's map, (B, branches, D), float64.
std::tuple<Tensor, Tensor> moments(const Tensor& x, const Tensor& taps, at::IntArrayRef sizes,
                                   at::IntArrayRef dilations) {
  const Plane plane = checked_plane(x, taps, sizes, dilations);
  const auto branches = make_branches(sizes, dilations, plane);
  const Index count = branches.size(), lanes = taps.size(1), pixels = plane.height * plane.width;
  Tensor means = at::empty({x.size(0), count, lanes}, x.options().dtype(at::kDouble)), squares = at::empty_like(means);
  double* const mean_to = means.mutable_data_ptr<double>();
  double* const square_to = squares.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_moments", [&] {
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const weights = taps.const_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, plane.size() + plane.tiled() * LANES, [&](Index sample, Index first, Index channels, scalar_t* input) {
          scalar_t* const row = input + plane.size();
          pack(from + sample * pixels * x.size(3) + first, plane.height, plane.width, x.size(3), channels,
               input + plane.row(0), plane.stride());
          for (Index i = 0; i < count; ++i) {
            Moments found;
            for (Index r = 0; r < plane.height; ++r) {
              convolve_row<scalar_t, 1, false>(input + plane.row(r), branches[i], weights + first, lanes, plane.tiled(),
                                               row);
              found.add_row(row, plane.width);
            }
            store(mean_to + (sample * count + i) * lanes + first, found.mean);
            store(square_to + (sample * count + i) * lanes + first, found.squares);
          }
        });
  });
  return {means, squares};
}

// Returns for each tap the sum over pixels of `grad` times shifted `x`: (B, T, D).
Tensor correlate(const Tensor& x, const Tensor& grad, Index size, Index dilation) {
  const Index lanes = (x.size(3) + LANES - 1) / LANES * LANES;
  Tensor sums = at::zeros({x.size(0), size * size, lanes}, x.options());
  const Plane plane = checked_plane(x, sums.numel() ? sums[0] : sums.sum(0), size, dilation);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.is_contiguous(),
              "grad must be as x");
  const auto branches = make_branches(size, dilation, plane);
  const Index pixels = plane.height * plane.width;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_correlate", [&] {
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const slopes = grad.const_data_ptr<scalar_t>();
    scalar_t* const to = sums.mutable_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, plane.size() + plane.width * LANES, [&](Index sample, Index first, Index channels, scalar_t* input) {
          scalar_t* const row = input + plane.size();
          const Index start = sample * pixels * x.size(3) + first;
          pack(from + start, plane.height, plane.width, x.size(3), channels, input + plane.row(0), plane.stride());
          for (Index r = 0; r < plane.height; ++r) {
            pack(slopes + start + r * plane.width * x.size(3), 1, plane.width, x.size(3), channels, row, 0);
            correlate_row(input + plane.row(r), branches[0], row, plane.width, to + sample * size * size * lanes + first,
                          lanes);
          }
        });
  });
  return sums;
}

// Gradients of branches z = taps * x whose own gradients are `by_grad * grad + by_map * z + shift`, coefficients
// (branches, D). Returns the gradient of x, (B, H, W, C), and of the taps for each sample, (B, T, D).
std::tuple<Tensor, Tensor> backward(const Tensor& x, const Tensor& grad, const Tensor& taps, at::IntArrayRef sizes,
                                    at::IntArrayRef dilations, const Tensor& by_grad, const Tensor& by_map,
                                    const Tensor& shift) {
  const Plane plane = checked_plane(x, taps, sizes, dilations);
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.is_contiguous(),
              "grad must be as x");
  const auto branches = make_branches(sizes, dilations, plane);
  const Index count = branches.size(), lanes = taps.size(1), pixels = plane.height * plane.width;
  for (const Tensor& t : {by_grad, by_map, shift})
    TORCH_CHECK(t.sizes() == at::IntArrayRef({count, lanes}) && t.scalar_type() == x.scalar_type() && t.is_contiguous(),
                "coefficients must be (", count, ", ", lanes, ")");
  Tensor grad_x = at::empty_like(x), grad_taps = at::zeros({x.size(0), taps.size(0), lanes}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_backward", [&] {
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const slopes = grad.const_data_ptr<scalar_t>();
    const scalar_t* const weights = taps.const_data_ptr<scalar_t>();
    scalar_t* const to = grad_x.mutable_data_ptr<scalar_t>();
    scalar_t* const taps_to = grad_taps.mutable_data_ptr<scalar_t>();
    const Index packed = pixels * LANES, summed = plane.height * plane.tiled() * LANES;
    for_each_unit<scalar_t>(
        x, 2 * plane.size() + packed + summed, [&](Index sample, Index first, Index channels, scalar_t* input) {
          scalar_t* const branch_slopes = input + plane.size();
          scalar_t* const output_slopes = branch_slopes + plane.size();
          scalar_t* const sums = output_slopes + packed;
          const Index start = sample * pixels * x.size(3) + first;
          pack(from + start, plane.height, plane.width, x.size(3), channels, input + plane.row(0), plane.stride());
          pack(slopes + start, plane.height, plane.width, x.size(3), channels, output_slopes, plane.width * LANES);
          std::fill_n(sums, summed, scalar_t(0));
          for (Index i = 0; i < count; ++i) {
            const Index column = i * lanes + first;
            const auto a = load<Channels<scalar_t>>(by_grad.const_data_ptr<scalar_t>() + column);
            const auto b = load<Channels<scalar_t>>(by_map.const_data_ptr<scalar_t>() + column);
            const auto c = load<Channels<scalar_t>>(shift.const_data_ptr<scalar_t>() + column);
            for (Index r = 0; r < plane.height; ++r) {
              scalar_t* const row = branch_slopes + plane.row(r);
              convolve_row<scalar_t, 1, false>(input + plane.row(r), branches[i], weights + first, lanes, plane.tiled(),
                                               row);
              for (Index p = 0; p < plane.width * LANES; p += LANES)
                store(row + p, Channels<scalar_t>(a * load<Channels<scalar_t>>(output_slopes + r * plane.width * LANES + p) +
                                                b * load<Channels<scalar_t>>(row + p) + c));
              std::fill(row + plane.width * LANES, row + plane.tiled() * LANES, scalar_t(0));
              correlate_row(input + plane.row(r), branches[i], row, plane.width,
                            taps_to + sample * taps.size(0) * lanes + first, lanes);
            }
            for (Index r = 0; r < plane.height; ++r)
              convolve_row<scalar_t, -1, true>(branch_slopes + plane.row(r), branches[i], weights + first, lanes,
                                               plane.tiled(), sums + r * plane.tiled() * LANES);
          }
          for (Index r = 0; r < plane.height; ++r)
            for (Index p = 0; p < plane.width; ++p)
              std::copy_n(sums + (r * plane.tiled() + p) * LANES, channels,
                          to + start + (r * plane.width + p) * x.size(3));
        });
  });
  return {grad_x, grad_taps};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_cpu, library) {
  library.def("depthwise_moments(Tensor x, Tensor taps, int[] sizes, int[] dilations) -> (Tensor, Tensor)");
  library.def("depthwise_correlate(Tensor x, Tensor grad, int size, int dilation) -> Tensor");
  library.def(
      "depthwise_backward(Tensor x, Tensor grad, Tensor taps, int[] sizes, int[] dilations, Tensor by_grad, "
      "Tensor by_map, Tensor shift) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_cpu, CPU, library) {
  library.impl("depthwise_moments", moments);
  library.impl("depthwise_correlate", correlate);
  library.impl("depthwise_backward", backward);
}
