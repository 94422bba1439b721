"""The tutorial's MNIST flows next to plain PyTorch: no row unless both compute the same."""

import shutil

import pytest
import torch

from benchmarks.models import mnist_flows
from benchmarks.tools import harness
from tests.support.rows import DEVICES, assert_tables, rows_of


@pytest.mark.parametrize("device", DEVICES)
def test_mnist_flows_beside_plain_pytorch(device, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_flows, "keep_memory", lambda: None)  # of this process
    monkeypatch.setattr(harness, "ROUNDS", 1)
    page = tmp_path / "models.md"
    shutil.copy(harness.ROOT / "docs" / "models.md", page)
    rows = mnist_flows.main(
        ["--quick", "--device", device, "--results", str(tmp_path), "--docs", str(tmp_path)]
    )
    assert rows_of(tmp_path / "mnist_flows.csv") == [{k: str(v) for k, v in row.items()} for row in rows]
    expected = [
        (model, mode, provider)
        for model in ("simple", "vardeq", "multiscale")
        for mode in ("log_prob", "sample")
        for provider in ("plain", "fastflow")
    ]
    assert [(row["model"], row["mode"], row["provider"]) for row in rows] == expected
    assert all(float(row["error"]) <= float(row["tolerance"]) for row in rows)
    assert_tables(page, "mnist_flows")
    assert "| multiscale | sample | " in page.read_text()


@pytest.mark.parametrize("wrong", ["a log-density", "a pixel", "a mask"])
def test_a_flow_that_computes_something_else_is_refused(wrong, monkeypatch):
    model = mnist_flows.build("multiscale", "cpu").double()
    plain, given = mnist_flows.Plain(model), mnist_flows.inputs(model, 2, torch.float64, "cpu")
    assert mnist_flows.check(plain, model, given) <= mnist_flows.TOLERANCE
    if wrong == "a log-density":
        log_prob = model.log_prob
        monkeypatch.setattr(model, "log_prob", lambda x, seed: log_prob(x, seed=seed) * (1 + 1e-8))
    elif wrong == "a pixel":
        monkeypatch.setattr(model, "decode", lambda latents: 255 - plain.decode(latents))
    else:
        coupling = plain.levels[1][-1]
        coupling.mask = 1 - coupling.mask
    with pytest.raises(ValueError, match=r"^multiscale: log-densities are off by .* no row is written"):
        mnist_flows.check(plain, model, given)
