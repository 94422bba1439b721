"""Training of an image flow, one loop to be read from top to bottom: see :func:`train`.

A run folder holds ``last.pt`` (all that is needed to go on), ``best.pt`` (the model with the best test bits/dim so
far), ``metrics.csv`` (a row a step), ``samples.png``, ``curve.png``, ``result.json`` at the end, and TensorBoard's
events where tensorboard is installed.  Batches, noise and samples are pure functions of (seed, step), so that a run
killed at any moment and resumed ends with the same weights and the same metrics.csv, byte for byte.
"""

import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from fastflow import checkpoint, data, picture
from fastflow.check import SingularError
from fastflow.checkpoint import CheckpointError
from fastflow.data import derive

_INITIALIZE, _NOISE, _TEST_NOISE, _SAMPLES = 10, 11, 12, 13  # streams of `derive`; the data's own are below 10
_COLUMNS = "step,epoch,lr,train_bits_per_dim,grad_norm,test_bits_per_dim"
_MAY_CHANGE = {"resume", "out", "steps", "minutes", "lr", "clip", "save_every", "device", "workers", "data_dir"}


@dataclass(frozen=True)
class Config:
    """Train a Glow on images."""

    data: str = "photos"
    """photos, cifar10, mnist, a folder of images, or a .npz file (uint8 x, and y, x_test, y_test at will)."""
    data_dir: str = "data"
    """Where torchvision finds cifar10 and mnist, or downloads them to."""
    image_size: int | None = None
    """Side of an image in pixels: folders are resized to it (32), mnist is padded from 28 to 32 unless it is 28."""
    n_bits: int = 8
    """Bits a pixel and channel; fewer than 8 drop the lowest."""
    flip: bool | None = None
    """Mirror training images at random; the default is what is usual for the data."""
    class_conditional: bool = False
    """Give the labels to the model."""

    levels: int = 3
    """Scales of the Glow: each halves the image's side."""
    steps_per_level: int = 8
    """Steps of flow a level (K)."""
    hidden: int = 32
    """Channels inside the coupling networks."""
    coupling: str = "affine"
    """affine or additive."""
    conv1x1: str = "lu"
    """How channels are mixed: by 1x1 convolutions, lu or plain, or fixed permutations, reverse or shuffle."""
    scale: str = "soft_clamp"
    """Scale function of the affine coupling: soft_clamp, tanh, sigmoid (the paper's code) or exp."""
    logit: bool = False
    """Model the logit of the pixels, as in RealNVP."""
    reversible: bool = True
    """Recompute activations backwards instead of keeping them."""
    activations_every: int | None = None
    """Keep the true activation each so many steps of a reversible chain."""

    steps: int = 800
    """Optimizer steps."""
    minutes: float | None = None
    """End within this time, evaluation and pictures included: where too slow, steps are cut, the schedule with them.
    The default is 2.9 for photos and no limit (inf) for other data."""
    batch_size: int = 32
    """Images a step."""
    lr: float = 3e-3
    """Adam's learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averaging of gradients and of their squares."""
    warmup: int = 50
    """Steps over which the learning rate rises linearly."""
    schedule: str = "cosine"
    """After the warm-up: cosine (to zero at the last step) or constant."""
    clip: float = 100.0
    """Largest norm of the gradient; greater ones are scaled down to it."""
    bf16: bool = False
    """Run the networks in bfloat16 (autocast)."""
    seed: int = 0
    """Of weights, batches, noise and samples."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), or a device as torch names it."""
    workers: int | None = None
    """Processes that prepare batches; the default is none for data in memory, up to four for a folder."""

    eval_every: int = 100
    """Steps between evaluations on the test set."""
    eval_images: int = 1000
    """Test images of these evaluations, the first ones; the last evaluation takes all."""
    eval_samples: int = 1
    """Importance samples of these evaluations."""
    final_samples: int = 8
    """Importance samples of the last evaluation."""
    sample_every: int = 400
    """Steps between sample grids."""
    samples: int = 64
    """Images in a sample grid."""
    temperature: float = 0.7
    """Factor on the latents' standard deviation in sample grids."""
    save_every: int = 100
    """Steps between checkpoints."""

    out: str | None = None
    """The run's folder, a new one; the default is the first free runs/DATA-N."""
    resume: str | None = None
    """Go on with the run of this folder; its settings hold, and few may be changed."""


