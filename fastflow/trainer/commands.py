"""The commands ``train``, ``evaluate``, ``sample`` and ``interpolate``, and their options."""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastflow import checkpoint, explore
from fastflow.models.model import Model
from fastflow.trainer import data, picture
from fastflow.trainer.config import RENAMED, REVERSIBLE, Config, ConfigError, check_values, config_error
from fastflow.trainer.evaluate import evaluate, sample
from fastflow.trainer.export import Export, export
from fastflow.trainer.kinds import kind_of
from fastflow.trainer.output import output
from fastflow.trainer.plot import Plot, plot
from fastflow.trainer.ranks import Ranks, available_device, init_process_group
from fastflow.trainer.rows import sample_rows, test_rows
from fastflow.trainer.run import resumed_config
from fastflow.trainer.run_folder import has_checkpoint
from fastflow.trainer.train import train


@dataclass(frozen=True)
class Evaluate:
    """Bits/dim of a trained model on a test set, compared with image codecs; nats for rows of a table."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, or a run folder: best.pt if a validation set chose it, otherwise last.pt."""
    data: str | None = None
    """Data, as in train. All rows of another table than the run's are evaluated, or its x_test. Default: the
    data of the training run."""
    data_dir: str | None = None
    """Folder of torchvision's data. Default: as in the training run."""
    columns: str | None = None
    """Columns of a table, as in train. Default: as in the training run."""
    context: str | None = None
    """Columns of a table that the model is conditioned on. Default: as in the training run."""
    images: int | None = None
    """Number of test images or rows, taken from the start. Default: all."""
    samples: int = 16
    """Importance samples; without effect for a table, whose densities are exact."""
    batch_size: int = 250
    """Images or rows per batch."""
    bf16: bool = False
    """Run the networks in bfloat16 (autocast)."""
    seed: int = 0
    """Random seed of the dequantization noise."""
    device: str = "cpu"
    """cpu, cuda or another torch device."""


@dataclass(frozen=True)
class Sample:
    """Write samples of a trained model: a grid of images as a PNG, or rows as a .csv or .npy file."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, or a run folder: best.pt if a validation set chose it, otherwise last.pt."""
    out: str | None = None
    """File to write, in the format of its suffix, or folder for it. Default: samples.png or samples.csv."""
    n: int | None = None
    """Number of samples. Default: 64 images, or 8 per temperature if there are several; 1,000 rows, or one for
    each row of --context."""
    temperature: tuple[float, ...] | None = None
    """Factor on the latents' standard deviation; several values give one row of images each, of the same noise.
    Default: 0.7 for images, 1 for rows."""
    context: str | None = None
    """A table with the columns that the model is conditioned on; its rows are used in turn."""
    classes: tuple[int, ...] | None = None
    """Class labels, used in turn. Default: all classes."""
    seed: int = 0
    """Random seed of the latents."""
    device: str = "cpu"
    """cpu, cuda or another torch device."""


@dataclass(frozen=True)
class Interpolate:
    """Write rows of images decoded from latents between two test images, as a PNG."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, or a run folder: best.pt if a validation set chose it, otherwise last.pt."""
    out: str | None = None
    """File to write, in the format of its suffix, or folder for it. Default: interpolation.png."""
    pairs: int = 4
    """Number of rows; the test images are used in order."""
    steps: int = 8
    """Images per row, including both ends."""
    method: explore.Method = "linear"
    """Path between the latents."""
    normalized: bool = True
    """Mix normalized latents; --no-normalized mixes raw ones."""
    seed: int = 0
    """Random seed of the dequantization noise."""
    data: str | None = None
    """Data, as in train. Default: the data of the training run."""
    data_dir: str | None = None
    """Folder of torchvision's data. Default: as in the training run."""
    device: str = "cpu"
    """cpu, cuda or another torch device."""


@dataclass(frozen=True)
class Info:
    """Versions, what runs on each device, and what is missing: for reports of bugs."""


