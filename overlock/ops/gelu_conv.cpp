// y = conv(GELU(x)) on CPUs, conv a depthwise 3x3 convolution with a bias, and its gradients. Maps are
// (B, H, W, C), taps (9, D), D the channels with zeros up to a multiple of 16.
//
// A map is read once, row by row: three rows of GELU(x), and in the backward pass three rows of y's gradient, stay in
// the cache, with zeros before and behind them.

#include <torch/library.h>

#include <array>
#include <tuple>

#include "plane.h"

namespace {

using namespace overlock;

constexpr Index CACHE = 1024 * 1024;  // bytes of rows that stay in a core's cache
constexpr Index MIN_ROWS = 8;          // of a band: the rows around it are computed twice

// GELU and its derivative. The normal distribution's tail is exp(-t^2 / 2) times a smooth function of t, for which
// stands a polynomial in 1 / (1 + 0.27 t): 2.4e-8 relative where t < 14.
inline void gelu(const Channels<float>& x, Channels<float>& value, Channels<float>& slope) {
  constexpr float coefficients[] = {0.0289155968f, -0.126256828f, 0.169294618f, -0.0686246257f, 0.107401926f,
                                    0.0722392414f, 0.101759429f,  0.10755047f,  0.107720183f};
  const Channels<float> t = x < 0.f ? -x : x, u = 1.f / (1.f + 0.27f * t);
  const Channels<float> bell = exponential<LANES>(Channels<float>(-0.5f * t * t));
  Channels<float> tail = {};
  for (const float coefficient : coefficients) tail = (tail + coefficient) * u;
  tail *= bell;
  const Channels<float> below = x < 0.f ? tail : 1.f - tail;
  value = x * below;
  slope = below + x * bell * 0.398942280f;
}

inline void gelu(const Channels<double>& x, Channels<double>& value, Channels<double>& slope) {
  for (int lane = 0; lane < LANES; ++lane) {
    const double below = 0.5 * std::erfc(-x[lane] * M_SQRT1_2);
    value[lane] = x[lane] * below;
    slope[lane] = below + x[lane] * std::exp(-0.5 * x[lane] * x[lane]) * (0.5 * M_2_SQRTPI * M_SQRT1_2);
  }
}

// How the work on a map (B, H, W, C) is split: into groups of blocks of 16 channels, and bands of rows.
struct Split {
  Index batch, height, width, channels, blocks, groups, bands;  // blocks: of all groups

  Split(const Tensor& x, Index rows) : batch(x.size(0)), height(x.size(1)), width(x.size(2)), channels(x.size(3)) {
    const Index threads = at::get_num_threads();
    blocks = blocks_of(channels);
    groups = std::min(blocks, (rows * (tiled() + 2) * lanes() * x.element_size() + CACHE - 1) / CACHE);
    while (batch * groups % threads && batch * groups < 4 * threads && groups < blocks) ++groups;
    bands = std::max<Index>(1, std::min((threads + batch * groups - 1) / (batch * groups), height / MIN_ROWS));
  }
  Index lanes() const { return blocks * LANES; }
  Index tiled() const { return (width + TILE - 1) / TILE * TILE; }
  Index step() const { return (blocks + groups - 1) / groups * LANES; }  // from a pixel of a row to the next
  Index size() const { return (tiled() + 2) * step(); }                  // of a row
};

// A share of the work: channels `first` to `last` of rows `begin` to `end` of a sample; where its sums go.
struct Share {
  Index sample, first, last, begin, end, sums;
};

// Calls `work(share, scratch)`; `scratch` holds `rows` rows of a share, zeros at first.
template <typename T, typename F>
void for_each_share(const Tensor& x, const Split& split, Index rows, const F& work) {
  at::parallel_for(0, split.batch * split.groups * split.bands, 1, [&](Index from, Index to) {
    Tensor scratch = at::zeros({rows * split.size()}, x.options());
    for (Index i = from; i < to; ++i) {
      const Index band = i % split.bands, group = i / split.bands % split.groups;
      const Index sample = i / split.bands / split.groups;
      const Share share = {sample,
                           group * split.blocks / split.groups * LANES,
                           (group + 1) * split.blocks / split.groups * LANES,
                           band * split.height / split.bands,
                           (band + 1) * split.height / split.bands,
                           sample * split.bands + band};
      work(share, scratch.mutable_data_ptr<T>());
    }
  });
}

// The last three rows of something, by their numbers; those outside of the map are zero.
template <typename T>
struct Rows {
  T* rows;
  const T* zeros;
  Index size, height;
  T* operator[](Index r) const { return rows + r % 3 * size; }
  std::array<const T*, 3> around(Index r) const {
    return {r > 0 ? (*this)[r - 1] : zeros, (*this)[r], r + 1 < height ? (*this)[r + 1] : zeros};
  }
};

// Adds to a tile of neighboring outputs the 3x3 convolution of three rows, each at the tile's first pixel less one.
template <typename T, bool TRANSPOSED>
inline void convolve(const std::array<const T*, 3>& rows, Index step, const T* taps, Index lanes,
                     Channels<T> sums[TILE]) {
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) {
    const Channels<T> weight = load<Channels<T>>(taps + (TRANSPOSED ? 8 - t : t) * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < TILE; ++i) sums[i] += weight * load<Channels<T>>(rows[t / 3] + (i + t % 3) * step);
  }
}

