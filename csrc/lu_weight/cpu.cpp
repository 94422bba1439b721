// fastflow_C::lu_weight and its backward on the CPU: W = (L (U + diag s))[perm], its inverse and log|det|,
// for a stack of matrices.
#include "stable.h"

#include <algorithm>
#include <tuple>

#include "cpu/diagonal.h"
#include "cpu/gemm.h"
#include "cpu/tensors.h"
#include "lu_weight/arguments.h"

namespace fastflow::cpu {
namespace {

// A stack of matrices [K, rows, columns], or of vectors [K, rows], with any strides.
template <typename T>
struct Stack {
  const T* data;
  int64_t batch, row, col;

  explicit Stack(const Tensor& t)
      : data(t.const_data_ptr<T>()),
        batch(t.stride(0)),
        row(t.dim() > 1 ? t.stride(1) : 0),
        col(t.dim() > 2 ? t.stride(2) : 0) {}
  T operator()(int64_t k, int64_t i = 0, int64_t j = 0) const { return data[k * batch + i * row + j * col]; }
};

// A matrix of up to C x C in a thread's memory.
template <typename T>
struct Square {
  T* data;
  int64_t row;

  T& operator()(int64_t i, int64_t j) const { return data[i * row + j]; }
};

template <typename T>
class Squares {
 public:
  Squares(int count, int64_t n) : row_(padded(n)), size_(n * row_), memory_(count * size_) {}
  Square<T> operator[](int i) const { return {memory_.get() + i * size_, row_}; }

 private:
  const int64_t row_, size_;
  Buffer<T> memory_;
};

// c = a b; a may be transposed by its strides.
template <typename T>
void multiply(int64_t n, const T* a, int64_t a_row, int64_t a_col, const Square<T>& b, const Square<T>& c) {
  gemm({n, b.row, n, a, a_row, a_col, b.data, b.row, c.data, c.row});
}

// Loads L and U with their diagonals, zero in the other triangle.
template <typename T>
void load_factors(int64_t k, int64_t n, const Stack<T>& lower, const Stack<T>& upper, const T* s,
                  const Square<T>& L, const Square<T>& U) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) L(i, j) = lower(k, i, j), U(i, j) = T(0);
    L(i, i) = T(1), U(i, i) = s[i];
    for (int64_t j = i + 1; j < n; ++j) L(i, j) = T(0), U(i, j) = upper(k, i, j);
    for (int64_t j = n; j < L.row; ++j) L(i, j) = U(i, j) = T(0);
  }
}

// Minimum number of matrices per thread: starting a thread costs about 10 us.
int64_t grain_of(int64_t n) { return std::max<int64_t>(1, (1 << 17) / (n * n * (n + 16))); }

void check_permutation(const char* op, const Stack<int64_t>& perm, int64_t K, int64_t n) {
  for (int64_t k = 0; k < K; ++k) {
    uint64_t seen = 0;  // n is at most 64
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = perm(k, i);
      STD_TORCH_CHECK(0 <= row && row < n && !(seen >> row & 1), op, ": perm of matrix ", k, ": got ", row,
                      " at index ", i, ", expected each of 0 to ", n - 1, " once");
      seen |= uint64_t(1) << row;
    }
  }
}

template <typename T>
void run(const Tensor& perm_, const Tensor& lower_, const Tensor& upper_, const Tensor& log_s_,
         const Tensor& sign_s_, const Tensor& weight, const Tensor& weight_inverse, const Tensor& log_det) {
  const int64_t K = lower_.size(0), n = lower_.size(1);
  const Stack<int64_t> perm(perm_);
  const Stack<T> lower(lower_), upper(upper_), log_s(log_s_), sign_s(sign_s_);
  T* w_ptr = weight.mutable_data_ptr<T>();
  T* inverse_ptr = weight_inverse.mutable_data_ptr<T>();
  T* log_det_ptr = log_det.mutable_data_ptr<T>();
  check_permutation("lu_weight", perm, K, n);
  FirstSingular singular(n);
  torch::stable::parallel_for(0, K, grain_of(n), [&](int64_t begin, int64_t end) {
    const Squares<T> squares(3, n);
    const Square<T> L = squares[0], U = squares[1], X = squares[2];
    const Buffer<T> vectors(3 * n);
    T *s = vectors.get(), *reciprocals = s + n, *ones = reciprocals + n;
    std::fill_n(ones, n, T(1));
    for (int64_t k = begin; k < end; ++k) {
      T sum = 0;
      for (int64_t i = 0; i < n; ++i) {
        s[i] = sign_s(k, i) * std::exp(log_s(k, i));
        reciprocals[n - 1 - i] = singular.reciprocal(s[i], k, i);
        sum += log_s(k, i);
      }
      log_det_ptr[k] = sum;
      load_factors(k, n, lower, upper, s, L, U);
      multiply(n, L.data, L.row, 1, U, X);
      for (int64_t i = 0; i < n; ++i) std::copy_n(&X(perm(k, i), 0), n, w_ptr + (k * n + i) * n);
      for (int64_t i = 0; i < n; ++i) {
        std::fill_n(&X(i, 0), X.row, T(0));
        X(i, i) = T(1);
      }
      substitute({n, n, L.data, L.row, 1, ones, X.data, X.row, X.data, X.row});
      T* end_of_x = &X(n - 1, 0);
      substitute({n, n, &U(n - 1, n - 1), -U.row, -1, reciprocals, end_of_x, -X.row, end_of_x, -X.row});
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) inverse_ptr[(k * n + i) * n + j] = X(i, perm(k, j));
    }
  });
  singular.raise("lu_weight");
}

