"""Training of an image flow, one loop to be read from top to bottom: see :func:`train`.

A run folder holds ``last.pt`` (all that is needed to go on), ``best.pt`` (the model with the best test bits/dim so
far), ``metrics.csv`` (a row a step), ``samples.png``, ``curve.png``, ``result.json`` at the end, and TensorBoard's
events where tensorboard is installed.  Batches, noise and samples are pure functions of (seed, step), so that a run
killed at any moment and resumed ends with the same weights and the same metrics.csv, byte for byte.

Started by torchrun, each rank takes its share of every batch; the first one writes.
"""

import copy
import importlib.util
import json
import math
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastflow import checkpoint
from fastflow.check import SingularError
from fastflow.checkpoint import CheckpointError
from fastflow.seeds import Stream, derive
from fastflow.trainer import data, picture
from fastflow.trainer.build import build_model
from fastflow.trainer.config import Config, ConfigError, check, check_changes
from fastflow.trainer.evaluate import evaluate, pictures, report
from fastflow.trainer.progress import Metrics, Progress
from fastflow.trainer.ranks import join, share
from fastflow.trainer.step import Step, autocast


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite, or a weight without an inverse; the message names the step and the layer or matrix."""


class Interrupted(Exception):
    """The run was stopped by a signal (``signum``) after saving; the message says where and how to go on."""

    def __init__(self, message, signum):
        super().__init__(message)
        self.signum = signum


def train(config):
    """Train as ``config`` says and give back the run's folder and the model that was evaluated.

    Raises ConfigError, DataError, DeviceError or CheckpointError (each a ValueError of one line) for what cannot be started,
    NonFiniteError when the loss diverges, LostRankError when another rank died, Interrupted after SIGINT or SIGTERM (in
    the main thread).
    """
    check(config)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    with join(name, config.timeout) as (ranks, device):
        return _train(config, ranks, device)


def _train(config, ranks, device):
    # Setup: data, model and optimizer, new or from the run's last checkpoint.
    began = time.monotonic()
    if config.cuda_graph and device.type != "cuda":
        raise ConfigError(f"cuda_graph: the device is {device}, expected a CUDA device")
    if config.batch_size < ranks.count * config.accumulate:
        parts = f"(ranks times accumulate, {ranks.count} x {config.accumulate})"
        raise ConfigError(
            f"batch_size is {config.batch_size}, expected at least {ranks.count * config.accumulate} {parts}"
        )
    bf16 = device.type == "cuda" and not config.float64 if config.bf16 is None else config.bf16
    saved = read_run(config.resume) if config.resume else None
    if saved:
        check_changes(saved["training"], config)
    size = (
        28
        if config.image_size is None and config.data == "mnist" and config.model.startswith("mnist-")
        else config.image_size
    )
    source = ranks.first_then_rest(lambda: data.load(config.data, config.data_dir, size))
    if device.type == "cuda" and not config.workers and isinstance(source, data.Images):
        if source.nbytes < torch.cuda.mem_get_info(device)[0] / 8:
            source.to(device)
    part = share(config.batch_size, ranks.index, ranks.count)
    batches = data.Batches(source, config.batch_size, config.seed, config.n_bits, config.flip, part)
    identity = [source.length, len(source.test), *source.image_shape, source.classes]
    if saved:
        run = Path(config.resume)
        state = saved["training"]
        if state["data"] != identity:
            raise ConfigError(f"{run}: was trained on other data (sizes {state['data']}, now {identity})")
        shown = checkpoint.build(saved, run / "last.pt").to(device)
        step, total, best, seconds = state["step"], state["total"], state["best"], state["seconds"]
        if (config.steps, config.minutes) != (state["config"]["steps"], state["config"]["minutes"]):
            total = config.steps
        model = shown
        if config.ema:
            model = copy.deepcopy(shown)
            model.load_state_dict(state["trained"])
    else:
        torch.manual_seed(config.seed)
        model = build_model(config, source).to(device)
        model = model.double() if config.float64 else model
        step, total, best, seconds = 0, config.steps, None, 0.0
        x, labels = _on(device, batches[0], config)
        with ranks.losing():
            model.initialize(x, labels, seed=derive(config.seed, Stream.INITIALIZE), offset=part[0])
        shown = copy.deepcopy(model) if config.ema else model
        run = Path(ranks.tell(str(_new_folder(config)) if ranks.first else ""))
    for each in {model, shown}:
        each.to(memory_format=torch.channels_last)  # convolutions run faster in it, and the layers keep it
    if config.compile:
        model.compile_networks()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(
        _groups(model, config.scale_l2), lr=config.lr, betas=tuple(config.betas), fused=True
    )
    if saved:
        optimizer.load_state_dict(state["optimizer"])
        _set_rng(state["rng"])
    take_step = Step(
        model,
        optimizer,
        ranks,
        batch_size=config.batch_size,
        parts=config.accumulate,
        clip=config.clip,
        bf16=bf16,
        capture=config.cuda_graph,
    )
    if config.compile and ranks.count > 1:
        take_step.alone()  # compiling may take one rank longer than the others would wait in a step
        ranks.wait()
    averages, weights = list(shown.parameters()), list(model.parameters())
    statistics = (
        list(zip(shown.running_statistics(), model.running_statistics(), strict=True)) if config.ema else []
    )
    test = source.test >> (8 - config.n_bits)
    test_labels = source.test_labels if config.class_conditional else None
    metrics = Metrics(run / "metrics.csv", step) if ranks.first else None
    board = _tensorboard(run, step) if ranks.first else None
    progress = Progress(total, step, config.batch_size) if ranks.first else None
    size = sum(p.numel() for p in parameters)
    if ranks.first:
        where = f"{ranks.count} x {device.type}" if ranks.count > 1 else device.type
        progress.say(f"{run}: {size:,} parameters, {source.length:,} images of {source.name}, {where}")

    def save():
        state = {"config": asdict(config), "data": identity, "step": step, "total": total, "best": best}
        state |= {
            "seconds": seconds + time.monotonic() - began,
            "optimizer": optimizer.state_dict(),
            "rng": _rng(),
        }
        state |= {"trained": model.state_dict()} if config.ema else {}
        metrics.sync()
        checkpoint.save(run / "last.pt", shown, state)

    def bits_of_test(samples, images=None):
        labels = None if test_labels is None else test_labels[:images]
        options = {"samples": samples, "seed": config.seed, "bf16": bf16, "each": True, "ranks": ranks}
        return evaluate(shown, test[:images], labels, **options).mean(1).tolist()

    def ends(reason, checkpoint="last checkpoint"):
        if ranks.first:
            metrics.sync()
            progress.close()
        return NonFiniteError(f"step {step + 1}: {reason}; the {checkpoint} is {run / 'last.pt'}")

    # The loop.  A step counts when its optimizer step is done and its row is written.
    if not saved and ranks.first:
        save()
    model.train()
    stream = batches.stream(step, config.steps, config.workers)
    limit = 60 * (config.minutes or (2.9 if config.data == "photos" else math.inf))
    stepping, begun_at, looked, fits = 0.0, step, began, total
    with _signals() as stop:
        stopped = 0
        while step < total and not stopped:
            start = time.monotonic()
            x, labels = _on(device, next(stream), config)
            lr = learning_rate(config, step, total)
            seed = derive(config.seed, Stream.TRAINING_NOISE, step)
            try:
                # what ranks have to agree on, a signal and the first one's clock, they do in the step's own sum
                wishes = (len(stop), fits if ranks.first else 0)
                bits, grad_norm, stopped, fits = take_step(x, labels, seed, lr, wishes)
            except SingularError as error:
                raise ends(str(error)) from None
            if not (math.isfinite(bits) and math.isfinite(grad_norm)):
                try:
                    with autocast(device, bf16):
                        reason = diagnose(model, x, labels, seed, part[0])
                except SingularError as error:  # which a GPU's kernels can only say now
                    reason = str(error)
                raise ends(
                    f"bits/dim {bits:g}, gradient norm {grad_norm:g}; {reason}", "last good checkpoint"
                )
            step += 1
            if config.ema:
                decay = min(
                    config.ema, (1 + step) / (10 + step)
                )  # so that the first weights are soon forgotten
                get_ema_multi_avg_fn(decay)(averages, weights, None)
                for average, value in statistics:
                    average.copy_(value)
            total = int(fits)
            if ranks.first:
                progress.update(bits, total)
            taken = step - begun_at - 1  # the first may have compiled something
            stepping += time.monotonic() - start if taken else 0.0
            if (
                ranks.first
                and limit < math.inf
                and taken
                and ((step - begun_at) % 50 == 0 or time.monotonic() - looked > 10)
            ):
                looked = time.monotonic()
                left = limit - seconds - (looked - began)
                fitting = step + _steps_that_fit(config, left, stepping / taken, len(test))
                fitting = min(max(fitting, step + 1), config.steps)
                # Estimates err, and the schedule should not follow each error; towards the end they have to hold.
                if fitting < (0.95 * total if step < total / 2 else total) or fitting > 1.05 * total:
                    progress.say(
                        f"step {step}: {fitting} of {config.steps} steps fit in {limit / 60:g} minutes"
                    )
                    fits = fitting

            last = step >= total
            test_bits = None
            if step % config.eval_every == 0 or last:
                test_bits = bits_of_test(config.eval_samples, config.eval_images)[-1]
            better = test_bits is not None and (best is None or test_bits < best)
            best = test_bits if better else best
            saving = step % config.save_every == 0 or last
            sampling = step % config.sample_every == 0 and not last
            if ranks.first:
                if test_bits is not None:
                    progress.say(f"step {step}: train {progress.bits:.3f}, test {test_bits:.3f} bits/dim")
                metrics.write(step, step * config.batch_size // source.length, lr, bits, grad_norm, test_bits)
                if board:
                    values = {"train/bits_per_dim": bits, "train/grad_norm": grad_norm, "train/lr": lr}
                    values |= {
                        "test/bits_per_dim": test_bits,
                        "images_per_second": progress.images_per_second,
                    }
                    for name, value in values.items():
                        if value is not None:
                            board.add_scalar(name, value, step)
                if better:
                    checkpoint.save(run / "best.pt", shown)
                if saving:
                    save()
                if sampling:
                    pictures(run, config, shown, metrics.path, board, step)
            if better or saving or sampling:
                ranks.wait()
    if ranks.first:
        progress.close()
    if stopped and step < total:
        if ranks.first:
            save()
        ranks.wait()
        again = f"python -m fastflow train --resume {run}"
        signum = stop[0] if stop else signal.SIGTERM
        raise Interrupted(
            f"stopped at step {step} of {total}, saved {run / 'last.pt'}; to go on: {again}", signum
        )

    # The end: the whole test set, the pictures, the codecs.  All of it is done again by resuming a finished run.
    bounds = bits_of_test(config.final_samples)
    if ranks.first:
        result = {
            "model": type(shown).__name__,
            "step": step,
            "test_images": len(test),
            "importance_samples": config.final_samples,
        }
        result |= {"test_bits_per_dim": bounds[-1], "test_bits_per_dim_1_sample": bounds[0]}
        codecs = picture.codec_bits_per_dim(test[:1000]) if config.n_bits == 8 else {}
        result["codecs_bits_per_dim"] = codecs
        pictures(run, config, shown, metrics.path, board, step, codecs)
        with checkpoint.replacing(run / "result.json") as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
        if board:
            board.close()
        print(report(result))
        print(f"{run}: last.pt, best.pt, metrics.csv, curve.png, samples.png")
    ranks.wait()
    return run, shown.eval()


def learning_rate(config, step, total):
    """The rate of 0-based ``step``: linear to ``lr`` over the warm-up, then constant or a cosine to 0 at ``total``."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - config.warmup) / max(1, total - config.warmup)))


def diagnose(model, x, labels, seed, offset=0):
    """One phrase: the first layer whose output is not finite as ``x`` runs again, and the largest gradient."""
    first = []

    def hook(name):
        def look(module, inputs, output):
            if not first and not all(t.isfinite().all() for t in _tensors(output)):
                first.append(
                    f"the first output that is not finite is that of {name} ({type(module).__name__})"
                )

        return look

    handles = [m.register_forward_hook(hook(name or "the model")) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model(x, labels, seed=seed, offset=offset)
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


def _groups(model, scale_l2):
    """The parameters, and where they are penalised those of weight normalization that are scales as a group of their own."""
    scales = model.weight_scales() if scale_l2 else []
    chosen = {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    # Adam's weight decay adds its multiple of a weight to the gradient, which that of a square is twice
    return [{"params": rest}, *([{"params": scales, "weight_decay": 2 * scale_l2}] if scales else [])]


def _new_folder(config):
    if config.out is not None:
        run = Path(config.out)
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ConfigError(
                f"out: {run} exists; --resume {run} goes on with a run, another --out starts one"
            )
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
