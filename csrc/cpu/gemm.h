#pragma once
// Products of small matrices and substitution for the CPU ops, compiled for each instruction set
// (multiversion.h). The left matrix is read element by element with any strides, transposed or not. Rows of
// the right matrix and of the result are contiguous, and vectors run along them.
#include <cstdint>
#include <memory>

namespace fastflow::cpu {

// The number of columns rounded up, so that rows of a buffer fill whole vectors of every width.
constexpr int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// The initial value of a sum: 0, bias[i] of row i, bias[j] of column j, or the present result.
enum class Start { zero, row, column, result };

constexpr int64_t PANEL = 6;  // rows of a that are processed together

// c[i][j] = start + sum over p of a[i][p] b[p][j], for i < m, j < n, p < k, in the order of p.
template <typename T>
struct Gemm {
  int64_t m, n, k;
  const T* a;
  int64_t a_row, a_col;
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  Start start = Start::zero;  // Start::result requires n == padded(n)
  const T* bias = nullptr;
  bool relu = false;    // of the result; keeps NaN
  int64_t a_panel = 0;  // if not 0: the distance between panels of a, whose rows are a_row apart
};
void gemm(const Gemm<float>&);
void gemm(const Gemm<double>&);

// Solves a x = b for a lower triangular. An upper triangular matrix is passed from its last row, with
// negative strides.
template <typename T>
struct Substitution {
  int64_t n, columns;
  const T* a;
  int64_t a_row, a_col;
  const T* reciprocals;  // of the diagonal; 0: divide by the diagonal instead
  const T* b;            // rows of `padded(columns)` readable elements, or of 1 if columns is 1
  int64_t b_row;
  T* x;  // likewise; written
  int64_t x_row;
};
// The bits of a column do not depend on the other columns.
void substitute(const Substitution<float>&);
void substitute(const Substitution<double>&);

// to[j][i] = from[i][j] for i < rows, j < columns; columns `rows` to padded(rows) of `to` become 0.
template <typename T>
struct Transposition {
  int64_t rows, columns;
  const T* from;
  int64_t from_row;
  T* to;
  int64_t to_row;
};
void transpose(const Transposition<float>&);
void transpose(const Transposition<double>&);

// Uninitialized memory that starts on a cache line, for aligned vectors. Not aligned new: a solve with one
// right-hand side takes 0.2 of its 3 microseconds longer with it.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(new unsigned char[size * sizeof(T) + LINE]) {
    data_ = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory_.get()) + LINE - 1) / LINE * LINE);
  }
  T* get() const { return data_; }

 private:
  static constexpr uintptr_t LINE = 64;
  std::unique_ptr<unsigned char[]> memory_;
  T* data_;
};

}  // namespace fastflow::cpu
