"""fastflow::residual_network, and its backward, which reads the hidden activations or computes them again."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow import validation
from fastflow.ops.registry import register
from fastflow.ops.residual_network import reference

ACTIVATIONS = ("relu", "tanh", "silu", "elu")
# Of fewer samples the products are those of vectors, which PyTorch computes without copies of the weights.
SAMPLES = 16
# Weights between hidden units. Of more, copies take longer than calls: without gradients networks of 512 units took 1.1
# to 1.3 times PyTorch's time on a CPU. In training with batch norm the op is still faster, and keeps a third less.
WEIGHTS = 2**18


def pays(hidden: int, blocks: int, by_batch: bool) -> bool:
    """Whether the op is faster than PyTorch's operators; ``by_batch``: norms take the statistics of the batch."""
    return by_batch or 2 * blocks * hidden**2 <= WEIGHTS


@functools.lru_cache(maxsize=256)
def shapes_of(
    features: int, contexts: int | None, hidden: int, outputs: int, blocks: int, batch_norm: bool
) -> list[torch.Size]:
    """Shapes of the parameters in their order."""

    def linear(inputs: int, units: int) -> list[torch.Size]:
        return [torch.Size((units, inputs)), torch.Size((units,))]

    norm = [torch.Size((hidden,))] * 2 if batch_norm else []
    block = [*norm, *linear(hidden, hidden)] * 2 + ([] if contexts is None else linear(contexts, hidden))
    return [*linear(features + (contexts or 0), hidden), *block * blocks, *linear(hidden, outputs)]


def _check(
    argument: str, x: Tensor, context: Tensor | None, parameters: Sequence[Tensor], running: Sequence[Tensor],
    blocks: int, activation: str, batch_norm: bool, eps: float,
) -> None:  # fmt: skip
    if x.ndim != 2:
        raise validation.argument_error(argument, validation.shape_of(x), "vectors [N, D]")
    if x.dtype not in (torch.float32, torch.float64):
        raise validation.argument_error(argument, f"dtype {x.dtype}", "float32 or float64")
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 0:
        raise validation.argument_error("blocks", blocks, "an integer of at least 0")
    if activation not in ACTIVATIONS:
        validation.one_of("activation", activation, ACTIVATIONS)
    if not eps > 0:
        raise validation.argument_error("eps", eps, "a positive number")
    if context is not None:
        if context.ndim != 2 or context.shape[0] != x.shape[0]:
            expected = f"[{x.shape[0]}, features], a vector for each sample of {argument}"
            raise validation.argument_error("context", validation.shape_of(context), expected)
        _check_like("context", context, argument, x)
    if len(parameters) < 4 or parameters[0].ndim != 2 or parameters[-2].ndim != 2:
        got = f"{len(parameters)} tensors"
        raise validation.argument_error("parameters", got, "weights and biases of at least two linear layers")
    contexts = None if context is None else context.shape[1]
    (hidden, _), (outputs, _) = parameters[0].shape, parameters[-2].shape
    sizes = x.shape[1], contexts, hidden, outputs
    symbolic = any(isinstance(v, torch.SymInt) for v in sizes)  # of a graph, not hashable
    expected = (shapes_of.__wrapped__ if symbolic else shapes_of)(*sizes, blocks, batch_norm)
    if len(parameters) != len(expected):
        why = f"{len(expected)} for {blocks} blocks"
        raise validation.argument_error("parameters", f"{len(parameters)} tensors", why)
    if [p.shape for p in parameters] != expected:
        for i, (p, shape) in enumerate(zip(parameters, expected, strict=True)):
            validation.same_shape(f"parameters[{i}]", p, shape, f"{hidden} hidden units")
    statistics = 4 * blocks if batch_norm else 0
    if len(running) not in (0, statistics):
        expected = f"none or {statistics}, a mean and a variance for each normalization"
        raise validation.argument_error("running", f"{len(running)} tensors", expected)
    if batch_norm and blocks and not running and x.shape[0] == 1:
        raise validation.argument_error(argument, "one sample", "at least 2 for the statistics of a batch")
    for i, t in enumerate(running):
        validation.same_shape(f"running[{i}]", t, (hidden,), f"{hidden} hidden units")
    for name, tensors in (("parameters", parameters), ("running", running)):
        for i, t in enumerate(tensors):
            if t.dtype != x.dtype or t.device != x.device:
                _check_like(f"{name}[{i}]", t, argument, x)


