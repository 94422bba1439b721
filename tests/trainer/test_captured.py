"""Functions and steps replayed from CUDA graphs; on the CPU, the replay of a graph runs the recorded work again."""

import contextlib
import copy
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastflow.models import Glow
from fastflow.trainer import run as run_module
from fastflow.trainer import step as step_module
from fastflow.trainer.captured import Captured, CaptureError, capture, record_on
from fastflow.trainer.cli import main
from fastflow.trainer.evaluate import captured_log_prob, captured_sample, evaluate, sample
from fastflow.trainer.progress import read_metrics
from fastflow.trainer.ranks import Ranks
from fastflow.trainer.step import WARM_UP, Step
from tests.support.cases import randomize
from tests.support.steps import CLIP, assert_same_bits, batch, model, ordinary, static

device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def record(work, generators):
    """A graph whose replay runs the work, on whatever its inputs then hold."""
    return SimpleNamespace(replay=work)


def refuse(work, generators):
    raise CaptureError("no capture here")


def recording(device):
    return record_on(torch.device(device)) or record


class Doubled:
    """``2 x + weight``, which notes the address of x in each call."""

    def __init__(self):
        self.module, self.seen = torch.nn.Linear(1, 4), []

    def __call__(self, x, factor=2):
        self.seen.append(x.data_ptr())
        return factor * x + self.module.bias


def test_the_third_call_replays_the_second_on_static_inputs():
    function = Doubled()
    captured = Captured(function, function.module, record)
    inputs = [torch.full((3, 4), float(i)) for i in range(4)]
    found = [captured(x) for x in inputs]
    assert function.seen[0] == inputs[0].data_ptr()
    assert len(set(function.seen[1:])) == 1 and function.seen[1] not in [x.data_ptr() for x in inputs]
    for x, y in zip(inputs, found, strict=True):  # a later replay does not change an earlier result
        torch.testing.assert_close(y, 2 * x + function.module.bias, rtol=0, atol=0)
    assert not any(y.requires_grad for y in found)


def test_a_later_replay_does_not_change_an_earlier_result():
    """A graph writes all its results to the same memory, as this function does."""
    memory = torch.empty(4)
    captured = Captured(lambda x: memory.copy_(2 * x), torch.nn.Identity(), record)
    replayed = [captured(torch.full((4,), float(i))) for i in range(4)][1:]
    assert [y[0].item() for y in replayed] == [2, 4, 6]


def test_each_signature_has_a_graph():
    function, recorded = Doubled(), []
    captured = Captured(function, function.module, lambda work, _: recorded.append(1) or record(work, ()))
    inputs = torch.ones(3, 4), torch.ones(2, 4), torch.ones(4, 4).T, torch.ones(3, 4).double()
    for x in inputs * 2:
        assert torch.equal(captured(x), function(x))
    assert torch.equal(captured(inputs[0], 3), 3 + function.module.bias.expand(3, 4))
    assert len(recorded) == 4
    function.module.eval()
    captured(inputs[0])
    with torch.autocast("cpu", torch.bfloat16):
        captured(inputs[0])
    assert len(recorded) == 4  # each of them is a first call


def test_weights_are_read_at_their_addresses():
    function, recorded = Doubled(), []
    captured = Captured(function, function.module, lambda work, _: recorded.append(1) or record(work, ()))
    x = torch.ones(3, 4)
    for _ in range(3):
        captured(x)
        with torch.no_grad():
            function.module.bias.add_(1)  # as an optimizer does
    assert torch.equal(captured(x), 2 + function.module.bias.expand(3, 4)) and len(recorded) == 1
    function.module.bias = torch.nn.Parameter(torch.zeros(4))
    for _ in range(2):
        assert torch.equal(captured(x), 2 * x)
    assert len(recorded) == 2


def test_what_cannot_be_captured_runs_and_says_so_once(capsys):
    function = Doubled()
    x, reasons = torch.ones(3, 4), []
    captured = Captured(function, function.module, refuse, reasons.append)
    assert all(torch.equal(captured(x), function(x)) for _ in range(4)) and reasons == ["no capture here"]
    captured = Captured(function, function.module, refuse)
    assert all(torch.equal(captured(x), function(x)) for _ in range(3))
    assert capsys.readouterr().err == "not captured in a CUDA graph: no capture here\n"
    function.__name__ = "doubled"
    captured = Captured(function, function.module, refuse, None)
    captured(x)
    with pytest.raises(CaptureError, match="cuda_graph: doubled cannot be captured: no capture here"):
        captured(x)


def test_nothing_is_recorded_on_the_cpu():
    assert record_on(torch.device("cpu")) is None and record_on(torch.device("cuda"), enabled=False) is None
    assert captured_sample(Glow((3, 8, 8), levels=1, steps=1, hidden=4)).record is None


@device
def test_evaluation_is_the_same_in_every_batch(device):
    """Batches differ in their images, labels and noise, the last one in its size; the weights change in between."""
    trained, (x, labels) = model(device, classes=3), batch(1, classes=3, n=7)
    captured = captured_log_prob(trained, record=recording(device), uncaptured=None)
    for _ in range(2):
        options = {"samples": 2, "batch_size": 2, "seed": 3, "each": True}
        found = evaluate(trained, x, labels, log_prob=captured, **options)
        plain = captured_log_prob(trained, record=None)
        assert torch.equal(found, evaluate(trained, x, labels, log_prob=plain, **options))
        randomize(trained, std=0.05)
    assert len(captured._recordings) == 2 and all(captured._recordings.values())


