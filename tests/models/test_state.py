"""State of layers and models: only training sets it from data; it follows the default dtype, loads onto meta, and copies."""

import copy
import inspect
import re

import pytest
import torch
import torch.distributed as dist

import fastflow.nn as fnn
from fastflow.models import (
    IAF,
    MAF,
    NICE,
    ContinuousFlow,
    FlowModel,
    Glow,
    MNISTFlow,
    NeuralSplineFlow,
    RealNVP,
    ResidualFlow,
    VectorGlow,
    mnist_flow,
)
from fastflow.nn.networks.glow_network import ActNormConv2d, ZeroConv2d
from fastflow.state_from_data import state_from_data, takes_state_from_data
from tests.support.copies import COPIES
from tests.support.flows import FLOWS, IMAGE, VECTOR, batch, conv
from tests.support.flows import trained as trained_flow
from tests.support.models import MNIST, MODELS, data, labels, of
from tests.support.models import trained as trained_model

every_flow = pytest.mark.parametrize("make, shape", FLOWS.values(), ids=FLOWS.keys())
SOME_MNIST = {"MNIST, vardeq": MNIST["MNIST, vardeq"]}
SMALL = {name: make for name, make in MODELS.items() if "three scales" not in name}


def flow_model():
    steps = (fnn.ActNorm(4), fnn.InvertibleConv1x1(4), fnn.AffineCoupling(fnn.MLP(2, 4)), fnn.BatchNorm(4))
    return FlowModel(fnn.Sequential(*steps), fnn.GaussianPrior((4,), learned=True))


FLOW_MODEL = {"FlowModel": flow_model}


def snapshot(module):
    return {k: v.clone() for k, v in (*module.named_parameters(), *module.named_buffers())}


def assert_unmoved(module, before, what):
    moved = [k for k, v in snapshot(module).items() if not torch.equal(v, before[k])]
    assert not moved, (what, moved)


def flags(module):
    return [bool(m.initialized) for m in module.modules() if isinstance(m, fnn.ActNorm)]


# only training sets it from data ----------------------------------------------------------------------------------------------