def _check_like(name: str, t: Tensor, argument: str, x: Tensor) -> None:
    if t.dtype != x.dtype or t.device != x.device:
        got, expected = f"{t.dtype} on {t.device}", f"{x.dtype} on {x.device}, like {argument}"
        raise validation.argument_error(name, got, expected)


def _eligible(x: Tensor, *_: object) -> bool:
    return x.shape[0] >= SAMPLES


def _vjp(
    x: Tensor, context: Tensor | None, parameters: Sequence[Tensor], running: Sequence[Tensor], hidden: Tensor,
    statistics: Tensor, blocks: int, activation: str, batch_norm: bool, eps: float, context_gradient: bool,
    dy: Tensor,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Gradients by x, the context and each of the parameters."""
    dx, dcontext, flat = torch.ops.fastflow.residual_network_backward.default(
        x, context, parameters, running, hidden, statistics, blocks, activation, batch_norm, eps,
        context_gradient, dy,
    )  # fmt: skip
    if type(flat) is Tensor:  # a third of the time
        unflatten = torch._C._nn.unflatten_dense_tensors  # pyright: ignore[reportAttributeAccessIssue]  # has no stub
        gradients = unflatten(flat, parameters)
    else:  # of a graph, perhaps with symbolic sizes
        parts = flat.split([p.numel() for p in parameters])
        gradients = [g.view(p.shape) for g, p in zip(parts, parameters, strict=True)]
    return dx, dcontext if context_gradient else None, gradients


register(reference.residual_network_backward, compiled=("cpu",), eligible=_eligible)
register(
    reference.residual_network,
    compiled=("cpu",),
    eligible=_eligible,
    check=_check,
    outputs="y hidden statistics",
    backward=_vjp,
    gradients="x context parameters",
    integers="hidden statistics",
)


def residual_network(
    x: Tensor,
    context: Tensor | None,
    parameters: Sequence[Tensor],
    *,
    blocks: int,
    activation: str = "relu",
    batch_norm: bool = False,
    running: Sequence[Tensor] = (),
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    r"""Residual network of vectors: pre-activation blocks of two linear layers, gated by a context.

    Source: the coupling networks of neural spline flows, arXiv:1906.04032. The first layer takes x and the context,
    :math:`h = W_i\,[x, c] + b_i`. A block computes

    .. math:: t = W_0\,f(n_0(h)) + b_0, \quad u = W_1\,f(n_1(t)) + b_1, \quad
        h \leftarrow h + u \, \sigma(W_c\,c + b_c),

    with the activation f and batch normalizations :math:`n_0, n_1`. Without a context the factor is 1, without
    ``batch_norm`` :math:`n(h) = h`. The output is :math:`y = W_f\,h + b_f`. The whole network is one call forward and
    one backward, instead of some 40 small ones.

    Args:
        x: inputs.
        context: values that all layers with a context take; None: no context.
        parameters: weight and bias of the first layer; of each block those of :math:`n_0` if there is one,
            :math:`W_0`, :math:`n_1` if there is one, :math:`W_1`, and :math:`W_c` if there is a context; of the last
            layer.
        blocks: number of blocks.
        activation: ``"relu"``, ``"tanh"``, ``"silu"`` or ``"elu"``.
        batch_norm: whether blocks are normalized.
        running: mean and variance of each normalization, in order; empty: the statistics of the batch.
        eps: added to variances.

    Shape: x ``[N, D]``; context ``[N, C]``; weights ``[outputs, inputs]``, as in ``torch.nn.Linear``; y ``[N, K]``;
    statistics ``[4 * blocks, H]``: for each normalization the means and the variances of the batch, divided by N,
    without gradients; empty if they were not needed. float32 or float64.

    Backward reads the hidden activations, which forward keeps if gradients are enabled. If it is itself
    differentiated, it is plain PyTorch. The C++ runs on the CPU for at least 16 samples.
    Raises ValueError for other shapes, dtypes, devices, names or numbers.

    Example:
        >>> import torch
        >>> from fastflow import ops
        >>> first, *block, last = torch.nn.Linear(3, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)
        >>> parameters = [p for layer in (first, *block, last) for p in layer.parameters()]
        >>> y, _ = ops.residual_network(torch.randn(20, 3), None, parameters, blocks=1)
    """
    keep = torch.is_grad_enabled()
    wanted = keep and context is not None and context.requires_grad
    y, _, statistics = torch.ops.fastflow.residual_network.default(
        x, context, parameters, running, blocks, activation, batch_norm, eps, keep, wanted
    )
    return y, statistics
