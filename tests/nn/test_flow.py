"""The contract of a flow: Flow.check finds a layer that breaks it, and Sequential keeps it."""

import math

import pytest
import torch
from torch import nn

from fastflow.nn import (
    ActNorm,
    AffineCoupling,
    Dequantize,
    Flow,
    GlowStep,
    InvertibleConv1x1,
    LogitDequantize,
    Permute,
    Sequential,
    Split,
)
from fastflow.reversible import vjp
from tests.support.cases import randomize


class Scale(Flow):
    """z = exp(s) x with a scale for each feature: right."""

    def __init__(self, features=3):
        super().__init__()
        self.s = nn.Parameter(0.3 * torch.randn(features))

    def forward(self, x, context=None):
        return x * self.s.exp(), self.s.sum().expand(x.shape[0])

    def inverse(self, z, context=None):
        return z * (-self.s).exp(), -self.s.sum().expand(z.shape[0])


class LogDetSign(Scale):
    """Both directions have the sign wrong, so that only the Jacobian tells."""

    def forward(self, x, context=None):
        z, log_det = super().forward(x)
        return z, -log_det

    def inverse(self, z, context=None):
        x, log_det = super().inverse(z)
        return x, -log_det


class InverseLogDet(Scale):
    def inverse(self, z, context=None):
        x, log_det = super().inverse(z)
        return x, -log_det


class Inverse(Scale):
    def inverse(self, z, context=None):
        x, log_det = super().inverse(z)
        return x + 1e-4, log_det


class Gradient(Scale):
    """The numbers are right, but a detach keeps the log-det's gradient from the parameter."""

    def forward(self, x, context=None):
        z, log_det = super().forward(x)
        return z, log_det.detach()


class ScalarLogDet(Scale):
    def forward(self, x, context=None):
        return super().forward(x)[0], self.s.sum()


class NotANumber(Scale):
    def inverse(self, z, context=None):
        x, log_det = super().inverse(z)
        return x * torch.nan, log_det


def test_a_right_layer_passes_and_stays_as_it_was():
    flow = Scale()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    report = flow.check(torch.randn(4, 3))
    assert max(report.inverse_error, report.log_det_sum, report.log_det_error) < 1e-12
    assert set(report.gradient_errors) == {"x", "s"} and max(report.gradient_errors.values()) < 1e-7
    assert report.failures() == []
    assert flow.training and flow.s.dtype == torch.float32 and flow.s.grad is None
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


@pytest.mark.parametrize(
    "layer, said",
    [
        (LogDetSign, "is inaccurate: log_det\n"),
        (InverseLogDet, "is inaccurate: log_det of the inverse\n"),
        (Inverse, "is inaccurate: inverse\n"),
        (NotANumber, "is inaccurate: inverse\n"),
        (Gradient, "is inaccurate: gradient of s\n"),
        (ScalarLogDet, r"log_det: got shape \[\], expected \[4\]"),
    ],
)
def test_a_wrong_layer_is_caught(layer, said):
    with pytest.raises(ValueError, match=said):
        layer().check(torch.randn(4, 3))


def test_report_prints_a_table():
    lines = str(Scale().check(torch.randn(4, 3))).splitlines()
    assert len(lines) == 5 and all(line.endswith("ok") for line in lines)
    assert (
        len({line.index("e-") if "e-" in line else line.index("e+") for line in lines}) == 1
    )  # columns line up
    with pytest.raises(ValueError) as error:
        LogDetSign().check(torch.randn(4, 3))
    wrong = [line for line in str(error.value).splitlines() if "WRONG" in line]
    assert len(wrong) == 1 and wrong[0].startswith("log_det - log|det Jacobian|") and "over 1e-08" in wrong[0]


def test_tolerances_are_arguments():
    Inverse().check(torch.randn(4, 3), tolerance=1e-3)
    with pytest.raises(ValueError, match="inverse"):
        Inverse().check(torch.randn(4, 3), tolerance=1e-5)


@pytest.mark.parametrize(
    "context", [torch.randn(4, 2), torch.randn(4, 2).double()], ids=["float32", "float64"]
)
def test_check_with_context(context):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x, context):
            return self.linear(torch.cat([x, context], dim=1))

    report = AffineCoupling(Net()).check(torch.randn(4, 4), context)
    assert {"net.linear.weight", "net.linear.bias", "log_factor"} <= set(report.gradient_errors)


def test_check_initialises_its_copy_alone():
    flow = Sequential(ActNorm(3), ActNorm(3))
    flow.check(3 + torch.randn(16, 3))
    assert not any(layer.initialized for layer in flow)


