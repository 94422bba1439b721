#pragma once
// What every body asks of its arguments: the message names the argument, what came and what was expected.
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

namespace fastflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t MAX_CHANNELS =
    64;  // of the small matrices: a larger one is for the library's product of matrices

inline std::string shape(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t d = 0; d < t.dim(); ++d) out << (d ? ", " : "") << t.size(d);
  out << "]";
  return out.str();
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

inline const char* dtype(const Tensor& t) { return torch::headeronly::toString(t.scalar_type()); }

// What a singular matrix is reported with.
inline std::string singular(const char* op, int64_t matrix, int64_t place, double value) {
  std::ostringstream out;
  out << op << ": matrix " << matrix << " of the stack has ";
  if (std::isnan(value)) out << "nan";  // a stream writes -nan where the sign bit is set
  else out << value;
  out << " at place " << place << " of its diagonal, expected a finite number other than 0";
  return out.str();
}

// `other`, named `name`, beside `t`, named `of`.
inline void check_beside(const char* op, const char* name, const Tensor& other, const char* of,
                         const Tensor& t) {
  STD_TORCH_CHECK(other.scalar_type() == t.scalar_type(), op, ": ", name, " has dtype ", dtype(other),
                  ", expected ", of, "'s, ", dtype(t));
  STD_TORCH_CHECK(other.device() == t.device(), op, ": ", of, " and ", name,
                  " are on different devices, expected one");
}

inline void check_triangular_solve(const Tensor& A, const Tensor& B) {
  STD_TORCH_CHECK(A.dim() == 3 && A.size(1) == A.size(2), "triangular_solve: A has shape ", shape(A),
                  ", expected [K, n, n]");
  STD_TORCH_CHECK(B.dim() == 3 && B.size(0) == A.size(0) && B.size(1) == A.size(1),
                  "triangular_solve: B has shape ", shape(B), ", expected [K, n, m] with K = ", A.size(0),
                  " and n = ", A.size(1), " of A");
  STD_TORCH_CHECK(A.scalar_type() == ScalarType::Float || A.scalar_type() == ScalarType::Double,
                  "triangular_solve: A has dtype ", dtype(A), ", expected Float or Double");
  check_beside("triangular_solve", "B", B, "A", A);
}

// `w`, named `name`, of shape [C, C] for x [N, C, ...], in the dtype that x is accumulated in.
inline void check_weight(const char* op, const char* name, const Tensor& w, const Tensor& x) {
  const int64_t channels = x.size(1);
  STD_TORCH_CHECK(w.dim() == 2 && w.size(0) == channels && w.size(1) == channels, op, ": ", name,
                  " has shape ", shape(w), ", expected [", channels, ", ", channels, "], x has ", channels,
                  " channels");
  const ScalarType expected = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(w.scalar_type() == expected, op, ": ", name, " has dtype ", dtype(w), ", expected ",
                  torch::headeronly::toString(expected), " for x of dtype ", dtype(x));
  STD_TORCH_CHECK(w.device() == x.device(), op, ": x and ", name, " are on different devices, expected one");
}

inline void check_floating(const char* op, const char* name, const Tensor& t) {
  const ScalarType found = t.scalar_type();
  STD_TORCH_CHECK(found == ScalarType::Float || found == ScalarType::Double ||
                      found == ScalarType::BFloat16 || found == ScalarType::Half,
                  op, ": ", name, " has dtype ", dtype(t), ", expected Float, Double, BFloat16 or Half");
}

inline void check_images(const char* op, const Tensor& x, const Tensor& weight,
                         const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": x has shape ", shape(x), ", expected [N, C, ...]");
  check_floating(op, "x", x);
  STD_TORCH_CHECK(1 <= x.size(1) && x.size(1) <= MAX_CHANNELS, op, ": x has shape ", shape(x),
                  ", expected 1 to ", MAX_CHANNELS, " channels");
  check_weight(op, "weight", weight, x);
  if (!bias) return;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == x.size(1), op, ": bias has shape ", shape(*bias),
                  ", expected [", x.size(1), "], one for each channel of x");
  check_beside(op, "bias", *bias, "weight", weight);
}

inline void check_gradient(const char* op, const Tensor& dy, const Tensor& x) {
  STD_TORCH_CHECK(same_shape(dy, x), op, ": dy has shape ", shape(dy), ", expected x's, ", shape(x));
  check_beside(op, "dy", dy, "x", x);
}

inline void check_conv1x1(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_images("conv1x1", x, weight, bias);
}

