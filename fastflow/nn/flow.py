"""Base class of flow layers, and its numerical check."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.batched_linalg import log_abs_det
from fastflow.reversible import Gradients, has_its_own_rule
from fastflow.state_from_data import state_from_data


@contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put ``module`` in training or eval mode within the block, and restore the mode of each part after it."""
    before = [(m, m.training) for m in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for m, was_training in before:
            m.training = was_training


@dataclass(frozen=True)
class FlowReport:
    """Errors that :meth:`Flow.check` measured in float64; None if an error is not applicable."""

    inverse_error: float
    """Largest difference between inverse(forward(x)) and x, relative to 1 + max|x|."""
    log_det_sum: float
    """Largest absolute sum of log_det and log_det of the inverse, relative to 1 + the magnitude of log_det."""
    log_det_error: float | None
    """Largest difference between log_det and the log-det of autograd's Jacobian, relative to 1 + the latter's
    magnitude."""
    gradient_errors: dict[str, float] = field(default_factory=dict)
    """Relative error of the gradient of x, of each parameter and of the context, against a central difference
    along a random direction. Keys that end in "by inverse_backward" compare that method with autograd,
    relative to 1 + the largest value; the entry of x also includes the error of the reconstructed x."""
    tolerance: float = 1e-8
    gradient_tolerance: float = 1e-5

    def failures(self) -> list[str]:
        """Names of the errors that exceed their tolerance."""
        errors = {
            "inverse": self.inverse_error,
            "log_det of the inverse": self.log_det_sum,
            "log_det": self.log_det_error,
        }
        failed = [name for name, e in errors.items() if e is not None and not e <= self.tolerance]
        return failed + [
            f"gradient of {name}"
            for name, e in self.gradient_errors.items()
            if not e <= self.gradient_tolerance
        ]

    def __str__(self) -> str:
        rows = [
            ("inverse(forward(x)) - x", self.inverse_error, self.tolerance),
            ("log_det + log_det of the inverse", self.log_det_sum, self.tolerance),
            ("log_det - log|det Jacobian|", self.log_det_error, self.tolerance),
            *(
                (f"gradient of {name}", e, self.gradient_tolerance)
                for name, e in self.gradient_errors.items()
            ),
        ]
        width = max(len(name) for name, _, _ in rows)
        lines = []
        for name, error, tolerance in rows:
            verdict = (
                "n/a"
                if error is None
                else f"{error:.1e}  {'ok' if error <= tolerance else f'WRONG, over {tolerance:.0e}'}"
            )
            lines.append(f"{name:<{width}}  {verdict}")
        return "\n".join(lines)


class Flow(nn.Module):
    r"""Base class of flow layers, :math:`z = f(x)` with its inverse and its log-determinant.

    Subclasses implement ``forward`` and ``inverse``; :meth:`check` tests them. See docs/own_layer.md.

    Both directions return ``(output, log_det)``, where ``log_det`` belongs to that direction. ``context`` is
    a tensor that the layer conditions on; layers without conditioning ignore it.

    Subclasses may also implement ``inverse_backward(z, dz, dlog_det, wanted, context=None)``, a faster
    backward pass for reversible chains (:mod:`fastflow.reversible`). From the output
    z it returns ``(x, dx, gradients)``: the input, its gradient, and a dict. The dict has the gradient of
    each tensor of ``wanted`` that z or the log-det depends on. A subclass that overrides ``forward`` or
    ``inverse``, but not ``inverse_backward``, does not use the inherited ``inverse_backward``.

    Shape: x, z ``[N, ...]``; log_det ``[N]``, nats, float32 (float64 for float64 input).
    """

    inverse_backward: Callable[..., tuple[Tensor, Tensor, Gradients]] | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # an inherited inverse_backward belongs to the forward and inverse it was written for: it is disabled
        # if the class, or a base nearer to it, overrides one of them
        first = {
            name: next(i for i, c in enumerate(cls.__mro__) if name in vars(c))
            for name in ("forward", "inverse", "inverse_backward")
        }
        if min(first["forward"], first["inverse"]) < first["inverse_backward"]:
            cls.inverse_backward = None

    @abstractmethod
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    @abstractmethod
    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def initialize(self, x: Tensor, context: Tensor | None = None) -> None:
        """Initialize every uninitialized :class:`ActNorm` within the flow from the batch ``x``.

        It is one forward pass without gradients, in which the flow is in training mode. Running statistics of
        :class:`BatchNorm` move as in training. If torch.distributed is initialized, every rank must call it,
        see :class:`ActNorm`.
        """
        with in_mode(self, training=True), state_from_data(True), torch.no_grad():
            self(x, context)

    def check(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        tolerance: float = 1e-8,
        gradient_tolerance: float = 1e-5,
    ) -> FlowReport:
        """Measure the errors of the inverse, the log-det and the gradients on the batch ``x``.

        The log-det is compared with autograd's Jacobian, gradients with central differences, and
        ``inverse_backward`` with autograd. The check runs on a float64 copy of the layer in eval mode, so it
        leaves the layer unchanged. It sets no state from x and communicates with no other rank: an ActNorm
        that is not initialized is checked as the identity (see :meth:`initialize`). The Jacobian costs one
        backward pass per element of a sample, so pass a small x. For an integer x (dequantization), the check
        skips the Jacobian and the gradients.

        Args:
            x: batch ``[N, ...]``.
            context: context of the layer, or None.
            tolerance: largest accepted relative error of the inverse and of the log-dets.
            gradient_tolerance: largest accepted relative error of gradients.

        Returns a report that prints as a table. Raises ValueError with that table if an error exceeds its
        tolerance.
        """
        flow = copy.deepcopy(self).double().eval()
        x = x.double() if x.is_floating_point() else x
        if context is not None and context.is_floating_point():
            context = context.double()
        with torch.no_grad():
            z, log_det = flow(x, context)
            if log_det.shape != (x.shape[0],):
                raise validation.argument_error(
                    "log_det", validation.shape_of(log_det), f"[{x.shape[0]}], one value per sample"
                )
            back, log_det_back = flow.inverse(z, context)
        report = FlowReport(
            inverse_error=_largest((back.double() - x.double()) / (1 + x.double().abs().max()))
            if x.numel()
            else 0.0,
            log_det_sum=_largest((log_det + log_det_back) / (1 + log_det.abs())),
            log_det_error=_jacobian_error(flow, x, context) if x.is_floating_point() else None,
            gradient_errors=_gradient_errors(flow, x, context) if x.is_floating_point() else {},
            tolerance=tolerance,
            gradient_tolerance=gradient_tolerance,
        )
        if failures := report.failures():
            raise ValueError(f"{type(self).__name__} is inaccurate: {', '.join(failures)}\n{report}")
        return report


def _largest(errors: Tensor) -> float:
    return errors.abs().max().item() if errors.numel() else 0.0


def _jacobian_error(flow: Flow, x: Tensor, context: Tensor | None) -> float:
    x = x.detach().clone().requires_grad_()
    z, log_det = flow(x, context)
    columns = z.flatten(1)
    if columns.shape[1] != x.flatten(1).shape[1]:
        raise validation.argument_error(
            "z", validation.shape_of(z), f"as many elements per sample as x, {list(x.shape)}"
        )
    rows = [
        torch.autograd.grad(
            columns[:, d].sum(), x, retain_graph=True, allow_unused=True, materialize_grads=True
        )[0].flatten(1)
        for d in range(columns.shape[1])
    ]
    jacobian = log_abs_det(torch.stack(rows, dim=1))
    return _largest((log_det - jacobian) / (1 + jacobian.abs()))


def _gradient_errors(flow: Flow, x: Tensor, context: Tensor | None, step: float = 1e-6) -> dict[str, float]:
    x = x.detach().clone().requires_grad_()
    if context is not None and context.is_floating_point():
        context = context.detach().clone().requires_grad_()
    generator = torch.Generator("cpu").manual_seed(0)

    def random_like(v: Tensor) -> Tensor:
        return torch.randn(v.shape, generator=generator, dtype=torch.float64, device="cpu").to(v.device)

    z, log_det = flow(x, context)
    weights = [random_like(v) / max(v.numel(), 1) ** 0.5 for v in (z, log_det)]

    def loss() -> Tensor:
        z, log_det = flow(x, context)
        return (weights[0] * z).sum() + (weights[1] * log_det).sum()

    variables = {"x": x} | {name: p for name, p in flow.named_parameters() if p.requires_grad}
    if context is not None and context.is_floating_point():
        variables["context"] = context
    gradients = torch.autograd.grad(
        loss(), list(variables.values()), allow_unused=True, materialize_grads=True
    )
    errors = {}
    for (name, v), gradient in zip(variables.items(), gradients, strict=True):
        direction = random_like(v)
        with torch.no_grad():
            start = v.clone()
            up = (v.copy_(start + step * direction), loss())[1]
            down = (v.copy_(start - step * direction), loss())[1]
            v.copy_(start)
        numeric, exact = ((up - down) / (2 * step)).item(), (gradient * direction).sum().item()
        errors[name] = abs(numeric - exact) / max(1.0, abs(numeric))
    if flow.inverse_backward is not None and has_its_own_rule(flow):
        with torch.no_grad():
            back, dx, found = flow.inverse_backward(
                z.detach(), *weights, list(variables.values())[1:], context
            )
        for (name, v), gradient in zip(variables.items(), gradients, strict=True):
            by_rule = dx if v is x else found.get(v, torch.zeros_like(v))
            errors[f"{name} by inverse_backward"] = _largest(by_rule - gradient) / (1 + _largest(gradient))
        errors["x by inverse_backward"] += _largest(back - x) / (1 + _largest(x))
    return errors


def check_channels(x: Tensor, num_features: int) -> None:
    """Raise ValueError unless x has the shape ``[N, num_features, ...]``."""
    if x.ndim < 2 or x.shape[1] != num_features:
        raise validation.argument_error(
            "x", validation.shape_of(x), f"[N, {num_features}, ...], the layer's number of channels"
        )
