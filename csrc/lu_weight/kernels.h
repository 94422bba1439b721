#pragma once
// The weights of a stack of LU-parameterized 1x1 convolutions, C <= 64: CUDA kernels written for block.h, one
// block per matrix. docs/maths.md has the formulas.
//
// Bound: the launch. A stack of K = 32, C = 48 is 0.6 MB in and out and 16 million operations on 32
// multiprocessors. The 48 dependent steps of the inversion, each with a barrier, take the time, so both
// triangles are inverted in the same steps.
#include <cmath>
#include <tuple>

#include "stable.h"
#include <torch/csrc/stable/ops.h>
#include "block.h"
#include "lu_weight/arguments.h"
#include "singular.h"

namespace fastflow {

// A C x C matrix in shared memory. The distance of rows is odd, so rows and columns are both read without
// bank conflicts.
template <typename T>
struct Square {
  Span<T> span;
  int stride;
  FASTFLOW_HD T& operator()(int i, int j) const { return span[i * stride + j]; }
};

// Calls out(i, j, sum over k of a(i, k) b(k, j)). A thread computes sixteen results, whose rows and columns
// are a quarter of C apart, so that neighboring threads read neighboring numbers.
template <int THREADS, typename T, class A, class B, class Out>
FASTFLOW_HD void product(int thread, int channels, A a, B b, Out out) {
  const int side = (channels + 3) / 4;
  for (int tile = thread; tile < side * side; tile += THREADS) {
    int i[4], j[4];
    T sum[4][4] = {};
    FASTFLOW_UNROLL
    for (int r = 0; r < 4; ++r) {
      // an index past the end reads the last row or column and is not written
      i[r] = tile / side + r * side < channels ? tile / side + r * side : channels - 1;
      j[r] = tile % side + r * side < channels ? tile % side + r * side : channels - 1;
    }
    for (int k = 0; k < channels; ++k) {
      T left[4], right[4];
      FASTFLOW_UNROLL
      for (int r = 0; r < 4; ++r) left[r] = a(i[r], k), right[r] = b(k, j[r]);
      FASTFLOW_UNROLL
      for (int r = 0; r < 4; ++r) {
        FASTFLOW_UNROLL
        for (int q = 0; q < 4; ++q) sum[r][q] += left[r] * right[q];
      }
    }
    FASTFLOW_UNROLL
    for (int r = 0; r < 4; ++r) {
      FASTFLOW_UNROLL
      for (int q = 0; q < 4; ++q)
        if (tile / side + r * side < channels && tile % side + q * side < channels)
          out(i[r], j[q], sum[r][q]);
    }
  }
}

// A stack of matrices [K, C, C] or of vectors [K, C], dense.
template <typename T>
struct Stack {
  Span<T> span;
  int64_t step;
  FASTFLOW_HD T& operator()(int64_t k, int64_t at) const { return span[k * step + at]; }
};

template <typename T>
struct Factors {
  Stack<const int64_t> perm;
  Stack<const T> lower, upper, log_s, sign_s;

  FASTFLOW_HD T diagonal(int64_t k, int i) const { return sign_s(k, i) * std::exp(log_s(k, i)); }
  // the row of L U that is row i of W; 0 if perm is out of range
  FASTFLOW_HD int row(int64_t k, int channels, int i) const {
    const int64_t row = perm(k, i);
    return row >= 0 && row < channels ? static_cast<int>(row) : 0;
  }
  // element (i, j) of L or U of matrix k; ignores the other triangle in memory
  FASTFLOW_HD T l(int64_t k, int channels, int i, int j) const {
    return i > j ? lower(k, i * channels + j) : T(i == j);
  }
  FASTFLOW_HD T u(int64_t k, int channels, int i, int j) const {
    return i < j ? upper(k, i * channels + j) : i == j ? diagonal(k, i) : T(0);
  }
};

// W = (L U)[perm], W^-1 = (U^-1 L^-1)[:, perm], log_det. Both triangles are inverted by elimination, column
// by column: the pivot's row times the column is subtracted from all rows beyond the pivot.
template <typename T>
struct LUWeightKernel {
  static constexpr int THREADS = 256, RESIDENT = 1, HALF = THREADS / 2, ROWS = 8, COLUMNS = HALF / ROWS;

  Factors<T> factors;
  Stack<T> weight, weight_inverse;
  Span<T> log_det;
  int channels;
  int64_t* fault;

  static int stride(int channels) { return channels | 1; }
  int64_t shared_bytes() const {
    return sizeof(T) * (4 * channels * stride(channels) + 2 * channels + 24) + sizeof(int) * (channels + 4);
  }

