"""The layers of the tutorial and of the exercise inside chains of flows, and flows inside theirs and inside networks."""

import re

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from fastflow import nn as fnn
from fastflow.models import FlowModel
from tests.support.cases import randomize

F64 = torch.float64


class TutorialCoupling(nn.Module):
    """A masked coupling that adds its log-det in place, and may take the image as a further input."""

    def __init__(self, mask, context=False):
        super().__init__()
        self.net = nn.Conv2d(4 if context else 2, 4, 3, padding=1)
        self.factor = nn.Parameter(torch.zeros(2))
        self.register_buffer("mask", mask)

    def forward(self, z, ldj, reverse=False, orig_img=None):
        z_in = z * self.mask
        out = self.net(z_in if orig_img is None else torch.cat([z_in, orig_img], dim=1))
        s, t = out.chunk(2, dim=1)
        factor = self.factor.exp().view(1, -1, 1, 1)
        s, t = torch.tanh(s / factor) * factor * (1 - self.mask), t * (1 - self.mask)
        if not reverse:
            z = (z + t) * torch.exp(s)
            ldj += s.sum(dim=[1, 2, 3])
        else:
            z = z * torch.exp(-s) - t
            ldj -= s.sum(dim=[1, 2, 3])
        return z, ldj


class ExerciseAffine(nn.Module):
    """x = z e^s + t, with a log-det that is one number for all samples."""

    def __init__(self, features):
        super().__init__()
        self.s, self.t = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))

    def decoder(self, z):
        return z * torch.exp(self.s) + self.t, self.s.sum()

    def encoder(self, x):
        return (x - self.t) * torch.exp(-self.s), -self.s.sum()


def trained(module):
    return randomize(module, std=0.2).double().eval()


def test_a_masked_coupling_of_the_tutorial_is_ours():
    odd = ((torch.arange(4).view(4, 1) + torch.arange(4)) % 2 == 1).expand(2, 4, 4)
    theirs = trained(TutorialCoupling(odd.double()))
    form = {"affine_order": "shift_first", "params_layout": "scale_shift", "num_scale_factors": 2}
    for mask in ("checkerboard", odd):
        ours = fnn.AffineCoupling(theirs.net, mask=mask, **form).double()
        ours.log_factor = theirs.factor
        x = torch.randn(3, 2, 4, 4, dtype=F64)
        torch.testing.assert_close(fnn.FromReverse(theirs)(x), ours(x))
        torch.testing.assert_close(fnn.FromReverse(theirs).inverse(x), ours.inverse(x))


@pytest.mark.parametrize("reversible", [True, False])
def test_layers_of_the_tutorial_in_a_chain(reversible):
    mask = torch.rand(2, 4, 4) < 0.5
    layers = [fnn.FromReverse(TutorialCoupling(m.double(), context=True)) for m in (mask, ~mask)]
    chain = trained(fnn.Sequential(fnn.ActNorm(2), *layers, reversible=reversible))
    chain.check(torch.randn(2, 2, 4, 4, dtype=F64), torch.randn(2, 2, 4, 4, dtype=F64))


def test_flows_in_the_tutorial_s_loops():
    flows = [
        TutorialCoupling((torch.rand(2, 4, 4) < 0.5).double()),
        fnn.WithReverse(fnn.Squeeze()),
        fnn.WithReverse(fnn.InvertibleConv1x1(8)),
    ]
    flows = trained(nn.ModuleList(flows))
    x = torch.randn(3, 2, 4, 4, dtype=F64)
    z, ldj = x, torch.zeros(3, dtype=F64)
    for flow in flows:
        z, ldj = flow(z, ldj, reverse=False)
    assert z.shape == (3, 8, 2, 2) and not ldj.eq(0).any()
    for flow in reversed(flows):
        z, ldj = flow(z, ldj, reverse=True)
    torch.testing.assert_close(z, x)
    torch.testing.assert_close(ldj, torch.zeros(3, dtype=F64))
    _, ldj = flows[1](x, ldj=None, reverse=False)
    assert torch.equal(ldj, torch.zeros(3, dtype=F64))


