// Vectors of N numbers. The types are GCC's and Clang's; where the machine's vectors are shorter, the compiler splits them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace overlock {

template <typename T, int N>
struct VectorType {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorType<T, N>::type;

template <typename V, typename T>
inline V load(const T* from) {
  V vector;
  std::memcpy(&vector, from, sizeof(V));
  return vector;
}

template <typename V, typename T>
inline void store(T* to, const V& vector) {
  std::memcpy(to, &vector, sizeof(V));
}

// e^x for x <= 0, to 2 units in the last place: 2^n times a Taylor polynomial on |r| <= ln(2) / 2.
template <int N>
inline Vector<float, N> exponential(const Vector<float, N>& x) {
  constexpr float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vector<float, N> shifted = x * 1.44269504f + round;
  const Vector<float, N> n = shifted - round;
  const Vector<float, N> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vector<float, N> p = r * (1.f / 5040) + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  typedef Vector<std::int32_t, N> Bits;
  const Vector<float, N> result =
      reinterpret_cast<Vector<float, N>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
  const Vector<float, N> zero = {};
  // Of NaN only the payload would be left in the low bits: it goes on as it is.
  return x < -87.f ? zero : (x == x ? result : x);
}

template <int N>
inline Vector<double, N> exponential(const Vector<double, N>& x) {
  Vector<double, N> result;
  for (int lane = 0; lane < N; ++lane) result[lane] = std::exp(x[lane]);
  return result;
}

template <typename T, int N>
inline T sum(const Vector<T, N>& vector) {
  T total = 0;
  for (int lane = 0; lane < N; ++lane) total += vector[lane];
  return total;
}

}  // namespace overlock
