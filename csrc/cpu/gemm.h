#pragma once
// Products of small matrices and substitution, compiled for each instruction set (multiversion.h): what the
// CPU's ops are made of. A matrix on the left is read element by element through any strides, transposed or
// not; rows on the right and of the result have their columns side by side, and vectors run along them.
#include <cstdint>
#include <memory>

namespace fastflow::cpu {

// Columns of a buffer, so that its rows fill whole vectors of every width.
constexpr int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16; }

// What a sum starts from: nothing, bias[i] for a row, bias[j] for a column, or the result as it stands.
enum class Start { zero, row, column, result };

// c[i][j] = start + sum over p of a[i][p] b[p][j], for i < m, j < n, p < k, the sum in the order of p.
template <typename T>
struct Gemm {
  int64_t m, n, k;
  const T* a;
  int64_t a_row, a_col;
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  Start start = Start::zero;  // Start::result wants n to be padded(n)
  const T* bias = nullptr;
};
void gemm(const Gemm<float>&);
void gemm(const Gemm<double>&);

// Solves a x = b for a lower triangular; an upper one is lower when walked from its last row, by negative
// strides.
template <typename T>
struct Substitution {
  int64_t n, columns;
  const T* a;
  int64_t a_row, a_col;
  const T* reciprocals;  // of the diagonal; 0 where to divide by it
  const T* b;            // rows of `padded(columns)` that can be read, of one where columns is 1
  int64_t b_row;
  T* x;  // the same, and written
  int64_t x_row;
};
// A column's bits are the same whatever stands beside it.
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

// Uninitialised memory that starts on a cache line, as vectors like it. Aligned new would do, but a
// solve with one right-hand side takes 0.2 of its 3 microseconds longer with it.
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
