"""fastflow::masked_inverse, fastflow::masked_solve, with which its gradient is one pass too, and several inverses."""

from typing import Any

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.masked_inverse import reference
from fastflow.ops.masked_inverse.reference import (
    AFTER,
    BEFORE,
    GATE,
    SCALES,
    SKIP,
    Affine,
    Spline,
    gated,
    sizes_of,
    transformer_of,
)
from fastflow.ops.registry import register
from fastflow.ops.spline import check_form
from fastflow.ops.spline.op import MAX_BINS

MAX_HIDDEN_LAYERS, MAX_PARAMETERS = 32, 255  # of the CUDA kernels; of a feature
ACTIVATIONS = ("relu", "tanh", "silu", "elu")
AFFINE_ORDERS = ("scale_first", "shift_first")
PARAMS_LAYOUTS = ("scale_shift", "shift_scale")


def _check_tensor(
    argument: str, t: Tensor, shape: tuple[int, ...], why: str, first: str, like: Tensor
) -> None:
    if t.dtype != like.dtype or t.device != like.device:
        got, expected = f"{t.dtype} on {t.device}", f"{like.dtype} on {like.device}, like {first}"
        raise validation.argument_error(argument, got, expected)
    validation.same_shape(argument, t, shape, why)


def _check_network(
    first: str, like: Tensor, weights: Tensor, ends: Tensor, widths: list[int], layers: list[int], each: int
) -> None:
    sizes = _check_layers(first, like, ends, widths, layers, each, ())
    count = sum(rows * columns for rows, columns in zip(sizes[1:], sizes[:-1], strict=True))
    why = f"the matrices of layers of {', '.join(map(str, sizes))}"
    _check_tensor("weights", weights, (count,), why, first, like)


def _check_layers(
    first: str,
    like: Tensor,
    ends: Tensor,
    widths: list[int],
    layers: list[int],
    each: int,
    several: tuple[int, ...],
) -> list[int]:
    """Returns the numbers of units of the layers."""
    features = like.shape[1]
    if like.dtype not in (torch.float32, torch.float64):
        raise validation.argument_error(first, f"dtype {like.dtype}", "float32 or float64")
    if like.ndim != 2 or features == 0:
        raise validation.argument_error(first, validation.shape_of(like), "vectors [N, D], D at least 1")
    for i, width in enumerate(widths):
        validation.positive_int(f"widths[{i}]", width)
    if len(layers) != len(widths) + 1:
        expected = f"{len(widths) + 1} numbers, one for each of {len(widths)} hidden layers and the output"
        raise validation.argument_error("layers", layers, expected)
    for i, flags in enumerate(layers):
        allowed = BEFORE if i == len(widths) else BEFORE | GATE | AFTER | SKIP
        if i == 0:
            allowed &= ~BEFORE
        if i < 2:
            allowed &= ~SKIP
        if flags & ~allowed:
            expected = f"a sum of some of the bits of {allowed}"
            raise validation.argument_error(f"layers[{i}]", flags, expected)
        if flags & SKIP and widths[i] != widths[i - 2]:
            expected = f"{widths[i - 2]}, the width that is added to it"
            raise validation.argument_error(f"widths[{i}]", widths[i], expected)
    if ends.dtype != torch.int64 or ends.device != like.device:
        got, expected = (
            f"{ends.dtype} on {ends.device}",
            f"torch.int64 on {like.device}, the device of {first}",
        )
        raise validation.argument_error("ends", got, expected)
    why = "transformations, hidden layers, features" if several else "hidden layers, features"
    validation.same_shape("ends", ends, (*several, len(widths), features), why)
    return sizes_of(features, widths, each)


