"""Every number and name that an option can have: what no run can have is refused in one line that names the option."""

import dataclasses
import math
import re
import resource
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastflow
from fastflow.models import Glow
from fastflow.trainer.build import build_model
from fastflow.trainer.cli import main
from fastflow.trainer.commands import Evaluate, Interpolate, Sample, _check_options
from fastflow.trainer.config import Config, ConfigError, validate_config
from fastflow.trainer.model_options import MODELS, OPTIONS
from fastflow.trainer.ranks import DeviceError, available_device

pytest.importorskip("tyro")


def numbers(options):
    """Options that are numbers, by name: whether they may have fractions."""
    hints = typing.get_type_hints(options)
    found = {f.name: str(hints[f.name]) for f in dataclasses.fields(options)}
    return {name: "float" in hint for name, hint in found.items() if "float" in hint or "int" in hint}


@pytest.mark.parametrize("command", [Config, Evaluate, Sample, Interpolate])
def test_numbers_below_above_and_none(command):
    check = validate_config if command is Config else _check_options
    options = command() if command is Config else command("run")
    found = numbers(command)
    assert len(found) > (20 if command is Config else 1)
    for name, fractions in found.items():
        if name in OPTIONS - {"n_bits"} or name == "classes":
            continue  # the model knows their range
        pair = "betas" == name
        for value in (-1, math.nan, -math.inf) if fractions else (-1, 2**63):
            given = (
                (0.9, value) if pair else (value,) if name == "temperature" and command is Sample else value
            )
            with pytest.raises(ConfigError, match=f"^{name}: got .*expected"):
                check(dataclasses.replace(options, **{name: given}))


@pytest.mark.parametrize("name", MODELS)
def test_numbers_of_models(name):
    known = MODELS[name]
    shape = (4,) if 3 not in known.dimensions else (1, 28, 28) if name.startswith("mnist") else (3, 8, 8)
    source = SimpleNamespace(shape=shape, name="x", classes=None, context_features=None)
    found = {option: str(field.type) for option, field in known.options().items() if option != "n_bits"}
    for option, hint in found.items():
        values = [math.nan, -1.0, math.inf] if "float" in hint else [0, -1] if "int" in hint else []
        for value in values:
            with pytest.raises(ConfigError, match=f"^{option}: got {value}"):
                build_model(Config(model=name, **{option: value}), source)


@pytest.mark.parametrize(
    "argv, words",
    [
        ("evaluate run --batch-size -1", "batch_size: got -1, expected at least 1"),
        ("evaluate run --images -1", "images: got -1, expected at least 1"),
        ("evaluate run --data=", "data: got an empty text, expected a value, or no such option"),
        ("sample run --temperature 0.7 inf", "temperature: got inf, expected 0 or a positive number"),
        ("sample run --seed 9223372036854775808", "seed: got 9223372036854775808, expected at most"),
        ("sample run --n 3000000000", "n: got 3000000000, expected at most 2147483647"),
        ("interpolate run --steps 1", "steps: got 1, expected at least 2"),
        ("train --data=", "data: got an empty text"),
        ("train --temperature inf", "temperature: got inf, expected 0 or a positive number"),
        ("train --betas 0.9 1", "betas: got (0.9, 1.0), expected two decay rates from 0 to below 1"),
        ("train --channels 2", "channels: got 2, expected 1 or 3"),
        (
            "train --background black",
            "background: got black, expected no value: photos is no folder of images",
        ),
        ("train --skip-damaged", "skip_damaged: got True, expected no value: photos is no folder"),
        ("train --steps-per-level 0", "steps_per_level: got 0, expected a positive integer"),
        (
            "train --levels 2000000000",
            "levels: got 2000000000 for image_shape (3, 32, 32), expected at most 5",
        ),
        ("evaluate own.pt --columns a", "columns: got a, expected none: own.pt holds a model of images"),
        (
            "sample own.pt --context t.csv",
            "context: got t.csv, expected none: own.pt holds a model of images",
        ),
        ("sample own.pt --out x.gif", "out: got x.gif, expected a folder, or a file .png, .jpg"),
        ("sample rows.pt --out x.png", "out: got x.png, expected a folder, or a file .csv, .npy"),
        (
            "sample rows.pt --context nowhere",
            "context: got nowhere, expected none: rows.pt holds a model without",
        ),
        ("sample given.pt --context nowhere", "context: got 'nowhere', expected a table"),
    ],
)
def test_what_commands_refuse(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fastflow.save("own.pt", Glow(image_shape=(3, 4, 4), levels=1, steps=1, hidden=2))
    fastflow.save("rows.pt", fastflow.models.VectorGlow(features=2, steps=1, hidden=2))
    fastflow.save("given.pt", fastflow.models.VectorGlow(features=2, steps=1, hidden=2, context_features=1))
    assert main(argv.split()) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {words}"), lines


@pytest.mark.parametrize(
    "argv, words",
    [
        ("train --device cpu --batch-size 2000000000", r" for [\d.]+ GiB more"),
        ("train --device cpu --hidden 2000000000", ""),
        ("evaluate own.pt --data x.npz --samples 2000000000", r" for 32000000000 bytes more"),
        ("sample own.pt --n 2000000000", ""),
    ],
)
def test_too_little_memory_is_one_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fastflow.save("own.pt", Glow(image_shape=(3, 4, 4), levels=1, steps=1, hidden=2))
    np.savez("x.npz", x=np.zeros((20, 4, 4, 3), np.uint8))
    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**34, limit[1]))  # also on machines with more memory
    try:
        assert main(argv.split()) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    expected = f"error: out of memory{words}: smaller batches, models or numbers of samples need less\n"
    assert re.fullmatch(expected, capsys.readouterr().err)


def test_samples_of_rows_go_into_a_folder_too(tmp_path, capsys):
    fastflow.save(tmp_path / "rows.pt", fastflow.models.VectorGlow(features=2, steps=1, hidden=2))
    for out, name in ((tmp_path, "samples.csv"), (tmp_path / "x.NPY", "x.NPY")):
        assert main(["sample", str(tmp_path / "rows.pt"), "--n", "3", "--out", str(out)]) == 0
        assert capsys.readouterr().out.startswith(f"{tmp_path / name}: 3 rows")
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 4
    assert (tmp_path / "x.NPY").read_bytes().startswith(b"\x93NUMPY")


@pytest.mark.parametrize("device", ["meta", "cpu:1", "xla", "vulkan", "mps", "cuda:99"])
def test_devices_that_are_not_there(device):
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator().type == device:
        pytest.skip("this machine has one")
    with pytest.raises(DeviceError, match=f"device: got {device}, expected an available device"):
        available_device(device)


def test_devices_that_are_there():
    assert available_device("cpu") == torch.device("cpu") and available_device("cpu:0").type == "cpu"