// Adds the products of a tile of gradients with the shifted inputs to the sums of nine taps, and its sum to the tenth.
template <typename T>
inline void correlate(const std::array<const T*, 3>& rows, Index step, const Channels<T> slopes[TILE], T* sums,
                      Index lanes) {
  Channels<T> totals[10];
  for (int t = 0; t < 10; ++t) totals[t] = load<Channels<T>>(sums + t * lanes);
#pragma GCC unroll 8
  for (int i = 0; i < TILE; ++i) {
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) totals[t] += slopes[i] * load<Channels<T>>(rows[t / 3] + (i + t % 3) * step);
    totals[9] += slopes[i];
  }
  for (int t = 0; t < 10; ++t) store(sums + t * lanes, totals[t]);
}

// A share's map, taps and rows. Positions in a row are those of the pixel before, which is zero for the first pixel.
template <typename T>
struct Pass {
  const Split& split;
  const Share& share;
  const T *x, *taps, *bias;
  Rows<T> activated;
  T* derivative;  // rows of it, by number modulo 3, or none

  Pass(const Split& split, const Share& share, const Tensor& x, const Tensor& taps, const Tensor& bias, T* scratch,
       bool with_derivative)
      : split(split),
        share(share),
        x(x.const_data_ptr<T>()),
        taps(taps.const_data_ptr<T>() + share.first),
        bias(bias.const_data_ptr<T>() + share.first),
        activated{scratch + split.size(), scratch, split.size(), split.height},
        derivative(with_derivative ? scratch + 4 * split.size() : nullptr) {}

  // Where a pixel's vector lies in a map, and how many channels are left from it on.
  Index at(Index r, Index p, Index channel) const {
    return ((share.sample * split.height + r) * split.width + p) * split.channels + share.first + channel;
  }
  Index left(Index channel) const { return split.channels - share.first - channel; }

  void activate(Index r) const {
    if (r < 0 || r >= split.height) return;
    for (Index p = 0; p < split.width; ++p)
      for (Index channel = 0; channel < share.last - share.first; channel += LANES) {
        const Index to = (p + 1) * split.step() + channel;
        Channels<T> value, slope;
        gelu(load_some(x + at(r, p, channel), left(channel)), value, slope);
        store(activated[r] + to, value);
        if (derivative) store(derivative + r % 3 * split.size() + to, slope);
      }
  }

