"""Former names work for one more release: each warns at the caller's line, and does what the new name does."""

import pytest
import torch

import fastflow
from fastflow import nn as fnn
from fastflow import ops, reversible
from fastflow.deprecation import renamed_arguments
from fastflow.models import Glow, RealNVP


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


def warned(seen):
    return {str(warning.message).split(";")[0] for warning in seen}


FORMER = {"flip": True, "order": "shift_first", "h_order": "scale_shift"}
PRESENT = {"swap_halves": True, "affine_order": "shift_first", "params_layout": "scale_shift"}
ARGUMENTS = {f"argument {old} is now {new}" for old, new in zip(FORMER, PRESENT, strict=True)}


def test_arguments_and_attributes_of_a_coupling():
    net = torch.nn.Linear(2, 4)
    with pytest.warns(DeprecationWarning) as seen:
        old = fnn.AffineCoupling(net, **FORMER)
    assert warned(seen) == ARGUMENTS
    assert {name: getattr(old, name) for name in PRESENT} == PRESENT
    with pytest.warns(DeprecationWarning) as seen:
        assert {name: getattr(old, name) for name in FORMER} == FORMER
    assert warned(seen) == {text.replace("argument ", "AffineCoupling.") for text in ARGUMENTS}
    with pytest.warns(DeprecationWarning, match="AffineCoupling.flip is now swap_halves"):
        old.flip = False
    assert old.swap_halves is False
    with pytest.warns(DeprecationWarning, match="argument flip is now swap_halves"):
        assert fnn.AdditiveCoupling(torch.nn.Linear(2, 2), flip=True).swap_halves


def test_arguments_of_the_coupling_s_op():
    x, params = torch.randn(3, 4), torch.randn(3, 4)
    expected = ops.affine_coupling(x, params, **PRESENT)
    with pytest.warns(DeprecationWarning) as seen:
        found = ops.affine_coupling(x, h=params, **FORMER)
    assert warned(seen) == {*ARGUMENTS, "argument h is now params"}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    gradients = {"dy": torch.randn(3, 4), "dlog_det": torch.randn(3)}
    expected = ops.affine_coupling_inverse_backward(x, params, None, **gradients, **PRESENT)
    with pytest.warns(DeprecationWarning) as seen:
        found = ops.affine_coupling_inverse_backward(x, params, None, **gradients, **FORMER)
    assert warned(seen) == ARGUMENTS
    assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3], strict=True))


def test_squeeze_and_unsqueeze():
    x = torch.randn(2, 4, 6, 6)
    with pytest.warns(DeprecationWarning, match="fastflow.ops.squeeze is now squeeze2d") as seen:
        assert torch.equal(ops.squeeze(x, "space"), ops.squeeze2d(x, "space"))
    assert seen[0].filename == __file__
    with pytest.warns(DeprecationWarning, match="fastflow.ops.unsqueeze is now unsqueeze2d"):
        assert torch.equal(ops.unsqueeze(x), ops.unsqueeze2d(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: fnn.Sequential(fnn.ActNorm(4), **options),
        lambda **options: fnn.GlowLevel([fnn.GlowStep(4, 2)], **options),
        lambda **options: Glow((1, 4, 4), levels=1, steps=1, hidden=2, **options).flows[0],
        lambda **options: RealNVP((1, 4, 4), scales=1, hidden=2, blocks=1, **options).flows[0],
    ],
    ids=["Sequential", "GlowLevel", "Glow", "RealNVP"],
)
def test_checkpoint_every(make):
    with pytest.warns(DeprecationWarning, match="checkpoint_every is now activation_checkpoint_every"):
        flow = make(checkpoint_every=3)
    assert flow.activation_checkpoint_every == 3
    with pytest.warns(DeprecationWarning, match=r"\.checkpoint_every is now activation_checkpoint_every"):
        flow.checkpoint_every = flow.checkpoint_every + 1
    assert flow.activation_checkpoint_every == 4


def test_checkpoint_every_in_a_checkpoint(tmp_path, recwarn):
    model = Glow((1, 4, 4), levels=1, steps=1, hidden=2, activation_checkpoint_every=3)
    model.config["checkpoint_every"] = model.config.pop("activation_checkpoint_every")
    fastflow.save(tmp_path / "old.pt", model)
    assert fastflow.load(tmp_path / "old.pt").flows[0].activation_checkpoint_every == 3
    assert not [w for w in recwarn if w.category is DeprecationWarning]


def test_names_of_reversible_backprop():
    x, steps = torch.randn(3, 4), [fnn.ActNorm(4).eval(), fnn.Permute(4)]
    expected = reversible.run_storing(steps, x)[0]
    with pytest.warns(DeprecationWarning, match="fastflow.reversible.stored is now run_storing"):
        assert reversible.stored is reversible.run_storing
    with pytest.warns(DeprecationWarning, match="fastflow.reversible.reversible is now run_reversible"):
        run = reversible.reversible
    with pytest.warns(DeprecationWarning) as seen:
        found = run(steps, x, weights=lambda steps: [()] * len(steps), checkpoint_every=1)
    assert warned(seen) == {
        "argument weights is now shared_args",
        "argument checkpoint_every is now activation_checkpoint_every",
    }
    assert torch.equal(found[0], expected)