  template <class Block>
  FASTFLOW_HD void operator()(Block& block) const {
    const int64_t k = block.index;
    const int stride = channels | 1;
    const auto square = [&] { return Square<T>{block.template shared<T>(channels * stride), stride}; };
    const Square<T> l = square(), u = square(), l_inverse = square(), u_inverse = square();
    const Span<T> reciprocal = block.template shared<T>(channels);
    const Span<T> log_s = block.template shared<T>(channels);
    const Span<int> perm = block.template shared<int>(channels);
    block.phase([&](int thread) {
      for (int at = thread; at < channels * channels; at += THREADS) {
        const int i = at / channels, j = at % channels;
        l(i, j) = factors.l(k, channels, i, j);
        u(i, j) = factors.u(k, channels, i, j);
        l_inverse(i, j) = u_inverse(i, j) = T(i == j);
      }
      for (int i = thread; i < channels; i += THREADS) {
        const T d = factors.diagonal(k, i);
        if (!is_finite_nonzero(d)) *fault = encode_fault(Fault::diagonal_of_lu_weight, k, i);
        reciprocal[i] = T(1) / d;
        perm[i] = factors.row(k, channels, i);
        if (perm[i] != factors.perm(k, i)) *fault = encode_fault(Fault::perm_of_lu_weight, k, i);
        log_s[i] = factors.log_s(k, i);
      }
    });
    block.phase([&](int thread) {
      product<THREADS, T>(
          thread, channels, [&](int i, int q) { return l(perm[i], q); },
          [&](int q, int j) { return u(q, j); },
          [&](int i, int j, T sum) { weight(k, i * channels + j) = sum; });
      if (thread == THREADS - 1) {  // the last thread, the least likely to have a product
        T sum = 0;
        uint64_t seen = 0;
        for (int i = 0; i < channels; ++i) {
          sum += log_s[i];
          if (seen >> perm[i] & 1) *fault = encode_fault(Fault::perm_of_lu_weight, k, i);
          seen |= uint64_t(1) << perm[i];
        }
        log_det[k] = sum;
      }
    });
    for (int step = 0; step + 1 < channels; ++step)
      block.phase([&](int thread) {
        const int row = thread % HALF / COLUMNS, column = thread % COLUMNS;
        if (thread < HALF) {
          for (int i = step + 1 + row; i < channels; i += ROWS) {
            const T factor = l(i, step);
            for (int j = column; j <= step; j += COLUMNS) l_inverse(i, j) -= factor * l_inverse(step, j);
          }
        } else {
          const int pivot = channels - 1 - step;
          const T scale = reciprocal[pivot];
          for (int i = row; i < pivot; i += ROWS) {
            const T factor = u(i, pivot);
            for (int j = pivot + column; j < channels; j += COLUMNS)
              u_inverse(i, j) -= factor * (scale * u_inverse(pivot, j));
          }
        }
      });
    block.phase([&](int thread) {
      product<THREADS, T>(
          thread, channels, [&](int i, int q) { return u_inverse(i, q); },
          [&](int q, int j) { return l_inverse(q, perm[j]); },
          [&](int i, int j, T sum) { weight_inverse(k, i * channels + j) = reciprocal[i] * sum; });
    });
  }
};

template <typename T>
struct LUWeightBackwardKernel {
  static constexpr int THREADS = 256, RESIDENT = 1;

  Factors<T> factors;
  Stack<const T> weight_inverse, dweight, dweight_inverse;
  Span<const T> dlog_det;
  Stack<T> dlower, dupper, dlog_s;
  int channels;

  int64_t shared_bytes() const { return sizeof(T) * (3 * channels * (channels | 1) + 12); }