def run_command(argv: list[str]) -> None:
    """Parse the arguments and run the command."""
    if os.environ.get("NO_COLOR") or not sys.stderr.isatty():  # tyro looks at standard output only
        getattr(tyro, "_experimental_options", {})["ansi_codes"] = False
    argv = _with_present_names(argv)
    # A resumed run's own settings are the defaults, so that the options given are those that differ.
    folder = _resume_folder(argv)
    default = resumed_config(folder) if folder is not None and not {"-h", "--help"} & set(argv) else Config()
    options = tyro.cli(
        Annotated[Config, tyro.conf.subcommand("train", default=default)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Interpolate, tyro.conf.subcommand("interpolate")]
        | Annotated[Plot, tyro.conf.subcommand("plot")]
        | Annotated[Export, tyro.conf.subcommand("export")]
        | Annotated[Info, tyro.conf.subcommand("info")],
        args=argv,
        prog="fastflow",
        description="Train, evaluate and explore normalizing flows on images and tables.",
    )
    if isinstance(options, Config):
        options = _with_one_length(options, default)
    commands = {
        Config: train,
        Evaluate: _evaluate,
        Sample: _sample,
        Interpolate: _interpolate,
        Plot: plot,
        Export: export,
    }
    if isinstance(options, (Evaluate, Sample, Interpolate)):
        _check_options(options)
    if isinstance(options, (Sample, Interpolate, Plot, Export)) and _is_another_rank():
        return  # the first rank writes the file
    commands[type(options)](options)


def _is_another_rank() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def _check_options(options: Evaluate | Sample | Interpolate) -> None:
    """Raise ConfigError or DeviceError for a value that no model and no data can take."""
    check_values(
        options, {"images": 1, "samples": 1, "batch_size": 1, "n": 1, "pairs": 1, "steps": 2, "seed": 0}
    )
    available_device(options.device)


def _with_one_length(options: Config, resumed: Config) -> Config:
    """``options`` of a resumed run with new steps instead of its epochs, or the other way around."""
    if resumed.epochs is not None and options.epochs == resumed.epochs and options.steps is not None:
        return replace(options, epochs=None)
    if resumed.steps is not None and options.steps == resumed.steps and options.epochs is not None:
        return replace(options, steps=None)
    return options


def _with_present_names(argv: list[str]) -> list[str]:
    """Replace deprecated names of options of ``train``, and options without a value."""
    if argv[:1] != ["train"]:
        return argv
    replaced = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        name, equals, value = argument.partition("=")
        option = name[2:].replace("-", "_") if name.startswith("--") else ""
        new = []
        if option in RENAMED:
            new = [f"--{RENAMED[option].replace('_', '-')}"]
        elif argument == "--no-reversible" or (argument == "--reversible" and following.startswith("-")):
            new = ["--reversible", REVERSIBLE[option == "reversible"]]
        elif argument == "--no-cuda-graph" or (argument == "--cuda-graph" and following.startswith("-")):
            replaced += ["--cuda-graph", str(option == "cuda_graph")]
            continue
        if new and not int(os.environ.get("RANK", 0)):
            print(f"{name} is deprecated and will be removed, use {' '.join(new)}", file=sys.stderr)
        replaced += [*new[:-1], new[-1] + equals + value] if new else [argument]
    return replaced


def _resume_folder(argv: list[str]) -> str | None:
    if argv[:1] != ["train"]:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    parser.add_argument("--out")
    parser.add_argument("--resume-if-present", action="store_true")
    given = parser.parse_known_args(argv)[0]
    present = given.resume_if_present and given.out and has_checkpoint(given.out)
    return given.out if present else given.resume


def _evaluate(options: Evaluate) -> None:
    with init_process_group(options.device) as (ranks, device):
        report = _evaluated(replace(options, device=str(device)), ranks)
    if ranks.is_main:
        print(report)


def _evaluated(options: Evaluate, ranks: Ranks) -> str:
    path = Path(options.checkpoint)
    model, training = checkpoint.opened(path, options.device)
    kind = kind_of(model.shape)
    notes: tuple[str, ...] = ()
    if len(model.shape) == 1:
        images, labels = test_rows(options, model, training, path)
    else:
        for option in ("columns", "context"):
            if (given := getattr(options, option)) is not None:
                raise config_error(option, given, f"none: {path} holds a model of images")
        n_bits = _bits_of_images(model, path)
        source = ranks.local_main_first(lambda: _source(options, model, training, path))
        images = data.drop_bits(source.test, n_bits)
        labels = None if model.classes is None else source.test_labels
        notes = source.notes
    images, labels = images[: options.images], None if labels is None else labels[: options.images]
    bounds = evaluate(
        model,
        images,
        labels,
        samples=options.samples,
        seed=options.seed,
        batch_size=options.batch_size,
        bf16=options.bf16,
        each=True,
        ranks=ranks,
    )
    losses = [kind.unit(model.shape).of_bits_per_dim * bits for bits in bounds.mean(1).tolist()]
    result = {"model": type(model).__name__, **kind.result(images, losses, model.n_bits)}
    return "\n".join([*notes, kind.report(result)])


