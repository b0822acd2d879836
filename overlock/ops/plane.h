// Depthwise convolutions of 16 channels of one sample, which is a unit of work.
//
// Their map is copied into a plane of vectors with zeros around it, so that a row of outputs is a sum of shifted rows.
// Maps come as (B, H, W, C); the taps of a unit are packed as (T, 16), those of all kernels row by row.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "vector.h"

namespace overlock {

using at::Tensor;
using Index = std::int64_t;

constexpr int LANES = 16;  // channels of a vector
constexpr int TILE = 8;    // neighboring outputs, or taps, whose sums are in registers together

template <typename T>
using Channels = Vector<T, LANES>;

inline Index blocks_of(Index channels) { return (channels + LANES - 1) / LANES; }

// A vector of the first `count` channels; the others are zero, or are not stored.
template <typename T>
inline Channels<T> load_some(const T* from, Index count) {
  if (count >= LANES) return load<Channels<T>>(from);
  T values[LANES] = {};
  std::copy_n(from, count, values);
  return load<Channels<T>>(values);
}

template <typename T>
inline void store_some(T* to, Index count, const Channels<T>& vector) {
  if (count >= LANES) return store(to, vector);
  T values[LANES];
  store(values, vector);
  std::copy_n(values, count, to);
}

// A map of 16 channels in its frame of zeros. Rows are padded to whole tiles.
struct Plane {
  Index height, width, reach;
  Index tiled() const { return (width + TILE - 1) / TILE * TILE; }
  Index stride() const { return (tiled() + 2 * reach) * LANES; }
  Index size() const { return (height + 2 * reach) * stride(); }
  Index row(Index r) const { return (r + reach) * stride() + reach * LANES; }
};

// Where the taps of a branch lie in the packed taps, and how far from the output's pixel they look in a plane.
struct Branch {
  Index first;
  std::vector<Index> offsets;
};

// Adds a branch of a kernel's size and dilation.
inline void add_branch(std::vector<Branch>& branches, Index size, Index dilation, const Plane& plane) {
  Branch branch = {branches.empty() ? 0 : branches.back().first + Index(branches.back().offsets.size()), {}};
  for (Index a = -(size / 2) * dilation; a <= size / 2 * dilation; a += dilation)
    for (Index b = -(size / 2) * dilation; b <= size / 2 * dilation; b += dilation)
      branch.offsets.push_back(a * plane.stride() + b * LANES);
  branches.push_back(branch);
}

// Copies 16 channels, or the `count` that are left, of a map (H, W, C) to rows of vectors.
template <typename T>
void pack(const T* from, Index height, Index width, Index channels, Index count, T* to, Index stride) {
  for (Index r = 0; r < height; ++r)
    for (Index p = 0; p < width; ++p) {
      const T* pixel = from + (r * width + p) * channels;
      T* vector = to + r * stride + p * LANES;
      std::copy_n(pixel, count, vector);
      std::fill(vector + count, vector + LANES, T(0));
    }
}

// One row of outputs, a whole number of tiles: the sum over taps of weight times shifted input. `SIGN` is -1 for the
// transposed convolution. With `ADD` the sum is added to `out`.
template <typename T, int SIGN, bool ADD>
void convolve_row(const T* center, const Branch& branch, const T* taps, Index tiled, T* out) {
  const Index count = branch.offsets.size();
  for (Index p = 0; p < tiled * LANES; p += TILE * LANES) {
    Channels<T> sums[TILE];
    for (int i = 0; i < TILE; ++i) sums[i] = ADD ? load<Channels<T>>(out + p + i * LANES) : Channels<T>{};
    for (Index t = 0; t < count; ++t) {
      const Channels<T> weight = load<Channels<T>>(taps + (branch.first + t) * LANES);
      const T* from = center + p + SIGN * branch.offsets[t];
#pragma GCC unroll 8
      for (int i = 0; i < TILE; ++i) sums[i] += weight * load<Channels<T>>(from + i * LANES);
    }
    for (int i = 0; i < TILE; ++i) store(out + p + i * LANES, sums[i]);
  }
}

// Adds the products of a row of gradients with shifted rows of inputs to the sums of N taps.
template <typename T, int N>
void correlate_taps(const T* center, const Index* offsets, const T* grad, Index width, T* sums) {
  Channels<T> totals[N];
  for (int i = 0; i < N; ++i) totals[i] = load<Channels<T>>(sums + i * LANES);
  for (Index p = 0; p < width * LANES; p += LANES) {
    const Channels<T> slope = load<Channels<T>>(grad + p);
#pragma GCC unroll 9
    for (int i = 0; i < N; ++i) totals[i] += slope * load<Channels<T>>(center + offsets[i] + p);
  }
  for (int i = 0; i < N; ++i) store(sums + i * LANES, totals[i]);
}

// The same for all taps of a branch: 8 m + 1, as in every odd square and every union of such around one center.
template <typename T>
void correlate_row(const T* center, const Branch& branch, const T* grad, Index width, T* sums) {
  const Index count = branch.offsets.size();
  const Index* offsets = branch.offsets.data();
  sums += branch.first * LANES;
  Index t = 0;
  for (; t + TILE + 1 < count; t += TILE)
    correlate_taps<T, TILE>(center, offsets + t, grad, width, sums + t * LANES);
  if (count - t == TILE + 1)
    correlate_taps<T, TILE + 1>(center, offsets + t, grad, width, sums + t * LANES);
  else
    correlate_taps<T, 1>(center, offsets + t, grad, width, sums + t * LANES);
}

// Calls `work(unit's sample, first channel, number of channels, scratch)` for every 16 channels of every sample.
template <typename T, typename F>
void for_each_unit(const Tensor& x, Index scratch_size, const F& work) {
  const Index channels = x.size(3), blocks = blocks_of(channels);
  at::parallel_for(0, x.size(0) * blocks, 1, [&](Index begin, Index end) {
    Tensor scratch = at::zeros({scratch_size}, x.options());
    for (Index unit = begin; unit < end; ++unit) {
      const Index first = unit % blocks * LANES;
      work(unit / blocks, first, std::min<Index>(LANES, channels - first), scratch.mutable_data_ptr<T>());
    }
  });
}

}  // namespace overlock
