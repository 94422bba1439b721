"""Residual flows: x + g(x) with a contraction g."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.func import functional_call

from fastflow import validation
from fastflow.nn.batched_linalg import log_abs_det
from fastflow.nn.flow import Flow
from fastflow.ops.noise.op import as_seed, normal_noise
from fastflow.reversible import vjp
from fastflow.state_from_data import state_from_data, takes_state_from_data
from fastflow.transforms import in_transform

LOG_DETS = ("auto", "exact", "series", "roulette")
# "auto" is exact for samples of at most so many elements
FEW = 4
# rows of the Jacobian of samples of at most so many elements are computed at once, in so many times the memory
MANY = 16
Pull = Callable[[Tensor], Tensor]


class Residual(Flow):
    r"""Residual flow, :math:`z = x + g(x)` with a network g whose Lipschitz constant is below 1.

    Source: invertible residual networks, arXiv:1811.00995, and residual flows, arXiv:1906.02735. The inverse is the fixed
    point of :math:`x = z - g(x)`. Each sample iterates until the error bound :math:`\frac{q}{1 - q} \|x_{k+1} - x_k\|` is
    below ``tolerance`` times :math:`1 + \|z\|`, where q is the ratio of its last two steps. Samples that have converged
    leave the batch. Afterwards, ``inverse_iterations`` has the number of iterations of each sample.

    With J the Jacobian of g, :math:`\log |\det| = \sum_k \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k` (equation 3 of
    arXiv:1811.00995). The log-det is one of

    - ``"exact"``: from the whole Jacobian, one vector-Jacobian product per element of a sample;
    - ``"series"``: the first ``terms`` terms of the series, which is biased, with Hutchinson's estimator of traces;
    - ``"roulette"``: the first ``exact_terms`` terms and a random number of further ones, which is unbiased
      (arXiv:1906.02735, theorem 1). After each further term, the series stops with probability ``stop``;
    - ``"auto"``: exact for samples of at most 4 elements, else by roulette.

    The gradient of an estimate is that of the Neumann series (theorem 2). n terms take n vector-Jacobian products, of
    which only the last one is differentiated, so memory does not grow with n. Second derivatives of the forward pass
    are right for the exact log-det only. The inverse has first derivatives, by the implicit function theorem.

    Training mode draws noise and the number of terms from torch's default generators. Eval mode draws them from ``seed``,
    and the roulette has 20 exact terms, so that the same batch has the same log-dets. The inverse has the log-det of
    the same estimator, of which the noise may be another.

    torch.compile breaks its graph at the norms, which iterate until convergence, at the random number of terms, and in the
    inverse. These parts run as without it.

    Args:
        net: the network g, a module whose output has the shape of x, called as ``net(x)`` or ``net(x, context)``. Its
            output for a sample must not depend on the other samples.
            :class:`LipschitzMLP` and :class:`LipschitzConvNet` are contractions by construction.
        log_det: how the log-det is computed.
        terms: number of terms of ``"series"``.
        exact_terms: number of terms that the roulette always has in training mode.
        stop: probability with which the roulette stops after each further term.
        noise: noise of Hutchinson's estimator, ``"rademacher"`` (signs) or ``"gaussian"``.
        seed: seed of the noise and the number of terms in eval mode.
        tolerance: largest relative error of the inverse; None: 8 units of rounding.
        max_iterations: number of iterations after which the inverse raises.

    Shape: x, z ``[N, ...]``; log_det ``[N]``, nats.
    Raises ValueError for other arguments and for an output of another shape. The inverse raises RuntimeError if
    steps grow, or if a sample has not converged after ``max_iterations``: g is then no contraction. In transforms of
    torch.func, all samples iterate together, and derivatives pass through the iterations.

    Example:
        >>> import torch
        >>> from fastflow import nn as fnn
        >>> layer = fnn.Residual(fnn.LipschitzMLP(2, hidden=(16, 16)))
        >>> z, log_det = layer(torch.randn(8, 2))
        >>> x, _ = layer.inverse(z)
        >>> layer.inverse_iterations.shape
        torch.Size([8])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        log_det: Literal["auto", "exact", "series", "roulette"] = "auto",
        terms: int = 10,
        exact_terms: int = 2,
        stop: float = 0.5,
        noise: Literal["rademacher", "gaussian"] = "rademacher",
        seed: int = 0,
        tolerance: float | None = None,
        max_iterations: int = 1000,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise validation.argument_error("net", repr(net), "a module")
        validation.one_of("log_det", log_det, LOG_DETS)
        validation.positive_ints(terms=terms, exact_terms=exact_terms, max_iterations=max_iterations)
        validation.number("stop", stop, "a number between 0 and 1", lambda v: 0 < v < 1)
        validation.one_of("noise", noise, ("rademacher", "gaussian"))
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise validation.argument_error("seed", repr(seed), "an integer, 0 or more")
        if tolerance is not None:
            validation.number("tolerance", tolerance, "a number between 0 and 1", lambda v: 0 < v < 1)
        self.net, self.log_det, self.terms, self.exact_terms, self.stop = (
            net,
            log_det,
            terms,
            exact_terms,
            stop,
        )
        self.noise, self.seed = noise, seed
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.eval_terms = 20
        self.inverse_iterations: Tensor | None = None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        validation.floating_point("x", x)
        self._update_norms(x.shape[0] > 0 and takes_state_from_data(self.training))
        g, log_det = self._with_log_det(x, context)
        return x + g, log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        validation.floating_point("z", z)
        self._update_norms(False)
        with state_from_data(False):
            x = self._solved(z, context)
            _, log_det = self._with_log_det(x, context)
        return x, -log_det

    def _update_norms(self, trains: bool) -> None:
        """Before every pass, as the weights may have changed; outside of training, norms that are known well stay."""
        if in_transform() or torch.compiler.is_exporting():
            return
        if torch.compiler.is_compiling():
            from fastflow.nn import untraced

            untraced.update_norms(self.net, trains)
        else:
            _update_norms(self.net, trains)

    # log-det -----------------------------------------------------------------------------------------------------

    def _with_log_det(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """g(x) and the log-det; both have a graph if gradients are enabled."""
        wanted = torch.is_grad_enabled()
        if (found := self._linearized(x, context)) is not None:
            g, product = found
            return g, self._log_det(g, x, product, product, batched=x.ndim == 2)
        if in_transform():
            g, products = torch.func.vjp(lambda x: self._g(x, context), x)[:2]
            return g, self._log_det(g, x, lambda v: products(v)[0], lambda v: products(v)[0])
        # gradients are enabled for the products only
        takes_state = takes_state_from_data(training=True)
        with torch.inference_mode(False), torch.enable_grad(), state_from_data(takes_state):
            if x.is_inference():
                x, context = x.clone(), None if context is None else context.clone()
            if not (wanted and x.requires_grad):
                x = x.detach().requires_grad_()
            g = self._g(x, context)

            def pull(v: Tensor, graph: bool = False) -> Tensor:
                return torch.autograd.grad(
                    g, x, v, retain_graph=True, create_graph=graph, materialize_grads=True
                )[0]

            log_det = self._log_det(g, x, pull, lambda v: pull(v, wanted))
        return (g, log_det) if wanted else (g.detach(), log_det.detach())

    def _linearized(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Pull] | None:
        """g(x) and its products with vectors by the network's own method, which builds no graph of its gradient."""
        linearized = getattr(self.net, "linearized", None)
        if linearized is None:
            return None
        return linearized(x) if context is None else linearized(x, context)

    def _log_det(self, g: Tensor, x: Tensor, pull: Pull, last_pull: Pull, batched: bool = False) -> Tensor:
        """The log-det from products of vectors with J; ``last_pull`` is differentiated.

        With ``batched``, it takes several vectors for each sample, ``[K, N, D]``.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        elements = x[0].numel() if x.shape[0] else 0
        if not x.numel():
            return x.new_zeros(x.shape[0], dtype=dtype)
        if self.log_det == "exact" or (self.log_det == "auto" and elements <= FEW):
            return self._exact(g, last_pull, dtype, batched and elements <= MANY)
        return self._estimate(self._noise_like(x.detach()), self._coefficients(), pull, last_pull).to(dtype)

    def _exact(self, g: Tensor, pull: Pull, dtype: torch.dtype, batched: bool) -> Tensor:
        n, d = g.shape[0], g[0].numel()
        basis = torch.eye(d, dtype=g.dtype, device=g.device)
        if batched:
            jacobian = pull(basis[:, None]).expand(d, n, d).movedim(0, 1).to(dtype)
        else:
            rows = [pull(b.view(1, *g.shape[1:]).expand_as(g)).reshape(n, d) for b in basis]
            jacobian = torch.stack(rows, dim=1).to(dtype)
        if d == 1:
            return torch.log1p(jacobian[:, 0, 0])
        if d == 2:
            (a, b), (c, d) = jacobian.movedim(0, 2)
            return torch.log((1 + a + d + (a * d - b * c)).abs())
        return log_abs_det(jacobian + basis)

    def _estimate(self, noise: Tensor, coefficients: Sequence[float], pull: Pull, last_pull: Pull) -> Tensor:
        r"""Power series with the value :math:`\sum_k (-1)^{k+1} c_k t_k / k` and the Neumann gradient.

        With :math:`v_k = (J^T)^k \epsilon` and :math:`t_k = \epsilon^T v_k`, the last product is with
        :math:`u = \sum_{k=1}^n (-1)^{k+1} c_k v_{k-1}`. :math:`S = \epsilon^T J^T u` has the gradient, and equals
        :math:`\sum_k (-1)^{k+1} c_k t_k`. So :math:`t_n` needs no product of its own.
        """
        n = len(coefficients)
        with torch.no_grad():
            v, u, value = noise, coefficients[0] * noise, 0.0
            for k in range(1, n):
                v = pull(v)
                sign = 1 if k % 2 else -1
                value = value + sign * coefficients[k - 1] * (1 / k - 1 / n) * _dot(v, noise)
                u = torch.add(u, v, alpha=-sign * coefficients[k])
        s = _dot(last_pull(u), noise)
        return s + (value - (1 - 1 / n) * s.detach())

    def _coefficients(self) -> list[float]:
        """Factors of the terms: 1, and for the roulette one over the probability that a term is computed."""
        if self.log_det == "series":
            return [1.0] * self.terms
        always = self.exact_terms if self.training else self.eval_terms
        return [1.0] * always + [(1 - self.stop) ** -k for k in range(1, self._further_terms() + 1)]

    def _further_terms(self) -> int:
        """A number of terms after the exact ones, k or more with probability (1 - stop)^k."""
        generator = None if self.training else torch.Generator("cpu").manual_seed(self.seed)
        drawn = torch.empty((), device="cpu", dtype=torch.float64)
        return int(drawn.geometric_(self.stop, generator=generator)) - 1

    def _noise_like(self, x: Tensor) -> Tensor:
        gaussian = self.noise == "gaussian"
        if self.training:
            return torch.randn_like(x) if gaussian else torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1)
        seed = as_seed(self.seed, x.device)
        draw = normal_noise if gaussian else torch.ops.fastflow.uniform_noise.default
        drawn = draw(list(x.shape), seed, 0, x.dtype)
        return drawn if gaussian else (drawn >= 0.5).to(x.dtype).mul_(2).sub_(1)

    # inverse -----------------------------------------------------------------------------------------------------

    def _g(self, x: Tensor, context: Tensor | None) -> Tensor:
        g = self.net(x) if context is None else self.net(x, context)
        validation.same_shape("net's output", g, x.shape, "the shape of its input")
        return g

    def _solved(self, z: Tensor, context: Tensor | None) -> Tensor:
        """x with x + g(x) = z, differentiable by the implicit function theorem."""
        if in_transform():
            return self._unrolled(z, context)
        parameters = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        variables = [v for v in (z, context, *parameters.values()) if v is not None and v.requires_grad]
        if not torch.is_grad_enabled() or not variables:
            with torch.no_grad():
                return self._iterated(z, context)
        names = list(parameters)

        def g(x: Tensor, *variables: Tensor) -> Tensor:
            given, variables = (None, variables) if context is None else (variables[0], variables[1:])
            args = (x,) if given is None else (x, given)
            with state_from_data(False):
                return functional_call(self.net, dict(zip(names, variables, strict=True)), args)

        others = [v for v in (context, *parameters.values()) if v is not None]
        return _FixedPoint.apply(self._iterated_linear, g, lambda: self._iterated(z, context), z, *others)

    def _unrolled(self, z: Tensor, context: Tensor | None) -> Tensor:
        """The fixed point by twice the iterations that its values need, so that its derivatives converge too."""
        x, left, before = z, self.max_iterations, None
        for done in range(self.max_iterations):
            new = z - self._g(x, context)
            if left == self.max_iterations:
                values, tolerance, scale, rounding = _raw(new - x), *self._limits(_raw(z))
                if values.shape != _raw(z).shape:  # a transform that batches one of them
                    scale, rounding = scale.max(), rounding.max()
                step = values.flatten(1).norm(dim=1)
                if bool((_converged(step, before, tolerance * scale, rounding) | ~step.isfinite()).all()):
                    left = 2 * done + 2
                before = step
            x = new
            if done + 1 >= left:
                return x
        raise _no_contraction(f"samples that moved after {self.max_iterations} iterations")

    def _limits(self, y: Tensor) -> tuple[float, Tensor, Tensor]:
        """Relative tolerance, the scale of errors of each sample, and steps that are rounding."""
        eps = torch.finfo(y.dtype).eps
        scale = 1 + y.flatten(1).norm(dim=1)
        return 8 * eps if self.tolerance is None else self.tolerance, scale, 4 * eps * scale

    def _iterated(self, z: Tensor, context: Tensor | None) -> Tensor:
        """The fixed point of z - g(x), sample by sample."""
        x, active = z.detach().clone(), torch.arange(z.shape[0], device=z.device)
        counts = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device)
        self.inverse_iterations = counts
        if not x.numel():
            return x
        tolerance, scale, rounding = self._limits(z)
        per_sample = context is not None and context.shape[0] == z.shape[0]
        now, given, c, before = x, z.detach(), context, None
        for iteration in range(1, self.max_iterations + 1):
            new = given - self._g(now, c)
            step = (new - now).flatten(1).norm(dim=1)
            now = new
            done = _converged(step, before, tolerance * scale, rounding)
            done |= ~scale.isfinite()  # such a sample stays as it is: NaN
            before = step
            if done.any():
                finished = active[done]
                x[finished], counts[finished] = now[done], iteration
                left = ~done
                active, now, given, before = active[left], now[left], given[left], before[left]
                scale, rounding = scale[left], rounding[left]
                c = c[left] if c is not None and per_sample else c
                if not active.numel():
                    return x
        raise _no_contraction(f"{active.numel()} samples that moved after {self.max_iterations} iterations")

    def _iterated_linear(self, pull: Pull, y: Tensor) -> Tensor:
        """The fixed point of y - pull(w), the whole batch at once."""
        if not y.numel():
            return y
        tolerance, scale, rounding = self._limits(y)
        w, before = y, None
        for _ in range(self.max_iterations):
            new = y - pull(w)
            step = (new - w).flatten(1).norm(dim=1)
            w = new
            if bool((_converged(step, before, tolerance * scale, rounding) | ~scale.isfinite()).all()):
                return w
            before = step
        raise _no_contraction(f"gradients that moved after {self.max_iterations} iterations")

    def extra_repr(self) -> str:
        how = {"series": f", terms={self.terms}", "exact": ""}.get(
            self.log_det, f", exact_terms={self.exact_terms}, stop={self.stop}"
        )
        return f"log_det={self.log_det!r}{how}, noise={self.noise!r}"


def _update_norms(net: nn.Module, trains: bool) -> None:
    for module in net.modules():
        update = getattr(module, "update_norm", None)
        if update is not None:
            update(keep_vectors=trains)


def _raw(x: Tensor) -> Tensor:
    """The values within the wrappers of transforms of torch.func and of forward-mode AD, without their batches."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    x = forward_ad.unpack_dual(x).primal.detach() if forward_ad._current_level >= 0 else x.detach()
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _converged(step: Tensor, before: Tensor | None, tolerance: Tensor, rounding: Tensor) -> Tensor:
    """Samples whose error bound is below the tolerance; raises if steps grow, as those of no contraction do."""
    if before is None:
        return step <= rounding
    ratio = step / before
    grows = (step > before * 1.001) & (step > 1000 * rounding) & tolerance.isfinite()
    grows |= ~step.isfinite() & tolerance.isfinite()
    if grows.any():
        largest = ratio[grows].max().item()
        raise _no_contraction(f"a step that is {largest:.3g} times the one before")
    bound = step * ratio / (1 - ratio).clamp(min=1e-3)
    return (bound <= tolerance) | (step <= rounding)


def _no_contraction(got: str) -> RuntimeError:
    return RuntimeError(
        f"net: got {got}, expected a contraction (a Lipschitz constant below 1); this layer has no inverse by iteration"
    )


class _Context(FunctionCtx):
    solve_linear: Callable[[Pull, Tensor], Tensor]
    g: Callable[..., Tensor]
    saved_tensors: tuple[Tensor, ...]


class _FixedPoint(torch.autograd.Function):
    """The solution x of x = y - g(x, *variables), with first derivatives by the implicit function theorem."""

    @staticmethod
    def forward(
        ctx: _Context,
        solve_linear: Callable[[Pull, Tensor], Tensor],
        g: Callable[..., Tensor],
        solve: Callable[[], Tensor],
        y: Tensor,
        *variables: Tensor,
    ) -> Tensor:
        x = solve()
        ctx.solve_linear, ctx.g = solve_linear, g
        ctx.save_for_backward(x, *variables)
        return x

    @staticmethod
    def backward(ctx: _Context, *dx: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: got True, expected False: the inverse of Residual has first derivatives only"
            )
        x, *variables = ctx.saved_tensors
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            g = ctx.g(at, *variables)

        def pull(w: Tensor) -> Tensor:
            return torch.autograd.grad(g, at, w, retain_graph=True, materialize_grads=True)[0]

        w = ctx.solve_linear(pull, dx[0])
        found = vjp([g], [-w], [v for v in variables if v.requires_grad])
        return None, None, None, w, *(found.get(v) for v in variables)