def _checked_transformer(
    argument: str, z: Tensor, activation: str, scale: str, affine_order: str, params_layout: str, offset: float,
    bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float, min_slope: float,
) -> Affine | Spline:  # fmt: skip
    if z.ndim != 2:
        raise validation.argument_error(argument, validation.shape_of(z), "vectors [N, D]")
    validation.one_of("activation", activation, ACTIVATIONS)
    if bins:
        as_spline = {"half_turn": "linear", "zero": "none"}.get(tails, tails)
        check_form(bins, bound, as_spline, convention, factor, min_bin, min_slope)
    else:
        validation.one_of("scale", scale, SCALES)
        validation.one_of("affine_order", affine_order, AFFINE_ORDERS)
        validation.one_of("params_layout", params_layout, PARAMS_LAYOUTS)
        validation.number("factor", factor, "a positive number", lambda v: 0 < v < float("inf"))
        validation.number("offset", offset, "a number of at least 0", lambda v: 0 <= v < float("inf"))
    return transformer_of(
        scale, affine_order, params_layout, offset, bins, bound, tails, convention, factor, min_bin, min_slope
    )


def _check(
    argument: str, z: Tensor, weights: Tensor, added: Tensor, gates: Tensor | None, ends: Tensor, order: Tensor,
    widths: list[int], layers: list[int], activation: str, scale: str, affine_order: str, params_layout: str,
    offset: float, bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float,
    min_slope: float, waves: Tensor | None,
) -> None:  # fmt: skip
    transformer = _checked_transformer(
        argument, z, activation, scale, affine_order, params_layout, offset, bins, bound, tails, convention, factor,
        min_bin, min_slope,
    )  # fmt: skip
    n, features = z.shape
    _check_network(argument, z, weights, ends, widths, layers, transformer.parameters)
    total = sum(sizes_of(features, widths, transformer.parameters)[1:])
    per_sample = (total,) if added.ndim == 1 else (n, total)
    _check_tensor("added", added, per_sample, "units of the hidden layers, parameters", argument, z)
    count = gated(layers, widths)
    if (gates is None) != (count == 0):
        got = "None" if gates is None else "a tensor"
        expected = f"[{n}, {count}] for the gated layers" if count else "None, no layer is gated"
        raise validation.argument_error("gates", got, expected)
    if gates is not None:
        _check_tensor("gates", gates, (n, count), "units of the gated layers", argument, z)
    if order.dtype != torch.int64 or order.device != z.device:
        got, expected = (
            f"{order.dtype} on {order.device}",
            f"torch.int64 on {z.device}, the device of {argument}",
        )
        raise validation.argument_error("order", got, expected)
    validation.channels("order", order, features, "a permutation of the features")
    if waves is not None:
        why = "frequency, factors of sin and cos, multiple; features"
        _check_tensor("waves", waves, (4, features), why, argument, z)


def _check_several(
    argument: str, z: Tensor, context: Tensor | None, parameters: Tensor, places: Tensor, ends: Tensor, order: Tensor,
    widths: list[int], layers: list[int], activation: str, scale: str, affine_order: str, params_layout: str,
    offset: float, bins: int, bound: float, tails: str, convention: str, factor: float, min_bin: float,
    min_slope: float,
) -> None:  # fmt: skip
    transformer = _checked_transformer(
        argument, z, activation, scale, affine_order, params_layout, offset, bins, bound, tails, convention, factor,
        min_bin, min_slope,
    )  # fmt: skip
    if ends.ndim != 3 or ends.shape[0] == 0:
        raise validation.argument_error("ends", validation.shape_of(ends), "[M, L, D], M at least 1")
    maps, (n, features) = ends.shape[0], z.shape
    sizes = _check_layers(argument, z, ends, widths, layers, transformer.parameters, (maps,))
    if any(flags & GATE for flags in layers):
        raise validation.argument_error("layers", layers, "no layer with gates")
    count = sum(rows * columns for rows, columns in zip(sizes[1:], sizes[:-1], strict=True)) + sum(sizes[1:])
    if context is not None:
        if context.ndim != 2:
            raise validation.argument_error("context", validation.shape_of(context), f"[{n}, C]")
        _check_tensor("context", context, (n, context.shape[1]), "one row for each sample", argument, z)
        count += sizes[1] * context.shape[1]
    if parameters.ndim != 1:
        raise validation.argument_error("parameters", validation.shape_of(parameters), "a vector")
    _check_tensor("parameters", parameters, tuple(parameters.shape), "a vector", argument, z)
    for name, t, size in (("places", places, count), ("order", order, features)):
        if t.dtype != torch.int64 or t.device != z.device:
            got, expected = f"{t.dtype} on {t.device}", f"torch.int64 on {z.device}, the device of {argument}"
            raise validation.argument_error(name, got, expected)
        validation.same_shape(name, t, (maps, size), "transformations, numbers of each")