  // Calls `visit(first pixel, number of pixels, channel, three rows at the tile, sums)` for each tile of row r of the
  // convolution of `rows`.
  template <bool TRANSPOSED, typename F>
  void for_each_tile(const Rows<T>& rows, Index r, const F& visit) const {
    const auto around = rows.around(r);
    for (Index p = 0; p < split.width; p += TILE)
      for (Index channel = 0; channel < share.last - share.first; channel += LANES) {
        const Index from = p * split.step() + channel;
        const std::array<const T*, 3> tile = {around[0] + from, around[1] + from, around[2] + from};
        const Channels<T> start = TRANSPOSED ? Channels<T>{} : load<Channels<T>>(bias + channel);
        Channels<T> sums[TILE];
        for (int i = 0; i < TILE; ++i) sums[i] = start;
        convolve<T, TRANSPOSED>(tile, split.step(), taps + channel, split.lanes(), sums);
        visit(p, std::min<Index>(TILE, split.width - p), channel, tile, sums);
      }
  }
};

void check(const Tensor& x, const Tensor& taps, const Tensor& bias) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && x.numel(), "x must be contiguous, (B, H, W, C), and not empty");
  const Index lanes = blocks_of(x.size(3)) * LANES;
  TORCH_CHECK(taps.sizes() == at::IntArrayRef({9, lanes}) && bias.sizes() == at::IntArrayRef({lanes}),
              "taps must be (9, ", lanes, "), bias (", lanes, ",)");
  for (const Tensor& t : {taps, bias})
    TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_contiguous(), "taps and bias must be contiguous, as x");
}

constexpr Index FORWARD_ROWS = 4;    // zeros, three activated
constexpr Index BACKWARD_ROWS = 10;  // and three of the derivative, three of the gradient

template <typename T>
void run_forward(const Split& split, const Tensor& x, const Tensor& taps, const Tensor& bias, T* y, double* squares) {
  for_each_share<T>(x, split, FORWARD_ROWS, [&](const Share& share, T* scratch) {
    const Pass<T> pass(split, share, x, taps, bias, scratch, false);
    double* const totals = squares + share.sums * split.lanes() + share.first;
    const auto finish = [&](Index r) {
      pass.template for_each_tile<false>(
          pass.activated, r, [&](Index p, Index pixels, Index channel, const auto&, const Channels<T>* sums) {
            Channels<T> total = {};
            for (Index i = 0; i < pixels; ++i) {
              total += sums[i] * sums[i];
              store_some(y + pass.at(r, p + i, channel), pass.left(channel), sums[i]);
            }
            const auto before = load<Channels<double>>(totals + channel);
            store(totals + channel, Channels<double>(before + __builtin_convertvector(total, Channels<double>)));
          });
    };
    pass.activate(share.begin - 1);
    pass.activate(share.begin);
    for (Index r = share.begin; r < share.end; ++r) {
      pass.activate(r + 1);
      finish(r);
    }
  });
}