inline void check_conv1x1_backward(const Tensor& x, const Tensor& weight, const Tensor& dy) {
  check_images("conv1x1_backward", x, weight, std::nullopt);
  check_gradient("conv1x1_backward", dy, x);
}

inline void check_conv1x1_inverse_backward(const Tensor& y, const Tensor& weight,
                                           const Tensor& weight_inverse, const std::optional<Tensor>& bias,
                                           const Tensor& dy) {
  check_images("conv1x1_inverse_backward", y, weight, bias);
  check_weight("conv1x1_inverse_backward", "weight_inverse", weight_inverse, y);
  check_gradient("conv1x1_inverse_backward", dy, y);
}

inline void check_named(const char* op, const char* name, const std::string& value,
                        std::initializer_list<const char*> known) {
  std::string expected;
  for (const char* one : known) {
    if (value == one) return;
    expected += (expected.empty() ? "" : ", ") + std::string(one);
  }
  STD_TORCH_CHECK(false, op, ": ", name, " is ", value, ", expected one of ", expected);
}

// x, named `name`; its network's output h may have another dtype.
inline void check_affine_coupling(const char* op, const char* name, const Tensor& x, const Tensor& h,
                                  const std::optional<Tensor>& factor, const std::string& mask,
                                  const std::string& scale, const std::string& order,
                                  const std::string& h_order) {
  check_named(op, "mask", mask, {"halves", "checkerboard"});
  check_named(op, "scale", scale, {"exp", "sigmoid", "soft_clamp", "tanh", "none"});
  check_named(op, "order", order, {"scale_first", "shift_first"});
  check_named(op, "h_order", h_order, {"shift_scale", "scale_shift", "interleaved"});
  const bool halves = mask == "halves", has_factor = scale == "soft_clamp" || scale == "tanh";
  STD_TORCH_CHECK(x.dim() >= 2 && (!halves || x.size(1) % 2 == 0), op, ": ", name, " has shape ", shape(x),
                  halves ? ", expected [N, C, ...] with an even C" : ", expected [N, C, ...]");
  check_floating(op, name, x);
  check_floating(op, "h", h);
  const int64_t transformed = halves ? x.size(1) / 2 : x.size(1);
  bool fits = h.dim() == x.dim() && h.size(1) == (scale == "none" ? transformed : 2 * transformed);
  for (int64_t d = 0; fits && d < x.dim(); ++d) fits = d == 1 || h.size(d) == x.size(d);
  STD_TORCH_CHECK(fits, op, ": h has shape ", shape(h), ", expected that of ", name, ", ", shape(x),
                  ", with ", scale == "none" ? transformed : 2 * transformed, " channels");
  STD_TORCH_CHECK(factor.has_value() == has_factor, op, ": factor is ", factor ? "given" : "None",
                  ", scale is ", scale);
  if (!factor) return;
  check_floating(op, "factor", *factor);
  STD_TORCH_CHECK(factor->dim() == 1 && factor->size(0) == transformed, op, ": factor has shape ",
                  shape(*factor), ", expected [", transformed, "], one for each transformed channel");
}

inline void check_affine_coupling_backward(const char* op, const char* name, const Tensor& x, const Tensor& h,
                                           const std::optional<Tensor>& factor, const Tensor& dy,
                                           const Tensor& dlog_det, const std::string& mask,
                                           const std::string& scale, const std::string& order,
                                           const std::string& h_order) {
  check_affine_coupling(op, name, x, h, factor, mask, scale, order, h_order);
  STD_TORCH_CHECK(same_shape(dy, x), op, ": dy has shape ", shape(dy), ", expected ", name, "'s, ", shape(x));
  check_floating(op, "dy", dy);
  STD_TORCH_CHECK(dlog_det.dim() == 1 && dlog_det.size(0) == x.size(0), op, ": dlog_det has shape ",
                  shape(dlog_det), ", expected [", x.size(0), "]");
  check_floating(op, "dlog_det", dlog_det);
}

// A mean or log scale: one for each element of z, or for each channel.
inline void check_term(const char* op, const char* name, const std::optional<Tensor>& v, const Tensor& z) {
  if (!v) return;
  check_floating(op, name, *v);
  STD_TORCH_CHECK(same_shape(*v, z) || (v->dim() == 1 && v->size(0) == z.size(1)), op, ": ", name,
                  " has shape ", shape(*v), ", expected z's, ", shape(z), ", or [", z.size(1),
                  "], one for each channel");
}

