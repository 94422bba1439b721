"""Flow models of nessai, accelerated before training and after it."""

import copy
import importlib
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("glasflow")
nessai = pytest.importorskip("nessai.flowmodel", exc_type=ImportError)
flows = pytest.importorskip("nessai.flows.utils", exc_type=ImportError)
ff = importlib.import_module("fastflow.integrations.glasflow")

REPLACED = {
    "RealNVP": "AffineCouplingTransform",
    "NSF": "PiecewiseRationalQuadraticCouplingTransform",
    "MAF": "MaskedAffineAutoregressiveTransform",
}
# Adam would divide the gradient of a mean that batch norm takes away, which is rounding, by 1e-8
TRAINING = {"max_epochs": 2, "batch_size": 50, "patience": 5, "optimiser": "sgd"}


def accelerated(name):
    """What nessai takes as ``flow``: a function that makes the flow."""

    def flow(*sizes, **options):
        made = flows.get_flow_class(name)(*sizes, **options)
        assert list(ff.accelerate(made).replaced.values()).count(REPLACED[name]) == 2
        return made

    return flow


def model(folder, **config):
    torch.manual_seed(0)
    config = {"n_inputs": 3, "n_neurons": 8, "n_blocks": 2, "n_layers": 1} | config
    made = nessai.FlowModel(config, TRAINING, output=str(folder), rng=np.random.default_rng(0))
    made.initialise()
    return made


def numbers(made, x):
    torch.manual_seed(1)
    samples, log_prob = made.sample_and_log_prob(6)
    return samples, log_prob, *made.forward_and_log_prob(x), made.log_prob(x)


def assert_close(found, wanted, tolerance=1e-8):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", REPLACED)
def test_flow_models(name, tmp_path, double):
    x = np.random.default_rng(1).normal(size=(100, 3))
    plain, faster = model(tmp_path / "plain", ftype=name), model(tmp_path / "faster", flow=accelerated(name))
    losses = []
    for made in (plain, faster):
        torch.manual_seed(2)
        losses.append(made.train(x, plot=False))
    for kind in ("loss", "val_loss"):
        assert_close(losses[1][kind], losses[0][kind])
    before = numbers(plain, x)
    faster.load_weights(plain.weights_file)
    assert_close(numbers(faster, x), before)
    flow = plain.model
    ff.accelerate(flow)
    # glasflow's affine layers have a lambda, which pickle does not take; nessai pickles no flow
    pickled = pickle.loads(pickle.dumps(flow)) if name == "NSF" else flow
    for plain.model in (flow, copy.deepcopy(flow), pickled):
        assert_close(numbers(plain, x), before)
    plain.reset_model(weights=True, permutations=True)
    plain.reset_model(weights=True, permutations=False)
    plain.train(x, plot=False)
    assert np.isfinite(plain.log_prob(x)).all()
