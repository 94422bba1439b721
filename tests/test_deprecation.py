"""Former names work for one more release: each warns at the caller's line, and does what the new name does."""

import pytest
import torch

from fastflow import nn as fnn
from fastflow.deprecation import renamed_arguments


@renamed_arguments(old="new")
def double(new: int = 1) -> int:
    return 2 * new


def test_an_argument_under_its_former_name():
    with pytest.warns(
        DeprecationWarning, match="argument old is now new; the old name will be removed"
    ) as seen:
        assert double(old=3) == 6
    assert seen[0].filename == __file__
    assert double(new=3) == double(3) == 6 and double() == 2


def test_both_names_of_an_argument_are_an_error():
    with pytest.raises(TypeError, match="new: got old, its former name, as well"):
        double(old=1, new=1)


@pytest.mark.parametrize("factors", [None, 2])
def test_num_features_of_a_coupling(factors):
    with pytest.warns(DeprecationWarning, match="argument num_features is now num_scale_factors"):
        layer = fnn.AffineCoupling(torch.nn.Linear(2, 4), num_features=factors)
    assert layer.log_factor.shape == (factors or 1,)


def test_continuous():
    with pytest.warns(DeprecationWarning, match="fastflow.nn.Continuous is now IdentityDequantize"):
        assert fnn.Continuous is fnn.IdentityDequantize
    with pytest.warns(
        DeprecationWarning, match="fastflow.nn.dequantize.Continuous is now IdentityDequantize"
    ):
        from fastflow.nn.dequantize import Continuous
    assert Continuous is fnn.IdentityDequantize
    with pytest.raises(AttributeError, match="module 'fastflow.nn' has no attribute 'Other'"):
        fnn.Other  # noqa: B018


@pytest.mark.parametrize(
    "layer",
    [fnn.Dequantize(), fnn.LogitDequantize(), fnn.IdentityDequantize()],
    ids=lambda m: type(m).__name__,
)
def test_centre_of_a_dequantization(layer):
    x = torch.arange(6, dtype=torch.uint8).view(2, 3)
    with pytest.warns(DeprecationWarning, match=f"{type(layer).__name__}.centre is now bin_center"):
        assert torch.equal(layer.centre(x), layer.bin_center(x))


def test_terms_of_a_split_and_of_a_prior():
    split, prior = fnn.Split(4), fnn.GaussianPrior((4,), learned=True)
    torch.nn.init.normal_(split.net.weight)
    kept = torch.randn(2, 2, 3, 3)
    with pytest.warns(DeprecationWarning, match="Split.terms is now mean_and_log_scale"):
        old = split.terms(kept)
    assert all(torch.equal(a, b) for a, b in zip(old, split.mean_and_log_scale(kept), strict=True))
    with pytest.warns(DeprecationWarning, match="GaussianPrior.terms is now mean_and_log_scale"):
        assert prior.terms(2, None) == (prior.mean, prior.log_scale)