@every_flow
def test_only_training_sets_the_state_of_a_flow(make, shape):
    """Each pass that is not training, in training mode; then training does, and initialize the same."""
    flow, x = make().double().train(), batch(shape)
    before, by_name = snapshot(flow), copy.deepcopy(flow).eval()
    z = copy.deepcopy(flow).eval()(x)[0].detach()
    flow.inverse(z)
    flow.inverse(z.requires_grad_())[0].sum().backward()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            flow(x), flow.inverse(z)
    flow.eval()(x), flow.train()
    assert_unmoved(flow, before, "passes without training")
    flow(batch(shape, 0))
    assert_unmoved(flow, before, "an empty batch")
    flow(x)
    assert all(flags(flow))
    assert all(m.batches == before["batches"] + 1 for m in flow.modules() if isinstance(m, fnn.BatchNorm))
    by_name.initialize(x)
    assert not by_name.training
    torch.testing.assert_close(by_name.state_dict(), flow.state_dict(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("make", [lambda: fnn.ActNorm(4), lambda: fnn.BatchNorm(4)])
def test_check_sets_no_state(make):
    flow, seen = fnn.Sequential(make()), []
    flow[0].register_forward_hook(lambda m, *_: seen.append(snapshot(m)))
    before = snapshot(flow[0])
    flow.check(3 + batch(VECTOR))
    assert seen and all(torch.equal(v, state[k].to(v)) for state in seen[:2] for k, v in before.items())
    assert_unmoved(flow[0], before, "check")


@of(SMALL, FLOW_MODEL, SOME_MNIST)
def test_only_training_sets_the_state_of_a_model(make):
    model = make().train()
    x, context = data(model, 2), labels(model, 2)
    before = snapshot(model)
    model.sample(2, context=context)
    latents = model.encode(x, context)
    model.decode(latents, context)
    model.encode(x, context, seed=1)
    for i, flow in enumerate(model.flows):
        flow.inverse(model.splits[i].inverse(latents[i], latents[i]) if i < len(model.splits) else latents[i])
    with torch.no_grad():
        model(x, context, seed=1)
    model.eval()(x, context), model.train()
    assert_unmoved(model, before, "passes without training")
    by_name, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    by_hand(x, context, seed=1).mean().backward()
    assert all(flags(by_hand))
    with torch.inference_mode(False):
        by_name.initialize(x, context, seed=1)
    torch.testing.assert_close(by_name.state_dict(), by_hand.state_dict(), rtol=1e-5, atol=1e-6)
    moves = {k for k, v in by_hand.named_buffers() if not torch.equal(v, before[k])}
    assert bool(moves) == any(isinstance(m, (fnn.ActNorm, fnn.BatchNorm)) for m in model.modules())


def test_initialize_keeps_the_mode_of_each_part():
    model = MODELS["VectorGlow"]()
    model.flows[0][2].net.eval()
    before = [m.training for m in model.modules()]
    model.initialize(data(model))
    assert [m.training for m in model.modules()] == before and len(set(before)) == 2


def test_the_rule():
    assert takes_state_from_data(True) and not takes_state_from_data(False)
    with torch.no_grad():
        assert not takes_state_from_data(True)
        with state_from_data(True):
            assert takes_state_from_data(True) and not takes_state_from_data(False)
            with state_from_data(False):
                assert not takes_state_from_data(True)
            assert takes_state_from_data(True)
    with pytest.raises(KeyError), state_from_data(False):
        assert not takes_state_from_data(True)
        raise KeyError
    assert takes_state_from_data(True)


def test_a_compiled_inverse_sets_no_state():
    level = fnn.GlowLevel([fnn.GlowStep(4, 4)], reversible=False)
    inverse = torch.compile(lambda z: level.inverse(z), fullgraph=True, backend="eager")
    for _ in range(2):
        inverse(torch.randn(2, 4, 2, 2))
    assert not any(flags(level))
    torch.compile(lambda x: level(x), fullgraph=True, backend="eager")(torch.randn(2, 1, 4, 4))
    assert all(flags(level))


def test_a_reversible_pass_forbidden_state_is_differentiated_as_it_ran():
    """In training mode, batch norm then normalizes by its running statistics, which its rule must know in backward."""
    x, gradients = batch(VECTOR, 6), []
    for reversible in (True, False):
        flow = fnn.Sequential(fnn.BatchNorm(4), fnn.BatchNorm(4), reversible=reversible).double()
        flow(3 * x + 1)
        x = x.detach().requires_grad_()
        with state_from_data(False):
            z, log_det = flow(x)
        gradients.append(torch.autograd.grad(z.pow(3).sum() + log_det.sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


# dtypes -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def float64_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def other_dtypes(module, dtype):
    named = (*module.named_parameters(), *module.named_buffers())
    return {k: v.dtype for k, v in named if v.is_floating_point() and v.dtype != dtype}


@every_flow
def test_flows_have_the_default_dtype(make, shape, float64_by_default):
    flow, x = trained_without_a_cast(make), batch(shape)
    assert not other_dtypes(flow, torch.float64)
    z, log_det = flow(x)
    assert z.dtype == log_det.dtype == torch.float64
    assert (flow.inverse(z)[0] - x).abs().max() <= 1e-13 * (1 + x.abs().max())


def trained_without_a_cast(make):
    flow = make()
    flow.load_state_dict(trained_flow(make).state_dict())
    return flow.eval()


@of(SMALL, FLOW_MODEL, SOME_MNIST)
def test_models_have_the_default_dtype(make, float64_by_default):
    model = trained_model(make, n=2)
    assert not other_dtypes(model, torch.float64)
    x, context = data(model, 2), labels(model, 2)
    assert model.log_prob(x, context).dtype == torch.float64
    y, _ = model.dequantize(x)
    for i, flow in enumerate(model.flows):
        z, _ = flow(y)
        assert (flow.inverse(z)[0] - y).abs().max() <= 1e-13 * (1 + y.abs().max() + z.abs().max())
        y = model.splits[i](z)[0] if i < len(model.splits) else z


def test_variational_dequantization_in_bfloat16():
    """Its noise stays float32: in bfloat16 one draw in 500 is 1, and its logit infinite."""
    layer = MODULES["VariationalDequantize"][0]().bfloat16()
    x = torch.randint(0, 256, (64, *IMAGE), dtype=torch.uint8)
    y, log_det = layer(x, seed=1)
    assert y.dtype == torch.bfloat16 and y.isfinite().all() and log_det.isfinite().all()
    assert (layer.inverse(y)[0].int() - x.int()).abs().max() <= 2


@of(SMALL, FLOW_MODEL)
def test_models_in_bfloat16(make):
    """Density within bfloat16's rounding of the sum of its terms, gradients for each parameter, samples."""
    exact = trained_model(make, n=4)
    model = copy.deepcopy(exact).bfloat16()
    assert not other_dtypes(model, torch.bfloat16)
    x, context = data(exact, 2), labels(exact, 2)
    x16 = x.bfloat16() if x.is_floating_point() else x
    bits, expected = model(x16, context, seed=1), exact(x, context, seed=1)
    assert ((bits - expected).abs() <= 0.05 * (1 + expected.abs())).all()
    model.train()(x16, context, seed=1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    sample = model.eval().sample(2, context=None if context is None else context[:2])
    assert sample.dtype == x16.dtype and sample.isfinite().all()
    back = model.decode(model.encode(x16, context), context)
    assert (back.double() - x16.double()).abs().max() <= 0.1 * (1 + x16.double().abs().max())


# meta, copies -----------------------------------------------------------------------------------------------------------------


def on_meta(make):
    with torch.device("meta"):
        return make()


def loaded_on_meta(make, state):
    assigned = on_meta(make)
    assigned.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    emptied = on_meta(make).to_empty(device="cpu")
    emptied.load_state_dict(state)
    for module in (assigned, emptied):
        module.eval()
        assert not [k for k, v in snapshot(module).items() if v.is_meta]
    return assigned, emptied


@pytest.mark.parametrize(
    "make, shape", [f for name, f in FLOWS.items() if "BatchNorm" not in name], ids=lambda _: ""
)
def test_flows_load_onto_meta(make, shape):
    flow, x = trained_flow(make).float(), batch(shape, dtype=torch.float32)
    for other in loaded_on_meta(make, flow.state_dict()):
        torch.testing.assert_close(other(x), flow(x), rtol=0, atol=0)
        assert flags(other) == flags(flow)


@of(SMALL, FLOW_MODEL, {"MNIST, multiscale": MNIST["MNIST, multiscale"]})
def test_models_load_onto_meta(make):
    model = trained_model(make, n=2)
    x, context = data(model, 1), labels(model, 1)
    for other in loaded_on_meta(make, model.state_dict()):
        assert torch.equal(other(x, context, seed=1), model(x, context, seed=1))
        other.decode(other.encode(x, context), context)
    # the assigned tensors decide the dtype
    other = on_meta(make)
    other.load_state_dict(model.double().state_dict(), assign=True)
    assert not other_dtypes(other, torch.float64) and model.dequantize.like.device == x.device


MODULES = {
    "MLP": (lambda: fnn.MLP(2, 4, 5), (VECTOR[0] // 2,)),
    "ResidualMLP": (lambda: fnn.ResidualMLP(2, 4, 5), (VECTOR[0] // 2,)),
    "GlowNetwork": (lambda: fnn.GlowNetwork(4, 6, 5), IMAGE),
    "ResidualNetwork": (lambda: fnn.ResidualNetwork(4, 6, 5, 1), IMAGE),
    "GatedNetwork": (lambda: fnn.GatedNetwork(4, 6, 5, 1), IMAGE),
    "Split": (lambda: fnn.Split(4), IMAGE),
    "Split, standard": (lambda: fnn.Split(4, "standard"), VECTOR),
    "Dequantize": (lambda: fnn.Dequantize(5), IMAGE),
    "LogitDequantize": (lambda: fnn.LogitDequantize(5), IMAGE),
    "VariationalDequantize": (
        lambda: fnn.VariationalDequantize(fnn.AffineCoupling(fnn.GatedNetwork(6, 4, 4, 1))),
        IMAGE,
    ),
}
PRIORS = {
    "GaussianPrior": lambda: fnn.GaussianPrior(IMAGE, learned=True),
    "LogisticPrior": lambda: fnn.LogisticPrior(IMAGE),
    "GaussianMixturePrior": lambda: fnn.GaussianMixturePrior(IMAGE, torch.eye(4)),
    "GaussianMixturePrior, fixed": lambda: fnn.GaussianMixturePrior(IMAGE, torch.eye(4), learned=False),
}


@pytest.mark.parametrize("make, shape", MODULES.values(), ids=MODULES.keys())
def test_copies_of_modules(make, shape):
    module = make()
    if isinstance(module, fnn.Dequantize):
        x = torch.randint(0, 32, (2, *shape), dtype=torch.uint8)
        results = [m(x, seed=1) for m in (module, *(c(module) for c in COPIES))]
    else:
        x = torch.randn(2, *shape)
        results = [m.eval()(x) for m in (module, *(c(module) for c in COPIES))]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("make", PRIORS.values(), ids=PRIORS.keys())
def test_copies_of_priors(make):
    prior, z = make(), torch.randn(2, *IMAGE)
    for made in COPIES:
        assert torch.equal(made(prior).log_prob(z), prior.log_prob(z))


def test_a_process_group_is_kept_by_deepcopy_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = fnn.ActNorm(4, process_group=dist.group.WORLD)
        copied, pickled, loaded = (made(layer) for made in COPIES)
        assert copied.process_group is layer.process_group is dist.group.WORLD
        assert pickled.process_group is loaded.process_group is None
        layer.check(batch(VECTOR))
    finally:
        dist.destroy_process_group()


# empty batches ----------------------------------------------------------------------------------------------------------------


@every_flow
def test_flows_of_no_samples(make, shape):
    for training in (True, False):
        flow, x = make().double().train(training), batch(shape, 0).requires_grad_()
        z, log_det = flow(x)
        back, log_det_back = flow.inverse(z.detach())
        assert back.shape == x.shape and log_det.shape == log_det_back.shape == (0,)
        (z.sum() + log_det.sum()).backward()
        with torch.no_grad():
            assert torch.equal(flow(x)[0], z)


@of(SMALL, FLOW_MODEL, SOME_MNIST)
def test_models_of_no_samples(make):
    for training in (True, False):
        model = make().train(training)
        x, context = data(model, 0), labels(model, 0)
        bits = model(x, context)
        assert bits.shape == (0,)
        bits.sum().backward()
        assert not any(p.grad is not None and p.grad.abs().sum() for p in model.parameters())
        assert model.sample(0, context=context).shape == (0, *model.shape)
        assert model.decode(model.encode(x, context), context).shape == (0, *model.shape)
        model.initialize(x, context)
        assert not any(flags(model))


# arguments that make no sense -------------------------------------------------------------------------------------------------

CONSTRUCTORS = {
    fnn.ActNorm: {"num_features": 4},
    fnn.AdditiveCoupling: {"net": conv(2, 2)},
    fnn.Affine: {"num_features": 4},
    fnn.AffineCoupling: {"net": conv(2, 4)},
    fnn.BatchNorm: {"num_features": 4},
    fnn.CircularShift: {},
    fnn.ConcatSquash: {"features": 4},
    fnn.NeuralODE: {"net": fnn.ConcatSquash(4, (4,))},
    fnn.Coupling: {"net": conv(2, 4), "transformer": fnn.ActNorm(4)},
    fnn.Dequantize: {},
    fnn.DistributionPrior: {"distribution": torch.distributions.Laplace(torch.zeros(4), torch.ones(4))},
    fnn.ElementwiseSpline: {"shape": IMAGE},
    fnn.EmergingConv: {"num_features": 4},
    fnn.EncoderDecoder: {"flow": fnn.ActNorm(4)},
    fnn.Exp: {},
    fnn.Flatten: {"shape": IMAGE},
    fnn.FlowTransform: {"flow": fnn.ActNorm(4)},
    fnn.FromEncoderDecoder: {"module": fnn.EncoderDecoder(fnn.ActNorm(4))},
    fnn.FromReverse: {"layer": fnn.WithReverse(fnn.ActNorm(4))},
    fnn.GatedNetwork: {"in_channels": 2, "out_channels": 2},
    fnn.GaussianMixturePrior: {"shape": IMAGE, "means": torch.eye(4)},
    fnn.GaussianPrior: {"shape": IMAGE},
    fnn.GlowLevel: {"steps": [fnn.GlowStep(16, 4)]},
    fnn.GlowNetwork: {"in_channels": 2, "out_channels": 2, "hidden": 4},
    fnn.GlowStep: {"num_features": 4, "hidden": 4},
    fnn.Inverse: {"flow": fnn.ActNorm(4)},
    fnn.InvertibleConv1x1: {"num_features": 4},
    fnn.LeakyReLU: {},
    fnn.LipSwish: {},
    fnn.LipschitzConv2d: {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "size": (4, 4)},
    fnn.LipschitzConvNet: {"channels": 2, "size": (4, 4), "hidden": 4},
    fnn.LipschitzLinear: {"in_features": 2, "out_features": 2},
    fnn.LipschitzMLP: {"features": 2, "hidden": (4, 4)},
    fnn.Log: {},
    fnn.Logit: {},
    fnn.LULinear: {"features": 4},
    fnn.LogisticPrior: {"shape": IMAGE},
    fnn.LogitDequantize: {},
    fnn.MaskedAutoregressive: {"net": fnn.MaskedNetwork(3, 2, (4, 4))},
    fnn.MaskedNetwork: {"features": 3, "outputs_per_feature": 2, "hidden": (4, 4)},
    fnn.MLP: {"in_features": 2, "out_features": 2},
    fnn.OrthogonalLinear: {"num_features": 4},
    fnn.PeriodicConv: {"num_features": 4},
    fnn.Permute: {"num_features": 4},
    fnn.PiecewiseLinear: {},
    fnn.PiecewiseQuadratic: {},
    fnn.Planar: {"features": 4},
    fnn.QRLinear: {"num_features": 4},
    fnn.Radial: {"features": 4},
    fnn.Residual: {"net": fnn.LipschitzMLP(2, (4,))},
    fnn.ResidualMLP: {"in_features": 2, "out_features": 2},
    fnn.ResidualNetwork: {"in_channels": 2, "out_channels": 2, "hidden": 4},
    fnn.Scale: {"num_features": 4},
    fnn.Sequential: {},
    fnn.Sigmoid: {},
    fnn.SoftClip: {},
    fnn.Softplus: {},
    fnn.Split: {"num_features": 4},
    fnn.SplineCoupling: {"net": conv(2, 46)},
    fnn.MixtureCDFCoupling: {"net": conv(2, 52)},
    fnn.Squeeze: {},
    fnn.Standardize: {"num_features": 4},
    fnn.Sylvester: {"features": 4},
    fnn.Tanh: {},
    fnn.TriangularLinear: {"num_features": 4},
    fnn.UniformPrior: {"shape": IMAGE},
    fnn.VariationalDequantize: {"flow": fnn.ActNorm(4)},
    fnn.WithReverse: {"flow": fnn.ActNorm(4)},
    fnn.WithoutLogDet: {"flow": fnn.ActNorm(4)},
    ActNormConv2d: {"in_channels": 2, "out_channels": 2, "kernel_size": 3},
    ZeroConv2d: {"in_channels": 2, "out_channels": 2},
    Glow: {"image_shape": (1, 4, 4), "levels": 1, "steps": 1, "hidden": 4},
    RealNVP: {"image_shape": (1, 4, 4), "scales": 1, "hidden": 4, "blocks": 1},
    NICE: {"features": 4, "hidden": 4},
    FlowModel: {"flow": fnn.ActNorm(4), "prior": fnn.GaussianPrior((4,))},
    MAF: {"features": 4, "steps": 1, "hidden": 4},
    IAF: {"features": 4, "steps": 1, "hidden": 4},
    NeuralSplineFlow: {"features": 4, "steps": 1, "hidden": 4, "blocks": 1},
    ContinuousFlow: {"features": 4, "hidden": 4, "layers": 1},
    ResidualFlow: {"features": 4, "blocks": 1, "hidden": 4, "layers": 1},
    VectorGlow: {"features": 4, "steps": 1, "hidden": 4},
    MNISTFlow: {"variant": "simple"},
    mnist_flow: {"variant": "simple"},
}
NONSENSE = (None, "nonsense", -1, 2.5, object(), float("nan"))
SENSIBLE = {
    ("eps", 2.5),
    ("output_start", 2.5),
    ("num_scale_factors", None),
}  # None: the default of a former name
SENSIBLE |= {("factor", 2.5), ("slope", 2.5), ("bound", 2.5), ("shift", -1), ("shift", 2.5)}
SENSIBLE |= {("time", 2.5), ("atol", 2.5), ("rtol", 2.5)}
SENSIBLE |= {("low", -1), ("low", 2.5), ("high", 2.5)}  # with a low above it, high is the one that is named
# torch's, variadic (TypeError), a string or a module, a name in other code
NOT_CHECKED = {"process_group", "flows", "prior", "context_name"}


def optional(parameter):
    return parameter.default is None or "None" in str(parameter.annotation)


@pytest.mark.parametrize("make, given", CONSTRUCTORS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_nonsense_is_named(make, given):
    make(**given)
    for name, parameter in inspect.signature(make).parameters.items():
        if name in NOT_CHECKED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        for value in NONSENSE:
            if (value is None and optional(parameter)) or (name, value) in SENSIBLE:
                continue
            with pytest.raises(ValueError) as error:
                make(**given | {name: value})
            assert re.match(rf"{name}(\[\d\])?: got .*, expected ", str(error.value)), (name, value)


def test_every_public_constructor_is_tried():
    abstract = {fnn.Flow, fnn.Prior, fnn.FlowReport, fnn.IdentityDequantize}
    classes = {v for k in fnn.__all__ if isinstance(v := getattr(fnn, k), type)} - abstract
    assert classes <= CONSTRUCTORS.keys()


@pytest.mark.parametrize("value", NONSENSE)
def test_nonsense_samples(value):
    model = MODELS["VectorGlow"]()
    with pytest.raises(ValueError, match="^n: got .*, expected 0 or more"):
        model.sample(value)
    if value != 2.5:
        with pytest.raises(ValueError, match="^temperature: got .*, expected 0 or more"):
            model.sample(2, temperature=value)
