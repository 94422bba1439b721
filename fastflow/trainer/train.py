"""Training of a flow of images or rows, one loop to be read from top to bottom: see :func:`train`.

A run folder holds ``last.pt`` (all that is needed to continue), ``best.pt`` (the model with the best
evaluation so far, on the validation set if there is one, otherwise on the test set), ``metrics.csv`` (one row
per step), ``samples.png``, ``curve.png``, ``result.json`` at the end, and TensorBoard events if tensorboard is
installed. Batches, noise and samples are pure functions of (seed, step). Therefore a run that is killed at any
moment and resumed ends with the same weights and the same metrics.csv, byte for byte.

Started by torchrun, each rank processes its part of every batch; the main rank writes and prints.
"""

import math
import shlex
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from fastflow.models.model import Model
from fastflow.seeds import Stream, derive
from fastflow.trainer.config import GAMMA, Config, validate_config
from fastflow.trainer.ranks import init_process_group
from fastflow.trainer.run import Run
from fastflow.trainer.run_folder import with_present_run
from fastflow.trainer.signals import Interrupted, received_signals


def train(config: Config) -> tuple[Path, Model]:
    """Train as ``config`` specifies; give the run folder and the evaluated model.

    Raises ConfigError, DataError, DeviceError or CheckpointError (each a ValueError of one line) if the run
    cannot be started, NonFiniteError if the loss diverges, LostRankError if another rank died, Interrupted
    after SIGINT, SIGTERM, SIGHUP or SIGUSR1 (in the main thread).
    """
    config = with_present_run(config)
    validate_config(config)
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    with (
        init_process_group(name, config.timeout) as (ranks, device),
        cudnn_deterministic(config.deterministic),
        ExitStack() as locks,
    ):
        run = Run(config, ranks, device, locks)
        with received_signals() as signals:
            train_steps(run, signals)
        run.finish()
        return run.folder, run.eval_model.eval()


def train_steps(run: Run, signals: list[int]) -> None:
    """The training loop. A step counts when its optimizer step is done and its row is written.

    Raises Interrupted after the step in which one of ``signals`` arrived.
    """
    config, state, ranks = run.config, run.state, run.ranks
    stop = False
    run.model.train()
    with run.batches.stream(state.step, config.steps, config.workers) as batches:
        while state.step < state.target_steps and not stop:
            run.budget.start_step()
            x, labels = run.to_device(next(batches))
            lr = learning_rate(config, state.step, state.target_steps, run.source.length)
            lr *= config.rollback_lr ** len(state.rollbacks)
            seed = derive(config.seed, Stream.TRAINING_NOISE, state.step)
            # a step also sums the votes over the ranks, so that all of them stop after the same step
            votes = (len(signals), run.budget.target_steps if ranks.is_main else 0)
            loss, grad_norm, stop, target_steps, restored = run.take_step(x, labels, seed, lr, votes)
            state.step, state.target_steps = state.step + 1, target_steps
            if restored is None:
                run.average_weights()
            run.update_progress(loss if restored is None else None)

            eval_loss, improved = None, False
            if state.step % config.eval_every == 0 or state.step >= state.target_steps:
                eval_loss = run.evaluate()
                improved = state.improve(eval_loss)
            run.log(lr, loss, grad_norm, eval_loss, restored)
            if eval_loss is not None:
                run.stop_early()
            last = state.step >= state.target_steps
            saving = state.step % config.save_every == 0 or last
            sampling = state.step % config.sample_every == 0 and not last
            if improved:
                run.save_best()
            if saving:
                run.save()
            if sampling:
                run.save_pictures()
            if improved or saving or sampling:
                ranks.barrier()
    run.close_progress()
    if stop and state.step < state.target_steps:
        run.save()
        run.close_events()
        ranks.barrier()
        done = f"stopped at step {state.step} of {state.target_steps}, saved {run.last}"
        folder = shlex.quote(str(run.folder))
        signum = signals[0] if signals else signal.SIGTERM
        raise Interrupted(f"{done}; to go on: python -m fastflow train --resume {folder}", signum)


def learning_rate(config: Config, step: int, target_steps: int, images: int) -> float:
    """Rate of 0-based ``step`` with ``images`` training images: the schedule, after a linear warm-up.

    A pure function of its arguments, which a resumed run therefore continues. With ``schedule_by="epoch"`` all
    steps of an epoch have the rate of its first step.
    """
    epoch = step * config.batch_size // images
    exponential = config.schedule == "exponential"
    by_epoch = (config.schedule_by or ("epoch" if exponential else "step")) == "epoch"
    rate = config.lr
    if exponential:
        rate *= (GAMMA if config.gamma is None else config.gamma) ** (epoch if by_epoch else step)
    if step < config.warmup:
        return rate * (step + 1) / config.warmup
    if config.schedule == "cosine":
        first = max(config.warmup, -(-epoch * images // config.batch_size)) if by_epoch else step
        progress = (first - config.warmup) / max(1, target_steps - config.warmup)
        return rate * 0.5 * (1 + math.cos(math.pi * progress))
    return rate


@contextmanager
def cudnn_deterministic(enabled: bool) -> Iterator[None]:
    """Restrict cuDNN to deterministic algorithms within the block, as a reproducible GPU run requires."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = enabled or before
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
