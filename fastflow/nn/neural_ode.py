"""NeuralODE flows: the solution of an ordinary differential equation."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from types import ModuleType

import torch
from torch import Tensor, nn

from fastflow import validation
from fastflow.nn.flow import Flow
from fastflow.ops import acc_dtype
from fastflow.transforms import in_transform

TRACES = ("auto", "exact", "hutchinson")
NOISES = ("rademacher", "gaussian")
EXACT_UP_TO = 8  # dimensions, of trace="auto"
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
FIXED_STEP = ("euler", "midpoint", "rk4")


class NeuralODE(Flow):
    r"""NeuralODE flow: z is the solution at time T of :math:`dx/dt = f(t, x)` that starts at x.

    Source: Neural ODEs, arXiv:1806.07366, section 4, and FFJORD, arXiv:1810.01367. The log-det is
    :math:`\int_0^T \operatorname{tr} \partial f / \partial x \, dt`, solved together with x. The inverse solves
    backward in time. Both are as exact as the solver: errors are about ``atol + rtol |x|``.

    The solvers are those of torchdiffeq: ``pip install fastflow-torch[ode]``.

    Args:
        net: the field f, a module that is called as ``net(t, x)``, or ``net(t, x, context)`` if a context is given, with
            a scalar t. :class:`~fastflow.nn.ConcatSquash` is one. It must not mix samples.
        time: T.
        trace: ``"exact"``: one vector-Jacobian product per dimension; ``"hutchinson"``: the unbiased estimate
            :math:`\epsilon^T (\partial f / \partial x) \epsilon` by one product, with one draw of :math:`\epsilon` for a
            solve, also in eval mode; ``"auto"``: exact for up to 8 dimensions.
        noise: distribution of :math:`\epsilon`, ``"rademacher"`` or ``"gaussian"``; torch's generator draws it.
        adjoint: solve backward in time for the gradients, with memory that does not grow with the number of steps. False:
            store the steps; second derivatives need it.
        method: solver of torchdiffeq: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``, ``"fehlberg2"`` or ``"adaptive_heun"`` with
            adaptive steps, ``"euler"``, ``"midpoint"`` or ``"rk4"`` with steps of one size.
        atol, rtol: tolerances of solvers with adaptive steps.
        step_size: step of ``"euler"``, ``"midpoint"`` and ``"rk4"``; None: T.

    Shape: x, z ``[N, ...]``; log_det ``[N]``, nats.
    Raises ValueError for other arguments, and for an output of ``net`` of another shape. Raises ImportError if torchdiffeq
    is not installed.

    ``evaluations`` is the number of evaluations of ``net`` by the last solve, without those of its gradient.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> flow = fnn.NeuralODE(fnn.ConcatSquash(2, hidden=(16,)))
        >>> z, log_det = flow(torch.randn(8, 2))
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        time: float = 1.0,
        trace: str = "auto",
        noise: str = "rademacher",
        adjoint: bool = True,
        method: str = "dopri5",
        atol: float = 1e-5,
        rtol: float = 1e-5,
        step_size: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise validation.argument_error("net", repr(net), "a module")
        _torchdiffeq()
        validation.one_of("trace", trace, TRACES)
        validation.one_of("noise", noise, NOISES)
        validation.boolean("adjoint", adjoint)
        validation.one_of("method", method, (*ADAPTIVE, *FIXED_STEP))
        for name, value in (("time", time), ("atol", atol), ("rtol", rtol)):
            validation.number(name, value, "a positive number", lambda v: 0 < v < math.inf)
        if step_size is not None:
            expected = f"a positive number up to the time {time:g}"
            validation.number("step_size", step_size, expected, lambda v: 0 < v <= time)
            if method not in FIXED_STEP:
                raise validation.argument_error("step_size", step_size, f"None for the method {method!r}")
        self.net, self.time, self.trace, self.noise, self.adjoint = net, time, trace, noise, adjoint
        self.method, self.atol, self.rtol, self.step_size = method, atol, rtol, step_size
        self.evaluations = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = self._solved("x", x, context, 0.0, self.time)
        return z, log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = self._solved("z", z, context, self.time, 0.0)
        return x, log_det

    def with_penalties(
        self, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""``(z, log_det, kinetic, jacobian)``: the two penalties that keep the field simple, per sample.

        Source: How to train your neural ODE, arXiv:2002.02798, eq. 8 and 10. ``kinetic`` is
        :math:`\int |f|^2 dt`, and ``jacobian`` :math:`\int |\epsilon^T \partial f / \partial x|^2 dt`, an estimate of the
        squared Frobenius norm, which is exact with an exact trace.
        """
        z, log_det, kinetic, jacobian = self._solved("x", x, context, 0.0, self.time, penalties=True)
        return z, log_det, kinetic, jacobian

    def path(self, x: Tensor, times: Sequence[float], context: Tensor | None = None) -> Tensor:
        """The solution at each of ``times``, ``[len(times), N, ...]``, of which x is the first.

        From data to latents times increase from 0 to ``time``; from latents to data they decrease. Gradients are stored
        steps'. Raises ValueError for fewer than two times, and for times that neither increase nor decrease.
        """
        steps = [b - a for a, b in zip(times, times[1:], strict=False)]
        if not steps or not (all(s > 0 for s in steps) or all(s < 0 for s in steps)):
            expected = "two or more times, each above the one before, or each below it"
            raise validation.argument_error("times", list(times), expected)
        validation.floating_point("x", x)

        def speed(t: Tensor, y: Tensor) -> Tensor:
            return self.net(t, y) if context is None else self.net(t, y, context)

        points = torch.tensor(times, dtype=x.dtype, device=x.device)
        return _torchdiffeq().odeint(speed, x, points, **self._options())

    def _options(self) -> dict[str, object]:
        options = {} if self.method not in FIXED_STEP else {"step_size": self.step_size or self.time}
        return {"method": self.method, "atol": self.atol, "rtol": self.rtol, "options": options}

    def _solved(
        self,
        argument: str,
        x: Tensor,
        context: Tensor | None,
        start: float,
        end: float,
        penalties: bool = False,
    ) -> tuple[Tensor, ...]:
        validation.floating_point(argument, x)
        ode, dtype = _torchdiffeq(), acc_dtype(x.dtype)
        if not x.numel():  # solvers take a norm
            f = self.net(x.new_zeros(()), x, *(() if context is None else (context,)))
            empty = f.to(dtype).flatten(1).sum(1)
            return (x + f, *([empty] * (3 if penalties else 1)))
        if torch.is_inference_mode_enabled():  # the trace is a derivative
            with torch.inference_mode(False), torch.no_grad():
                context = None if context is None else context.clone()
                return self._solved(argument, x.clone(), context, start, end, penalties)
        field = _Field(self, x, context, penalties)
        state = (x.to(dtype), *(x.new_zeros(x.shape[0], dtype=dtype) for _ in range(3 if penalties else 1)))
        times = torch.tensor([start, end], dtype=dtype, device=x.device)
        given = self._options()
        if self.adjoint and torch.is_grad_enabled():
            leaves = tuple(p for p in self.net.parameters() if p.requires_grad)
            leaves += (context,) if context is not None and context.requires_grad else ()
            found = ode.odeint_adjoint(field, state, times, adjoint_params=leaves, **given)
        else:
            found = ode.odeint(field, state, times, **given)
        self.evaluations = field.evaluations
        z, *others = (values[-1] for values in found)
        return z.to(x.dtype), *others

    def extra_repr(self) -> str:
        return f"time={self.time:g}, trace={self.trace!r}, method={self.method!r}, adjoint={self.adjoint}"


class _Field(nn.Module):
    """The right-hand side of x, its log-det and its penalties, for one solve."""

    def __init__(self, flow: NeuralODE, x: Tensor, context: Tensor | None, penalties: bool) -> None:
        super().__init__()
        self.net, self.context, self.penalties, self.evaluations = flow.net, context, penalties, 0
        self.dtype, dimensions = x.dtype, x[0].numel()
        exact = flow.trace == "exact" or (flow.trace == "auto" and dimensions <= EXACT_UP_TO)
        self.noise: Tensor | None = None  # None: the exact trace
        if not exact:
            draw = torch.randn_like(x, dtype=acc_dtype(x.dtype))
            self.noise = draw if flow.noise == "gaussian" else draw.sign() + (draw == 0)

    def forward(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.evaluations += 1
        recorded, x = torch.is_grad_enabled(), state[0]
        if in_transform():
            f, pull_back = torch.func.vjp(lambda v: self._speed(t, v), x)[:2]
            trace, frobenius = self._of_jacobian(f, lambda v: pull_back(v)[0])
        else:
            with torch.enable_grad():
                x = x if recorded and x.requires_grad else x.detach().requires_grad_()
                f = self._speed(t, x)
                options = {"create_graph": recorded, "retain_graph": True, "materialize_grads": True}
                trace, frobenius = self._of_jacobian(f, lambda v: torch.autograd.grad(f, x, v, **options)[0])
        found = f, trace
        if self.penalties:
            found = f, trace, f.square().flatten(1).sum(1), frobenius
        return found if recorded else tuple(v.detach() for v in found)

    def _speed(self, t: Tensor, x: Tensor) -> Tensor:
        given = (t, x.to(self.dtype)) if self.context is None else (t, x.to(self.dtype), self.context)
        f = self.net(*given)
        validation.same_shape("output of net", f, x.shape, "the shape of x")
        return f.to(x.dtype)

    def _of_jacobian(self, f: Tensor, product: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Trace and squared Frobenius norm of the Jacobian of each sample, or their estimates."""
        if self.noise is not None:
            row = product(self.noise).flatten(1)
            return (row * self.noise.flatten(1)).sum(1), row.square().sum(1)
        traces, squares = [], []
        for i, e in enumerate(torch.eye(f[0].numel(), dtype=f.dtype, device=f.device)):
            row = product(e.view(f.shape[1:]).expand_as(f)).flatten(1)
            traces.append(row[:, i])
            squares.append(row.square().sum(1))
        return reduce(torch.add, traces), reduce(torch.add, squares)


def _torchdiffeq() -> ModuleType:
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError("continuous flows need torchdiffeq: pip install fastflow-torch[ode]") from error
    return torchdiffeq