  template <class Block>
  FASTFLOW_HD void operator()(Block& block) const {
    const int64_t k = block.index;
    const int stride = channels | 1;
    const auto square = [&] { return Square<T>{block.template shared<T>(channels * stride), stride}; };
    const Square<T> first = square(), second = square(), third = square();
    const auto fill = [&](int thread, const Square<T>& to, auto value) {
      for (int at = thread; at < channels * channels; at += THREADS)
        to(at / channels, at % channels) = value(at / channels, at % channels);
    };
    // first = W^-1, second = the gradient of W^-1
    block.phase([&](int thread) {
      fill(thread, first, [&](int i, int j) { return weight_inverse(k, i * channels + j); });
      fill(thread, second, [&](int i, int j) { return dweight_inverse(k, i * channels + j); });
    });
    block.phase([&](int thread) {
      product<THREADS, T>(
          thread, channels, [&](int i, int q) { return first(q, i); },
          [&](int q, int j) { return second(q, j); }, [&](int i, int j, T sum) { third(i, j) = sum; });
    });
    // second = the gradient of L U, with rows in its order
    block.phase([&](int thread) {
      product<THREADS, T>(
          thread, channels, [&](int i, int q) { return third(i, q); },
          [&](int q, int j) { return first(j, q); },
          [&](int i, int j, T sum) {
            second(factors.row(k, channels, i), j) = dweight(k, i * channels + j) - sum;
          });
    });
    block.phase([&](int thread) {
      fill(thread, first, [&](int i, int j) { return factors.l(k, channels, i, j); });
      fill(thread, third, [&](int i, int j) { return factors.u(k, channels, i, j); });
    });
    block.phase([&](int thread) {
      product<THREADS, T>(
          thread, channels, [&](int i, int q) { return second(i, q); },
          [&](int q, int j) { return third(j, q); },
          [&](int i, int j, T sum) { dlower(k, i * channels + j) = i > j ? sum : T(0); });
      product<THREADS, T>(
          thread, channels, [&](int i, int q) { return first(q, i); },
          [&](int q, int j) { return second(q, j); },
          [&](int i, int j, T sum) {
            dupper(k, i * channels + j) = i < j ? sum : T(0);
            if (i == j) dlog_s(k, i) = sum * third(i, i) + dlog_det[k];
          });
    });
  }
};

// The ops: host code that launches the kernels.

template <typename T, typename Element = std::remove_const_t<T>>
Stack<T> stack_of(const Tensor& dense) {
  T* data;
  if constexpr (std::is_const_v<T>) data = dense.const_data_ptr<Element>();
  else data = dense.mutable_data_ptr<Element>();
  return {{data, dense.numel()}, dense.size(0) ? dense.numel() / dense.size(0) : 0};
}

template <typename T>
Factors<T> factors_of(const Tensor& perm, const Tensor& lower, const Tensor& upper, const Tensor& log_s,
                      const Tensor& sign_s) {
  return {stack_of<const int64_t>(perm), stack_of<const T>(lower), stack_of<const T>(upper),
          stack_of<const T>(log_s), stack_of<const T>(sign_s)};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> lu_weight(const Tensor& perm, const Tensor& lower, const Tensor& upper,
                                             const Tensor& log_s, const Tensor& sign_s) {
  using torch::stable::contiguous;
  check_lu_weight("lu_weight", perm, lower, upper, log_s, sign_s);
  const typename Device::Guard guard(lower);
  raise_singular<Device>();
  const int64_t stack = lower.size(0), channels = lower.size(1);
  const Tensor p = contiguous(perm), l = contiguous(lower), u = contiguous(upper), s = contiguous(log_s),
               sign = contiguous(sign_s);
  const auto empty = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(lower, size);
  };
  const Tensor weight = empty({stack, channels, channels}),
               weight_inverse = empty({stack, channels, channels}), log_det = empty({stack});
  const auto launch = [&](auto value) {
    using T = decltype(value);
    const LUWeightKernel<T> kernel{factors_of<T>(p, l, u, s, sign), stack_of<T>(weight),
                                   stack_of<T>(weight_inverse),     stack_of<T>(log_det).span,
                                   static_cast<int>(channels),      Device::fault_word()};
    Device::launch(kernel, stack, kernel.shared_bytes());
  };
  if (stack) lower.scalar_type() == torch::headeronly::ScalarType::Float ? launch(float()) : launch(double());
  return {weight, weight_inverse, log_det};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> lu_weight_backward(const Tensor& perm, const Tensor& lower,
                                                      const Tensor& upper, const Tensor& log_s,
                                                      const Tensor& sign_s, const Tensor& weight_inverse,
                                                      const Tensor& dweight, const Tensor& dweight_inverse,
                                                      const Tensor& dlog_det) {
  using torch::stable::contiguous;
  check_lu_weight_backward(perm, lower, upper, log_s, sign_s, weight_inverse, dweight, dweight_inverse,
                           dlog_det);
  const typename Device::Guard guard(lower);
  const int64_t stack = lower.size(0), channels = lower.size(1);
  const Tensor p = contiguous(perm), l = contiguous(lower), u = contiguous(upper), s = contiguous(log_s),
               sign = contiguous(sign_s);
  const Tensor v = contiguous(weight_inverse), dw = contiguous(dweight), dv = contiguous(dweight_inverse),
               dlog = contiguous(dlog_det);
  const auto empty = [&](std::initializer_list<int64_t> size) {
    return torch::stable::new_empty(lower, size);
  };
  const Tensor dlower = empty({stack, channels, channels}), dupper = empty({stack, channels, channels}),
               dlog_s = empty({stack, channels});
  const auto launch = [&](auto value) {
    using T = decltype(value);
    const LUWeightBackwardKernel<T> kernel{
        factors_of<T>(p, l, u, s, sign), stack_of<const T>(v), stack_of<const T>(dw), stack_of<const T>(dv),
        stack_of<const T>(dlog).span,    stack_of<T>(dlower),  stack_of<T>(dupper),   stack_of<T>(dlog_s),
        static_cast<int>(channels)};
    Device::launch(kernel, stack, kernel.shared_bytes());
  };
  if (stack) lower.scalar_type() == torch::headeronly::ScalarType::Float ? launch(float()) : launch(double());
  return {dlower, dupper, dlog_s};
}

}  // namespace fastflow
