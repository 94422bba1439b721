"""The training step over static buffers: bit for bit an ordinary step, and on a GPU the captured one bit for bit the uncaptured."""

import copy

import pytest
import torch

from fastflow.trainer.ranks import Ranks
from fastflow.trainer.step import Step
from tests.support.steps import CLIP, assert_same_bits, batch, model, ordinary, static

device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("options", [{}, {"classes": 3}, {"bf16": True}, {"reversible": False}], ids=str)
def test_an_ordinary_step_bit_for_bit(options, capture):
    """``capture`` on the CPU is all of a captured step, the capturable optimizer too, but for the capture."""
    how = {k: v for k, v in options.items() if k in ("classes", "bf16")}
    ours = model(**{k: v for k, v in options.items() if k != "bf16"})
    theirs = copy.deepcopy(ours)
    found, expected = static(ours, **how, capture=capture), ordinary(theirs, **how)
    assert_same_bits(found, expected)
    assert found[1].param_groups[0]["capturable"] == capture
    assert any(norm > CLIP for _, norm in expected[0])


@device
def test_the_buffers_stay_where_they_are(device):
    trained = model(device)
    step = Step(
        trained, torch.optim.Adam(trained.parameters(), fused=True), Ranks(), batch_size=6, capture=True
    )
    x, _ = batch(0, device)
    step(x, None, 1, 1e-3)

    def places():
        held = [step.x, step.seed, step.lr, step.votes, *trained.parameters()]
        return [
            t.data_ptr()
            for t in held + [v for state in step.optimizer.state.values() for v in state.values()]
        ]

    before = places()
    for i in range(3):
        step(*batch(i, device), i, 1e-3)
    assert places() == before


def test_labels_that_are_missing_are_named():
    trained = model(classes=3)
    step = Step(trained, torch.optim.Adam(trained.parameters(), fused=True), Ranks(), batch_size=6)
    with pytest.raises(ValueError, match=r"labels: got None, expected shape \[6\]"):
        step(batch(0)[0], None, 1, 1e-3)


@device
@pytest.mark.parametrize("capture", [False, True])
def test_an_update_that_is_not_finite_is_left_out(device, capture):
    trained = model(device)
    step = Step(
        trained, torch.optim.Adam(trained.parameters(), fused=True), Ranks(), batch_size=6, capture=capture
    )
    for i in range(6):
        bits, norm = step(*batch(i, device), i, 1e-3)[:2]
    assert 0 < norm < torch.inf
    with torch.no_grad():
        trained.flows[0].steps[0].coupling.net[0].conv.weight[0, 0, 0, 0] = torch.inf
    before = copy.deepcopy(trained.state_dict()), copy.deepcopy(step.optimizer.state_dict()["state"])
    bits, norm = step(*batch(7, device), 7, 1e-3)[:2]
    assert not (torch.tensor([bits, norm]).isfinite().all())
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    for i, state in step.optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[1][i][k]) for k, v in state.items())


def test_a_loss_that_is_not_finite_updates_and_clips_nothing():
    trained = model()
    step = Step(trained, torch.optim.Adam(trained.parameters(), fused=True), Ranks(), batch_size=6, clip=1e-3)
    trained.register_forward_hook(lambda *args: args[-1] + torch.inf)
    before = copy.deepcopy(trained.state_dict())
    bits, norm = step(*batch(0), 0, 1e-3)[:2]
    assert bits == torch.inf and 1e-3 < norm < torch.inf
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.nn.utils.get_total_norm([p.grad for p in trained.parameters()]).item() == norm


@pytest.mark.parametrize("micro_batches", [2, 4, 6])
def test_accumulated_parts_are_the_whole(micro_batches):
    whole = model().double()
    parted = copy.deepcopy(whole)
    expected, found = static(whole), static(parted, micro_batches=micro_batches)
    for a, b in zip(expected[0], found[0], strict=True):
        assert b == pytest.approx(a, rel=1e-12)
    torch.testing.assert_close(list(parted.parameters()), list(whole.parameters()), rtol=1e-11, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"classes": 3}, {"bf16": True}, {"micro_batches": 2}, {"reversible": False}], ids=str
)
def test_captured_is_uncaptured_bit_for_bit(options):
    how = {k: v for k, v in options.items() if k in ("classes", "bf16", "micro_batches")}
    ours = model("cuda", **{k: v for k, v in options.items() if k not in ("bf16", "micro_batches")})
    theirs = copy.deepcopy(ours)
    found, expected = static(ours, **how, capture=True), static(theirs, **how)
    assert_same_bits(found, expected)


@pytest.mark.gpu
def test_a_replayed_step_is_one_launch():
    trained = model("cuda")
    step = Step(
        trained, torch.optim.Adam(trained.parameters(), fused=True), Ranks(), batch_size=6, capture=True
    )
    for i in range(5):
        step(*batch(i, "cuda"), i, 1e-3)
    assert step.graph is not None
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profiled:
        step(*batch(6, "cuda"), 6, 1e-3)
    launches = [e.name for e in profiled.events() if "LaunchKernel" in e.name or "GraphLaunch" in e.name]
    assert launches.count("cudaGraphLaunch") == 1 and len(launches) < 12, launches