template <typename T>
void run_backward(const Tensor& perm_, const Tensor& lower_, const Tensor& upper_, const Tensor& log_s_,
                  const Tensor& sign_s_, const Tensor& weight_inverse_, const Tensor& dweight_,
                  const Tensor& dweight_inverse_, const Tensor& dlog_det_, const Tensor& dlower,
                  const Tensor& dupper, const Tensor& dlog_s) {
  const int64_t K = lower_.size(0), n = lower_.size(1);
  const Stack<int64_t> perm(perm_);
  const Stack<T> lower(lower_), upper(upper_), log_s(log_s_), sign_s(sign_s_), inverse(weight_inverse_),
      dweight(dweight_), dinverse(dweight_inverse_), dlog_det(dlog_det_);
  T* dlower_ptr = dlower.mutable_data_ptr<T>();
  T* dupper_ptr = dupper.mutable_data_ptr<T>();
  T* dlog_s_ptr = dlog_s.mutable_data_ptr<T>();
  check_permutation("lu_weight_backward", perm, K, n);
  torch::stable::parallel_for(0, K, grain_of(n), [&](int64_t begin, int64_t end) {
    const Squares<T> squares(6, n);
    const Square<T> L = squares[0], U = squares[1], transposed = squares[2], product = squares[3],
                    G = squares[4], dA = squares[5];
    const Buffer<T> s(n);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t i = 0; i < n; ++i) s.get()[i] = sign_s(k, i) * std::exp(log_s(k, i));
      load_factors(k, n, lower, upper, s.get(), L, U);
      // dA: the gradient of W plus the contribution of W^-1, with rows in the order of A = L U
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) transposed(i, j) = inverse(k, j, i);
        std::fill(&transposed(i, n), &transposed(i, 0) + transposed.row, T(0));
      }
      multiply(n, dinverse.data + k * dinverse.batch, dinverse.row, dinverse.col, transposed, product);
      multiply(n, transposed.data, transposed.row, 1, product, G);
      std::fill_n(dA.data, n * dA.row, T(0));
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < n; ++j) dA(perm(k, i), j) = dweight(k, i, j) - G(i, j);
      multiply(n, L.data, 1, L.row, dA, product);
      for (int64_t i = 0; i < n; ++i) {
        T* row = dupper_ptr + (k * n + i) * n;
        std::fill_n(row, i + 1, T(0));
        std::copy_n(&product(i, 0) + i + 1, n - i - 1, row + i + 1);
        dlog_s_ptr[k * n + i] = product(i, i) * s.get()[i] + dlog_det(k);
      }
      transpose({n, n, U.data, U.row, transposed.data, transposed.row});
      multiply(n, dA.data, dA.row, 1, transposed, product);
      for (int64_t i = 0; i < n; ++i) {
        T* row = dlower_ptr + (k * n + i) * n;
        std::copy_n(&product(i, 0), i, row);
        std::fill(row + i, row + n, T(0));
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> lu_weight(const Tensor& perm, const Tensor& lower, const Tensor& upper,
                                             const Tensor& log_s, const Tensor& sign_s) {
  check_lu_weight("lu_weight", perm, lower, upper, log_s, sign_s);
  const int64_t K = lower.size(0), n = lower.size(1);
  Tensor weight = empty(lower, {K, n, n}), weight_inverse = empty(lower, {K, n, n});
  Tensor log_det = n ? empty(lower, {K}) : torch::stable::new_zeros(lower, {K});
  if (lower.numel())
    (lower.scalar_type() == ScalarType::Float ? run<float> : run<double>)(perm, lower, upper, log_s, sign_s,
                                                                          weight, weight_inverse, log_det);
  return {weight, weight_inverse, log_det};
}

std::tuple<Tensor, Tensor, Tensor> lu_weight_backward(const Tensor& perm, const Tensor& lower,
                                                      const Tensor& upper, const Tensor& log_s,
                                                      const Tensor& sign_s, const Tensor& weight_inverse,
                                                      const Tensor& dweight, const Tensor& dweight_inverse,
                                                      const Tensor& dlog_det) {
  check_lu_weight_backward(perm, lower, upper, log_s, sign_s, weight_inverse, dweight, dweight_inverse,
                           dlog_det);
  const int64_t K = lower.size(0), n = lower.size(1);
  Tensor dlower = empty(lower, {K, n, n}), dupper = empty(lower, {K, n, n});
  Tensor dlog_s = empty(lower, {K, n});
  if (lower.numel())
    (lower.scalar_type() == ScalarType::Float
         ? run_backward<float>
         : run_backward<double>)(perm, lower, upper, log_s, sign_s, weight_inverse, dweight, dweight_inverse,
                                 dlog_det, dlower, dupper, dlog_s);
  return {dlower, dupper, dlog_s};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("lu_weight", TORCH_BOX(&fastflow::cpu::lu_weight));
  m.impl("lu_weight_backward", TORCH_BOX(&fastflow::cpu::lu_weight_backward));
}
