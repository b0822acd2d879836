// Parallel depthwise convolutions on CPUs: their statistics, their weighted sum, and gradients. Maps are (B, H, W, C),
// kernels as PyTorch has them. The map of the first branch, which has the most taps, is kept between the passes, as
// (B, blocks of channels, H, W, 16). Of the others none is.

#include <torch/library.h>

#include <tuple>

#include "plane.h"

namespace {

using namespace overlock;

// The sum over the pixels of a row. Four sums, as each addition waits for the one before.
template <typename V, typename F>
V sum_row(Index width, const F& of) {
  V sums[4] = {};
  Index p = 0;
  for (; p + 4 <= width; p += 4)
    for (int i = 0; i < 4; ++i) sums[i] += of(p + i);
  for (; p < width; ++p) sums[0] += of(p);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Mean and sum of squared deviations of 16 channels, extended row after row (Chan et al., 1983).
struct Moments {
  Channels<double> mean = {}, squares = {};
  double count = 0;

  template <typename T>
  void add_row(const T* row, Index width) {
    using Lanes = Channels<T>;
    const auto value = [&](Index p) { return load<Lanes>(row + p * LANES); };
    const Lanes center = sum_row<Lanes>(width, value) / static_cast<T>(width);
    const Lanes spread = sum_row<Lanes>(width, [&](Index p) { return (value(p) - center) * (value(p) - center); });
    const double total = count + width;
    const auto step = __builtin_convertvector(center, Channels<double>) - mean;
    mean += step * (width / total);
    squares += __builtin_convertvector(spread, Channels<double>) + step * step * (count * width / total);
    count = total;
  }
};

void check_maps(const Tensor& x, const Tensor& grad) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(), "x must be contiguous, (B, H, W, C)");
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() && grad.is_contiguous(),
              "grad must be as x");
}

void check_factors(const char* name, const Tensor& factors, at::IntArrayRef sizes, const Tensor& x) {
  TORCH_CHECK(factors.sizes() == sizes && factors.is_contiguous() && factors.scalar_type() == x.scalar_type(), name,
              " must be contiguous, of size ", sizes, ", and ", x.scalar_type(), " as x, got ", factors.sizes(),
              " and ", factors.scalar_type());
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

  Index blocks() const { return blocks_of(weights[0].size(0)); }

  // Where a unit begins among all units, each of `size` vectors.
  Index unit(Index sample, Index first, Index size) const { return (sample * blocks() * LANES + first) * size; }

  // Numbers of a packed unit: its plane, and behind it its taps.
  Index packed_size() const { return plane.size() + taps * LANES; }

  // Packs 16 channels, or the `count` that are left. Returns the taps.
  template <typename T>
  T* pack_unit(const T* from, Index first, Index count, T* input) const {
    const Index channels = weights[0].size(0);
    pack(from, plane.height, plane.width, channels, count, input + plane.row(0), plane.stride());
    T* const packed = input + plane.size();
    T* to = packed;
    std::fill_n(to, taps * LANES, T(0));
    for (const Tensor& weight : weights) {
      const Index size = weight.size(2) * weight.size(3);
      const T* kernel = weight.const_data_ptr<T>() + first * size;
      for (Index c = 0; c < count; ++c)
        for (Index t = 0; t < size; ++t) to[t * LANES + c] = kernel[c * size + t];
      to += size * LANES;
    }
    return packed;
  }

  void check_kept(const Tensor& x, const Tensor& kept) const {
    TORCH_CHECK(kept.sizes() == at::IntArrayRef({x.size(0), blocks(), plane.height, plane.width, LANES}) &&
                    kept.scalar_type() == x.scalar_type() && kept.is_contiguous(),
                "kept must be what the moments of this map came with");
  }
};

// The union of the taps of all branches but the first, and for each branch where its taps are in it.
struct Rest {
  Branch taps = {};
  std::vector<std::vector<Index>> places;

  explicit Rest(const std::vector<Branch>& branches) : places(branches.size()) {
    auto& offsets = taps.offsets;
    for (std::size_t i = 1; i < branches.size(); ++i)
      for (const Index offset : branches[i].offsets) {
        const auto found = std::find(offsets.begin(), offsets.end(), offset);
        places[i].push_back(found - offsets.begin());
        if (found == offsets.end()) offsets.push_back(offset);
      }
    if (offsets.empty()) offsets.push_back(0);  // one branch alone: a tap of weight zero
  }