@pytest.mark.parametrize(
    "flow",
    [Dequantize(), Dequantize(5), LogitDequantize(), LogitDequantize(alpha=1e-5, preset="tutorial")],
    ids=repr,
)
def test_check_of_images(flow):
    x = torch.randint(0, 2**flow.n_bits, (4, 3, 4, 4), dtype=torch.uint8)
    x[0] = 2**flow.n_bits - 1
    report = flow.check(x)
    assert report.inverse_error == 0 and report.log_det_error is None and "n/a" in str(report)


def test_check_of_an_empty_batch():
    for layer in (Scale(), ActNorm(3)):
        assert layer.check(torch.randn(0, 3)).inverse_error == 0


class Walk(Scale):
    """A rule of its own for reversible backprop."""

    x_off, dx_off, ds_off = 0.0, 0.0, 0.0

    def inverse_backward(self, z, dz, dlog_det, wanted, context=None):
        x, _ = self.inverse(z)
        with torch.enable_grad():
            again = x.detach().requires_grad_()
            found = vjp(self(again), (dz, dlog_det), [again, *wanted])
        dx = found.pop(again)
        return x + self.x_off, dx + self.dx_off, {v: g + self.ds_off for v, g in found.items()}


@pytest.mark.parametrize(
    "off, said",
    [("x_off", "gradient of x by"), ("dx_off", "gradient of x by"), ("ds_off", "gradient of s by")],
)
def test_a_wrong_rule_is_caught(off, said):
    layer = Walk()
    assert {"x by inverse_backward", "s by inverse_backward"} <= set(
        layer.check(torch.randn(4, 3)).gradient_errors
    )
    setattr(layer, off, 0.01)
    with pytest.raises(ValueError, match=f"{said} inverse_backward\n"):
        layer.check(torch.randn(4, 3))


def test_check_of_a_step_whose_part_has_no_rule():
    class Doubled(AffineCoupling):
        def forward(self, x, context=None):
            z, log_det = super().forward(2 * x, context)
            return z, log_det + x[0].numel() * math.log(2)

        def inverse(self, z, context=None):
            x, log_det = super().inverse(z, context)
            return x / 2, log_det - z[0].numel() * math.log(2)

    step = GlowStep(4, 3)
    step.coupling = Doubled(nn.Conv2d(2, 4, 1))
    assert not any(
        "by inverse_backward" in name for name in step.check(torch.randn(2, 4, 2, 2)).gradient_errors
    )


def test_sequential_is_the_chain():
    flows = [ActNorm(4), InvertibleConv1x1(4), Permute(4), AffineCoupling(nn.Linear(2, 4))]
    flow = randomize(Sequential(*flows)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    z, log_det = x, 0
    for layer in flows:
        z, step = layer(z)
        log_det = log_det + step
    torch.testing.assert_close(flow(x), (z, log_det), rtol=1e-13, atol=1e-13)
    assert len(flow) == 4 and flow[1] is flows[1] and list(flow) == flows
    empty, log_det = Sequential()(x)
    assert empty is x and torch.equal(log_det, torch.zeros(5, dtype=torch.float64))


def test_sequential_hands_the_context_on():
    class Shift(Flow):
        def forward(self, x, context=None):
            return x + context, x.new_zeros(x.shape[0])

        def inverse(self, z, context=None):
            return z - context, z.new_zeros(z.shape[0])

    flow, x, context = Sequential(Shift(), ActNorm(3).eval(), Shift()), torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(flow(x, context)[0], x + 2 * context)
    torch.testing.assert_close(flow.inverse(x, context)[0], x - 2 * context)


@pytest.mark.parametrize("module", [nn.Linear(2, 2), Split(4)])
def test_sequential_takes_flows_alone(module):
    with pytest.raises(TypeError, match=r"flows\[1\]: got (Linear|Split), expected a Flow"):
        Sequential(ActNorm(4), module)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_a_direction_that_is_not_written_says_so(direction):
    class Unfinished(Flow):
        pass

    with pytest.raises(NotImplementedError, match=f"Unfinished has no {direction}"):
        getattr(Unfinished(), direction)(torch.randn(2, 3))


def test_hooks_of_a_nested_sequential_run():
    inner, calls = Sequential(ActNorm(3)), []
    inner.register_forward_hook(lambda *_: calls.append("forward"))
    Sequential(inner)(torch.randn(2, 3, requires_grad=True))
    assert calls == ["forward"]