def _check_solve(
    argument: str, v: Tensor, slope: Tensor, jac: Tensor, dparams: Tensor | None, inner: Tensor | None,
    outer: Tensor | None, weights: Tensor, ends: Tensor, widths: list[int], layers: list[int],
    of_features: Tensor | None,
) -> None:  # fmt: skip
    if v.ndim != 2:
        raise validation.argument_error(argument, validation.shape_of(v), "vectors [N, D]")
    n, features = v.shape
    if jac.ndim != 3:
        raise validation.argument_error("jac", validation.shape_of(jac), f"[{n}, {features}, P]")
    each = jac.shape[2]
    _check_network(argument, v, weights, ends, widths, layers, each)
    of_params = (n, features, each), "samples, features, parameters of a feature"
    of_units = (n, sum(widths)), "samples, hidden units"
    named = {
        "slope": (slope, v.shape, f"like {argument}"),
        "jac": (jac, *of_params),
        "dparams": (dparams, *of_params),
        "inner": (inner, *of_units),
        "outer": (outer, *of_units),
        "of_features": (of_features, v.shape, f"like {argument}"),
    }
    for name, (t, shape, why) in named.items():
        if t is not None:
            _check_tensor(name, t, shape, why, argument, v)


def _eligible_solve(v: Tensor, slope: Tensor, jac: Tensor, *args: Any) -> bool:
    widths = args[5]
    return v.is_cpu or (len(widths) <= MAX_HIDDEN_LAYERS and jac.shape[2] <= MAX_PARAMETERS)


def _eligible(z: Tensor, *args: Any) -> bool:
    widths, bins, convention = args[5], args[12], args[15]
    return (
        bins <= MAX_BINS
        and (bins == 0 or convention != "freia")
        and (z.is_cpu or len(widths) <= MAX_HIDDEN_LAYERS)
    )


register(
    reference.masked_solve,
    compiled=("cpu", "cuda"),
    eligible=_eligible_solve,
    check=_check_solve,
    batched="v slope jac dparams inner outer of_features",
)
register(
    reference.masked_inverse,
    compiled=("cpu", "cuda"),
    eligible=_eligible,
    check=_check,
    outputs="x log_det",
    backward=reference.masked_inverse_backward,
    gradients="z weights added gates waves",
    batched="z added gates",
)


# the reference calls masked_inverse, whose gradient is one pass
register(
    reference.masked_inverses,
    compiled=("cpu",),
    eligible=_eligible,  # the same places of the same arguments
    check=_check_several,
    batched="z context",
)