  Index size() const { return taps.offsets.size() * LANES; }
};

// From sums of units, (B, blocks, T, 16), to those over the batch, (C, T).
Tensor sum_units(const Tensor& sums, Index channels) {
  return sums.sum(0).transpose(1, 2).reshape({-1, sums.size(2)}).narrow(0, 0, channels).contiguous();
}

// Returns the map of the first branch, to be kept, and the means and the sums of squared deviations of each branch's
// map, (B, branches, C), float64.
std::tuple<Tensor, Tensor, Tensor> moments(const Tensor& x, at::TensorList weights, at::IntArrayRef dilations) {
  check_maps(x, x);
  const Kernels kernels(x, weights, dilations);
  const Plane& plane = kernels.plane;
  const Index count = weights.size(), pixels = plane.height * plane.width;
  Tensor kept = at::empty({x.size(0), kernels.blocks(), plane.height, plane.width, LANES}, x.options());
  Tensor means = at::empty({x.size(0), count, x.size(3)}, x.options().dtype(at::kDouble));
  Tensor squares = at::empty_like(means);
  double* const mean_to = means.mutable_data_ptr<double>();
  double* const square_to = squares.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_moments", [&] {
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    scalar_t* const to = kept.mutable_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, kernels.packed_size() + plane.tiled() * LANES,
        [&](Index sample, Index first, Index channels, scalar_t* input) {
          const scalar_t* const taps =
              kernels.pack_unit(from + sample * pixels * x.size(3) + first, first, channels, input);
          scalar_t* const row = input + kernels.packed_size();
          scalar_t* const map = to + kernels.unit(sample, first, pixels);
          for (Index i = 0; i < count; ++i) {
            Moments found;
            for (Index r = 0; r < plane.height; ++r) {
              convolve_row<scalar_t, 1, false>(input + plane.row(r), kernels.branches[i], taps, plane.tiled(), row);
              found.add_row(row, plane.width);
              if (i == 0) std::copy_n(row, plane.width * LANES, map + r * plane.width * LANES);
            }
            const Index at = (sample * count + i) * x.size(3) + first;
            store_some(mean_to + at, channels, found.mean);
            store_some(square_to + at, channels, found.squares);
          }
        });
  });
  return {kept, means, squares};
}

// Returns the sum of all branches, each times its scale, plus a bias. Scales and bias: (branches + 1, C).
Tensor weighted_sum(const Tensor& x, const Tensor& kept, at::TensorList weights, at::IntArrayRef dilations,
                    const Tensor& scales) {
  check_maps(x, x);
  const Kernels kernels(x, weights, dilations);
  const Rest rest(kernels.branches);
  kernels.check_kept(x, kept);
  const Plane& plane = kernels.plane;
  const Index count = weights.size(), pixels = plane.height * plane.width;
  check_factors("scales", scales, {count + 1, x.size(3)}, x);
  Tensor out = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_weighted_sum", [&] {
    using Lanes = Channels<scalar_t>;
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const maps = kept.const_data_ptr<scalar_t>();
    const scalar_t* const factors = scales.const_data_ptr<scalar_t>();
    scalar_t* const to = out.mutable_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, kernels.packed_size() + plane.tiled() * LANES + rest.size(),
        [&](Index sample, Index first, Index channels, scalar_t* input) {
          const Index start = sample * pixels * x.size(3) + first;
          const scalar_t* const taps = kernels.pack_unit(from + start, first, channels, input);
          scalar_t* const row = input + kernels.packed_size();
          scalar_t* const rest_taps = row + plane.tiled() * LANES;
          const scalar_t* const map = maps + kernels.unit(sample, first, pixels);
          const auto factor = [&](Index i) { return load_some(factors + i * x.size(3) + first, channels); };
          std::fill_n(rest_taps, rest.size(), scalar_t(0));
          for (Index i = 1; i < count; ++i) {
            const Branch& branch = kernels.branches[i];
            const Lanes scale = factor(i);
            for (std::size_t t = 0; t < branch.offsets.size(); ++t) {
              scalar_t* const sum = rest_taps + rest.places[i][t] * LANES;
              store(sum, Lanes(load<Lanes>(sum) + scale * load<Lanes>(taps + (branch.first + t) * LANES)));
            }
          }
          const Lanes scale = factor(0), bias = factor(count);
          for (Index r = 0; r < plane.height; ++r) {
            convolve_row<scalar_t, 1, false>(input + plane.row(r), rest.taps, rest_taps, plane.tiled(), row);
            for (Index p = 0; p < plane.width; ++p) {
              const Index pixel = r * plane.width + p;
              store_some(to + start + pixel * x.size(3), channels,
                         Lanes(load<Lanes>(row + p * LANES) + scale * load<Lanes>(map + pixel * LANES) + bias));
            }
          }
        });
  });
  return out;
}

