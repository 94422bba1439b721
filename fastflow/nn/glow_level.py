"""Step and level of Glow. A level computes the weights of all its steps at once."""

import math
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastflow import ops, validation
from fastflow.deprecation import renamed_arguments, renamed_property
from fastflow.nn.actnorm import ActNorm
from fastflow.nn.affine_coupling import AdditiveCoupling, AffineCoupling
from fastflow.nn.conv1x1 import InvertibleConv1x1, stacked_weights
from fastflow.nn.flow import Flow
from fastflow.nn.mixture_cdf_coupling import MixtureCDFCoupling
from fastflow.nn.networks.builder import NetworkBuilder, built
from fastflow.nn.networks.glow_network import GlowNetwork, ZeroConv2d, network_args_of
from fastflow.nn.permute import Permute
from fastflow.nn.spline_coupling import SplineCoupling
from fastflow.nn.squeeze import Squeeze
from fastflow.reversible import Gradients, add, run_reversible, run_storing, vjp
from fastflow.state_from_data import state_from_data

# weight and bias of forward and of inverse, the log-det or None, and the arguments of the coupling
StepArgs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, *tuple[Any, ...]]
StepCoupling = AffineCoupling | SplineCoupling | MixtureCDFCoupling


def _mixing(num_features: int, conv1x1: str) -> InvertibleConv1x1 | Permute:
    if conv1x1 in ("lu", "plain"):
        return InvertibleConv1x1(num_features, lu=conv1x1 == "lu")
    return Permute(num_features, order="reverse" if conv1x1 == "reverse" else "random")