@device
def test_samples_are_functions_of_the_seed(device):
    trained = model(device)
    drawn, plain = (
        captured_sample(trained, record=recording(device), uncaptured=None),
        captured_sample(trained, record=None),
    )
    images = [sample(trained, 3, seed=seed, draw=drawn) for seed in (1, 1, 1, 2, 1)]
    assert torch.equal(images[0], sample(trained, 3, seed=1, draw=plain))
    assert all(torch.equal(images[0], images[i]) for i in (1, 2, 4)) and not torch.equal(images[0], images[3])
    assert torch.equal(images[3], sample(trained, 3, seed=2, draw=plain)) and all(drawn._recordings.values())


def assert_ordinary_steps(record, monkeypatch):
    """Steps that ``record`` is to record are, bit for bit, ordinary ones."""
    monkeypatch.setattr(step_module, "record_on", lambda *_: record)
    trained = model()
    expected = ordinary(copy.deepcopy(trained))
    assert_same_bits(static(trained, capture=True), expected)


def test_replayed_steps_are_ordinary_ones(monkeypatch):
    replayed = []

    def counted(work, generators):
        return SimpleNamespace(replay=lambda: replayed.append(1) or work())

    assert_ordinary_steps(counted, monkeypatch)
    assert len(replayed) == 6 - WARM_UP


def test_a_capture_that_fails_leaves_nothing_behind(monkeypatch):
    """Gradients and the report of a capture hold no values, here NaN; then the steps go on as if it had not been."""
    reasons, steps = [], []

    class Watched(Step):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, uncaptured=reasons.append)
            steps.append(self)

    def half(work, generators):
        for p in steps[0].parameters:
            p.grad = torch.full_like(p, torch.nan)
        steps[0].report = torch.full((4,), torch.nan)
        steps[0].optimizer.found_inf = torch.ones(())
        raise CaptureError("cannot record this")

    monkeypatch.setattr("tests.support.steps.Step", Watched)
    assert_ordinary_steps(half, monkeypatch)
    assert reasons == ["cannot record this"] and steps[0].graph is None


def test_a_capture_that_was_asked_for_must_not_fail(monkeypatch):
    with pytest.raises(CaptureError, match="cuda_graph: the step cannot be captured: no capture here"):
        assert_ordinary_steps(refuse, monkeypatch)


def test_a_run_goes_on_uncaptured_with_one_line(tmp_path, monkeypatch):
    """Replayed, refused and ordinary runs have the same numbers."""
    np.savez(tmp_path / "images.npz", x=np.random.default_rng(0).integers(0, 60, (20, 8, 8, 3), np.uint8))
    argv = "--levels 1 --steps-per-level 1 --hidden 4 --batch-size 6 --samples 1 --final-samples 2 --reversible no"
    argv = [
        "train",
        "--data",
        str(tmp_path / "images.npz"),
        *argv.split(),
        "--steps",
        "6",
        "--eval-every",
        "1",
    ]
    said = {}
    for name, recorder in (("ordinary", None), ("replayed", record), ("refused", refuse)):
        for module in (step_module, run_module):
            monkeypatch.setattr(module, "record_on", lambda *_, r=recorder, **__: r)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main([*argv, "--out", str(tmp_path / name)]) == 0
        said[name] = [line for line in printed.getvalue().splitlines() if "CUDA graph" in line]
    assert said == {"ordinary": [], "replayed": [], "refused": ["CUDA graph: not captured, no capture here"]}
    metrics = [read_metrics(tmp_path / name / "metrics.csv") for name in said]
    assert metrics[0] == metrics[1] == metrics[2]
    pictures = [(tmp_path / name / "samples.png").read_bytes() for name in said]
    assert pictures[0] == pictures[1] == pictures[2]


@pytest.mark.gpu
def test_a_failed_capture_leaves_the_generator_and_the_stream():
    trained = model("cuda")
    where, before = next(trained.parameters()).device, torch.cuda.current_stream()
    drawn = torch.Generator(where)
    torch.cuda.manual_seed(3)
    expected = torch.rand(4, device=where)
    torch.cuda.manual_seed(3)
    for work in (lambda: torch.rand(4, device=where).sum().item(), lambda: 1 / 0):
        with pytest.raises(CaptureError):
            capture(work, where, torch.cuda.Stream(), [drawn])
        assert torch.cuda.current_stream() == before
    assert torch.equal(torch.rand(4, device=where), expected)
    assert evaluate(trained, batch(1)[0]).isfinite().all()


@pytest.mark.gpu
def test_a_step_that_synchronizes_goes_on_uncaptured():
    trained = model("cuda")
    plain = copy.deepcopy(trained)
    trained.register_forward_hook(lambda module, inputs, bits: bits + 0 * bits.sum().item())
    plain.register_forward_hook(lambda module, inputs, bits: bits + 0 * bits.sum().item())
    reasons, optimizer = (
        [],
        torch.optim.Adam(trained.parameters(), lr=0.0, fused=True, betas=(0.9, 0.95), eps=1e-6),
    )
    step = Step(trained, optimizer, Ranks(), batch_size=6, clip=CLIP, capture=True, uncaptured=reasons.append)
    found = [step(*batch(i, "cuda"), 100 + i, 1e-3 * (i + 1) / 3)[:2] for i in range(6)]
    assert len(reasons) == 1 and "captur" in reasons[0]
    assert_same_bits((found, optimizer), static(plain))