def masked_inverse(
    z: Tensor,
    weights: Tensor,
    added: Tensor,
    gates: Tensor | None = None,
    waves: Tensor | None = None,
    *,
    ends: Tensor,
    order: Tensor,
    widths: list[int],
    layers: list[int],
    activation: str = "relu",
    transformer: Affine | Spline,
) -> tuple[Tensor, Tensor]:
    r"""Inverse of a masked autoregressive transformation, in one pass through its network.

    Source: MADE, arXiv:1502.03509; MAF, arXiv:1705.07057, section 3. The transformation is
    :math:`z_k = T(x_k; h_k(x_{<k}))`, where h is a network with masks. A hidden unit of degree d depends on the first d
    features. Once these are known, the unit is computed and does not change. So the D features, one after
    the other, take the arithmetic of one pass; docs/maths.md has the formulas.

    A hidden layer computes :math:`u = W\,p + a`, with the units p of the layer before and the row a of ``added``. It
    is described by a sum of bits: ``BEFORE`` (1): p are activated first; ``GATE`` (2): u is multiplied by ``gates``;
    ``AFTER`` (4): u is activated then; ``SKIP`` (8): the units of the layer before the previous one are added to it.
    The units of a layer are sorted by degree, 0 to D - 1. Degree 0 depends on no feature.

    Args:
        z: latents.
        weights: the matrices of the hidden layers and of the output, in rows, one after the other. Columns of the
            first one and rows of the last one are in the order of the features; those of the parameters of a
            feature are neighbors. Masked weights must be 0.
        added: added to the products: biases, or biases and the terms of a context.
        gates: factors of the gated layers; None if there are none.
        waves: :math:`\omega, \alpha, \beta, \gamma` of each feature in its order, if the network reads
            :math:`\alpha \sin \omega x + \beta \cos \omega x + \gamma x` and not x, as for angles.
        ends: number of units of each hidden layer of degree at most 0, 1, ..., D - 1.
        order: the features in their order, a permutation of them: degree d has the first d.
        widths: sizes of the hidden layers.
        layers: bits of the hidden layers, and of the output, ``BEFORE`` or 0.
        activation: ``"relu"``, ``"tanh"``, ``"silu"`` or ``"elu"``.
        transformer: an ``Affine`` or a ``Spline``.

    Shape: z, x ``[N, D]``; ends ``[L, D]``; order ``[D]``; added ``[S]`` or ``[N, S]``, S hidden units and parameters;
    gates ``[N, G]``, G units of gated layers; waves ``[4, D]``; log_det ``[N]``, nats, of this direction. float32 or
    float64.

    The gradient of z, ``weights``, ``added``, ``gates`` and ``waves`` takes one pass too. Masked weights get a gradient of 0.
    Raises ValueError for other shapes, dtypes, devices, names or numbers. The values of ``ends`` and ``order`` are
    not checked, nor that masked weights are 0.
    """
    return torch.ops.fastflow.masked_inverse.default(
        z, weights, added, gates, ends, order, widths, layers, activation, *_arguments_of(transformer), waves,
    )  # fmt: skip


def _arguments_of(transformer: Affine | Spline) -> tuple[Any, ...]:
    """Those of an op, from ``scale`` to ``min_slope``."""
    if isinstance(transformer, Affine):
        scale, affine_order, params_layout, factor, offset = transformer
        bins, bound, tails, convention, _, min_bin, min_slope = Spline(bins=0)
    else:
        scale, affine_order, params_layout, _, offset = Affine()
        bins, bound, tails, convention, factor, min_bin, min_slope = transformer
    return (
        scale, affine_order, params_layout, offset, bins, bound, tails, convention, factor, min_bin, min_slope,
    )  # fmt: skip