def _sample(options: Sample) -> None:
    path = Path(options.checkpoint)
    model, training = checkpoint.opened(path, options.device)
    default = kind_of(model.shape).defaults["temperature"]
    temperatures = options.temperature or (default,)
    if len(model.shape) == 1:
        sample_rows(options, temperatures, model, training, path)
    else:
        _sample_images(options, temperatures, model, path)


def _sample_images(options: Sample, temperatures: tuple[float, ...], model: Model, path: Path) -> None:
    n_bits = _bits_of_images(model, path)
    if options.context is not None:
        raise config_error("context", options.context, f"none: {path} holds a model of images")
    out = output(options.out, "samples.png", picture.FORMATS)
    several = len(temperatures) > 1
    n = (8 if several else 64) if options.n is None else options.n
    labels = None
    if options.classes is not None:
        if model.classes is None:
            raise config_error("classes", options.classes, f"none: {path} holds a model without classes")
        if not all(0 <= c < model.classes for c in options.classes):
            raise config_error("classes", options.classes, f"labels from 0 to {model.classes - 1}")
        labels = torch.tensor(options.classes)[torch.arange(n) % len(options.classes)]
    rows = {f"T = {t:g}": sample(model, n, t, options.seed, labels) for t in temperatures}
    if several:
        picture.save_rows(out, rows, n_bits)
    else:
        picture.save_grid(out, next(iter(rows.values())), n_bits)
    print(f"{out}: {n} samples at temperature {', '.join(f'{t:g}' for t in temperatures)}")


def _interpolate(options: Interpolate) -> None:
    out = output(options.out, "interpolation.png", picture.FORMATS)
    path = Path(options.checkpoint)
    model, training = checkpoint.opened(path, options.device)
    n_bits = _bits_of_images(model, path)
    source = _source(options, model, training, path)
    images = source.test[: 2 * options.pairs] >> (8 - n_bits)
    if len(images) < 2 * options.pairs:
        most = f"at most {len(source.test) // 2}: {source.name} has {len(source.test)} test images"
        raise config_error("pairs", options.pairs, most)
    x0, x1 = images.to(options.device).chunk(2)
    labels = None if model.classes is None else source.test_labels
    context = None if labels is None else labels[: options.pairs].to(options.device)
    rows = explore.interpolate(
        model, x0, x1, options.steps, context, options.method, options.seed, options.normalized
    ).cpu()
    picture.save_grid(out, torch.flatten(rows, 0, 1), n_bits, columns=options.steps)
    latents = len(model.latent_shapes())
    for note in source.notes:
        print(note)
    print(f"{out}: {options.pairs} pairs of {source.name}, {options.method} in {latents} latents")


def _source(
    options: Evaluate | Interpolate, model: Model, training: dict[str, Any] | None, path: Path
) -> data.Source:
    """The data of ``--data``, or of the training run. Raises ConfigError if the model cannot take them."""
    trained = (training or {}).get("config", {})
    name = trained.get("data") if options.data is None else options.data
    if name is None:
        raise ConfigError(f"{path}: does not contain the name of its training data; give --data")
    data_dir = trained.get("data_dir", "data") if options.data_dir is None else options.data_dir
    of_folder = trained.get("skip_damaged", False), trained.get("background")
    side = model.shape[1] if model.shape[1] == model.shape[2] else None  # a .npz file of other images
    source = data.load(name, data_dir, side, model.shape[0], *of_folder)
    if source.shape != tuple(model.shape):
        got = f"{name} with images {source.shape}"
        raise config_error("data", got, f"images {tuple(model.shape)}, the model's")
    if model.classes is None:
        return source
    if source.classes is None:
        raise config_error(
            "data", f"{name} without labels", f"labels of {model.classes} classes for the model"
        )
    names = (training or {}).get("classes")
    if names is not None and isinstance(source, data.Folder):
        source.number_test_labels_as(names)
    elif source.classes > model.classes:
        got = f"{name} with {source.classes} classes"
        raise config_error("data", got, f"at most {model.classes}, the model's classes")
    return source


def _bits_of_images(model: Model, path: Path) -> int:
    """Bits per value of the images of a model. Raises ConfigError for a model of other samples."""
    if len(model.shape) != 3:
        got = f"a {type(model).__name__} of vectors {list(model.shape)}"
        raise ConfigError(f"{path}: got {got}, expected a model of images")
    if model.n_bits is None:
        got = f"a {type(model).__name__} of floating point images"
        raise ConfigError(f"{path}: got {got}, expected a model of uint8 images")
    return model.n_bits
