"""Training each of the models by name: it goes on bit for bit when resumed, and refuses settings that it does not have."""

import json

import numpy as np
import pytest
import torch

import fastflow
from fastflow import checkpoint
from fastflow.trainer.build import build_model
from fastflow.trainer.cli import main
from fastflow.trainer.config import Config, ConfigError, validate_config
from fastflow.trainer.data import Images
from fastflow.trainer.run import parameter_groups

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

SMALL = "--batch-size 6 --warmup 1 --final-samples 1 --samples 4 --eval-every 4 --save-every 3 --schedule constant --lr 2e-3".split()
TINY = {
    "glow": "--levels 2 --steps-per-level 1 --hidden 8 --learned-prior --network fused",
    "realnvp": "--hidden 4 --blocks 1 --ema 0.5 --scale-l2 1e-3 --reversible yes",
    "nice": "--hidden 16 --blocks 2 --prior gaussian",
    "mnist-multiscale": "--reversible no",
    "residual_flow": "--levels 2 --blocks 1 --hidden 4 --dense-blocks 1 --dense-hidden 4 --reversible no",
}
THINGS = Images("things", np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 3, 8, 8), np.uint8))


def arrays(folder, side, channels, n=24):
    x = np.random.default_rng(0).integers(0, 60, (n, side, side, channels)).astype(np.uint8)
    np.savez(folder / "images.npz", x=x, x_test=x[:6], y=np.arange(n) % 2, y_test=np.arange(6) % 2)
    return str(folder / "images.npz")


@pytest.mark.parametrize("model", TINY)
def test_a_model_trains_and_resumes_bit_for_bit(model, tmp_path, capsys):
    data = arrays(tmp_path, *((28, 1) if model.startswith("mnist") else (8, 3)))
    argv = ["train", "--data", data, "--model", model, *SMALL, *TINY[model].split()]
    assert main([*argv, "--steps", "4", "--out", str(tmp_path / "whole")]) == 0
    assert main([*argv, "--steps", "2", "--out", str(tmp_path / "part")]) == 0
    half = checkpoint.read(tmp_path / "part" / "last.pt")["state_dict"]
    assert main(["train", "--resume", str(tmp_path / "part"), "--steps", "4"]) == 0
    whole, part = (checkpoint.read(tmp_path / name / "last.pt") for name in ("whole", "part"))
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, part["state_dict"][name]), name
    for name, value in half.items():
        moved = not name.endswith(("perm", "sign_s", "initialized"))
        assert torch.equal(value, whole["state_dict"][name]) != moved, name
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    trained = fastflow.load(tmp_path / "whole" / "last.pt")
    assert result["model"] == type(trained).__name__
    if model == "glow":
        assert all(step.coupling.net.network == "fused" for level in trained.flows for step in level.steps)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "whole"), "--samples", "1"]) == 0
    assert f"  {result['model']:5s} {result['test_bits_per_dim']:.3f}" in capsys.readouterr().out
    assert main(["sample", str(tmp_path / "whole"), "--n", "4", "--out", str(tmp_path / "samples.png")]) == 0


def test_averaged_weights_go_with_the_running_statistics(tmp_path):
    data = arrays(tmp_path, 8, 3)
    argv = [
        "train",
        "--data",
        data,
        "--model",
        "realnvp",
        *SMALL,
        *TINY["realnvp"].split(),
        "--steps",
        "3",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(argv) == 0
    contents = checkpoint.read(tmp_path / "run" / "last.pt")
    averaged, trained = contents["state_dict"], contents["training"]["trained"]
    statistics = [
        name for name in trained if name.rsplit(".", 1)[-1] in ("mean", "var", "running_mean", "running_var")
    ]
    assert statistics and all(torch.equal(averaged[name], trained[name]) for name in statistics)
    assert trained["flows.0.flows.1.batches"] == 4  # one to initialise, three steps
    assert any(not torch.equal(averaged[name], trained[name]) for name in trained if name.endswith("bias"))


def test_the_penalty_is_on_the_scales_of_weight_normalization():
    model = build_model(
        Config(model="realnvp", hidden=4, blocks=1),
        Images("", np.zeros((2, 3, 8, 8), np.uint8), np.zeros((2, 3, 8, 8), np.uint8)),
    )
    rest, scales = parameter_groups(model, 0.5)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {id(p) for p in scales["params"]} == {id(m.g) for m in convolutions}
    assert (
        len(rest["params"]) + len(convolutions) == len(list(model.parameters()))
        and len(parameter_groups(model, 0.0)) == 1
    )
    before = [p.detach().clone() for p in scales["params"]]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.SGD([rest, scales], lr=0.1).step()
    for p, start in zip(scales["params"], before, strict=True):  # the gradient of 0.5 g^2 is g
        torch.testing.assert_close(p.detach(), 0.9 * start)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"model": "flow++"}, "model: got 'flow++', expected one of glow, realnvp"),
        (
            {"model": "nice", "levels": 2},
            "levels: got 2, expected no value: nice has no such option, it takes couplings, hidden, blocks, prior",
        ),
        ({"model": "glow", "blocks": 3}, "blocks: got 3, expected no value: glow has no such option"),
        (
            {"model": "glow", "scale_l2": 5e-5},
            "scale_l2: got 5e-05, expected 0: glow has no weight normalization to penalize",
        ),
        (
            {"model": "mnist-simple", "n_bits": 5},
            "n_bits: got 5, expected no value: mnist-simple has no such option, it takes reversible",
        ),
        (
            {"model": "mnist-vardeq"},
            "data: got things with images (3, 8, 8), expected (1, 28, 28) for mnist-vardeq",
        ),
        ({"model": "realnvp", "levels": 5}, "levels: got 5 for image_shape (3, 8, 8)"),
        ({"model": "nice", "prior": "cauchy"}, "prior: got 'cauchy'"),
        (
            {"model": "realnvp", "class_conditional": True},
            "class_conditional: got True, expected False: things has no labels",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(settings, said):
    config = Config(**settings)
    with pytest.raises(ConfigError) as caught:
        validate_config(config)
        build_model(config, THINGS)
    assert said in str(caught.value)
