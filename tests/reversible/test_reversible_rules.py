"""Every flow by its own rule of reversible backprop, and by the general one, on every body of its ops."""

import pytest

from fastflow.nn import ActNorm
from tests.support.cases import CUDA
from tests.support.flows import FLOWS, batch, trained
from tests.support.gradients import assert_as_stored

# not in the interpreter: a rule does not depend on the body of its ops, and every body equals the reference
pytestmark = [pytest.mark.usefixtures("each_backend"), pytest.mark.bodies("reference", CUDA)]


@pytest.mark.parametrize("rule", ["its own rule", "the general rule"])
@pytest.mark.parametrize("make, shape", FLOWS.values(), ids=FLOWS.keys())
def test_every_flow(make, shape, rule):
    flow = trained(make)
    if rule == "the general rule":
        flow.register_forward_hook(lambda *_: None)  # which a rule of its own would pass by
    steps = [flow, trained(lambda: ActNorm(flow(batch(shape))[0].shape[1]))]
    for x in (batch(shape).requires_grad_(), batch(shape)):
        assert_as_stored(steps, x)
