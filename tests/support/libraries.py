"""Models of other libraries before and after they are accelerated."""

import copy
import pickle
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.models.drop_in import kept_bytes
from fastflow.integrations.accelerate import Chain
from tests.support.cases import randomize

Call = Callable[[nn.Module, Tensor, Tensor | None], tuple[Tensor, ...]]


def assert_same(
    ff: ModuleType,
    model: nn.Module,
    calls: dict[str, Call],
    x: Tensor,
    context: Tensor | None = None,
    float32_only: tuple[str, ...] = (),
    pickles: bool = True,
):
    """Results and gradients of ``calls`` are those of the model before, in float64 and, to rounding, in float32.

    Where the model's own error in float32 is larger than rounding, errors may be twice as large.
    State dicts and parameters are the same, and copies and pickles compute the same. Returns the report. ``pickles``:
    whether the library's own model can be pickled.
    """
    before = copy.deepcopy(model)
    parameters, state = dict(model.named_parameters()), {k: v.clone() for k, v in model.state_dict().items()}
    report = ff.accelerate(model)
    assert report.replaced
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    exact = {}
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        copies = [before, model, *([pickle.loads(pickle.dumps(model))] if pickles else [])]
        converted = [copy.deepcopy(m).to(dtype) for m in copies]
        for name, call in calls.items():
            if dtype is torch.float64 and name in float32_only:
                continue
            wanted, *found = (_computed(m, call, x.to(dtype), context) for m in converted)
            truth = exact.setdefault(name, wanted)
            for values in found:
                assert len(values) == len(wanted)
                for i, (a, b) in enumerate(zip(values, wanted, strict=True)):
                    error = (a - b).abs().max() if a.numel() else a.new_zeros(())
                    scale = 1 + (b.abs().max() if b.numel() else 0)
                    own = (b - truth[i]).abs().max() if b.numel() else 0
                    assert error <= max(tolerance * scale, 2 * own), (
                        f"{name}, {dtype}, result {i}: {error / scale:.1e}"
                    )
    assert ff.revert(model) == len(report.replaced)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in before.modules()]
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    return report


def assert_recomputes(ff: ModuleType, model: nn.Module, call: Call, x: Tensor, context: Tensor | None = None):
    """Results and gradients of ``call`` in float64 are those of the model before, with fewer bytes kept for backward.

    Returns the report of ``accelerate(model, reversible=True)``.
    """
    before = copy.deepcopy(model).double()
    report = ff.accelerate(model.double(), reversible=True)
    wanted, found = (_computed(m, call, x.double(), context) for m in (before, model))
    assert len(found) == len(wanted)
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        error = ((a - b).abs().max() / (1 + b.abs().max())).item()
        assert error <= 1e-8, f"result {i}: {error:.1e}"
    assert_close(model.state_dict(), before.state_dict())  # running statistics
    again = copy.deepcopy(model)
    ff.accelerate(again)
    assert not any(isinstance(m, Chain) for m in again.modules())
    given = x.double(), None if context is None else context.double()
    kept = [kept_bytes(lambda m=m: call(m, *given), m, given) for m in (again, model)]
    assert kept[1] < kept[0] / 2, kept
    assert ff.revert(model) == len(report.replaced)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    return report


def _computed(model: nn.Module, call: Call, x: Tensor, context: Tensor | None) -> list[Tensor]:
    """Results of a call, then the gradients of a sum of them by x, the context, and the parameters."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    context = None if context is None else context.to(x.dtype).requires_grad_()
    results = call(model, x, context)
    weights = [torch.linspace(-1, 1, max(r.numel(), 1)).to(r)[: r.numel()].view(r.shape) for r in results]
    total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
    leaves = [v for v in (x, context, *model.parameters()) if v is not None and v.requires_grad]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else []
    return [*(r.detach() for r in results), *(g for g in gradients if g is not None)]


def assert_trains_the_same(
    ff: ModuleType, model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 50
):
    """Training steps with an optimizer made before the model is accelerated coincide with those of the model."""
    models = [model.double(), copy.deepcopy(model).double()]
    optimizers = [torch.optim.Adam(m.parameters(), 1e-3) for m in models]
    ff.accelerate(models[1])
    losses = [[], []]
    for _ in range(steps):
        for m, optimizer, values in zip(models, optimizers, losses, strict=True):
            optimizer.zero_grad()
            value = loss(m)
            value.backward()
            optimizer.step()
            values.append(value.item())
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        dict(models[1].state_dict()), dict(models[0].state_dict()), rtol=1e-6, atol=1e-8
    )


def randomized(model: nn.Module) -> nn.Module:
    return randomize(model, std=0.2)


def passes(model: nn.Module, call: Callable[[], object]) -> int:
    """How often ``call`` calls the MADE in ``model``, which has no hooks: these would change what is called."""
    net = next(m for m in model.modules() if type(m).__name__ == "MADE")
    kind, count = type(net), 0

    class Counting(kind):
        def forward(self, *args: object) -> Tensor:
            nonlocal count
            count += 1
            return kind.forward(self, *args)

    Counting.__name__, Counting.__module__ = kind.__name__, kind.__module__
    net.__class__ = Counting
    try:
        call()
    finally:
        net.__class__ = kind
    return count
