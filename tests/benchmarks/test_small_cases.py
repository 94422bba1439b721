"""The program that compute-sanitizer runs, on a CPU: an inverse that is wrong or not finite ends it."""

import math

import pytest
import torch

from benchmarks.tools import small_cases
from fastflow import nn


def test_layers_and_models_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(small_cases, "ran_ops", lambda device: ())  # tests/ops/test_specs.py runs these cases
    small_cases.main(["--device", "cpu"])
    assert capsys.readouterr().out.count("layers on") == 2 * len(small_cases.SIZES)


@pytest.mark.parametrize("x", [0.02, math.nan])
def test_an_inverse_that_is_wrong_is_an_error(x):
    with pytest.raises(ValueError, match=r"Tanh.*: x came back with an error of"):
        small_cases.check_inverse(nn.Tanh(), torch.zeros(2, 3), torch.full((2, 3), x))
