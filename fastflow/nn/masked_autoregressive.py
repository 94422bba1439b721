"""Masked autoregressive flow layer."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.nn.coupling import Transformer
from fastflow.nn.flow import Flow
from fastflow.nn.lu_linear import without_autocast
from fastflow.nn.networks.context import checked_context
from fastflow.nn.networks.masked_network import MaskedNetwork
from fastflow.ops.masked_inverse import Affine, Spline
from fastflow.ops.masked_inverse.op import AFFINE_ORDERS, PARAMS_LAYOUTS
from fastflow.ops.masked_inverse.reference import SCALES
from fastflow.ops.spline import check_form
from fastflow.reversible import Gradients, has_hooks, vjp
from fastflow.state_from_data import state_from_data


class MaskedAutoregressive(Flow):
    r"""Masked autoregressive flow (MAF), :math:`z_k = g(x_k; h_k),\; h_k = \mathrm{net}(x_{<k})_k`.

    Source: MAF, arXiv:1705.07057, section 3; with splines, arXiv:1906.04032, section 3.2.

    Forward, from data to latents, is one pass of the network. The inverse also costs about one pass, by
    :func:`fastflow.ops.masked_inverse`: each unit of the network is computed once the features that it reads are known.
    ``Inverse`` of the layer is an inverse autoregressive flow (IAF, arXiv:1606.04934). Gradients of the inverse take
    one pass too.

    The inverse takes D passes instead, one per feature, with a network that is no :class:`MaskedNetwork`, with a
    transformer of one's own, with hooks on the network, and in training mode with dropout. ``repr`` names the
    number of passes.

    A :class:`MaskedNetwork` computes in the dtype of its weights, also under autocast, so that the inverse undoes the
    forward pass.

    Args:
        net: a :class:`MaskedNetwork`, or any module whose output ``[N, D P]`` has the P parameters of the first feature,
            then those of the second, such that in some order of the features those of a feature depend on the features
            before it only. It is called as ``net(x)``, or ``net(x, context)`` if a context is given.
        transformer: g. ``"affine"``: :math:`g(x) = s x + t`, with a raw scale and a shift as parameters, P = 2.
            ``"spline"``: rational-quadratic splines. Or a function as :class:`Coupling` takes it: its h is ``[N, P D]``,
            the first parameter of all features before the second.
        form: of ``"affine"``: ``scale`` (default ``"soft_clamp"``), ``affine_order``, ``params_layout`` (default
            ``"scale_shift"``), ``factor`` (default 5) and ``offset``. The scale functions are ``"exp"``, ``"sigmoid"``,
            ``"softplus"``, ``"soft_clamp"``, ``"tanh"`` and ``"soft_clip"``, see :func:`fastflow.ops.masked_inverse`.
            Of ``"spline"``: ``bins``, ``bound``, ``tails``, ``convention``, ``factor``, ``min_bin`` and ``min_slope``, see
            :func:`fastflow.ops.spline`.

    Shape: x, z ``[N, D]``; context ``[N, ...]`` or None; log_det ``[N]``, nats.
    Raises ValueError for other shapes and arguments, and TypeError for an option that the transformer does not have.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> flow = fnn.MaskedAutoregressive(fnn.MaskedNetwork(4, 2, hidden=(32, 32)))
        >>> z, log_det = flow(torch.randn(8, 4))
        >>> x, _ = flow.inverse(z)
    """

    def __init__(
        self, net: nn.Module, transformer: str | Transformer = "affine", **form: str | float
    ) -> None:
        super().__init__()
        if not callable(net):
            raise validation.argument_error("net", repr(net), "a module")
        own = not isinstance(transformer, str)
        if own and (not callable(transformer) or not callable(getattr(transformer, "inverse", None))):
            expected = "'affine', 'spline', or a function of (x, h) with a method inverse(y, h)"
            raise validation.argument_error("transformer", repr(transformer), expected)
        if own and form:
            raise TypeError(f"form: got {', '.join(form)}, expected none with a transformer of one's own")
        self.net, self.transformer = net, transformer
        self.form = _form(transformer, form) if isinstance(transformer, str) else None
        if self.form is not None and isinstance(net, MaskedNetwork):
            if net.outputs_per_feature != self.form.parameters:
                got = f"{net.outputs_per_feature} outputs per feature"
                expected = f"{self.form.parameters}, the parameters of {transformer!r}"
                raise validation.argument_error("net", got, expected)
        if not isinstance(net, MaskedNetwork):
            # the general rule of reversible chains also checks the inverse, which here depends on the network
            self.inverse_backward = None  # pyright: ignore[reportAttributeAccessIssue] # as if it had no such method

    @staticmethod
    def params_per_feature(transformer: str = "affine", **form: str | float) -> int:
        """Number P of parameters of one feature, the ``outputs_per_feature`` of a :class:`MaskedNetwork`."""
        return _form(transformer, form).parameters

    def _check(self, argument: str, x: Tensor) -> None:
        validation.floating_point(argument, x)
        features = self.net.features if isinstance(self.net, MaskedNetwork) else x.shape[1]
        validation.same_shape(argument, x, (x.shape[0], features), "vectors of the layer's features")

    def _params(self, x: Tensor, context: Tensor | None, factors: Sequence[Tensor | None] | None) -> Tensor:
        if isinstance(self.net, MaskedNetwork):
            weight = self.net.layers[0].weight
            validation.same_device_and_precision("x", x, "the network's weights", weight)
            with without_autocast(x.device):  # its rounding would not be that of the inverse
                x, context = x.to(weight.dtype), None if context is None else context.to(weight.dtype)
                further = () if factors is None else (factors,)
                return self.net(x) if context is None and not further else self.net(x, context, *further)
        return self.net(x) if context is None else self.net(x, context)

    def _transformed(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        features = x.shape[1]
        if self.form is None:
            each = params.shape[1] // max(features, 1)
            validation.same_shape("params", params, (x.shape[0], each * features), "P of each feature")
            h = params.unflatten(1, (features, each)).mT.flatten(1)
            own: Any = self.transformer
            y, log_det = (own.inverse if inverse else own)(x, h)
            validation.same_shape("transformer's output", y, x.shape, "the shape of its input")
            validation.same_shape("transformer's log_det", log_det, x.shape[:1], "one value per sample")
            return y.to(x.dtype), log_det
        each = self.form.parameters
        shape, why = (x.shape[0], each * features), f"{each} parameters of each of {features} features"
        validation.same_shape("params", params, shape, why)
        if isinstance(self.form, Spline):
            return ops.spline(x, params, **self.form._asdict(), inverse=inverse)
        dtype = ops.acc_dtype(x.dtype)
        of_direction = self.form.inverse if inverse else self.form.forward
        y, log_slope = of_direction(x.to(dtype), params.to(dtype).unflatten(1, (features, each)))
        return y.to(x.dtype), log_slope.sum(1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("x", x)
        return self._transformed(x, self._params(x, context, None), inverse=False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check("z", z)
        with state_from_data(False):
            if self._obstacle() is None:
                return self._in_one_pass(z, context)
            return self._in_passes(z, context, self._drawn(z))

    def _obstacle(self) -> str | None:
        """Why the inverse takes D passes; None if it takes one."""
        if type(self.net) is not MaskedNetwork:
            return f"net is a {type(self.net).__name__}"
        if self.form is None:
            return f"transformer is a {type(self.transformer).__name__}"
        if self.net.training and self.net.dropout:
            return "dropout is active"
        if torch.onnx.is_in_onnx_export():  # its graph has no values, by which the op goes through the units
            return "ONNX has no such operator"
        return "net has hooks" if any(map(has_hooks, self.net.modules())) else None

    def _drawn(self, z: Tensor) -> list[Tensor | None] | None:
        """Factors of dropout that the passes of an inverse share; None if there is none."""
        if isinstance(self.net, MaskedNetwork) and self.net.training and self.net.dropout:
            return self.net.drawn(z)
        return None

    def _in_one_pass(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        net: Any = self.net
        form: Any = self.form
        dtype = ops.acc_dtype(z.dtype)
        validation.same_device_and_precision("z", z, "the network's weights", net.layers[0].weight)
        context = checked_context(z, context, net.context_features)
        with without_autocast(z.device):
            context = None if context is None else context.to(net.layers[0].weight.dtype)
            plan, added, gates = net.one_pass(context)
        x, log_det = ops.masked_inverse(
            z.to(dtype),
            plan.weights.to(dtype),
            added.to(dtype),
            None if gates is None else gates.to(dtype),
            ends=plan.ends,
            order=plan.order,
            widths=plan.widths,
            layers=plan.layers,
            activation=net.activation,
            transformer=form,
        )
        return x.to(z.dtype), log_det

    def _in_passes(
        self, z: Tensor, context: Tensor | None, factors: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, Tensor]:
        x, log_det = torch.zeros_like(z), z.new_zeros(z.shape[0], dtype=ops.acc_dtype(z.dtype))
        for _ in range(z.shape[1]):
            # features whose turn has not come may overflow: a masked weight of 0 times inf would be NaN
            params = self._params(x.nan_to_num(0.0, 0.0, 0.0), context, factors)
            x, log_det = self._transformed(z, params, inverse=True)
        return x, log_det

    def inverse_backward(
        self, z: Tensor, dz: Tensor, dlog_det: Tensor, wanted: Sequence[Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Gradients]:
        factors = self._drawn(z)
        with torch.no_grad(), state_from_data(False):
            if self._obstacle() is None:
                x, _ = self._in_one_pass(z, context)
            else:
                x, _ = self._in_passes(z, context, factors)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z_again, log_det = self._transformed(
                x, self._params(x.view_as(x), context, factors), inverse=False
            )
        gradients = vjp((z_again, log_det), (dz, dlog_det), [x, *wanted])
        dx = gradients.pop(x, None)
        return x.detach(), torch.zeros_like(z) if dx is None else dx, gradients

    def extra_repr(self) -> str:
        if self.form is None:
            what = "" if isinstance(self.transformer, nn.Module) else f"{type(self.transformer).__name__}, "
        else:
            default = _form(cast("str", self.transformer), {})
            changed = [
                f", {name}={value!r}"
                for name, value in self.form._asdict().items()
                if value != getattr(default, name)
            ]
            what = f"{self.transformer!r}{''.join(changed)}, "
        obstacle = self._obstacle()
        return f"{what}inverse in {'one pass' if obstacle is None else f'D passes: {obstacle}'}"


def _form(transformer: str, form: dict[str, Any]) -> Affine | Spline:
    """The options of a transformer with their defaults, checked."""
    validation.one_of("transformer", transformer, ("affine", "spline"))
    if transformer == "spline":
        spline = Spline(**form)
        check_form(*spline)
        return spline
    affine = Affine(**{"scale": "soft_clamp", "factor": 5.0} | form)
    validation.one_of("scale", affine.scale, SCALES)
    validation.one_of("affine_order", affine.affine_order, AFFINE_ORDERS)
    validation.one_of("params_layout", affine.params_layout, PARAMS_LAYOUTS)
    validation.number("factor", affine.factor, "a positive number", lambda v: 0 < v < float("inf"))
    validation.number("offset", affine.offset, "a number of at least 0", lambda v: 0 <= v < float("inf"))
    return affine