def masked_inverses(
    z: Tensor,
    parameters: Tensor,
    context: Tensor | None = None,
    *,
    places: Tensor,
    ends: Tensor,
    order: Tensor,
    widths: list[int],
    layers: list[int],
    activation: str = "relu",
    transformer: Affine | Spline,
) -> tuple[Tensor, Tensor]:
    r"""Inverses of several masked autoregressive transformations, one after the other, in one call.

    :math:`x = T_M^{-1}(\dots T_1^{-1}(z))`. The transformations are those of :func:`masked_inverse`. Their networks
    have the same sizes, and parameters, masks and orders of their own. The parameters come as they are stored, in any
    order and with masked weights: the op takes them from their places. A context is part of the input of each first
    layer, as in zuko. With few samples, time is that of calls: this is one call for a chain of layers.

    Args:
        z: latents.
        parameters: of all networks, in any order.
        context: further inputs of the first layers; None if there are none.
        places: for each transformation the place in ``parameters`` of each weight, of each weight of the context and of
            each bias, sorted as :func:`masked_inverse` takes them; -1 for masked weights, which are 0. Weights of the
            context are those of the first layer, in rows.
        ends, order: of each transformation, as in :func:`masked_inverse`.
        widths, layers, activation, transformer: of all transformations, as in :func:`masked_inverse`. No layer has gates.

    Shape: z, x ``[N, D]``; parameters ``[S]``; context ``[N, C]``; ends ``[M, L, D]``; order ``[M, D]``; places ``[M, W +
    H C + U]`` with W weights, H units of the first layer and U units and parameters of a sample; log_det ``[N]``, nats,
    of this direction. float32 or float64.

    Gradients take one call of :func:`masked_inverse` for each transformation.
    Raises ValueError for other shapes, dtypes, devices, names or numbers. The values of ``ends``, ``order`` and
    ``places`` are not checked on GPUs.

    Example:
        >>> import torch
        >>> from fastflow import ops
        >>> from fastflow.ops.masked_inverse import AFTER, Affine
        >>> z, weights, biases = torch.randn(8, 2), torch.randn(2, 2 + 4), torch.randn(2, 1 + 4)
        >>> parameters = torch.cat([weights, biases], 1).flatten()  # of two networks with one hidden unit
        >>> places = torch.arange(22).view(2, 11)
        >>> places[:, [1, 2, 3]] = -1  # the unit reads the first feature, whose own parameters do not read the unit
        >>> x, log_det = ops.masked_inverses(
        ...     z,
        ...     parameters,
        ...     places=places,
        ...     ends=torch.tensor([[[0, 1]], [[0, 1]]]),
        ...     order=torch.tensor([[0, 1], [1, 0]]),
        ...     widths=[1],
        ...     layers=[AFTER, 0],
        ...     transformer=Affine(),
        ... )
    """
    return torch.ops.fastflow.masked_inverses.default(
        z, context, parameters, places, ends, order, widths, layers, activation, *_arguments_of(transformer)
    )


def masked_solve(
    v: Tensor,
    slope: Tensor,
    jac: Tensor,
    dparams: Tensor | None = None,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    of_features: Tensor | None = None,
    *,
    weights: Tensor,
    ends: Tensor,
    widths: list[int],
    layers: list[int],
) -> Tensor:
    r"""Solves :math:`J^T u = v + N^T q` with the Jacobian J of a masked autoregressive transformation, in one pass.

    N is the Jacobian of the network's parameters, and :math:`J = \mathrm{diag}(\text{slope}) + \text{jac}\,N`. J is
    lower triangular. The gradient of :func:`masked_inverse` is such a solve. Features are in their order.

    Args:
        v: right-hand sides.
        slope: :math:`\partial z_k / \partial x_k` at fixed parameters.
        jac: derivatives of z_k by the parameters of feature k.
        dparams: q, a gradient of the parameters; None stands for 0.
        inner: derivatives of the hidden units by their products :math:`W\,p + a`: gate and activation after. None
            stands for 1.
        outer: derivatives of p in the next layer by the hidden units: activation before. None stands for 1.
        of_features: derivatives of what the network reads of the features, by these. None stands for 1.
        weights, ends, widths, layers: the network, as in :func:`masked_inverse`. Only the bit ``SKIP`` is read.

    Shape: v, slope, of_features, u ``[N, D]``; jac, dparams ``[N, D, P]``; inner, outer ``[N, S]``, S hidden units. float32 or
    float64.
    Raises ValueError for other shapes, dtypes or devices.
    """
    return torch.ops.fastflow.masked_solve.default(
        v, slope, jac, dparams, inner, outer, weights, ends, widths, layers, of_features
    )
