"""The command line: ``python -m fastflow train | evaluate | sample | interpolate``, also installed as ``fastflow``."""

import argparse
import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

_EXTRA = {"tyro", "tqdm", "PIL", "sklearn", "matplotlib", "torchvision", "numpy"}


def main(argv=None):
    """Run one command and give back its exit code; errors that a user can mend are one line on stderr."""
    if argv is None:  # the process is the command's own
        keep_memory()
        argv = sys.argv[1:]
    argv = list(argv)
    try:
        from fastflow.check import SingularError
        from fastflow.checkpoint import CheckpointError
        from fastflow.trainer.config import ConfigError
        from fastflow.trainer.data import DataError
        from fastflow.trainer.ranks import DeviceError, LostRankError
        from fastflow.trainer.train import Interrupted, NonFiniteError
    except ModuleNotFoundError as error:
        return _missing(error)
    try:
        return _run(argv)
    except ModuleNotFoundError as error:
        return _missing(error)
    except (
        CheckpointError,
        ConfigError,
        DataError,
        DeviceError,
        LostRankError,
        NonFiniteError,
        SingularError,
    ) as error:
        line = (
            str(error).strip().splitlines()[-1]
        )  # from a worker process the message is a traceback's last line
        return _fail(line.removeprefix("fastflow.trainer.data.DataError: "))
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}")
    except Interrupted as error:
        if not int(os.environ.get("RANK", 0)):
            print(error)
        return 128 + error.signum
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def keep_memory():
    """Has glibc keep what tensors free, for the next ones.

    It gives large blocks back to the system at once, which then hands out zeroed pages again, thousands a training step: 15 to 24% of its
    time on 2 cores of an AMD EPYC (docs/training.md). Nothing is done where the C library has no such settings.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    mallopt(trim_threshold, most)
    mallopt(mmap_threshold, most)


def _fail(line, code=1):
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    print(f"error: {rank}{line}", file=sys.stderr)
    return code


def _missing(error):
    if error.name is None or error.name.split(".")[0] not in _EXTRA:
        raise error
    return _fail(f"{error.name} is not installed: pip install fastflow[train]")


def _run(argv):
    import tyro

    from fastflow.trainer.config import Config
    from fastflow.trainer.train import resumed, train

    @dataclass(frozen=True)
    class Evaluate:
        """Bits/dim of a trained model on the test set of some data, beside what image codecs need."""

        checkpoint: tyro.conf.Positional[str]
        """A checkpoint, or a run folder (its last.pt)."""
        data: str | None = None
        """As in train; the default is what the model was trained on."""
        data_dir: str | None = None
        """Where torchvision keeps its data."""
        images: int | None = None
        """Only the first so many test images."""
        samples: int = 16
        """Importance samples."""
        batch_size: int = 250
        """Images at a time."""
        bf16: bool = False
        """Run the networks in bfloat16 (autocast)."""
        seed: int = 0
        """Of the dequantization noise."""
        device: str = "cpu"
        """cpu, cuda, ..."""

    @dataclass(frozen=True)
    class Sample:
        """Write a grid of samples of a trained model as a PNG."""

        checkpoint: tyro.conf.Positional[str]
        """A checkpoint, or a run folder (its last.pt)."""
        out: str = "samples.png"
        """The picture."""
        n: int | None = None
        """Images; the default is 64, or 8 of each temperature."""
        temperature: tuple[float, ...] = (0.7,)
        """Factor on the latents' standard deviation; several give a row each, of the same noise."""
        classes: tuple[int, ...] | None = None
        """Labels, taken in turn; the default is all of them."""
        seed: int = 0
        """Of the latents."""
        device: str = "cpu"
        """cpu, cuda, ..."""

    @dataclass(frozen=True)
    class Interpolate:
        """Write rows of images between pairs of test images, decoded from between their latents, as a PNG."""

        checkpoint: tyro.conf.Positional[str]
        """A checkpoint, or a run folder (its last.pt)."""
        out: str = "interpolation.png"
        """The picture."""
        pairs: int = 4
        """Rows; the test images are taken in order."""
        steps: int = 8
        """Images in a row, both ends included."""
        method: str = "linear"
        """linear or spherical."""
        seed: int = 0
        """Of the dequantization noise."""
        data: str | None = None
        """As in train; the default is what the model was trained on."""
        data_dir: str | None = None
        """Where torchvision keeps its data."""
        device: str = "cpu"
        """cpu, cuda, ..."""

    # A resumed run's own settings are the defaults, so that what differs from them is what was asked for.
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--resume")
    resume = peek.parse_known_args(argv)[0].resume if argv[:1] == ["train"] else None
    default = resumed(resume) if resume is not None and not {"-h", "--help"} & set(argv) else Config()
    options = tyro.cli(
        Annotated[Config, tyro.conf.subcommand("train", default=default)]
        | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Interpolate, tyro.conf.subcommand("interpolate")],
        args=argv,
        prog="fastflow",
        description="Train, evaluate and explore normalizing flows on images.",
    )
    if isinstance(options, Config):
        train(options)
    elif isinstance(options, Evaluate):
        _evaluate(options)
    elif isinstance(options, Sample):
        _sample(options)
    else:
        _interpolate(options)
    return 0


