// The schemas of the compiled ops, which are those of the ops in Python. fastflow_C holds the bodies of the
// CPU and of CUDA, fastflow_emulated the CUDA kernels run on the CPU. A namespace of its own, because
// fastflow:: is defined in Python and picks between these bodies and others.
#include "stable.h"

constexpr const char* SCHEMAS[] = {
    "triangular_solve(Tensor A, Tensor B, bool upper, bool unit_diagonal, bool transpose) -> Tensor",
    "lu_weight(Tensor perm, Tensor lower, Tensor upper, Tensor log_s, Tensor sign_s) -> (Tensor, Tensor, "
    "Tensor)",
    "lu_weight_backward(Tensor perm, Tensor lower, Tensor upper, Tensor log_s, Tensor sign_s, Tensor "
    "weight_inverse, "
    "Tensor dweight, Tensor dweight_inverse, Tensor dlog_det) -> (Tensor, Tensor, Tensor)",
    "conv1x1(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "conv1x1_backward(Tensor x, Tensor weight, Tensor dy) -> (Tensor, Tensor, Tensor)",
    "conv1x1_inverse_backward(Tensor y, Tensor weight, Tensor weight_inverse, Tensor? bias, Tensor dy) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
};

// On a GPU these are Triton's, so there is no CUDA kernel to emulate.
#define FASTFLOW_VARIANT "str mask, bool flip, str scale, str order, str h_order"
#define FASTFLOW_MAP "int n_bits, float scale, float shift, bool logit, str? squeeze_order"
constexpr const char* CPU_SCHEMAS[] = {
    "actnorm(Tensor x, Tensor log_scale, Tensor bias, bool inverse) -> (Tensor, Tensor)",
    "actnorm_backward(Tensor x, Tensor log_scale, Tensor bias, Tensor dy, Tensor dlog_det, bool inverse) -> "
    "(Tensor, Tensor, Tensor)",
    "actnorm_inverse_backward(Tensor y, Tensor log_scale, Tensor bias, Tensor dy, Tensor dlog_det) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    "actnorm_statistics(Tensor x) -> (Tensor, Tensor)",
    "affine_coupling(Tensor x, Tensor h, Tensor? factor, " FASTFLOW_VARIANT
    ", bool inverse) -> (Tensor, Tensor)",
    "affine_coupling_backward(Tensor x, Tensor h, Tensor? factor, Tensor dy, Tensor "
    "dlog_det, " FASTFLOW_VARIANT ", bool inverse) -> (Tensor, Tensor, Tensor)",
    "affine_coupling_inverse_backward(Tensor y, Tensor h, Tensor? factor, Tensor dy, Tensor "
    "dlog_det, " FASTFLOW_VARIANT ") -> (Tensor, Tensor, Tensor, Tensor)",
    "gaussian_log_prob(Tensor z, Tensor? mean, Tensor? log_scale) -> Tensor",
    "gaussian_log_prob_backward(Tensor z, Tensor? mean, Tensor? log_scale, Tensor dlog_prob) -> (Tensor, "
    "Tensor, Tensor)",
    "dequantize(Tensor x, Tensor? noise, Tensor? seed, int offset, " FASTFLOW_MAP
    ", ScalarType dtype) -> (Tensor, Tensor)",
    "dequantize_backward(Tensor x, Tensor noise, Tensor dy, Tensor dlog_det, " FASTFLOW_MAP ") -> Tensor",
    "dequantize_inverse(Tensor y, " FASTFLOW_MAP ") -> (Tensor, Tensor)",
    "squeeze(Tensor x, str order, bool inverse) -> Tensor",
    "uniform_noise(int n, int d, Tensor seed, int offset, bool as_double) -> Tensor",
    "normal_noise(int n, int d, Tensor seed, int offset, bool as_double) -> Tensor",
};

// FRAGMENT, not STABLE_TORCH_LIBRARY: a second file with the latter crashes at load.
STABLE_TORCH_LIBRARY_FRAGMENT(fastflow_C, m) {
  for (const char* schema : SCHEMAS) m.def(schema);
  for (const char* schema : CPU_SCHEMAS) m.def(schema);
}
STABLE_TORCH_LIBRARY_FRAGMENT(fastflow_emulated, m) {
  for (const char* schema : SCHEMAS) m.def(schema);
}
