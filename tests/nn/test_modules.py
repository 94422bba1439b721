"""Every module: inverse both ways, log-det against autograd's Jacobian, copies of it, and ActNorm's initialization."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastflow.models.glow import GlowStep
from fastflow.nn import (
    ActNorm,
    AffineCoupling,
    Dequantize,
    EncoderDecoder,
    Flatten,
    GatedNetwork,
    GaussianPrior,
    GlowLevel,
    GlowNetwork,
    InvertibleConv1x1,
    LogitDequantize,
    Permute,
    ResidualNetwork,
    Sequential,
    Split,
)
from fastflow.nn.glow_level import folded
from fastflow.nn.networks.gated_network import GatedBlock, concat_elu
from fastflow.nn.networks.glow_network import ActNormConv2d, ZeroConv2d, network_args_of
from fastflow.nn.networks.residual_network import WeightNormConv2d
from fastflow.ops.affine_coupling import SCALES
from tests.support.cases import jacobian_log_det, randomize
from tests.support.copies import COPIES
from tests.support.flows import FLOWS, IMAGE, VECTOR, WithContext, batch, conv, trained

AFFINE = [scale for scale in SCALES if scale != "none"]
every_flow = pytest.mark.parametrize("make, shape", FLOWS.values(), ids=FLOWS.keys())


@every_flow
def test_inverse_both_ways_and_log_det(make, shape):
    flow, x = trained(make), batch(shape)
    z, log_det = flow(x)
    assert log_det.shape == (3,) and log_det.dtype == torch.float64
    torch.testing.assert_close(log_det, jacobian_log_det(lambda v: flow(v)[0], x), rtol=1e-9, atol=1e-9)
    back, log_det_back = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=1e-10)

    z = torch.randn_like(z)
    x, log_det = flow.inverse(z)
    torch.testing.assert_close(
        log_det, jacobian_log_det(lambda v: flow.inverse(v)[0], z), rtol=1e-9, atol=1e-9
    )
    again, log_det_again = flow(x)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_det_again, -log_det, rtol=0, atol=1e-10)


@every_flow
def test_check_passes(make, shape):
    """Also before any training, where ActNorm has yet to be initialised."""
    make().check(batch(shape))
    trained(make).check(batch(shape))


@every_flow
def test_float32(make, shape):
    flow, x = trained(make).float(), batch(shape, dtype=torch.float32)
    z, log_det = flow(x)
    assert z.dtype == log_det.dtype == torch.float32
    back, _ = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


@every_flow
def test_copies_are_the_same_flow(make, shape):
    flow, x = trained(make), batch(shape)
    expected = flow(x)
    for copied in COPIES:
        torch.testing.assert_close(copied(flow)(x), expected, rtol=0, atol=0)
    fresh = make().double()
    assert not fresh.state_dict() or fresh.load_state_dict(flow.state_dict())
    torch.testing.assert_close(
        fresh(x), expected, rtol=0, atol=0
    )  # in training mode, and nothing is initialised again


@pytest.mark.parametrize("make, shape", [f for f in FLOWS.values() if list(f[0]().parameters())])
def test_gradients_reach_every_parameter(make, shape):
    flow = trained(make)
    for direction in (flow, flow.inverse):
        flow.zero_grad()
        z, log_det = direction(
            torch.randn_like(flow(batch(shape))[0]) if direction == flow.inverse else batch(shape)
        )
        (z.square().sum() + log_det.sum()).backward()
        for name, p in flow.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("scale", ["soft_clamp", "exp"])
def test_coupling_with_context(scale):
    flow = trained(lambda: AffineCoupling(WithContext(2, 4), scale=scale))
    x, context = batch(VECTOR), batch((3,))
    z, log_det = flow(x, context)
    torch.testing.assert_close(
        log_det, jacobian_log_det(lambda v: flow(v, context)[0], x), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(flow.inverse(z, context)[0], x, rtol=0, atol=1e-10)
    assert not torch.equal(flow(x, context + 1)[0], z)


@pytest.mark.parametrize("mask", ["halves", "checkerboard"])
@pytest.mark.parametrize("flip", [False, True])
def test_what_the_network_sees_passes_through(mask, flip):
    flow = trained(
        lambda: AffineCoupling(conv(2, 4) if mask == "halves" else conv(4, 8), mask=mask, swap_halves=flip)
    )
    x = batch(IMAGE)
    z, _ = flow(x)
    torch.testing.assert_close(flow.network_input(z), flow.network_input(x), rtol=0, atol=0)
    changed = (z != x).sum().item()
    assert changed == x.numel() // 2


def test_conv1x1_starts_as_an_orthogonal_matrix():
    for lu in (True, False):
        layer = InvertibleConv1x1(12, lu=lu)
        weight, inverse, log_det = layer.weights()
        assert torch.linalg.det(weight).round() == -1  # (-1)^(C - 1), as the docstring has it
        torch.testing.assert_close(weight @ weight.mT, torch.eye(12), rtol=0, atol=1e-5)
        torch.testing.assert_close(inverse, weight.mT, rtol=0, atol=1e-5)
        assert abs(log_det) < 1e-5


def test_lu_and_plain_agree():
    lu, plain = trained(lambda: InvertibleConv1x1(4)), InvertibleConv1x1(4, lu=False).double()
    with torch.no_grad():
        plain.weight.copy_(lu.weights()[0])
    x = batch(IMAGE)
    torch.testing.assert_close(lu(x), plain(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lu.inverse(x), plain.inverse(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("conv1x1", ["lu", "plain"])
def test_a_glow_step_under_autocast_comes_back(conv1x1):
    """The network may be in half precision; the state, and the weights that it is multiplied by, are not."""
    step = randomize(GlowStep(12, 16, conv1x1=conv1x1), std=0.1).eval()
    step.actnorm.bias.data += 3  # W b is large
    x = torch.randn(4, 12, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = step(x)
        back, _ = step.inverse(y)
    assert y.dtype == torch.float32
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


def test_permute():
    x = batch(IMAGE)
    assert torch.equal(Permute(4)(x)[0], x.flip(1))
    drawn = Permute(64, order="random")
    assert torch.equal(drawn.perm.sort().values, torch.arange(64)) and not torch.equal(
        drawn.perm, Permute(64, order="random").perm
    )
    assert torch.equal(Permute(4, order="interleaved")(x)[0], x[:, [0, 2, 1, 3]])
    assert torch.equal(
        Permute(5, order="interleaved")(batch((5,), 1).fill_(0) + torch.arange(5))[0],
        torch.tensor([[0.0, 2, 4, 1, 3]]).double(),
    )
    assert torch.equal(Permute(4, order=(2, 0, 3, 1))(x)[0], x[:, [2, 0, 3, 1]])


def test_flatten_goes_row_by_row():
    x = torch.arange(24.0).view(2, 3, 2, 2)
    assert torch.equal(Flatten((3, 2, 2))(x)[0], torch.arange(24.0).view(2, 12))


def test_encoder_and_decoder_are_the_flow_s_directions():
    flow = trained(lambda: AffineCoupling(WithContext(2, 4)))
    layer, x, context = EncoderDecoder(flow), batch(VECTOR), batch((3,))
    for found, expected in (
        (layer.encoder(x, context), flow(x, context)),
        (layer.decoder(x, context), flow.inverse(x, context)),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert layer.check(x, context).failures() == [] and list(layer.parameters()) == list(flow.parameters())
    with pytest.raises(ValueError, match="is inaccurate: inverse"):
        layer.check(x, context, tolerance=-1.0)
    with pytest.raises(ValueError, match="flow: got Linear, expected a Flow"):
        EncoderDecoder(nn.Linear(2, 2))


# what is no Flow -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_split(prior):
    split, x = randomize(Split(4, prior)).double(), batch(IMAGE)
    kept, z, log_prob = split(x)
    assert torch.equal(torch.cat([kept, z], dim=1), x) and torch.equal(split.inverse(kept, z), x)
    mean, log_scale = (torch.zeros_like(z),) * 2 if prior == "standard" else split.net(kept).chunk(2, dim=1)
    expected = torch.distributions.Normal(mean, log_scale.exp()).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=1e-12)
    cold = split.sample(kept, temperature=0.0)
    torch.testing.assert_close(cold, torch.cat([kept, mean], dim=1), rtol=0, atol=0)
    draws = [split.sample(kept, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert split(batch(IMAGE, 0))[2].shape == (0,)


def test_split_draws_from_its_prior():
    split = randomize(Split(2)).double()
    kept = batch((1, 2, 2), 1).expand(20000, -1, -1, -1)
    z = split.sample(kept)[:, 1:]
    mean, log_scale = split.net(kept[:1]).chunk(2, dim=1)
    standard = (z - mean) / log_scale.exp()
    assert (standard.mean(0).abs() < 5 / 20000**0.5).all() and (
        (standard.var(0) - 1).abs() < 5 * (2 / 20000) ** 0.5
    ).all()


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("classes", [None, 5])
def test_gaussian_prior(shape, classes):
    prior = randomize(GaussianPrior(shape, classes)).double()
    z, context = batch(shape), None if classes is None else torch.tensor([4, 0, 4])
    mean, scale = torch.zeros(3, *shape, dtype=z.dtype), torch.ones(3, *shape, dtype=z.dtype)
    for i in range(3 if classes else 0):
        mean[i] += prior.mean[context[i]].view(-1, *[1] * (len(shape) - 1))
        scale[i] *= prior.log_scale[context[i]].exp().view(-1, *[1] * (len(shape) - 1))
    expected = torch.distributions.Normal(mean, scale).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(prior.log_prob(z, context), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prior.sample(3, z, temperature=0.0, context=context), mean, rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer",
    [Dequantize(), Dequantize(3), LogitDequantize(), LogitDequantize(5, alpha=1e-5, preset="tutorial")],
    ids=repr,
)
def test_dequantize(layer):
    x = torch.randint(0, 2**layer.n_bits, (4, 3, 2, 2), dtype=torch.uint8)
    y, log_det = layer(x)
    assert y.dtype == log_det.dtype == torch.float32 and not torch.equal(layer(x)[0], y)
    assert copy.deepcopy(layer).double()(x)[0].dtype == torch.float64
    assert torch.equal(layer.inverse(layer.bin_center(x))[0], x)
    noise = torch.rand(x.shape, dtype=torch.float64)
    log_jacobian = jacobian_log_det(lambda u: layer(x, noise=u)[0], noise)
    torch.testing.assert_close(layer(x, noise=noise)[1], log_jacobian, rtol=1e-9, atol=1e-9)
    first, second = (
        layer(x, seed=5)[0],
        torch.cat([layer(x[:1], seed=5)[0], layer(x[1:], seed=5, offset=1)[0]]),
    )
    assert torch.equal(first, second)
    torch.manual_seed(3)
    again = layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(layer(x)[0], again)
    assert layer(x[:0])[1].shape == (0,) and layer.state_dict() == {}


def test_glow_network_starts_at_zero_and_folds_its_actnorm():
    x = batch(IMAGE)
    assert (GlowNetwork(4, 6, hidden=8).double()(x) == 0).all()
    layer = trained(lambda: ActNormConv2d(4, 8, 3))
    torch.testing.assert_close(layer(x), layer.actnorm(layer.conv(x))[0], rtol=1e-12, atol=1e-12)
    layer = trained(lambda: ZeroConv2d(4, 6))
    plain = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(
        layer(x), plain * (3 * layer.logs).exp().view(1, -1, 1, 1), rtol=1e-12, atol=1e-12
    )


def test_weight_norm_is_torchs():
    layer, x = WeightNormConv2d(3, 4, 3, bias=True), batch((3, 4, 2))
    plain = nn.functional.conv2d(x.float(), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x.float()), plain, rtol=1e-5, atol=1e-6)
    other = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1).double())
    randomize(layer.double())
    with torch.no_grad():
        other.parametrizations.weight.original0.copy_(layer.g)
        other.parametrizations.weight.original1.copy_(layer.weight)
        other.bias.copy_(layer.bias)
    torch.testing.assert_close(layer(x), other(x), rtol=1e-12, atol=1e-12)


def test_residual_and_gated_networks_start_at_zero():
    x = batch((3, 4, 2))
    assert (ResidualNetwork(3, 6, hidden=4, blocks=2).double()(x) == 0).all()
    for pre_activation in (False, True):
        network = GatedNetwork(5, 6, hidden=4, blocks=2, pre_activation=pre_activation).double()
        assert (network(x, batch((2, 4, 2))) == 0).all()


def test_residual_network_sees_its_input_with_both_signs():
    network, x, seen = ResidualNetwork(3, 6, hidden=4, blocks=1).double(), batch((3, 4, 2)), []
    network.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(x)
    normalized = network.norm_in(x)
    assert torch.equal(seen[0], torch.cat([normalized.relu(), (-normalized).relu()], dim=1))


def test_pre_activation_precedes_both_convolutions():
    block, x, seen = GatedBlock(2, pre_activation=True).double(), batch((2, 4, 2)), []
    for convolution in (block.conv_in, block.conv_out):
        convolution.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(x)
    for given, before in zip(seen, (x, block.conv_in(concat_elu(x))), strict=False):
        assert torch.equal(given, torch.cat([nn.functional.elu(before), nn.functional.elu(-before)], dim=1))


def test_gated_block_gates_the_first_half():
    block, x = GatedBlock(2).double(), batch((2, 4, 2))
    nn.init.zeros_(block.conv_out.weight)
    block.conv_out.bias.data.copy_(torch.tensor([1, 2, 3, -1]))
    value, gate = torch.tensor([[1, 2], [3, -1]], dtype=x.dtype).view(2, 1, 2, 1, 1)
    torch.testing.assert_close(block(x), block.norm(x + value * gate.sigmoid()), rtol=1e-12, atol=1e-12)


# ActNorm's initialization ----------------------------------------------------------------------------------------------------------


def data(shape, n=64):
    c = torch.arange(shape[0], dtype=torch.float64).view(-1, *[1] * (len(shape) - 1))
    return 3 * c - 2 + (0.1 + c) * batch(shape, n)


def moments(y):
    rows = y.transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, correction=0)


@pytest.mark.parametrize("shape", [VECTOR, IMAGE])
@pytest.mark.parametrize("how", ["forward", "initialize"])
def test_first_batch_gets_zero_mean_and_unit_variance(shape, how):
    layer, x = ActNorm(4).double(), data(shape)
    if how == "initialize":
        layer.eval().initialize(x)
    mean, var = moments(layer(x)[0])
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=1e-12, atol=0)
    assert layer.initialized
    before = copy.deepcopy(layer.state_dict())
    layer.train()(2 * x + 1)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_actnorm_ignores_a_context_as_every_layer_does():
    layer, x = ActNorm(3), torch.randn(8, 3)
    layer.initialize(x, torch.randn(8, 2))
    torch.testing.assert_close(layer(x)[0].mean(0), torch.zeros(3))


def test_initialize_can_be_called_again():
    layer, x = ActNorm(4).double(), data(IMAGE)
    layer.initialize(x)
    layer.initialize(2 * x + 1)
    torch.testing.assert_close(
        moments(layer(2 * x + 1)[0])[1], torch.ones(4, dtype=x.dtype), rtol=1e-12, atol=0
    )


def test_first_batch_of_glows_network():
    layer = ActNormConv2d(4, 6, 3)
    x = data(IMAGE).float()
    mean, var = moments(layer(x))
    torch.testing.assert_close(mean, torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(var, torch.ones(6), rtol=1e-4, atol=0)


def test_first_batch_of_a_glow_step_is_that_of_its_layers():
    step = GlowStep(4, 6).double()
    apart, x = copy.deepcopy(step), data(IMAGE)
    z, log_det = step(x)
    y, first = apart.actnorm(x)
    y, second = apart.conv1x1(y)
    y, third = apart.coupling(y)
    torch.testing.assert_close((z, log_det), (y, first + second + third), rtol=1e-11, atol=1e-11)
    assert step.actnorm.initialized and step.coupling.net[0].actnorm.initialized


@pytest.mark.parametrize("bf16", [False, True])
def test_a_level_computes_what_its_steps_compute_alone(bf16):
    """Each step prepares its own weights if the level does not; the sum of log-dets and the gradients agree too."""
    steps = [GlowStep(8, 6, network="plain") for _ in range(3)]
    level = randomize(GlowLevel(steps, reversible=False), 0.3)
    x = torch.randn(2, 2, 4, 4)

    def alone(x):
        z, log_det = level.squeeze(x)
        for step in level.steps:
            z, more = step(z)
            log_det = log_det + more
        return z, log_det

    found, expected = [], []
    for run, results in ((level, found), (alone, expected)):
        level.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            z, log_det = run(x)
        (z.square().sum() + log_det.sum()).backward()
        results += [z.detach(), log_det.detach(), *(p.grad for p in level.parameters())]
    assert all(g.abs().sum() > 0 for g in expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    networks, x_a = [step.coupling.net for step in level.steps], torch.randn(2, 4, 2, 2)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for net, args in zip(networks, network_args_of(networks, x.device, 8), strict=True):
            assert len(args) == (4 if bf16 else 1)
            torch.testing.assert_close(net(x_a, shared_args=args), net(x_a))


def test_a_glow_step_inverts_the_rounded_weights():
    """The inverse matrix is exact up to its own rounding to float32, 2^-24."""
    step = randomize(GlowStep(48, 4), 0.05)
    weight, _, inverse, _, _ = (v[0] for v in folded([step]))
    exact = weight.double().inverse()
    assert (inverse - exact).abs().max() <= 2**-24 * exact.abs().max()


@pytest.mark.parametrize("how", ["eval", "inverse", "inverse in training"])
def test_before_initialization_it_is_the_identity(how):
    layer, x = ActNorm(4).train(how == "inverse in training"), data(IMAGE).float()
    y, log_det = layer(x) if how == "eval" else layer.inverse(x)
    assert torch.equal(y, x) and torch.equal(log_det, torch.zeros(64)) and not layer.initialized


@pytest.mark.parametrize("value", [0.0, 7.0, 255 / 256, 1e-30, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_channel_stays_finite(value, dtype):
    layer, x = ActNorm(3).to(dtype), torch.randn(16, 3, 4, 4, dtype=dtype)
    x[:, 1] = value
    for batch_of in (x, x * (1 + 1e-3)):
        y, log_det = layer(batch_of)
        assert y.isfinite().all() and log_det.isfinite().all()
        (y.square().mean() + log_det.mean()).backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.log_scale[1] == 0
    torch.testing.assert_close(layer.inverse(y)[0], batch_of, rtol=1e-4, atol=1e-4)


def test_rounding_of_a_constant_channel_is_not_scaled_up():
    layer, x = ActNorm(2), torch.randn(64, 2)
    x[:, 1] = 1000.1
    x[0, 1] = torch.nextafter(x[0, 1], torch.tensor(torch.inf))
    layer(x)
    assert layer.log_scale[1] == 0 and layer.log_scale[0] != 0


def test_one_sample_initialises_finite():
    layer = ActNorm(4)
    y, log_det = layer(torch.randn(1, 4))
    assert (y == 0).all() and (log_det == 0).all() and layer.initialized


def test_a_loaded_checkpoint_is_not_initialised_again():
    first, x = Sequential(ActNorm(4), AffineCoupling(GlowNetwork(2, 4, hidden=6))), data(IMAGE).float()
    first(x)
    for strict, assign in ((True, False), (False, False), (True, True)):
        fresh = Sequential(ActNorm(4), AffineCoupling(GlowNetwork(2, 4, hidden=6)))
        fresh.load_state_dict(copy.deepcopy(first.state_dict()), strict=strict, assign=assign)
        fresh.train()(5 * x + 3)
        assert all(torch.equal(v, first.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_a_checkpoint_from_before_initialization_still_initialises():
    fresh, x = ActNorm(4), data(IMAGE).float()
    fresh(x)
    fresh.load_state_dict(ActNorm(4).state_dict())
    fresh(x)
    torch.testing.assert_close(moments(fresh(x)[0])[1], torch.ones(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double()],
    ids=["deepcopy", "pickle", "double"],
)
@pytest.mark.parametrize("done", [False, True])
def test_copies_know_whether_they_are_initialised(how, done):
    layer, x = ActNorm(4), data(IMAGE)
    if done:
        layer(x.float())
    other = how(layer)
    assert bool(other.initialized) == other._initialized == done
    before = other.bias.clone()
    other(9 + x.to(other.bias.dtype))
    assert torch.equal(other.bias, before) == done
