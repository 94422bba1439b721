"""Number of kernels per flow step of Glow, counted as operators below autograd, each with its launches on a GPU."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow.models import Glow
from fastflow.ops import spec

NO_KERNEL = {
    *(
        "view",
        "reshape",
        "t",
        "transpose",
        "permute",
        "slice",
        "split",
        "chunk",
        "select",
        "unsqueeze",
        "expand",
    ),
    *("unbind", "detach", "alias", "empty_like", "new_empty", "new_empty_strided", "empty", "_reshape_alias"),
    "equal",  # finds parameters that changed, on the CPU only
}
# a sum over samples or blocks takes a second launch; cuDNN computes the two gradients of a convolution separately
LAUNCHES = {}
for case in spec.cases(spec.Make(torch.bfloat16), (2, 12, 4, 4)):
    LAUNCHES[case.op] = max(case.launches + len(case.operations), LAUNCHES.get(case.op, 1))
LAUNCHES |= {"convolution_backward": 2, "conv1x1_inverse_backward": 2, "conv1x1_backward": 2}


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in NO_KERNEL:
            self.launches[name] += LAUNCHES.get(name, 1)
        return func(*args, **(kwargs or {}))


def kernels(run, steps: int, network: str = "auto") -> Counter:
    """Launches of ``run(model, images)`` with bfloat16 networks in the trainer's memory format."""
    torch.manual_seed(0)
    model = Glow((3, 8, 8), levels=2, steps=steps, hidden=8, network=network).to(
        memory_format=torch.channels_last
    )
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    model.initialize(images, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        run(model, images)  # no more ActNorm to initialize
        model.zero_grad()
        with Kernels() as found:
            run(model, images)
    return found.launches


def train(model, images):
    model(images, seed=0).mean().backward()


def sample(model, images):
    model.sample(2)


@pytest.mark.parametrize(
    "run, network, allowed",
    [(train, "plain", 35), (train, "fused", 24), (sample, "plain", 10), (sample, "fused", 6)],
)
def test_kernels_per_flow_step(run, network, allowed):
    """Reversible backprop included; the difference between 6 and 2 steps in each of two levels."""
    few, many = kernels(run, 2, network), kernels(run, 6, network)
    per_step = {name: (many[name] - few[name]) / 8 for name in many if many[name] != few[name]}
    assert all(count == int(count) for count in per_step.values()), per_step
    assert per_step["affine_coupling"] == per_step["conv1x1"] == 1
    evaluations = {train: 2, sample: 1}[run] if network == "fused" else 0
    assert per_step.get("glow_network", 0) == evaluations * LAUNCHES["glow_network"]
    assert sum(per_step.values()) <= allowed, per_step


@pytest.mark.parametrize("network", ["plain", "fused"])
def test_the_weights_of_a_level_are_prepared_at_once(network):
    """The number of kernels that a level adds does not depend on its weights: nothing but the steps repeats."""
    few, many = kernels(train, 2, network), kernels(train, 6, network)
    for name in ("exp", "mul", "stack", "_foreach_copy_", "lu_weight"):
        assert few[name] == many[name] > 0, (name, few, many)
    if network == "fused":
        for name in ("exp_", "mul_", "cat", "sum"):
            assert few[name] == many[name] > 0, (name, few, many)