class GlowStep(Flow):
    r"""One step of Glow: ActNorm, 1x1 convolution, coupling (arXiv:1807.03039, figure 2a).

    ActNorm is folded into the convolution, :math:`W e^{s} (x + b) = W' x + W' b` with
    :math:`W' = W \operatorname{diag}(e^{s})`, so that both take one pass over x.

    Args:
        num_features: number of channels C, 2 or more, or 1 with ``context_features``.
        hidden: number of channels inside the coupling network.
        coupling: ``"affine"``, ``"additive"``, ``"spline"`` or ``"mixture"``, see :class:`SplineCoupling` and
            :class:`MixtureCDFCoupling`.
        conv1x1: channel mixing: ``"lu"`` or ``"plain"``, a learned 1x1 convolution with or without LU
            decomposition; ``"reverse"`` or ``"shuffle"``, a fixed permutation.
        scale: scale function of the affine coupling, see :func:`fastflow.ops.affine_coupling`.
        network: how the coupling network is computed, see :class:`GlowNetwork`; or a function of
            (in_channels, out_channels) that returns the network, a module.
        context_features: number of channels of the context at the size of x, see :class:`GlowNetwork`; None:
            no context.
        bins: number of bins K of each spline; the network has (3K - 1) outputs per transformed channel.
        bound: the splines map ``[-bound, bound]`` to itself, and are the identity outside.
        components: number of components K of each mixture; the network has (3K + 2) outputs per transformed channel.
            Its biases start as :meth:`MixtureCDFCoupling.initial_bias`, not those of a network of the caller's own.

    Shape: x, z ``[N, C, H, W]``; log_det ``[N]``, nats.
    Raises ValueError for another shape, and for any other argument.
    """

    def __init__(
        self,
        num_features: int,
        hidden: int = 512,
        coupling: str = "affine",
        conv1x1: str = "lu",
        scale: str = "soft_clamp",
        network: str | NetworkBuilder = "auto",
        context_features: int | None = None,
        bins: int = 4,
        bound: float = 3.0,
        components: int = 8,
    ) -> None:
        super().__init__()
        validation.positive_int("num_features", num_features)
        if num_features < 2 and context_features is None:
            raise validation.argument_error("num_features", num_features, "2 or more, or context_features")
        validation.positive_int("hidden", hidden)
        validation.one_of("coupling", coupling, ("affine", "additive", "spline", "mixture"))
        validation.one_of("conv1x1", conv1x1, ("lu", "plain", "reverse", "shuffle"))
        validation.positive_int("bins", bins)
        validation.number("bound", bound, "a positive number", lambda v: 0 < v < math.inf)
        validation.positive_int("components", components)
        kept = num_features // 2
        transformed = num_features - kept
        self.actnorm = ActNorm(num_features)
        self.conv1x1 = _mixing(num_features, conv1x1)
        each = {
            "affine": 2,
            "additive": 1,
            "spline": SplineCoupling.params_per_element(bins),
            "mixture": MixtureCDFCoupling.params_per_element(components),
        }
        outputs = each[coupling] * transformed
        if callable(network):
            net = built(network, kept, outputs)
        else:
            net = GlowNetwork(kept, outputs, hidden, network, context_features)
        self.coupling: StepCoupling
        if coupling == "affine":
            self.coupling = AffineCoupling(net, scale=scale, num_scale_factors=transformed)
        elif coupling == "additive":
            self.coupling = AdditiveCoupling(net)
        elif coupling == "spline":
            self.coupling = SplineCoupling(net, bins=bins, bound=bound)
        else:
            self.coupling = MixtureCDFCoupling(net, components=components)
            if isinstance(net, GlowNetwork):
                last = cast("ZeroConv2d", net[-1])
                last.bias.data.copy_(MixtureCDFCoupling.initial_bias(transformed, components))

    def forward(
        self, x: Tensor, context: Tensor | None = None, *shared_args: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``(z, log_det)``; ``shared_args`` is the step's entry of ``shared_args_of`` if it is computed."""
        self.actnorm.initialize_once(x)
        weight, bias, _, _, log_det, *of_coupling = self._args(x, shared_args)
        x = ops.conv1x1(x, weight, bias)
        x, coupling_log_det = self.coupling(x, context, *of_coupling)
        return x, coupling_log_det if log_det is None else coupling_log_det + log_det

    def inverse(
        self, z: Tensor, context: Tensor | None = None, *shared_args: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        _, _, weight, bias, log_det, *of_coupling = self._args(z, shared_args)
        z, coupling_log_det = self.coupling.inverse(z, context, *of_coupling)
        x = ops.conv1x1(z, weight, bias)
        return x, coupling_log_det if log_det is None else coupling_log_det - log_det

    def inverse_backward(
        self,
        z: Tensor,
        dz: Tensor,
        dlog_det: Tensor,
        wanted: Sequence[Tensor],
        context: Tensor | None = None,
        *shared_args: Tensor | None,
    ) -> tuple[Tensor, Tensor, Gradients]:
        with torch.enable_grad():
            weight, bias, weight_inverse, _, log_det, *of_coupling = self._args(z, shared_args)
        y, dy, gradients = self.coupling.inverse_backward(z, dz, dlog_det, wanted, context, *of_coupling)
        x, dx, dweight, dbias = ops.conv1x1_inverse_backward(
            y, weight.detach(), weight_inverse.detach(), bias.detach(), dy
        )
        of_linear = None if log_det is None else dlog_det.sum().to(log_det.dtype)
        add(gradients, vjp((weight, bias, log_det), (dweight, dbias, of_linear), wanted))
        return x, dx, gradients

    def _args(self, x: Tensor, shared_args: tuple[Tensor | None, ...]) -> StepArgs:
        given: Any = shared_args
        return given or shared_args_of([self], x.shape, x.device)[0]


def shared_args_of(steps: list[GlowStep], shape: torch.Size, device: torch.device) -> list[StepArgs]:
    """Arguments of the steps' methods that follow ``context``, computed for all steps at once.

    Returns per step: weight and bias of forward, weight and bias of inverse, the log-det of the linear part,
    and the arguments of the coupling, for an input of this shape. The log-det is the sum over the steps, and
    the first step has it; the others have None.
    """
    samples, _, *sides = shape
    positions = math.prod(sides)
    weight, bias, weight_inverse, bias_inverse, log_det = folded(steps)
    log_dets = [positions * log_det.sum(), *[None] * (len(steps) - 1)]
    couplings = coupling_args_of([step.coupling for step in steps], device, samples * positions)
    linear = zip(weight, bias, weight_inverse, bias_inverse, log_dets, strict=True)
    return [(*args, *of_coupling) for args, of_coupling in zip(linear, couplings, strict=True)]


def coupling_args_of(
    couplings: Sequence[StepCoupling], device: torch.device, pixels: int
) -> Sequence[tuple[Tensor | None, ...]]:
    """Arguments of each coupling's network, for affine ones after their factors; none of other flows."""
    kinds = {type(coupling) for coupling in couplings}
    elementwise = kinds <= {SplineCoupling, MixtureCDFCoupling}
    if not elementwise and not kinds <= {AffineCoupling, AdditiveCoupling}:
        return [()] * len(couplings)
    networks = network_args_of([coupling.net for coupling in couplings], device, pixels)
    if elementwise:
        return networks
    affine: Any = couplings
    log_factors = [coupling.log_factor for coupling in affine]
    if any(f is None or f.shape != log_factors[0].shape or f.numel() == 1 for f in log_factors):
        return [(None, *of_network) for of_network in networks]
    factors = torch.stack(log_factors).exp().unbind()
    return [(factor, *of_network) for factor, of_network in zip(factors, networks, strict=True)]


def folded(steps: list[GlowStep]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fold ActNorm into the convolution of each step.

    Returns, stacked over the steps: weight and bias of forward, weight and bias of inverse, and log-det per
    position, nats.
    """
    weight, inverse, log_det = stacked_weights([step.conv1x1 for step in steps])
    # half-precision parameters are folded in float32, so that the two matrices remain inverse to each other
    log_scale, bias = (
        torch.stack([getattr(step.actnorm, name) for step in steps]) for name in ("log_scale", "bias")
    )
    log_scale, bias = log_scale.to(ops.acc_dtype(log_scale.dtype)), bias.to(ops.acc_dtype(bias.dtype))
    weight = weight.to(bias.dtype) * log_scale.exp().unsqueeze(1)
    inverse = inverse.to(bias.dtype) * (-log_scale).exp().unsqueeze(2)
    inverse = inverse + _correction(weight, inverse)
    log_det = log_det.to(bias.dtype) + log_scale.sum(1)
    # not a matrix product, which autocast would round: the inverse would then subtract another bias
    return weight, (weight * bias.unsqueeze(1)).sum(2), inverse, -bias, log_det


@torch.no_grad()
def _correction(weight: Tensor, inverse: Tensor) -> Tensor | float:
    """Correction that turns ``inverse`` into the inverse of the *rounded* float32 weights.

    It is one step of Newton's method in float64, V (1 - W V). Without it, the input that backward
    reconstructs through 32 steps is about twice as far from the true one (docs/memory.md).
    """
    # other devices may not support float64
    if weight.dtype != torch.float32 or weight.device.type not in ("cpu", "cuda"):
        return 0.0
    w, v = weight.double(), inverse.double()
    return (v - v @ (w @ v)).float()


class GlowLevel(Flow):
    """One level of Glow: squeeze, then K steps (arXiv:1807.03039, figure 2b).

    The weights of all steps are computed at once.

    Args:
        steps: the K steps, applied in order.
        reversible: recompute activations in backward instead of storing them, see docs/memory.md.
        activation_checkpoint_every: with ``reversible``, number of steps between two stored activations.

    Shape: x ``[N, C, H, W]``; z ``[N, 4C, H/2, W/2]``; log_det ``[N]``, nats.
    Raises ValueError for another shape, for an empty list of steps, and if ``activation_checkpoint_every`` is
    neither None nor a positive integer.
    """

    @renamed_arguments(checkpoint_every="activation_checkpoint_every")
    def __init__(
        self, steps: list[GlowStep], reversible: bool = True, activation_checkpoint_every: int | None = None
    ) -> None:
        super().__init__()
        validation.positive_int("activation_checkpoint_every", activation_checkpoint_every, optional=True)
        validation.boolean("reversible", reversible)
        listed = isinstance(steps, Sequence | nn.ModuleList) and len(steps) > 0
        if not listed or not all(isinstance(step, nn.Module) for step in steps):
            raise validation.argument_error("steps", repr(steps), "a list of one or more steps")
        self.squeeze = Squeeze()
        self.steps = cast("Sequence[GlowStep]", nn.ModuleList(steps))
        self.reversible, self.activation_checkpoint_every = reversible, activation_checkpoint_every

    checkpoint_every = renamed_property("checkpoint_every", "activation_checkpoint_every")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self.squeeze(x)
        # a step with an uninitialized ActNorm cannot compute its weights before x reaches it
        pending = any(step.actnorm._pending for step in self.steps)
        args_of = partial(shared_args_of, shape=x.shape, device=x.device)
        shared_args = None if pending else args_of
        if self.reversible:
            x, steps_log_det = run_reversible(
                self.steps,
                x,
                context,
                shared_args=shared_args,
                activation_checkpoint_every=self.activation_checkpoint_every,
            )
        else:
            x, steps_log_det = run_storing(self.steps, x, context, shared_args=shared_args)
        return x, log_det + steps_log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_dets = []
        with state_from_data(False):
            shared_args = shared_args_of(list(self.steps), z.shape, z.device)
            for step, args in zip(reversed(self.steps), reversed(shared_args), strict=True):
                z, step_log_det = step.inverse(z, context, *args)
                log_dets.append(step_log_det)
        return self.squeeze.inverse(z)[0], reduce(torch.add, log_dets)
