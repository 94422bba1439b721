"""Every flow by its own rule of reversible backprop, and by the general one."""

import pytest

from fastflow.nn import ActNorm
from tests.support.cases import CUDA
from tests.support.flows import FLOWS, batch, trained
from tests.support.gradients import assert_as_stored

pytestmark = pytest.mark.usefixtures("each_backend")
each_rule = pytest.mark.parametrize("rule", ["its own rule", "the general rule"])
SIX = ("ActNorm", "LU", "soft_clamp", "additive", "squeeze channel", "GlowStep, lu")


def assert_by_rule(make, shape, rule):
    flow = trained(make)
    if rule == "the general rule":
        flow.register_forward_hook(lambda *_: None)  # which a rule of its own would pass by
    steps = [flow, trained(lambda: ActNorm(flow(batch(shape))[0].shape[1]))]
    for x in (batch(shape).requires_grad_(), batch(shape)):
        assert_as_stored(steps, x)


@pytest.mark.bodies("reference", CUDA)
@each_rule
@pytest.mark.parametrize("make, shape", FLOWS.values(), ids=FLOWS.keys())
def test_every_flow(make, shape, rule):
    assert_by_rule(make, shape, rule)


# a rule does not depend on the body of its ops: one flow of each kind of op is enough
@pytest.mark.bodies("interpreter")
@each_rule
@pytest.mark.parametrize("flow", SIX)
def test_six_flows_on_kernels(flow, rule):
    assert_by_rule(*FLOWS[f"{flow} of images"], rule)
