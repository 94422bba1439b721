// fastflow_C::spline, its backward and its inverse + backward on the CPU.
//
// Bytes per element, float32, for P parameters: forward 8 + 4 P, backward 12 + 8 P, inverse + backward
// 16 + 8 P. Splines that the samples share are tables, of which an element costs no exponentials: 8, 12
// and 16.
#include "stable.h"

#include <optional>
#include <string>
#include <tuple>

#include "checks.h"
#include "cpu/columns.h"
#include "spline/form.h"
#include "spline/shared.h"

namespace fastflow::cpu {
namespace {

std::tuple<Tensor, Tensor> spline(const Tensor& x, const Tensor& params,
                                  const std::optional<Tensor>& channel_order, int64_t first_channel,
                                  int64_t bins, double bound, const std::string& tails,
                                  const std::string& convention, double factor, double min_bin,
                                  double min_slope, bool inverse) {
  expect_batch("spline", "x", x);
  const SplineForm form{bins, bound, tails, convention, factor, min_bin, min_slope};
  const Layout layout("spline", "x", x, params, channel_order, first_channel, form.parameters("spline"),
                      true);
  OutputBuffer y(x);
  const Tensor log_det = empty(x, {x.size(0)}, accumulator_of(x));
  for_accumulator(x, [&](auto acc) {
    using T = decltype(acc);
    const Splines<T> splines = form.splines<T>();
    if (layout.shared) {
      const Tensor in = with_position_stride(x);
      return shared_spline<T>({splines, in, with_position_stride(params), layout}, in, inverse,
                              y.kernel_output(), log_det);
    }
    for_columns<T>(with_position_stride(x), with_position_stride(params), layout, y.kernel_output(), log_det,
                   [&](int64_t count, T* v, T* columns, T* log_slope) {
                     spline_elements({splines, inverse, count, COLUMN, v, columns, v, log_slope});
                   });
  });
  return {y.finalize(), log_det};
}

std::tuple<std::optional<Tensor>, Tensor, Tensor> backward_of(const char* op, const char* name,
                                                              const Tensor& v, const Tensor& params,
                                                              const std::optional<Tensor>& channel_order,
                                                              int64_t first_channel, const Tensor& dy,
                                                              const Tensor& dlog_det, const SplineForm& form,
                                                              Given of) {
  expect_batch(op, name, v);
  expect_gradients(op, v, dy, dlog_det);
  const Layout layout(op, name, v, params, channel_order, first_channel, form.parameters(op), true);
  OutputBuffer dv(dy), dparams(params);
  std::optional<OutputBuffer> x;
  if (of == Given::y) x.emplace(v);
  for_accumulator(v, [&](auto acc) {
    using T = decltype(acc);
    const Splines<T> splines = form.splines<T>();
    if (layout.shared) {
      const Tensor in = with_position_stride(v);
      return shared_spline_backward<T>(
          {splines, in, with_position_stride(params), layout}, of, in, with_position_stride(dy), dlog_det,
          x ? std::optional(x->kernel_output()) : std::nullopt, dv.kernel_output(), dparams.kernel_output());
    }
    for_columns_backward<T>(
        with_position_stride(v), with_position_stride(params), with_position_stride(dy), dlog_det, layout,
        x ? std::optional(x->kernel_output()) : std::nullopt, dv.kernel_output(), dparams.kernel_output(),
        [&](int64_t count, T* in, T* columns, T* g, T* dlog, T* out) {
          spline_elements_backward({splines, of, count, COLUMN, in, columns, g, dlog, out, g, columns});
        });
  });
  return {x ? std::optional(x->finalize()) : std::nullopt, dv.finalize(), dparams.finalize()};
}

std::tuple<Tensor, Tensor> spline_backward(const Tensor& x, const Tensor& params,
                                           const std::optional<Tensor>& channel_order, int64_t first_channel,
                                           const Tensor& dy, const Tensor& dlog_det, int64_t bins,
                                           double bound, const std::string& tails,
                                           const std::string& convention, double factor, double min_bin,
                                           double min_slope, bool inverse) {
  auto [none, dx, dparams] = backward_of(
      "spline_backward", "x", x, params, channel_order, first_channel, dy, dlog_det,
      {bins, bound, tails, convention, factor, min_bin, min_slope}, inverse ? Given::inverse : Given::x);
  return {dx, dparams};
}

std::tuple<Tensor, Tensor, Tensor> spline_inverse_backward(
    const Tensor& y, const Tensor& params, const std::optional<Tensor>& channel_order, int64_t first_channel,
    const Tensor& dy, const Tensor& dlog_det, int64_t bins, double bound, const std::string& tails,
    const std::string& convention, double factor, double min_bin, double min_slope) {
  auto [x, dx, dparams] =
      backward_of("spline_inverse_backward", "y", y, params, channel_order, first_channel, dy, dlog_det,
                  {bins, bound, tails, convention, factor, min_bin, min_slope}, Given::y);
  return {*x, dx, dparams};
}

}  // namespace
}  // namespace fastflow::cpu

STABLE_TORCH_LIBRARY_IMPL(fastflow_C, CPU, m) {
  m.impl("spline", TORCH_BOX(&fastflow::cpu::spline));
  m.impl("spline_backward", TORCH_BOX(&fastflow::cpu::spline_backward));
  m.impl("spline_inverse_backward", TORCH_BOX(&fastflow::cpu::spline_inverse_backward));
}