class ConfigError(ValueError):
    """Settings that do not go together; the message is one line."""


def check(config):
    """Raise ConfigError, naming the field, for a value that no run can have."""
    if config.schedule not in ("cosine", "constant"):
        raise ConfigError(f"schedule is {config.schedule!r}, expected cosine or constant")
    ones = "levels steps_per_level hidden steps batch_size eval_every eval_images eval_samples final_samples"
    least = dict.fromkeys(f"{ones} sample_every samples save_every n_bits".split(), 1)
    for name, bound in (least | {"seed": 0, "warmup": 0, "temperature": 0}).items():
        if not getattr(config, name) >= bound:
            raise ConfigError(f"{name} is {getattr(config, name)}, expected at least {bound}")
    if config.n_bits > 8:
        raise ConfigError(f"n_bits is {config.n_bits}, expected at most 8")
    if config.minutes is not None and not config.minutes > 0:
        raise ConfigError(f"minutes is {config.minutes}, expected a positive number")
    for name in ("lr", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{name} is {getattr(config, name)}, expected a positive number")


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite, or a weight without an inverse; the message names the step and the layer or matrix."""


class Interrupted(Exception):
    """The run was stopped by a signal (``signum``) after saving; the message says where and how to go on."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


def train(config):
    """Train as ``config`` says and give back the run's folder and the model.

    Raises ConfigError, DataError or CheckpointError (each a ValueError of one line) for what cannot be started,
    NonFiniteError when the loss diverges, Interrupted after SIGINT or SIGTERM (in the main thread).
    """
    # Setup: data, model and optimizer, new or from the run's last checkpoint.
    check(config)
    began = time.monotonic()
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device)
    saved = read_run(config.resume) if config.resume else None
    if saved:
        _check_changes(saved["training"], config)
    source = data.load(config.data, config.data_dir, config.image_size)
    batches = data.Batches(source, config.batch_size, config.seed, config.n_bits, config.flip)
    identity = [source.length, len(source.test), *source.image_shape, source.classes]
    if saved:
        run = Path(config.resume)
        state = saved["training"]
        if state["data"] != identity:
            raise ConfigError(f"{run}: was trained on other data (sizes {state['data']}, now {identity})")
        model = checkpoint.build(saved, run / "last.pt").to(device)
        step, total, best, seconds = state["step"], state["total"], state["best"], state["seconds"]
        if (config.steps, config.minutes) != (state["config"]["steps"], state["config"]["minutes"]):
            total = config.steps
    else:
        torch.manual_seed(config.seed)
        model = build_model(config, source).to(device)
        step, total, best, seconds = 0, config.steps, None, 0.0
        x, labels = _on(device, batches[0], config)
        model.initialize(x, labels, seed=derive(config.seed, _INITIALIZE))
        run = _new_folder(config)
    model.to(memory_format=torch.channels_last)  # convolutions run faster in it, and the layers keep it
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.lr, betas=tuple(config.betas), fused=True)
    if saved:
        optimizer.load_state_dict(state["optimizer"])
        _set_rng(state["rng"])
    test = source.test >> (8 - config.n_bits)
    test_labels = source.test_labels if config.class_conditional else None
    metrics = Metrics(run / "metrics.csv", step)
    board = _tensorboard(run, step)
    size = sum(p.numel() for p in parameters)
    print(f"{run}: {size:,} parameters, {source.length:,} images of {source.name}, {device.type}", flush=True)

    def save():
        state = {"config": asdict(config), "data": identity, "step": step, "total": total, "best": best}
        state |= {"seconds": seconds + time.monotonic() - began, "optimizer": optimizer.state_dict(), "rng": _rng()}
        metrics.sync()
        checkpoint.save(run / "last.pt", model, state)

    def bits_of_test(samples, images=None):
        labels = None if test_labels is None else test_labels[:images]
        bounds = evaluate(model, test[:images], labels, samples=samples, seed=config.seed, bf16=config.bf16, each=True)
        return bounds.mean(1).tolist()

    # The loop.  A step counts when its optimizer step is done and its row is written.
    if not saved:
        save()
    model.train()
    progress = Progress(total, step, config.batch_size)
    stream = batches.stream(step, config.steps, config.workers, pin_memory=device.type == "cuda")
    limit = 60 * (config.minutes or (2.9 if config.data == "photos" else math.inf))
    stepping, begun_at, looked = 0.0, step, began
    with _signals() as stop:
        while step < total and not stop:
            start = time.monotonic()
            x, labels = _on(device, next(stream), config)
            lr = learning_rate(config, step, total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            try:
                with _autocast(device, config.bf16):
                    loss = model(x, labels, seed=derive(config.seed, _NOISE, step)).mean()
            except SingularError as error:
                metrics.sync()
                progress.close()
                raise NonFiniteError(f"step {step + 1}: {error}; the last checkpoint is {run / 'last.pt'}") from None
            loss.backward()
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            bits, grad_norm = torch.stack([loss.detach().float(), norm.float()]).tolist()
            if not (math.isfinite(bits) and math.isfinite(grad_norm)):
                metrics.sync()
                progress.close()
                try:
                    with _autocast(device, config.bf16):
                        reason = diagnose(model, x, labels, derive(config.seed, _NOISE, step))
                except SingularError as error:  # which a GPU's kernels can only say now
                    reason = str(error)
                raise NonFiniteError(
                    f"step {step + 1}: bits/dim {bits:g}, gradient norm {grad_norm:g}; {reason}; "
                    f"the last good checkpoint is {run / 'last.pt'}"
                )
            torch.nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
            optimizer.step()
            step += 1
            progress.update(bits)
            stepping += time.monotonic() - start
            if limit < math.inf and ((step - begun_at) % 50 == 0 or time.monotonic() - looked > 10):
                looked = time.monotonic()
                left = limit - seconds - (looked - began)
                fits = step + _steps_that_fit(config, left, stepping / (step - begun_at), len(test))
                fits = min(fits, config.steps)
                # Estimates err, and the schedule should not follow each error; towards the end they have to hold.
                if fits < (0.95 * total if step < total / 2 else total) or fits > 1.05 * total:
                    progress.say(f"step {step}: {fits} of {config.steps} steps fit in {limit / 60:g} minutes")
                    total = fits
                    progress.total(total)

            test_bits = None
            if step % config.eval_every == 0 or step == total:
                test_bits = bits_of_test(config.eval_samples, config.eval_images)[-1]
                progress.say(f"step {step}: train {progress.bits:.3f}, test {test_bits:.3f} bits/dim")
            epoch = step * config.batch_size // source.length
            metrics.write(step, epoch, lr, bits, grad_norm, test_bits)
            if board:
                values = {"train/bits_per_dim": bits, "train/grad_norm": grad_norm, "train/lr": lr}
                values |= {"test/bits_per_dim": test_bits, "images_per_second": progress.images_per_second}
                for name, value in values.items():
                    if value is not None:
                        board.add_scalar(name, value, step)
            if test_bits is not None and (best is None or test_bits < best):
                best = test_bits
                checkpoint.save(run / "best.pt", model)
            if step % config.save_every == 0 or step == total:
                save()
            if step % config.sample_every == 0 and step < total:
                _pictures(run, config, model, metrics.path, board, step)
    progress.close()
    if stop:
        save()
        again = f"python -m fastflow train --resume {run}"
        raise Interrupted(f"stopped at step {step} of {total}, saved {run / 'last.pt'}; to go on: {again}", stop[0])

    # The end: the whole test set, the pictures, the codecs.  All of it is done again by resuming a finished run.
    bounds = bits_of_test(config.final_samples)
    result = {"step": step, "test_images": len(test), "importance_samples": config.final_samples}
    result |= {"test_bits_per_dim": bounds[-1], "test_bits_per_dim_1_sample": bounds[0]}
    codecs = picture.codec_bits_per_dim(test[:1000]) if config.n_bits == 8 else {}
    result["codecs_bits_per_dim"] = codecs
    _pictures(run, config, model, metrics.path, board, step, codecs)
    with checkpoint.replacing(run / "result.json") as file:
        file.write((json.dumps(result, indent=2) + "\n").encode())
    if board:
        board.close()
    print(report(result))
    print(f"{run}: last.pt, best.pt, metrics.csv, curve.png, samples.png")
    return run, model.eval()


def build_model(config, source):
    """The model that ``config`` describes for the images of ``source``; ConfigError where they do not fit."""
    from fastflow.models import Glow

    if config.class_conditional and source.classes is None:
        raise ConfigError(f"class_conditional: {source.name} has no labels")
    try:
        return Glow(
            image_shape=source.image_shape,
            levels=config.levels,
            steps=config.steps_per_level,
            hidden=config.hidden,
            coupling=config.coupling,
            conv1x1=config.conv1x1,
            scale=config.scale,
            n_bits=config.n_bits,
            classes=source.classes if config.class_conditional else None,
            logit=config.logit,
            reversible=config.reversible,
            checkpoint_every=config.activations_every,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def learning_rate(config, step, total):
    """The rate of 0-based ``step``: linear to ``lr`` over the warm-up, then constant or a cosine to 0 at ``total``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup)))


@torch.no_grad()
def evaluate(model, images, labels=None, *, samples=1, seed=0, batch_size=250, bf16=False, each=False) -> Tensor:
    r"""Bits/dim of each image, :math:`-\log_2 \frac{1}{K} \sum_k p_k(x) / D` over K draws of the dequantization noise.

    More samples tighten the bound (arXiv:1509.00519, equation 8).  The noise depends on (seed, k, image) alone.

    images: uint8 ``[N, C, H, W]``; labels: int64 ``[N]`` or None.  Gives float64 ``[N]`` on the CPU; with ``each`` the
    bounds of 1, 2, ... K samples, ``[K, N]``.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    log_prob = torch.empty(samples, len(images), dtype=torch.float64)
    for k in range(samples):
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            context = None if labels is None else labels[part].to(device)
            with _autocast(device, bf16):
                nats = model.log_prob(images[part].to(device), context, seed=derive(seed, _TEST_NOISE, k), offset=start)
            log_prob[k, part] = nats.double().cpu()
    model.train(was_training)
    dimensions = images[0].numel() * math.log(2)
    bounds = torch.logcumsumexp(log_prob, 0) - torch.arange(1, samples + 1, dtype=torch.float64).log()[:, None]
    return -(bounds if each else bounds[-1]) / dimensions


def diagnose(model, x, labels, seed):
    """One phrase: the first layer whose output is not finite as ``x`` runs again, and the largest gradient."""
    first = []

    def hook(name):
        def look(module, inputs, output):
            if not first and not all(t.isfinite().all() for t in _tensors(output)):
                first.append(f"the first output that is not finite is that of {name} ({type(module).__name__})")

        return look

    handles = [m.register_forward_hook(hook(name or "the model")) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(x, labels, seed=seed)
    finally:
        for handle in handles:
            handle.remove()
    norms = {name: p.grad.float().norm().item() for name, p in model.named_parameters() if p.grad is not None}
    name = max(norms, key=lambda n: norms[n] if not math.isnan(norms[n]) else math.inf)
    return f"{first[0] if first else 'every layer output is finite'}; largest gradient {norms[name]:g}, of {name}"


def _tensors(output):
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output for t in _tensors(part)] if isinstance(output, (tuple, list)) else []


def read_run(folder):
    """The contents of a run folder's last checkpoint; CheckpointError where there is none to go on with."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run folder")
    contents = checkpoint.read(folder / "last.pt")
    if contents["training"] is None:
        raise CheckpointError(f"{folder / 'last.pt'}: holds no training state to go on with")
    return contents


def resumed(folder):
    """The Config with which to go on with the run of ``folder`` unchanged."""
    kept = read_run(folder)["training"]["config"]
    known = {field.name for field in fields(Config)}
    return replace(Config(**{k: v for k, v in kept.items() if k in known}), resume=str(folder), out=None)


def _check_changes(training, config):
    kept, given = training["config"], asdict(config)
    for name in given:
        if name not in _MAY_CHANGE and kept.get(name, given[name]) != given[name]:
            allowed = ", ".join(sorted(_MAY_CHANGE - {"resume", "out"}))
            raise ConfigError(f"{name} is {given[name]}, the run has {kept[name]}; a resumed run may change {allowed}")
    if config.out is not None:
        raise ConfigError(f"out is {config.out}, but a resumed run goes on in its own folder, {config.resume}")
    if config.steps < training["step"]:
        raise ConfigError(f"steps is {config.steps}, the run is at step {training['step']} already")


def _new_folder(config):
    if config.out is not None:
        run = Path(config.out)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ConfigError(f"out: {run} exists; --resume {run} goes on with a run, another --out starts one")
        run.mkdir(parents=True, exist_ok=True)
        return run
    n = 1
    while True:
        run = Path("runs") / f"{Path(config.data).resolve().stem}-{n}"
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError:
            n += 1


class Metrics:
    """metrics.csv, a row a step.  Opened at ``step``, rows after it are cut: the resumed run writes them again."""

    def __init__(self, path, step):
        self.path = path
        kept = [_COLUMNS]
        if step and path.exists():
            for line in path.read_bytes().decode(errors="replace").split("\n")[1:-1]:  # a row without its end is cut
                if line.split(",")[0] != str(len(kept)) or len(kept) > step:
                    break
                kept.append(line)
        if len(kept) <= step:
            raise CheckpointError(f"{path}: has {len(kept) - 1} rows in order, the checkpoint is at step {step}")
        with checkpoint.replacing(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self._file = open(path, "ab", buffering=0)  # a row is one write, so that none is seen half

    def write(self, step, epoch, lr, bits, grad_norm, test_bits):
        test = "" if test_bits is None else f"{test_bits:.6f}"
        self._file.write(f"{step},{epoch},{lr:.6g},{bits:.6f},{grad_norm:.6g},{test}\n".encode())

    def sync(self):
        os.fsync(self._file.fileno())


def read_metrics(path):
    """The rows of a metrics.csv as dicts; test_bits_per_dim is None where a step was not evaluated."""
    lines = Path(path).read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    whole = {"step", "epoch"}
    return [{k: (int if k in whole else float)(v) if v else None for k, v in row.items()} for row in rows]


class Progress:
    """A progress bar on a terminal, elsewhere a line every ten seconds; keeps running means of bits/dim and speed."""

    def __init__(self, total, step, batch_size):
        self.bits, self.images_per_second = None, None
        self._total, self._step, self._batch_size = total, step, batch_size
        self._printed = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            size = shutil.get_terminal_size()  # 80 by 24 where the terminal does not say: tqdm would show nothing
            bar_format = "step {n_fmt}/{total_fmt} |{bar}| {desc}, {remaining} left"
            shape = {"ncols": size.columns, "nrows": size.lines, "bar_format": bar_format}
            self._bar = tqdm(total=total, initial=step, desc="starting", **shape)

    def update(self, bits):
        now = time.monotonic()
        speed = self._batch_size / max(now - self._last, 1e-9)
        self._last = now
        self._step += 1
        self.bits = bits if self.bits is None else 0.95 * self.bits + 0.05 * bits
        kept = self.images_per_second
        self.images_per_second = speed if kept is None else 0.95 * kept + 0.05 * speed
        text = f"{self.bits:.3f} bits/dim, {self.images_per_second:.0f} images/s"
        if self._bar is not None:
            self._bar.desc = text
            self._bar.update()
        elif now - self._printed > 10:
            self._printed = now
            left = (self._total - self._step) * self._batch_size / self.images_per_second
            print(f"step {self._step}/{self._total}: {text}, {left:.0f} s left", flush=True)

    def say(self, line):
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)
        self._last = time.monotonic()

    def total(self, total):
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def close(self):
        if self._bar is not None:
            self._bar.close()


def report(result):
    """The closing table, from what result.json holds."""
    bits, one, k = result["test_bits_per_dim"], result["test_bits_per_dim_1_sample"], result["importance_samples"]
    samples = f"{k} importance samples, {one:.3f} with one" if k > 1 else "one sample of the noise"
    lines = [f"bits/dim on {result['test_images']} test images", f"  Glow  {bits:.3f}  ({samples})"]
    notes = {"PNG": "optimize=True", "WebP": "lossless, quality 100, method 6"}
    for name, value in result["codecs_bits_per_dim"].items():
        first = ", the first 1000 images" if result["test_images"] > 1000 else ""
        lines.append(f"  {name:5s} {value:.3f}  ({notes[name]}, each image alone{first})")
    return "\n".join(lines)


def _pictures(run, config, model, metrics, board, step, codecs=None):
    images = sample(model, config.samples, config.temperature, derive(config.seed, _SAMPLES))
    picture.save_grid(run / "samples.png", images, config.n_bits)
    if board:
        board.add_image("samples", picture.grid(images, config.n_bits), step, dataformats="HWC")
    rows = [(r["step"], r["train_bits_per_dim"], r["test_bits_per_dim"]) for r in read_metrics(metrics)]
    if rows:
        picture.save_curve(run / "curve.png", rows, codecs)


@torch.no_grad()
def sample(model, n, temperature=1.0, seed=0, labels=None):
    """``n`` images, uint8 ``[n, C, H, W]`` on the CPU; of a model of classes, all classes in turn unless ``labels``."""
    device = next(model.parameters()).device
    if labels is None and model.classes is not None:
        labels = torch.arange(n) % model.classes
    was_training = model.training
    model.eval()
    generator = torch.Generator(device).manual_seed(seed)
    context = None if labels is None else labels.to(device)
    images = model.sample(n, temperature=temperature, context=context, generator=generator).cpu()
    model.train(was_training)
    return images


def _steps_that_fit(config, left, per_step, test_images):
    """How many steps of ``per_step`` seconds fit into ``left`` seconds, with their evaluations and the last one."""
    forward = per_step / config.batch_size / 2  # seconds an image: a step is about three forwards
    end = 8 + forward * (test_images * config.final_samples + config.samples)
    evaluation = forward * min(config.eval_images, test_images) * config.eval_samples
    return max(0, int((left - end - evaluation) / (per_step + evaluation / config.eval_every)))


def _on(device, batch, config):
    x, labels = batch
    labels = labels.to(device, non_blocking=True) if config.class_conditional else None
    return x.to(device, non_blocking=True, memory_format=torch.channels_last), labels


def _autocast(device, enabled):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def _rng():
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def _set_rng(states):
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _tensorboard(run, step):
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run, purge_step=step + 1 if step else None)


@contextmanager
def _signals():
    """A list that SIGINT or SIGTERM puts its number into; a second one acts as it would have without us."""
    received, former = [], {}

    def handler(signum, frame):
        received.append(signum)
        signal.signal(signum, former[signum])

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            former[signum] = signal.signal(signum, handler)
    except ValueError:  # not the main thread: signals are the caller's
        pass
    try:
        yield received
    finally:
        for signum, kept in former.items():
            signal.signal(signum, kept)
