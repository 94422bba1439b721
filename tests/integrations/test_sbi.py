"""Estimators of sbi, accelerated before training and after it."""

import copy
import importlib
import pickle

import pytest
import torch

pytest.importorskip("sbi")
inference = pytest.importorskip("sbi.inference")
posterior_nn = pytest.importorskip("sbi.neural_nets").posterior_nn

NAMES = {
    "nsf": "PiecewiseRationalQuadraticCouplingTransform",
    "maf": "MaskedAffineAutoregressiveTransform",
    "maf_rqs": "MaskedPiecewiseRationalQuadraticAutoregressiveTransform",
    "zuko_nsf": "MaskedAutoregressiveTransform",
    "zuko_maf": "MaskedAutoregressiveTransform",
    "zuko_nice": "GeneralCouplingTransform",
}


def module_of(name):
    return importlib.import_module("fastflow.integrations." + ("zuko" if "zuko" in name else "nflows"))


def trained(name, accelerated):
    """An estimator after two epochs, and the posterior that sbi makes of it."""
    torch.manual_seed(0)
    theta = torch.randn(100, 3)
    x = theta + 0.1 * torch.randn(100, 3)

    def build(theta, x):
        estimator = posterior_nn(name, hidden_features=10, num_transforms=2)(theta, x)
        if accelerated:
            replaced = list(module_of(name).accelerate(estimator).replaced.values())
            assert replaced.count(NAMES[name]) == 2
        return estimator

    prior = torch.distributions.MultivariateNormal(torch.zeros(3), torch.eye(3))
    npe = inference.NPE(prior, density_estimator=build, show_progress_bars=False)
    estimator = npe.append_simulations(theta, x).train(training_batch_size=50, max_num_epochs=2)
    return estimator, npe.build_posterior(), x


def numbers(estimator, x):
    torch.manual_seed(1)
    samples = estimator.sample((4,), x[:5])
    return samples, estimator.log_prob(samples, x[:5]), estimator.loss(x[5:9], x[:4])


@pytest.mark.parametrize("name", NAMES)
def test_estimators(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # sbi writes its logs there
    estimator, posterior, x = trained(name, accelerated=False)
    before = numbers(estimator, x)
    faster = trained(name, accelerated=True)[0]
    torch.testing.assert_close(numbers(faster, x), before, rtol=1e-2, atol=1e-2)  # four steps of Adam apart
    faster.load_state_dict(estimator.state_dict())
    later, of_posterior = copy.deepcopy(estimator), copy.deepcopy(posterior)
    for model in (later, of_posterior.posterior_estimator):
        report = module_of(name).accelerate(model)
        assert list(report.replaced.values()).count(NAMES[name]) == 2
    for model in (faster, later, copy.deepcopy(later), pickle.loads(pickle.dumps(later))):
        torch.testing.assert_close(numbers(model, x), before, rtol=1e-3, atol=1e-3)
    found = []
    for p in (posterior, of_posterior, pickle.loads(pickle.dumps(of_posterior))):
        torch.manual_seed(2)
        samples = p.sample((5,), x=x[:1], show_progress_bars=False)
        found.append((samples, p.log_prob(samples, x=x[:1], norm_posterior=False)))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-2, atol=1e-2)
    module_of(name).revert(later)
    assert type(pickle.loads(pickle.dumps(later)).net) is type(estimator.net)
    torch.testing.assert_close(numbers(later, x), before, rtol=0, atol=0)
