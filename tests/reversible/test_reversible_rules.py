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


# A rule does not depend on the body of its ops: one flow of each kind of op is enough. The general rule calls the
# forward and inverse kernels of any flow; those of a step include ActNorm's, LU's and the coupling's.
@pytest.mark.bodies("interpreter")
@pytest.mark.parametrize(
    "flow, rule",
    [(flow, "its own rule") for flow in SIX] + [(flow, "the general rule") for flow in SIX[3:]],
)
def test_six_flows_on_kernels(flow, rule):
    assert_by_rule(*FLOWS[f"{flow} of images"], rule)
