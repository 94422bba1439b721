// fastflow_C::mixture_cdf, its backward and its inverse + backward on the CPU.
//
// Bytes per element, float32, for P parameters: forward 8 + 4 P, backward 12 + 8 P, inverse + backward
// 16 + 8 P.
#include "stable.h"

#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/columns.h"
#include "mixture_cdf/mixture.h"

namespace fastflow::cpu {
namespace {

int64_t parameters(const char* op, int64_t components) {
  STD_TORCH_CHECK(components >= 1 && components <= MAX_COMPONENTS, op, ": components: got ", components,
                  ", expected 1 to ", MAX_COMPONENTS);
  return 3 * components + 2;
}

std::tuple<Tensor, Tensor> mixture_cdf(const Tensor& x, const Tensor& params,
                                       const std::optional<Tensor>& channel_order, int64_t first_channel,
                                       int64_t components, bool inverse) {
  expect_batch("mixture_cdf", "x", x);
  const Layout layout("mixture_cdf", "x", x, params, channel_order, first_channel,
                      parameters("mixture_cdf", components));
  OutputBuffer y(x);
  const Tensor log_det = empty(x, {x.size(0)}, accumulator_of(x));
  for_accumulator(x, [&](auto acc) {
    using T = decltype(acc);
    for_columns<T>(
        with_position_stride(x), with_position_stride(params), layout, y.kernel_output(), log_det,
        [&](int64_t count, T* v, T* columns, T* log_slope) {
          mixture_elements(MixtureForward<T>{components, inverse, count, COLUMN, v, columns, v, log_slope});
        });
  });
  return {y.finalize(), log_det};
}

std::tuple<std::optional<Tensor>, Tensor, Tensor> backward_of(const char* op, const char* name,
                                                              const Tensor& v, const Tensor& params,
                                                              const std::optional<Tensor>& channel_order,
                                                              int64_t first_channel, const Tensor& dy,
                                                              const Tensor& dlog_det, int64_t components,
                                                              MixtureGiven of) {
  expect_batch(op, name, v);
  expect_gradients(op, v, dy, dlog_det);
  const Layout layout(op, name, v, params, channel_order, first_channel, parameters(op, components));
  OutputBuffer dv(dy), dparams(params);
  std::optional<OutputBuffer> x;
  if (of == MixtureGiven::y) x.emplace(v);
  for_accumulator(v, [&](auto acc) {
    using T = decltype(acc);
    for_columns_backward<T>(with_position_stride(v), with_position_stride(params), with_position_stride(dy),
                            dlog_det, layout, x ? std::optional(x->kernel_output()) : std::nullopt,
                            dv.kernel_output(), dparams.kernel_output(),
                            [&](int64_t count, T* in, T* columns, T* g, T* dlog, T* out) {
                              mixture_elements_backward(MixtureBackward<T>{
                                  components, of, count, COLUMN, in, columns, g, dlog, out, g, columns});
                            });
  });
  return {x ? std::optional(x->finalize()) : std::nullopt, dv.finalize(), dparams.finalize()};
}

std::tuple<Tensor, Tensor> mixture_cdf_backward(const Tensor& x, const Tensor& params,
                                                const std::optional<Tensor>& channel_order,
                                                int64_t first_channel, const Tensor& dy,
                                                const Tensor& dlog_det, int64_t components, bool inverse) {
  auto [none, dx, dparams] =
      backward_of("mixture_cdf_backward", "x", x, params, channel_order, first_channel, dy, dlog_det,
                  components, inverse ? MixtureGiven::inverse : MixtureGiven::x);
  return {dx, dparams};
}

std::tuple<Tensor, Tensor, Tensor> mixture_cdf_inverse_backward(const Tensor& y, const Tensor& params,
                                                                const std::optional<Tensor>& channel_order,
                                                                int64_t first_channel, const Tensor& dy,
                                                                const Tensor& dlog_det, int64_t components) {
  auto [x, dx, dparams] = backward_of("mixture_cdf_inverse_backward", "y", y, params, channel_order,
                                      first_channel, dy, dlog_det, components, MixtureGiven::y);
  return {*x, dx, dparams};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("mixture_cdf", TORCH_BOX(&fastflow::cpu::mixture_cdf));
  m.impl("mixture_cdf_backward", TORCH_BOX(&fastflow::cpu::mixture_cdf_backward));
  m.impl("mixture_cdf_inverse_backward", TORCH_BOX(&fastflow::cpu::mixture_cdf_inverse_backward));
}