inline void check_gaussian_log_prob(const char* op, const Tensor& z, const std::optional<Tensor>& mean,
                                    const std::optional<Tensor>& log_scale) {
  STD_TORCH_CHECK(z.dim() >= 2, op, ": z has shape ", shape(z), ", expected [N, C, ...]");
  check_floating(op, "z", z);
  check_term(op, "mean", mean, z);
  check_term(op, "log_scale", log_scale, z);
}

inline void check_gaussian_log_prob_backward(const char* op, const Tensor& z,
                                             const std::optional<Tensor>& mean,
                                             const std::optional<Tensor>& log_scale,
                                             const Tensor& dlog_prob) {
  check_gaussian_log_prob(op, z, mean, log_scale);
  STD_TORCH_CHECK(dlog_prob.dim() == 1 && dlog_prob.size(0) == z.size(0), op, ": dlog_prob has shape ",
                  shape(dlog_prob), ", expected [", z.size(0), "]");
  check_floating(op, "dlog_prob", dlog_prob);
}

// x, named `name`.
inline void check_actnorm(const char* op, const char* name, const Tensor& x, const Tensor& log_scale,
                          const Tensor& bias) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": ", name, " has shape ", shape(x), ", expected [N, C, ...]");
  check_floating(op, name, x);
  const auto check_channels = [&](const char* parameter, const Tensor& v) {
    check_floating(op, parameter, v);
    STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == x.size(1), op, ": ", parameter, " has shape ", shape(v),
                    ", expected [", x.size(1), "], one for each channel of ", name);
  };
  check_channels("log_scale", log_scale);
  check_channels("bias", bias);
}

inline void check_actnorm_backward(const char* op, const char* name, const Tensor& x, const Tensor& log_scale,
                                   const Tensor& bias, const Tensor& dy, const Tensor& dlog_det) {
  check_actnorm(op, name, x, log_scale, bias);
  STD_TORCH_CHECK(same_shape(dy, x), op, ": dy has shape ", shape(dy), ", expected ", name, "'s, ", shape(x));
  check_floating(op, "dy", dy);
  STD_TORCH_CHECK(dlog_det.dim() == 1 && dlog_det.size(0) == x.size(0), op, ": dlog_det has shape ",
                  shape(dlog_det), ", expected [", x.size(0), "]");
  check_floating(op, "dlog_det", dlog_det);
}

// The image that an op squeezes, or unsqueezes, named `name`.
inline void check_squeezed(const char* op, const char* name, const Tensor& x, const std::string& order,
                           bool inverse) {
  check_named(op, "order", order, {"channel", "space", "realnvp"});
  STD_TORCH_CHECK(x.dim() == 4, op, ": ", name, " has shape ", shape(x), ", expected [N, C, H, W]");
  STD_TORCH_CHECK(!inverse || x.size(1) % 4 == 0, op, ": ", name, " has shape ", shape(x),
                  ", expected a number of channels that 4 divides");
  STD_TORCH_CHECK(inverse || (x.size(2) % 2 == 0 && x.size(3) % 2 == 0), op, ": ", name, " has shape ",
                  shape(x), ", expected an even height and width");
}

inline void check_batch(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 2, op, ": ", name, " has shape ", shape(x), ", expected [N, ...]");
}

inline void check_seed(const char* op, const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.dim() == 0, op, ": seed has dtype ",
                  dtype(seed), " and shape ", shape(seed), ", expected Long without dimensions");
}

// uint8 images, and noise of their shape where it is given.
inline void check_dequantize(const char* op, const Tensor& x, const std::optional<Tensor>& noise,
                             const std::optional<Tensor>& seed,
                             const std::optional<std::string>& squeeze_order) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte, op, ": x has dtype ", dtype(x), ", expected Byte");
  check_batch(op, "x", x);
  if (squeeze_order) check_squeezed(op, "x", x, *squeeze_order, false);
  STD_TORCH_CHECK(noise.has_value() != seed.has_value(), op, ": noise and seed are ",
                  noise ? "both" : "neither", " given, expected one of them");
  if (seed) return check_seed(op, *seed);
  STD_TORCH_CHECK(same_shape(*noise, x), op, ": noise has shape ", shape(*noise), ", expected x's, ",
                  shape(x));
  check_floating(op, "noise", *noise);
}

