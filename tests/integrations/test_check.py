"""``accelerate(model, check=...)`` compares the model before and after, and refuses a layer that is wrong."""

import importlib

import pytest
import torch
from torch import nn

from fastflow.integrations import nflows_layers
from fastflow.integrations.accelerate import Accelerated

transforms = pytest.importorskip("nflows.transforms")
nets = pytest.importorskip("nflows.nn.nets")
ff = importlib.import_module("fastflow.integrations.nflows")

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def chain(*more, **options):
    def net(inputs, outputs):
        return nets.ResidualNet(inputs, outputs, hidden_features=8, num_blocks=1, **options)

    return transforms.CompositeTransform(
        [transforms.AdditiveCouplingTransform([0, 1, 0, 1], net), transforms.LULinear(4), *more]
    )


def log_det(m):
    return m(X.to(next(m.parameters()).dtype))[1]


def outputs(m):
    return m(X.to(next(m.parameters()).dtype))[0]


def wrong(change):
    def forward(self, inputs, transform_params):
        return change(inputs + transform_params), transform_params.new_zeros(inputs.shape[0])

    return forward


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize(
    "dtype, error", [(torch.float64, 1e-6), (torch.float32, 0.01), (torch.bfloat16, 0.5)]
)
def test_a_wrong_layer_is_refused(dtype, error, reversible, monkeypatch):
    model = chain().to(dtype)
    assert ff.accelerate(model, check=outputs, reversible=reversible).replaced
    ff.revert(model)
    classes = [type(m) for m in model.modules()]
    planted = wrong(lambda y: y * (1 + error))
    monkeypatch.setattr(nflows_layers.AdditiveCoupling, "_coupling_transform_forward", planted)
    with pytest.raises(RuntimeError, match="check: the faster model is off by"):
        ff.accelerate(model, check=outputs, reversible=reversible)
    assert [type(m) for m in model.modules()] == classes
    assert ff.accelerate(model, check=log_det, reversible=reversible).replaced  # which is right


def test_values_that_are_not_finite_any_more_are_refused(monkeypatch):
    model = chain()
    monkeypatch.setattr(
        nflows_layers.AdditiveCoupling, "_coupling_transform_forward", wrong(lambda y: y * float("nan"))
    )
    with pytest.raises(RuntimeError, match="off by nan"):
        ff.accelerate(model, check=outputs)
    with pytest.raises(RuntimeError, match=r"check: got shape \[2, 4\] of the faster model"):
        ff.accelerate(
            model,
            check=lambda m: torch.zeros(2 if any(isinstance(p, Accelerated) for p in m.modules()) else 1, 4),
        )
    assert not any(isinstance(m, Accelerated) for m in model.modules())
    ff.accelerate(model, check=lambda m: outputs(m) / 0 * 0)  # nor were they before


def test_the_model_is_as_it_was():
    """Neither the state nor the generator changes, and dropout is the same before and after."""
    model = chain(transforms.ActNorm(4), dropout_probability=0.5).train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    report = ff.accelerate(model, check=outputs)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert report == ff.accelerate(model)  # and again, on a model that is faster


def test_an_error_of_the_check_leaves_the_model():
    model, calls = chain(), []

    def fails(m):
        calls.append(m)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return outputs(m)

    with pytest.raises(KeyboardInterrupt):
        ff.accelerate(model, check=fails)
    assert not any(isinstance(m, Accelerated) for m in model.modules())
    with pytest.raises(ValueError, match="check: got Tensor, expected a function of the model, or None"):
        ff.accelerate(model, check=X)
    with pytest.raises(ValueError, match="check: got a function that returns tuple, expected a tensor"):
        ff.accelerate(model, check=lambda m: m(X))


@pytest.mark.parametrize("library", ["zuko", "normflows", "freia", "glasflow"])
def test_every_library(library):
    pytest.importorskip({"freia": "FrEIA"}.get(library, library))
    faster = importlib.import_module(f"fastflow.integrations.{library}")
    seen = []
    faster.accelerate(nn.Linear(2, 2), check=lambda m: seen.append(type(m)) or X)
    assert seen == [nn.Linear] * 2
