"""Batch normalization: its statistics by hand, its gradient against plain PyTorch, stored and reversible, and what takes it back."""

import pytest
import torch

from fastflow.nn import AffineCoupling, BatchNorm, Sequential
from fastflow.reversible import run_reversible, run_storing
from tests.support.cases import jacobian_log_det
from tests.support.flows import IMAGE, VECTOR, batch, mlp
from tests.support.gradients import outputs_and_gradients

F64 = torch.float64
every_shape = pytest.mark.parametrize("shape", [VECTOR, IMAGE, (4, 3)], ids=str)


def batches(shape, n=5, count=4):
    """Whose mean and variance differ from batch to batch."""
    c = torch.arange(4, dtype=F64).view(-1, *[1] * (len(shape) - 1))
    return [(1 + 0.3 * i + c) * batch(shape, n) + 2 * c - i for i in range(count)]


class ByHand:
    """Moving statistics as sums over all batches, (1 - r) sum r^(t - i) m_i / (1 - r^t), of which the last m alone is differentiated."""

    def __init__(self, momentum, eps=1e-5):
        self.momentum, self.eps, self.means, self.vars = momentum, eps, [], []

    def average(self, past):
        weights = [self.momentum ** (len(past) - 1 - i) for i in range(len(past))]
        return sum(
            w * (v if i == len(past) - 1 else v.detach())
            for i, (w, v) in enumerate(zip(weights, past, strict=True))
        ) / sum(weights)

    def __call__(self, x):
        rows = x.transpose(0, 1).flatten(1)
        self.means.append(rows.mean(1))
        self.vars.append((rows - rows.mean(1, keepdim=True)).square().mean(1))
        mean, var = (self.average(v).view(-1, *[1] * (x.ndim - 2)) for v in (self.means, self.vars))
        positions = x[0, 0].numel()
        return (x - mean) / (var + self.eps).sqrt(), (-0.5 * positions * (var + self.eps).log().sum()).expand(
            len(x)
        )


@every_shape
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("run", [run_storing, run_reversible])
def test_values_statistics_and_gradients_over_batches(shape, momentum, run):
    layer, by_hand = BatchNorm(4, momentum).double(), ByHand(momentum)
    for x in batches(shape):
        x.requires_grad_()
        found = outputs_and_gradients(lambda x=x: run([layer], x), [x])
        expected = outputs_and_gradients(lambda x=x: by_hand(x), [x])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(
            layer.mean, by_hand.average(by_hand.means).detach(), rtol=1e-12, atol=1e-12
        )
        torch.testing.assert_close(layer.var, by_hand.average(by_hand.vars).detach(), rtol=1e-12, atol=0)
    assert layer.batches == 4


def test_the_first_batch_sets_the_statistics():
    layer, (x, *_) = BatchNorm(4).double(), batches(IMAGE)
    z, _ = layer(x)
    rows = z.transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(4, dtype=F64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.var(1, correction=0), layer.var / (layer.var + 1e-5), rtol=1e-12, atol=0)


@every_shape
def test_eval_mode(shape):
    layer = BatchNorm(4).double()
    for x in batches(shape):
        layer(x)
    before, x = {k: v.clone() for k, v in layer.eval().state_dict().items()}, batch(shape)
    z, log_det = layer(x)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    torch.testing.assert_close(log_det, jacobian_log_det(lambda v: layer(v)[0], x), rtol=1e-11, atol=0)
    torch.testing.assert_close(torch.cat([layer(v)[0] for v in x.split(1)]), z, rtol=0, atol=0)
    for n in (0, 1):
        assert layer(batch(shape, n))[0].shape == (n, *shape)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_inverse_takes_back_the_last_pass_in_training_mode(momentum):
    layer = BatchNorm(4, momentum).double()
    for x in batches(IMAGE):
        z, log_det = layer(x)
        for mode in (True, False):
            back, log_det_back = layer.train(mode).inverse(z)
            torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(log_det_back, -log_det, rtol=1e-13, atol=0)
        layer.train()
    assert layer.batches == 4


def chain(momentum=0.9):
    couplings = [AffineCoupling(mlp(2, 4), swap_halves=flip) for flip in (False, True)]
    return Sequential(
        BatchNorm(4, momentum), couplings[0], BatchNorm(4, momentum), couplings[1], BatchNorm(4, momentum)
    ).double()