// Returns for each tap of a kernel the sum over batch and pixels of `grad` times shifted `x`, (C, T).
Tensor correlate(const Tensor& x, const Tensor& grad, Index size, Index dilation) {
  check_maps(x, grad);
  TORCH_CHECK(size > 0 && size % 2 == 1 && dilation > 0, "kernels are odd");
  const Plane plane = {x.size(1), x.size(2), size / 2 * dilation};
  std::vector<Branch> branches;
  add_branch(branches, size, dilation, plane);
  const Index pixels = plane.height * plane.width, blocks = blocks_of(x.size(3));
  Tensor sums = at::empty({x.size(0), blocks, size * size, LANES}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_correlate", [&] {
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const slopes = grad.const_data_ptr<scalar_t>();
    scalar_t* const to = sums.mutable_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, plane.size() + plane.width * LANES, [&](Index sample, Index first, Index channels, scalar_t* input) {
          const Index start = sample * pixels * x.size(3) + first;
          scalar_t* const row = input + plane.size();
          scalar_t* const found = to + (sample * blocks * LANES + first) * size * size;
          pack(from + start, plane.height, plane.width, x.size(3), channels, input + plane.row(0), plane.stride());
          std::fill_n(found, size * size * LANES, scalar_t(0));
          for (Index r = 0; r < plane.height; ++r) {
            pack(slopes + start + r * plane.width * x.size(3), 1, plane.width, x.size(3), channels, row, 0);
            correlate_row(input + plane.row(r), branches[0], row, plane.width, found);
          }
        });
  });
  return sum_units(sums, x.size(3));
}

// Returns the sum over batch and pixels of `grad` times each branch's map, (branches, C), float64.
Tensor products(const Tensor& x, const Tensor& grad, const Tensor& kept, at::TensorList weights,
                at::IntArrayRef dilations) {
  check_maps(x, grad);
  const Kernels kernels(x, weights, dilations);
  const Rest rest(kernels.branches);
  kernels.check_kept(x, kept);
  const Plane& plane = kernels.plane;
  const Index count = weights.size(), pixels = plane.height * plane.width;
  Tensor found = at::empty({x.size(0), count, x.size(3)}, x.options().dtype(at::kDouble));
  double* const to = found.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_products", [&] {
    using Lanes = Channels<scalar_t>;
    const auto widen = [](const Lanes& v) { return __builtin_convertvector(v, Channels<double>); };
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const slopes = grad.const_data_ptr<scalar_t>();
    const scalar_t* const maps = kept.const_data_ptr<scalar_t>();
    for_each_unit<scalar_t>(
        x, kernels.packed_size() + plane.width * LANES + rest.size(),
        [&](Index sample, Index first, Index channels, scalar_t* input) {
          const Index start = sample * pixels * x.size(3) + first;
          const scalar_t* const taps = kernels.pack_unit(from + start, first, channels, input);
          scalar_t* const row = input + kernels.packed_size();
          scalar_t* const sums = row + plane.width * LANES;
          const scalar_t* const map = maps + kernels.unit(sample, first, pixels);
          const auto put = [&](Index i, const Channels<double>& total) {
            store_some(to + (sample * count + i) * x.size(3) + first, channels, total);
          };
          Channels<double> of_first = {};
          std::fill_n(sums, rest.size(), scalar_t(0));
          for (Index r = 0; r < plane.height; ++r) {
            pack(slopes + start + r * plane.width * x.size(3), 1, plane.width, x.size(3), channels, row, 0);
            of_first += widen(sum_row<Lanes>(plane.width, [&](Index p) {
              return load<Lanes>(row + p * LANES) * load<Lanes>(map + (r * plane.width + p) * LANES);
            }));
            correlate_row(input + plane.row(r), rest.taps, row, plane.width, sums);
          }
          put(0, of_first);
          for (Index i = 1; i < count; ++i) {
            const Branch& branch = kernels.branches[i];
            Channels<double> total = {};
            for (std::size_t t = 0; t < branch.offsets.size(); ++t)
              total += widen(load<Lanes>(taps + (branch.first + t) * LANES)) *
                       widen(load<Lanes>(sums + rest.places[i][t] * LANES));
            put(i, total);
          }
        });
  });
  return found.sum(0);
}

