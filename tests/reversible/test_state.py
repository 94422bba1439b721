"""Each kind of state that a reversible chain restores, by itself, also when the block raises."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastflow.reversible import state


class Interrupt(Exception):
    pass


@contextmanager
def interrupted():
    with pytest.raises(Interrupt):
        yield


def test_training_modes():
    network = nn.Sequential(nn.Dropout(), nn.Linear(2, 2).eval())
    modules = list(network.modules())
    with interrupted(), state.training_modes(modules, [False, False, True]):
        assert [m.training for m in modules] == [False, False, True]
        raise Interrupt
    assert [m.training for m in modules] == [True, True, False]


def test_parameters_in_place():
    layer = nn.Linear(2, 2)
    original, other = layer.weight, nn.Parameter(torch.zeros(2, 2))
    layer._parameters["weight"] = other
    with interrupted(), state.parameters_in_place([(layer, "weight", original), (layer, "bias", layer.bias)]):
        assert layer.weight is original
        raise Interrupt
    assert layer.weight is other


def test_hooks_suspended():
    p, calls = torch.ones(2, requires_grad=True), []
    p.register_hook(calls.append)
    with interrupted(), state.hooks_suspended([p, torch.ones(2, requires_grad=True)]):
        torch.autograd.grad((2 * p).sum(), p)
        assert not calls
        raise Interrupt
    torch.autograd.grad((2 * p).sum(), p)
    assert len(calls) == 1


def test_same_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        settings = state.autocast_settings(torch.device("cpu"))
    assert settings == {"cpu": (True, torch.bfloat16)}
    a = torch.ones(2, 2)
    with interrupted(), state.same_autocast(settings):
        assert (a @ a).dtype == torch.bfloat16 and not torch.is_autocast_cache_enabled()
        raise Interrupt
    assert (a @ a).dtype == torch.float32 and torch.is_autocast_cache_enabled()
    off = state.autocast_settings(torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16), state.same_autocast(off):
        assert (a @ a).dtype == torch.float32


def test_no_parametrization_cache():
    with parametrize.cached():
        with interrupted(), state.no_parametrization_cache():
            assert not parametrize._cache_enabled
            raise Interrupt
        assert parametrize._cache_enabled


def test_rng_restored():
    before = torch.get_rng_state()
    with interrupted(), state.rng_restored(state.generators_of(torch.device("cpu"), [])):
        torch.rand(3)
        raise Interrupt
    assert torch.equal(torch.get_rng_state(), before)
    with state.rng_restored([]):
        torch.rand(3)
    assert not torch.equal(torch.get_rng_state(), before)


def test_buffers_restored():
    norm = nn.BatchNorm1d(2)
    mean = norm.running_mean
    with interrupted(), state.buffers_restored([(norm, "running_mean")]):
        norm._buffers["running_mean"] = torch.ones(2)
        raise Interrupt
    assert norm.running_mean is mean


def test_change_detector():
    a, b = torch.zeros(2), torch.zeros(2)
    detector = state.ChangeDetector([a, b])
    assert detector.changed() is None
    b.add_(1)
    assert detector.changed() is b
    detector = state.ChangeDetector([a, b])
    a.data = torch.ones(2)
    assert detector.changed() is a


def test_a_fused_optimizer_counts_as_a_change():
    p = nn.Parameter(torch.ones(2))
    detector, optimizer = state.ChangeDetector([p]), torch.optim.Adam([p], fused=True)
    p.grad = torch.ones(2)
    optimizer.step()
    assert detector.changed() is p


def test_replay_restores_what_a_step_changed():
    norm, generators = nn.BatchNorm1d(2), state.generators_of(torch.device("cpu"), [])
    before, buffers = [get() for get, _ in generators], state.copied_buffers([norm], by_rule=False)
    norm(torch.randn(5, 2))
    torch.rand(3)
    replay = state.Replay(before, [get() for get, _ in generators], buffers)
    assert {name for _, name, *_ in replay.buffers} == {"running_mean", "running_var", "num_batches_tracked"}
    replay.restore(generators)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert not norm.running_mean.any() and norm.num_batches_tracked == 0


def test_replay_leaves_a_flag_set():
    """A step that has initialized itself does not do so again."""
    module = nn.Module()
    module.register_buffer("initialized", torch.tensor(False))
    buffers = state.copied_buffers([module], by_rule=False)
    module.initialized.fill_(True)
    state.Replay([], [], buffers).restore([])
    assert module.initialized