@pytest.mark.parametrize("activation_checkpoint_every", [None, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_reversible_chain(momentum, activation_checkpoint_every):
    on, off = chain(momentum), chain(momentum)
    off.load_state_dict(on.state_dict())
    off.reversible, on.activation_checkpoint_every = False, activation_checkpoint_every
    for x in batches(VECTOR, 6):
        x.requires_grad_()
        found, expected = (
            outputs_and_gradients(lambda f=f, x=x: f(x), [x, *f.parameters()]) for f in (on, off)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    found = off.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in on.state_dict().items())


def hooked(layers):
    layers[2].register_forward_hook(lambda *_: None)
    return layers


def nested(layers):
    return [layers[0], Sequential(*layers[1:4], activation_checkpoint_every=2), layers[4]]


def nested_and_stored(layers):
    return [layers[0], Sequential(*layers[1:4], reversible=False), layers[4]]


@pytest.mark.parametrize("arranged", [hooked, nested, nested_and_stored])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_reversible_chain_where_the_general_rule_holds(arranged, momentum):
    """It inverts with the statistics after the forward pass, and runs again from those before; they have moved once in the end."""
    results = []
    for run in (run_storing, run_reversible):
        torch.manual_seed(1)
        flow = chain(momentum)
        steps, found = arranged(list(flow)), []
        for x in batches(VECTOR, 6):
            x.requires_grad_()
            found.append(
                outputs_and_gradients(
                    lambda x=x, steps=steps, run=run: run(steps, x), [x, *flow.parameters()]
                )
            )
        results.append((found, flow.state_dict()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-10)


def test_two_passes_before_backward():
    flow, (x, other, *_) = chain(), batches(VECTOR)
    z, _ = flow(x)
    flow(other)
    with pytest.raises(
        RuntimeError,
        match=r"steps\[0\].mean of a reversible chain changed between forward and backward.*reversible=False",
    ):
        z.sum().backward()
    flow.reversible = False
    z, _ = flow(x)
    flow(other)
    z.sum().backward()


def test_two_passes_before_backward_in_eval_mode():
    flow, (x, other, *_) = chain(), batches(VECTOR)
    flow(x)
    z, _ = flow.eval()(x)
    flow(other)
    z.sum().backward()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("kept", ["in float32", "as x"])
def test_dtypes(dtype, tolerance, kept):
    exact, layer = BatchNorm(4).double(), BatchNorm(4)
    layer = layer.to(dtype) if kept == "as x" else layer
    for x in batches(IMAGE, 16, 2):
        x = x.to(dtype)
        z, log_det = layer(x)
        wanted, wanted_log_det = exact(x.double())
        assert z.dtype == dtype and log_det.dtype == torch.float32
        torch.testing.assert_close(z.double(), wanted, rtol=tolerance, atol=4 * tolerance)
        torch.testing.assert_close(log_det.double(), wanted_log_det, rtol=4 * tolerance, atol=4 * tolerance)


def test_a_constant_channel_and_a_single_sample_stay_finite():
    layer, x = BatchNorm(4), torch.randn(1, 4)
    z, log_det = layer(x.requires_grad_())
    (z.square().sum() + log_det.sum()).backward()
    assert torch.equal(z, torch.zeros(1, 4)) and x.grad.isfinite().all() and log_det.isfinite().all()


def test_check():
    BatchNorm(4).check(batches(IMAGE)[0])
    BatchNorm(4).eval().check(batch(IMAGE))


def test_statistics_are_kept():
    layer, other = BatchNorm(4), BatchNorm(4)
    for x in batches(VECTOR):
        layer(x.float())
    other.load_state_dict(layer.state_dict())
    x = batch(VECTOR).float()
    assert torch.equal(other(x)[0], layer(x)[0]) and other.batches == layer.batches == 5


@pytest.mark.parametrize(
    "call, message",
    [
        *(
            (lambda m=m: BatchNorm(4, momentum=m), f"momentum: got {m}, expected a number from 0 to below 1")
            for m in (-0.1, 1, 1.5)
        ),
        (lambda: BatchNorm(4)(torch.randn(2, 3)), r"x: got shape \[2, 3\], expected \[N, 4, ...\]"),
        (lambda: BatchNorm(4).inverse(torch.randn(2, 3)), r"x: got shape \[2, 3\], expected \[N, 4, ...\]"),
        (
            lambda: BatchNorm(4)(torch.zeros(2, 4).long()),
            "x: got dtype torch.int64, expected a floating point tensor",
        ),
        (
            lambda: BatchNorm(4)(torch.zeros(2, 4).double()),
            "mean: got dtype torch.float32, expected torch.float64",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


def test_an_error_leaves_the_statistics():
    layer = BatchNorm(4)
    for x in (torch.zeros(2, 4).long(), torch.zeros(2, 4).double()):
        with pytest.raises(ValueError):
            layer(x)
    assert layer.batches == 0 and torch.equal(layer.mean, torch.zeros(4))