inline void check_dequantize_backward(const Tensor& x, const Tensor& noise, const Tensor& dy,
                                      const Tensor& dlog_det,
                                      const std::optional<std::string>& squeeze_order) {
  const char* op = "dequantize_backward";
  check_dequantize(op, x, noise, std::nullopt, squeeze_order);
  const bool like_x = squeeze_order
                          ? dy.dim() == 4 && dy.size(0) == x.size(0) && dy.size(1) == 4 * x.size(1) &&
                                dy.size(2) == x.size(2) / 2 && dy.size(3) == x.size(3) / 2
                          : same_shape(dy, x);
  STD_TORCH_CHECK(like_x, op, ": dy has shape ", shape(dy), ", expected that of x, ", shape(x),
                  squeeze_order ? ", squeezed" : "");
  check_floating(op, "dy", dy);
  STD_TORCH_CHECK(dlog_det.dim() == 1 && dlog_det.size(0) == x.size(0), op, ": dlog_det has shape ",
                  shape(dlog_det), ", expected [", x.size(0), "]");
  check_floating(op, "dlog_det", dlog_det);
}

inline void check_dequantize_inverse(const Tensor& y, const std::optional<std::string>& squeeze_order) {
  check_floating("dequantize_inverse", "y", y);
  check_batch("dequantize_inverse", "y", y);
  if (squeeze_order) check_squeezed("dequantize_inverse", "y", y, *squeeze_order, true);
}

inline void check_lu(const char* op, const Tensor& perm, const Tensor& lower, const Tensor& upper,
                     const Tensor& log_s, const Tensor& sign_s) {
  STD_TORCH_CHECK(lower.dim() == 3 && lower.size(1) == lower.size(2) && lower.size(1) <= MAX_CHANNELS, op,
                  ": lower has shape ", shape(lower), ", expected [K, C, C] with C up to ", MAX_CHANNELS);
  STD_TORCH_CHECK(lower.scalar_type() == ScalarType::Float || lower.scalar_type() == ScalarType::Double, op,
                  ": lower has dtype ", dtype(lower), ", expected Float or Double");
  STD_TORCH_CHECK(same_shape(upper, lower), op, ": upper has shape ", shape(upper), ", expected lower's, ",
                  shape(lower));
  check_beside(op, "upper", upper, "lower", lower);
  const auto check_vector = [&](const char* name, const Tensor& v) {
    STD_TORCH_CHECK(v.dim() == 2 && v.size(0) == lower.size(0) && v.size(1) == lower.size(1), op, ": ", name,
                    " has shape ", shape(v), ", expected [", lower.size(0), ", ", lower.size(1), "]");
  };
  check_vector("perm", perm);
  check_vector("log_s", log_s);
  check_vector("sign_s", sign_s);
  check_beside(op, "log_s", log_s, "lower", lower);
  check_beside(op, "sign_s", sign_s, "lower", lower);
  STD_TORCH_CHECK(perm.scalar_type() == ScalarType::Long, op, ": perm has dtype ", dtype(perm),
                  ", expected Long");
  STD_TORCH_CHECK(perm.device() == lower.device(), op,
                  ": lower and perm are on different devices, expected one");
}

inline void check_lu_weight(const Tensor& perm, const Tensor& lower, const Tensor& upper, const Tensor& log_s,
                            const Tensor& sign_s) {
  check_lu("lu_weight", perm, lower, upper, log_s, sign_s);
}

inline void check_lu_weight_backward(const Tensor& perm, const Tensor& lower, const Tensor& upper,
                                     const Tensor& log_s, const Tensor& sign_s, const Tensor& weight_inverse,
                                     const Tensor& dweight, const Tensor& dweight_inverse,
                                     const Tensor& dlog_det) {
  const char* op = "lu_weight_backward";
  check_lu(op, perm, lower, upper, log_s, sign_s);
  const auto check_matrix = [&](const char* name, const Tensor& w) {
    STD_TORCH_CHECK(same_shape(w, lower), op, ": ", name, " has shape ", shape(w), ", expected lower's, ",
                    shape(lower));
    check_beside(op, name, w, "lower", lower);
  };
  check_matrix("weight_inverse", weight_inverse);
  check_matrix("dweight", dweight);
  check_matrix("dweight_inverse", dweight_inverse);
  STD_TORCH_CHECK(dlog_det.dim() == 1 && dlog_det.size(0) == lower.size(0), op, ": dlog_det has shape ",
                  shape(dlog_det), ", expected [", lower.size(0), "]");
  check_beside(op, "dlog_det", dlog_det, "lower", lower);
}

}  // namespace fastflow