// Gradients of branches z whose own gradients are `c_0 grad + c_1 z + c_2`, coefficients (3, branches, C). Returns the
// gradient of x, (B, H, W, C), and of the taps of all branches, (C, T).
std::tuple<Tensor, Tensor> backward(const Tensor& x, const Tensor& grad, const Tensor& kept, at::TensorList weights,
                                    at::IntArrayRef dilations, const Tensor& coefficients) {
  check_maps(x, grad);
  const Kernels kernels(x, weights, dilations);
  kernels.check_kept(x, kept);
  const Plane& plane = kernels.plane;
  const Index count = weights.size(), pixels = plane.height * plane.width;
  check_factors("coefficients", coefficients, {3, count, x.size(3)}, x);
  Tensor grad_x = at::empty_like(x);
  Tensor grad_taps = at::empty({x.size(0), kernels.blocks(), kernels.taps, LANES}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "depthwise_backward", [&] {
    using Lanes = Channels<scalar_t>;
    const scalar_t* const from = x.const_data_ptr<scalar_t>();
    const scalar_t* const slopes = grad.const_data_ptr<scalar_t>();
    const scalar_t* const maps = kept.const_data_ptr<scalar_t>();
    const scalar_t* const factors = coefficients.const_data_ptr<scalar_t>();
    scalar_t* const to = grad_x.mutable_data_ptr<scalar_t>();
    scalar_t* const taps_to = grad_taps.mutable_data_ptr<scalar_t>();
    const Index packed = pixels * LANES, summed = plane.height * plane.tiled() * LANES;
    for_each_unit<scalar_t>(
        x, kernels.packed_size() + plane.size() + packed + summed,
        [&](Index sample, Index first, Index channels, scalar_t* input) {
          scalar_t* const branch_slopes = input + kernels.packed_size();
          scalar_t* const output_slopes = branch_slopes + plane.size();
          scalar_t* const sums = output_slopes + packed;
          scalar_t* const grad_of_taps = taps_to + kernels.unit(sample, first, kernels.taps);
          const Index start = sample * pixels * x.size(3) + first;
          const scalar_t* const taps = kernels.pack_unit(from + start, first, channels, input);
          const scalar_t* const map = maps + kernels.unit(sample, first, pixels);
          pack(slopes + start, plane.height, plane.width, x.size(3), channels, output_slopes, plane.width * LANES);
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
              const scalar_t* const z = i == 0 ? map + r * plane.width * LANES : row;
              if (i > 0)
                convolve_row<scalar_t, 1, false>(input + plane.row(r), kernels.branches[i], taps, plane.tiled(), row);
              for (Index p = 0; p < plane.width * LANES; p += LANES)
                store(row + p, Lanes(a * load<Lanes>(slope + p) + b * load<Lanes>(z + p) + c));
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
  library.def("depthwise_moments(Tensor x, Tensor[] weights, int[] dilations) -> (Tensor, Tensor, Tensor)");
  library.def(
      "depthwise_weighted_sum(Tensor x, Tensor kept, Tensor[] weights, int[] dilations, Tensor scales) -> Tensor");
  library.def("depthwise_correlate(Tensor x, Tensor grad, int size, int dilation) -> Tensor");
  library.def(
      "depthwise_products(Tensor x, Tensor grad, Tensor kept, Tensor[] weights, int[] dilations) -> Tensor");
  library.def(
      "depthwise_backward(Tensor x, Tensor grad, Tensor kept, Tensor[] weights, int[] dilations, Tensor coefficients) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_cpu, CPU, library) {
  library.impl("depthwise_moments", moments);
  library.impl("depthwise_weighted_sum", weighted_sum);
  library.impl("depthwise_correlate", correlate);
  library.impl("depthwise_products", products);
  library.impl("depthwise_backward", backward);
}