def _evaluate(options):
    from fastflow import checkpoint
    from fastflow.trainer import picture
    from fastflow.trainer.evaluate import evaluate, report

    path = _file(options.checkpoint)
    model, training = checkpoint.opened(path, options.device)
    source = _source(options, model, training, path)
    images = source.test[: options.images] >> (8 - model.n_bits)
    labels = None if model.classes is None else source.test_labels[: options.images]
    bounds = evaluate(
        model,
        images,
        labels,
        samples=options.samples,
        seed=options.seed,
        batch_size=options.batch_size,
        bf16=options.bf16,
        each=True,
    )
    result = {
        "model": type(model).__name__,
        "test_images": len(images),
        "importance_samples": options.samples,
    }
    result |= {
        "test_bits_per_dim": bounds[-1].mean().item(),
        "test_bits_per_dim_1_sample": bounds[0].mean().item(),
    }
    result["codecs_bits_per_dim"] = picture.codec_bits_per_dim(images[:1000]) if model.n_bits == 8 else {}
    print(report(result))


def _sample(options):
    import torch

    from fastflow import checkpoint
    from fastflow.trainer import picture
    from fastflow.trainer.config import ConfigError
    from fastflow.trainer.evaluate import sample

    path = _file(options.checkpoint)
    model = checkpoint.load(path, options.device)
    _images_only(model, path)
    several = len(options.temperature) > 1
    n = (8 if several else 64) if options.n is None else options.n
    for name, values, least in (("n", [n], 1), ("temperature", options.temperature, 0)):
        if not min(values) >= least:
            raise ConfigError(f"{name} is {min(values)}, expected at least {least}")
    labels = None
    if options.classes is not None:
        if model.classes is None:
            raise ConfigError(f"classes is {options.classes}, but {path} holds a model without classes")
        if not all(0 <= c < model.classes for c in options.classes):
            raise ConfigError(f"classes is {options.classes}, expected labels from 0 to {model.classes - 1}")
        labels = torch.tensor(options.classes)[torch.arange(n) % len(options.classes)]
    rows = {f"T = {t:g}": sample(model, n, t, options.seed, labels) for t in options.temperature}
    if several:
        picture.save_rows(options.out, rows, model.n_bits)
    else:
        picture.save_grid(options.out, *rows.values(), model.n_bits)
    print(f"{options.out}: {n} samples at temperature {', '.join(f'{t:g}' for t in options.temperature)}")


def _interpolate(options):
    import torch

    from fastflow import checkpoint, explore
    from fastflow.trainer import picture
    from fastflow.trainer.config import ConfigError

    for name, least in {"pairs": 1, "steps": 2}.items():
        if (got := getattr(options, name)) < least:
            raise ConfigError(f"{name} is {got}, expected at least {least}")
    if options.method not in explore.METHODS:
        raise ConfigError(f"method is {options.method!r}, expected {' or '.join(explore.METHODS)}")
    path = _file(options.checkpoint)
    model, training = checkpoint.opened(path, options.device)
    source = _source(options, model, training, path)
    images = source.test[: 2 * options.pairs] >> (8 - model.n_bits)
    if len(images) < 2 * options.pairs:
        raise ConfigError(f"pairs is {options.pairs}, but {source.name} has {len(source.test)} test images")
    x0, x1 = images.to(options.device).chunk(2)
    context = None if model.classes is None else source.test_labels[: options.pairs].to(options.device)
    rows = explore.interpolate(model, x0, x1, options.steps, context, options.method, options.seed).cpu()
    picture.save_grid(options.out, torch.flatten(rows, 0, 1), model.n_bits, columns=options.steps)
    print(
        f"{options.out}: {options.pairs} pairs of {source.name}, {options.method} in {len(model.latent_shapes())} latents"
    )


def _source(options, model, training, path):
    """The data that the options name, or that the model was trained on, with images as the model takes them."""
    from fastflow.trainer import data
    from fastflow.trainer.config import ConfigError

    trained = (training or {}).get("config", {})
    name = options.data or trained.get("data")
    _images_only(model, path)
    if name is None:
        raise ConfigError(f"{path}: does not say what it was trained on: give --data")
    source = data.load(name, options.data_dir or trained.get("data_dir", "data"), model.shape[1])
    if source.image_shape != tuple(model.shape):
        raise ConfigError(f"{name} has images {source.image_shape}, the model takes {tuple(model.shape)}")
    if model.classes is not None and (source.classes or 0) > model.classes:
        raise ConfigError(f"{name} has {source.classes} classes, the model {model.classes}")
    if model.classes is not None and source.classes is None:
        raise ConfigError(f"{name} has no labels, the model takes {model.classes} classes")
    return source


def _images_only(model, path):
    from fastflow.trainer.config import ConfigError

    if len(model.shape) != 3:
        raise ConfigError(
            f"{path}: holds a {type(model).__name__} of vectors {list(model.shape)}, expected a model of images"
        )


def _file(path):
    return Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