template <typename T>
void run_backward(const Split& split, const Tensor& x, const Tensor& taps, const Tensor& bias, const T* grad,
                  const T* by_grad, const T* by_map, T* grad_x, T* grad_taps) {
  for_each_share<T>(x, split, BACKWARD_ROWS, [&](const Share& share, T* scratch) {
    const Pass<T> pass(split, share, x, taps, bias, scratch, true);
    const Rows<T> slopes = {scratch + 7 * split.size(), scratch, split.size(), split.height};
    const Index column = share.sample * split.lanes() + share.first;
    T* const totals = grad_taps + share.sums * 10 * split.lanes() + share.first;
    // The gradient of row r of y, and what it adds to those of taps and bias.
    const auto differentiate = [&](Index r) {
      const bool is_own = share.begin <= r && r < share.end;
      pass.template for_each_tile<false>(
          pass.activated, r, [&](Index p, Index pixels, Index channel, const auto& tile, Channels<T>* y) {
            const auto a = load<Channels<T>>(by_grad + column + channel);
            const auto b = load<Channels<T>>(by_map + column + channel);
            for (Index i = 0; i < TILE; ++i) {
              y[i] = i < pixels ? a * load_some(grad + pass.at(r, p + i, channel), pass.left(channel)) + b * y[i]
                                : Channels<T>{};
              store(slopes[r] + (p + i + 1) * split.step() + channel, y[i]);
            }
            if (is_own) correlate(tile, split.step(), y, totals + channel, split.lanes());
          });
    };
    const auto finish = [&](Index r) {
      const T* const derivative = pass.derivative + r % 3 * split.size();
      pass.template for_each_tile<true>(
          slopes, r, [&](Index p, Index pixels, Index channel, const auto&, const Channels<T>* sums) {
            for (Index i = 0; i < pixels; ++i) {
              const auto slope = load<Channels<T>>(derivative + (p + i + 1) * split.step() + channel);
              store_some(grad_x + pass.at(r, p + i, channel), pass.left(channel), Channels<T>(sums[i] * slope));
            }
          });
    };
    const Index first = std::max<Index>(share.begin - 1, 0), last = std::min(share.end + 1, split.height);
    pass.activate(first - 1);
    pass.activate(first);
    for (Index r = first; r < last; ++r) {
      pass.activate(r + 1);
      differentiate(r);
      if (r > share.begin) finish(r - 1);
    }
    if (share.end == split.height) finish(share.end - 1);
  });
}

// Returns y, (B, H, W, C), and the sums of its squares over the pixels of each band of rows, (B, bands, D), float64.
std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& taps, const Tensor& bias) {
  check(x, taps, bias);
  const Split split(x, FORWARD_ROWS);
  Tensor y = at::empty_like(x);
  Tensor squares = at::zeros({split.batch, split.bands, split.lanes()}, x.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gelu_conv", [&] {
    run_forward(split, x, taps, bias, y.mutable_data_ptr<scalar_t>(), squares.mutable_data_ptr<double>());
  });
  return {y, squares};
}

// The gradients where that of y is `by_grad * grad + by_map * y`, coefficients (B, D). Returns that of x, (B, H, W, C),
// and for each sample and band those of the taps and, as the tenth, of the bias, (B, bands, 10, D).
std::tuple<Tensor, Tensor> backward(const Tensor& x, const Tensor& grad, const Tensor& taps, const Tensor& bias,
                                    const Tensor& by_grad, const Tensor& by_map) {
  check(x, taps, bias);
  const Split split(x, BACKWARD_ROWS);
  for (const Tensor& t : {grad, by_grad, by_map})
    TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.is_contiguous(), "all must be contiguous, as x");
  TORCH_CHECK(grad.sizes() == x.sizes(), "grad must be as x");
  for (const Tensor& t : {by_grad, by_map})
    TORCH_CHECK(t.sizes() == at::IntArrayRef({split.batch, split.lanes()}), "coefficients must be (", split.batch, ", ",
                split.lanes(), ")");
  Tensor grad_x = at::empty_like(x), sums = at::zeros({split.batch, split.bands, 10, split.lanes()}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "gelu_conv_backward", [&] {
    run_backward(split, x, taps, bias, grad.const_data_ptr<scalar_t>(), by_grad.const_data_ptr<scalar_t>(),
                 by_map.const_data_ptr<scalar_t>(), grad_x.mutable_data_ptr<scalar_t>(),
                 sums.mutable_data_ptr<scalar_t>());
  });
  return {grad_x, sums};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(overlock_cpu, library) {
  library.def("gelu_conv(Tensor x, Tensor taps, Tensor bias) -> (Tensor, Tensor)");
  library.def(
      "gelu_conv_backward(Tensor x, Tensor grad, Tensor taps, Tensor bias, Tensor by_grad, Tensor by_map) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(overlock_cpu, CPU, library) {
  library.impl("gelu_conv", forward);
  library.impl("gelu_conv_backward", backward);
}