def test_the_exercise_s_layers_are_flows_and_learn_a_gaussian():
    theirs, ours = (
        FlowModel(fnn.FromEncoderDecoder(ExerciseAffine(2)), fnn.GaussianPrior((2,))),
        fnn.Affine(2),
    )
    ours = FlowModel(ours, Independent(Normal(torch.zeros(2), torch.ones(2)), 1))
    mean, scale = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    x = mean + scale * torch.randn(4000, 2)
    for model in (theirs, ours):
        model.flow.check(x[:3].double())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(250):
            optimizer.zero_grad()
            (-model.log_prob(x).mean()).backward()
            optimizer.step()
    for t, s in ((theirs.flow.module.t, theirs.flow.module.s), (ours.flow.shift, ours.flow.log_scale)):
        # maximum likelihood: mean and deviation of the samples
        torch.testing.assert_close(t.detach(), x.mean(0), rtol=0, atol=0.02)
        torch.testing.assert_close(s.detach().exp(), x.std(0), rtol=0.02, atol=0)


def reversible_network(reversible):
    """Two blocks of eq. 16.18 with batch normalization in an ordinary network."""

    def branch():
        return nn.Sequential(nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1))

    halves = [fnn.AdditiveCoupling(branch(), swap_halves=i % 2 == 0) for i in range(4)]
    chain = fnn.WithoutLogDet(fnn.Sequential(*halves, reversible=reversible))
    network = nn.Sequential(nn.Conv2d(1, 6, 3), chain, nn.Flatten(), nn.Linear(6 * 16, 2))
    return randomize(network, std=0.3).double()


def test_blocks_of_an_ordinary_network():
    """Two residual halves; gradients and running statistics are those with stored activations."""
    recomputed, stored = reversible_network(True), reversible_network(False)
    stored.load_state_dict(recomputed.state_dict())
    x = torch.randn(4, 1, 6, 6, dtype=F64)
    h = stored[0](x)
    h_1, h_2 = h.chunk(2, dim=1)
    for i in range(0, 4, 2):
        first, second = (stored[1].flow[i + j].net for j in range(2))
        h_1 = h_1 + first(h_2)
        h_2 = h_2 + second(h_1)
    found = recomputed[1](h.detach())
    torch.testing.assert_close(found, torch.cat([h_1, h_2], dim=1), rtol=0, atol=1e-12)
    gradients = []
    for network in (recomputed, stored):
        given = x.clone().requires_grad_()
        loss = network(given).logsumexp(1).sum()
        gradients.append(torch.autograd.grad(loss, (given, *network.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)
    assert all(g.abs().max() > 0 for g in gradients[0])
    for name, buffer in recomputed.named_buffers():
        torch.testing.assert_close(buffer, stored.state_dict()[name], rtol=1e-12, atol=1e-12)


def test_a_layer_without_log_det_passes_the_context_on():
    flow = trained(fnn.AffineCoupling(fnn.MLP(2, 4, context_features=3)))
    x, context = torch.randn(5, 4, dtype=F64), torch.randn(5, 3, dtype=F64)
    assert torch.equal(fnn.WithoutLogDet(flow)(x, context), flow(x, context)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fnn.WithoutLogDet(nn.Identity()), "flow: got Identity, expected a Flow"),
        (lambda: fnn.FromReverse(torch.exp), "layer: got <built-in method exp"),
        (lambda: fnn.WithReverse(nn.Identity()), "flow: got Identity, expected a Flow"),
        (
            lambda: fnn.FromEncoderDecoder(nn.Identity()),
            "module: got Identity, expected a module with methods",
        ),
        (lambda: fnn.FromEncoderDecoder(ExerciseAffine), "module: got <class"),
        (lambda: fnn.Affine(0), "num_features: got 0, expected a positive integer"),
        (lambda: fnn.Affine(2)(torch.zeros(2, 3)), "x: got shape [2, 3], expected [N, 2, ...]"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        make()
