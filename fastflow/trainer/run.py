"""A training run: its model, data, optimizer and files, and the operations of the training loop on them."""

import copy
import json
import math
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastflow import checkpoint, system
from fastflow.checkpoint import CheckpointError
from fastflow.models.model import Model
from fastflow.seeds import Stream, derive
from fastflow.trainer import data
from fastflow.trainer.activations import with_activations_chosen
from fastflow.trainer.board import Board
from fastflow.trainer.budget import TimeBudget
from fastflow.trainer.build import build_model, check_options, with_defaults
from fastflow.trainer.captured import record_on
from fastflow.trainer.config import (
    Config,
    check_changes,
    config_error,
    stored_config,
    with_choice_kept,
    with_steps,
)
from fastflow.trainer.evaluate import captured_log_prob, captured_sample, evaluate, save_pictures
from fastflow.trainer.kinds import kind_of
from fastflow.trainer.nonfinite import NonFiniteError, diagnose
from fastflow.trainer.progress import Metrics, Progress
from fastflow.trainer.ranks import Ranks, shard_bounds
from fastflow.trainer.run_folder import has_checkpoint, locked, new_folder
from fastflow.trainer.step import Step, autocast
from fastflow.validation import SingularError


@dataclass
class RunState:
    """Steps done and planned, seconds used by earlier processes, and the best evaluation.

    ``best``: its bits/dim; ``best_step``: its step; ``stale``: the number of evaluations since. ``rollbacks``:
    the steps after which the run went back to earlier weights. ``mean``: running mean of the training loss;
    ``lowest``: its lowest value. ``wandb``: the run of Weights & Biases.
    """

    step: int
    target_steps: int
    best: float | None = None
    seconds: float = 0.0
    best_step: int | None = None
    stale: int = 0
    rollbacks: list[int] = field(default_factory=list)
    mean: float | None = None
    lowest: float | None = None
    wandb: str | None = None

    def observe(self, loss: float) -> None:
        """Add the loss of a step to the running mean."""
        self.mean = loss if self.mean is None else 0.95 * self.mean + 0.05 * loss
        self.lowest = self.mean if self.lowest is None else min(self.lowest, self.mean)

    def improve(self, bits: float) -> bool:
        """Keep the best bits/dim of the evaluations; whether ``bits`` is better than all before."""
        better = self.best is None or bits < self.best
        self.best = bits if better else self.best
        self.best_step, self.stale = (self.step, 0) if better else (self.best_step, self.stale + 1)
        return better

    def stop_if_stale(self, patience: int) -> bool:
        """Plan no more steps after ``patience`` evaluations without a new best; 0: never."""
        stale = 0 < patience <= self.stale and self.step < self.target_steps
        if stale:
            self.target_steps = self.step
        return stale


class StepReport(NamedTuple):
    """Loss, gradient norm, whether a rank received a signal, and the planned number of steps.

    ``restored``: the step whose weights the model has again after a collapse, otherwise None.
    """

    loss: float
    grad_norm: float
    stop: bool
    target_steps: int
    restored: int | None = None


class Run:
    """A run on this rank, new or from its last checkpoint, ready for its next step.

    ``model`` is trained; ``eval_model`` is evaluated, sampled and saved: with ``ema`` its averaged copy,
    otherwise the same object. Files are written by the main rank only; on other ranks these methods do
    nothing.
    """

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, locks: ExitStack) -> None:
        began = time.monotonic()
        _check_device(config, ranks, device)
        self.ranks, self.device = ranks, device
        self._uncaptured = False
        self.captures = device.type == "cuda" if config.cuda_graph is None else config.cuda_graph
        self._locks = locks
        if config.resume and ranks.is_main and has_checkpoint(config.resume):
            locks.enter_context(locked(Path(config.resume)))
        saved = read_run(config.resume) if config.resume else None
        if saved:
            config = with_choice_kept(saved["training"], config)
            check_changes(saved["training"], config)
        self.notes: list[str] = []
        self._load_data(config)
        if saved and config.resume:
            self._restore(saved, Path(config.resume))
        else:
            self._create()
        self._set_up_training(saved)
        state = self.state
        self.budget = TimeBudget(
            self.config,
            state.step,
            state.target_steps,
            state.seconds,
            len(self.test),
            began,
            len(self.eval_set[0]),
        )
        self._open_files()
        if not saved:
            self.save()

    def _load_data(self, config: Config) -> None:
        """The source, its samples, and ``self.config``: ``config`` with values for what it leaves open."""
        ranks = self.ranks
        side = config.image_size
        if side is None and config.data == "mnist" and config.model.startswith("mnist-"):
            side = 28
        dtype = torch.float64 if config.float64 else torch.float32
        of_folder = (config.channels, config.skip_damaged, config.background)
        options = (config.data_dir, side, *of_folder, config.columns, config.context, dtype)
        source = ranks.local_main_first(lambda: data.load(config.data, *options))
        if config.channels not in (None, source.shape[0]):
            raise config_error("channels", config.channels, f"{source.shape[0]} for {config.data}")
        config = with_defaults(config, source)
        check_options(config, source)
        data.set_validation(source, config.validation, config.seed)
        self.config = with_steps(config, source.length)
        self.kind, self.unit = kind_of(source.shape), kind_of(source.shape).unit(source.shape)
        on_gpu = self.device.type == "cuda" and not config.float64
        self.bf16 = on_gpu and self.kind.bf16 if config.bf16 is None else config.bf16
        self.conditional = config.class_conditional or source.context_features is not None
        self.notes += source.notes
        self.evaluated = "test" if source.validation is None else "validation"
        if config.patience and source.validation is None:
            expected = "0 without a validation set, such as that of --validation 0.1"
            raise config_error("patience", config.patience, expected)
        if self.device.type == "cuda" and not config.workers and isinstance(source, data.InMemory):
            if source.nbytes < torch.cuda.mem_get_info(self.device)[0] / 8:
                source.to(self.device)
        self.source, self.part = source, shard_bounds(config.batch_size, ranks.rank, ranks.world_size)
        self.batches = data.Batches(
            source, config.batch_size, config.seed, config.n_bits, config.horizontal_flip, self.part
        )
        self.test, self.test_labels = self._as_evaluated(source.test, source.test_labels)
        self.eval_set = self.test, self.test_labels
        if source.validation is not None:
            self.eval_set = self._as_evaluated(source.validation, source.validation_labels)
        whole = config.check_contents and ranks.is_main
        self.data_identity = data.identity(config.data, source, whole)
        if config.check_contents:
            ranks.barrier()
        self.data_fingerprint = [source.length, len(source.test), *source.shape, source.classes]
        self.data_fingerprint += [] if source.validation is None else [len(source.validation)]

    def _as_evaluated(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return data.drop_bits(images, self.config.n_bits), labels if self.conditional else None

    def _create(self) -> None:
        """A new model, initialized from the first batch, and a new folder."""
        chosen = with_activations_chosen(self.config, self.source, self.ranks, self.device, self.bf16)
        self.config, note = chosen
        self.notes += [note] if note else []
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(config, self.source).to(self.device)
        self.model = model.double() if config.float64 else model
        if self.model.standardize is not None and isinstance(self.source, data.Table):
            rows, context = self.source.training_rows()
            context = None if context is None else context.to(self.device)
            self.model.standardize_by(rows.to(self.device), context)
        self.state = RunState(0, config.steps)
        x, labels = self.to_device(self.batches[0])
        with self.ranks.translate_collective_errors():
            seed = derive(config.seed, Stream.INITIALIZE)
            self.model.initialize(x, labels, seed=seed, offset=self.part[0])
        self.eval_model = copy.deepcopy(self.model) if config.ema else self.model
        self.folder = Path(
            self.ranks.broadcast_str(str(new_folder(config, self._locks)) if self.ranks.is_main else "")
        )

    def _restore(self, saved: dict[str, Any], folder: Path) -> None:
        """The models and the state of a checkpoint of ``folder``, which :func:`read_run` read."""
        config, training = self.config, saved["training"]
        self.folder = folder
        if config.data_changed:
            self.notes.append("data: as they are now, and not as when the run started")
        elif training["data"] != self.data_fingerprint:
            got = f"data of sizes {self.data_fingerprint}"
            expected = f"{training['data']} as in the run {self.folder}, or --data-changed"
            raise config_error("data", got, expected)
        elif changed := data.change(training.get("data_identity", {}), self.data_identity):
            got = f"{config.data}, of which {changed} of files changed"
            raise config_error("data", got, f"those of the run {self.folder}, or --data-changed")
        shape_and_classes = slice(2, 3 + len(self.source.shape))
        found, kept = self.data_fingerprint[shape_and_classes], training["data"][shape_and_classes]
        if found != kept:
            raise config_error("data", f"shape and classes {found}", f"{kept} as in the run {self.folder}")
        names = training.get("classes")
        found = self.source.class_names if isinstance(self.source, data.Folder) else names
        if self.conditional and names is not None and found != names:
            got, expected = (f"classes {', '.join(each or ())}" for each in (found, names))
            raise config_error("data", got, f"{expected} as in the run {self.folder}")
        self.eval_model = checkpoint.build(saved, self.last).to(self.device)
        if config.steps < (step := training["step"]):
            raise config_error("steps", config.steps, f"at least {step}, the current step of the run")
        self.state = RunState(
            step,
            training["total"],
            training["best"],
            training["seconds"],
            training.get("best_step"),
            training.get("stale", 0),
            training.get("rollbacks", []),
            training.get("mean"),
            training.get("lowest"),
            training.get("wandb"),
        )
        kept = {"patience": 0} | training["config"]  # older runs have no patience
        if any(getattr(config, name) != kept[name] for name in ("steps", "minutes", "patience")):
            self.state.target_steps = config.steps
        self.model = self.eval_model
        if config.ema:
            self.model = copy.deepcopy(self.eval_model)
            self.model.load_state_dict(training["trained"])

    def _set_up_training(self, saved: dict[str, Any] | None) -> None:
        config, model = self.config, self.model
        for each in {model, self.eval_model}:
            each.to(memory_format=torch.channels_last)  # faster convolutions; the layers keep the format
        if config.compile:
            model.compile_networks()
        groups = parameter_groups(model, config.scale_l2)
        beta1, beta2 = config.betas
        self.optimizer = torch.optim.Adam(groups, lr=config.lr, betas=(beta1, beta2), fused=True)
        if saved:
            self.optimizer.load_state_dict(saved["training"]["optimizer"])
            _set_rng_states(saved["training"]["rng"])
        uncaptured = None if config.cuda_graph else self.stop_capturing
        self._step = Step(
            model,
            self.optimizer,
            self.ranks,
            batch_size=config.batch_size,
            micro_batches=config.accumulate,
            clip=config.clip,
            bf16=self.bf16,
            capture=self.captures,
            uncaptured=uncaptured,
        )
        record = record_on(self.device, enabled=self.captures)
        self._log_prob = captured_log_prob(self.eval_model, uncaptured=uncaptured, record=record)
        self._draw = captured_sample(self.eval_model, uncaptured=uncaptured, record=record)
        if config.compile and self.ranks.world_size > 1:
            # here, because the ranks may compile for longer than they wait for each other in a step
            self._step.compile_forward_backward()
            self.ranks.barrier()
        self._averages: list[Tensor] = list(self.eval_model.parameters())
        self._weights: list[Tensor] = list(model.parameters())
        statistics = zip(self.eval_model.running_statistics(), model.running_statistics(), strict=True)
        self._statistics = list(statistics) if config.ema else []

    def _open_files(self) -> None:
        if not self.ranks.is_main:
            return
        config, step = self.config, self.state.step
        self.metrics = Metrics(
            self.folder / "metrics.csv",
            step,
            self.evaluated,
            self.unit.key,
            rollbacks=config.on_divergence == "rollback",
        )
        self.board = Board(self.folder, step, config.wandb, self.state.wandb, asdict(config))
        unit, noun = self.unit, self.kind.noun
        self.progress = Progress(self.state.target_steps, step, config.batch_size, unit.name, noun)
        size = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        count, samples = self.ranks.world_size, f"{self.source.length:,} {noun} of {self.source.name}"
        if self.source.validation is not None:
            samples += f", {len(self.source.validation):,} for validation"
        where = f"{count} x {self.device.type}" if count > 1 else self.device.type
        self.progress.say(f"{self.folder}: {size:,} parameters, {samples}, {where}")
        for note in self.notes:
            self.progress.say(note)

    def stop_capturing(self, reason: str) -> None:
        """Evaluate and sample without CUDA graphs from now on; name the ``reason``, once per run."""
        if not self._uncaptured and self.ranks.is_main:
            self.progress.say(f"CUDA graph: not captured, {reason}")
        self._uncaptured = True
        for captured in (self._log_prob, self._draw):
            captured.stop()

    @property
    def last(self) -> Path:
        """The file of the last checkpoint."""
        return self.folder / "last.pt"

    def to_device(self, batch: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        x, labels = batch
        if labels is not None:
            labels = labels.to(self.device, non_blocking=True) if self.conditional else None
        memory_format = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        return x.to(self.device, non_blocking=True, memory_format=memory_format), labels

    def take_step(
        self, x: Tensor, labels: Tensor | None, seed: int, lr: float, votes: tuple[float, float]
    ) -> StepReport:
        """Take one optimizer step, and go back to the best weights after a collapse, if the run may do so.

        Raises NonFiniteError otherwise; after a loss that is not finite, the weights are those before the step.
        """
        try:
            bits, grad_norm, stop, target_steps = self._step(x, labels, seed, lr, votes)
        except SingularError as error:
            if self._may_roll_back():  # the votes are summed again in the next step
                restored = self._roll_back(str(error))
                return StepReport(math.nan, math.nan, False, self.state.target_steps, restored)
            raise self._non_finite_error(str(error), "last checkpoint") from None
        loss = bits * self.unit.of_bits_per_dim
        report = StepReport(loss, grad_norm, bool(stop), int(target_steps))
        jump = self._jump(loss)
        if math.isfinite(loss) and math.isfinite(grad_norm) and jump is None:
            self.state.observe(loss)
            return report
        try:
            with autocast(self.device, self.bf16):
                reason = jump or diagnose(self.model, x, labels, seed, self.part[0])
        except SingularError as error:  # a GPU reports a singular matrix at the next call
            reason = str(error)
        found = f"{self.unit.name} {loss:g}, gradient norm {grad_norm:g}; {reason}"
        if self._may_roll_back():
            return report._replace(restored=self._roll_back(found))
        raise self._non_finite_error(found, "last good checkpoint")

    def _jump(self, loss: float) -> str | None:
        """The reason to go back if the loss of a step is far above the losses before, otherwise None."""
        config, lowest = self.config, self.state.lowest
        if config.on_divergence == "stop" or lowest is None or not math.isfinite(loss):
            return None
        # nats may be near 0 or negative
        most = lowest + (config.divergence_factor - 1) * max(abs(lowest), 1.0)
        return f"above {most:.3f}; the lowest running mean is {lowest:.3f}" if loss > most else None

    def _may_roll_back(self) -> bool:
        config = self.config
        return config.on_divergence == "rollback" and len(self.state.rollbacks) < config.rollbacks

    def _roll_back(self, reason: str) -> int:
        """Go back to the weights, averages and optimizer of best.pt, or of last.pt; give their step.

        All ranks read the same file. Tensors keep their addresses, so CUDA graphs stay valid.
        """
        config, state = self.config, self.state
        saved, name = self._snapshot()
        self.eval_model.load_state_dict(saved["state_dict"])
        if config.ema:
            self.model.load_state_dict(saved["training"]["trained"])
        _restore_optimizer(self.optimizer, saved["training"]["optimizer"])
        state.rollbacks.append(state.step + 1)
        restored = saved["training"]["step"]
        if self.ranks.is_main:
            rate = f"learning rate times {config.rollback_lr ** len(state.rollbacks):g}"
            count = f"rollback {len(state.rollbacks)} of {config.rollbacks}"
            line = f"step {state.step + 1}: {reason}; back to step {restored} of {name}, {rate}, {count}"
            self.progress.say(line)
        self.ranks.barrier()  # the main rank may write the file again
        return restored

    def _snapshot(self) -> tuple[dict[str, Any], str]:
        """Contents and name of best.pt, or of last.pt if there is no training state of the best step."""
        if (path := self.folder / "best.pt").exists():
            best = checkpoint.read(path)
            # a run that was killed and resumed may have written one of a later step
            step = (best["training"] or {}).get("step")
            if step is not None and step == self.state.best_step:
                return best, path.name
        return read_run(self.folder), self.last.name

    def _non_finite_error(self, reason: str, last: str) -> NonFiniteError:
        if self.ranks.is_main:
            self.metrics.sync()
            self.progress.close()
        return NonFiniteError(f"step {self.state.step + 1}: {reason}; the {last} is {self.last}")

    def average_weights(self) -> None:
        """Update the averaged weights of ``eval_model``, and copy the running statistics to it."""
        if not self.config.ema:
            return
        step = self.state.step
        decay = min(
            self.config.ema, (1 + step) / (10 + step)
        )  # low at first, to forget the first weights soon
        get_ema_multi_avg_fn(decay)(self._averages, self._weights, None)
        for average, value in self._statistics:
            average.copy_(value)

    def evaluate(self) -> float:
        """Mean loss on the validation set, or on the test set if there is none."""
        count = self.config.eval_images
        images, labels = self.eval_set
        labels = None if labels is None else labels[:count]
        return self._losses(images[:count], labels, self.config.eval_samples)[-1]

    def _losses(self, images: Tensor, labels: Tensor | None, samples: int) -> list[float]:
        """Mean losses with 1, 2, ... ``samples`` importance samples."""
        bounds = evaluate(
            self.eval_model,
            images,
            labels,
            samples=samples,
            seed=self.config.seed,
            bf16=self.bf16,
            each=True,
            ranks=self.ranks,
            log_prob=self._log_prob,
        )
        return [self.unit.of_bits_per_dim * bits for bits in bounds.mean(1).tolist()]

    def update_progress(self, loss: float | None) -> None:
        """Show the step's loss, None after a collapse; adapt the number of steps to the time limit."""
        if not self.ranks.is_main:
            return
        step, config = self.state.step, self.config
        self.progress.update(loss, self.state.target_steps)
        if self.budget.end_step(step, self.state.target_steps):
            fitting, minutes = self.budget.target_steps, self.budget.limit / 60
            self.progress.say(f"step {step}: {fitting} of {config.steps} steps fit in {minutes:g} minutes")

    def stop_early(self) -> None:
        """Plan no more steps if ``patience`` is used up."""
        state, patience = self.state, self.config.patience
        if state.stop_if_stale(patience) and self.ranks.is_main:
            best = f"{state.best:.3f} {self.unit.name} of step {state.best_step}"
            self.progress.say(f"step {state.step}: {patience} evaluations without a new best, {best}")

    def log(
        self, lr: float, loss: float, grad_norm: float, eval_loss: float | None, restored: int | None = None
    ) -> None:
        """Write the step's row of metrics.csv and show its scalars."""
        if not self.ranks.is_main:
            return
        step = self.state.step
        if eval_loss is not None:
            found = f"{self.evaluated} {eval_loss:.3f} {self.unit.name}"
            train = math.nan if self.progress.loss is None else self.progress.loss
            self.progress.say(f"step {step}: train {train:.3f}, {found}")
        epoch = step * self.config.batch_size // self.source.length
        self.metrics.write(step, epoch, lr, loss, grad_norm, eval_loss, restored)
        key = self.unit.key
        scalars: dict[str, float | None] = {
            f"train/{key}": loss,
            "train/grad_norm": grad_norm,
            "train/lr": lr,
        }
        scalars[f"{self.evaluated}/{key}"] = eval_loss
        scalars["train/back_to_step"] = restored
        scalars[f"{self.kind.noun}_per_second"] = self.progress.samples_per_second
        self.board.scalars(scalars, step)

    def save_best(self) -> None:
        """Write best.pt."""
        if self.ranks.is_main:
            # a rollback needs more than the evaluated weights
            rollback = self.config.on_divergence == "rollback"
            training = self._training_state() if rollback else self._about()
            checkpoint.save(self.folder / "best.pt", self.eval_model, training)

    def _about(self) -> dict[str, Any]:
        """What every checkpoint of the run holds: its settings, columns of a table, classes of a folder."""
        about: dict[str, Any] = {"config": asdict(self.config)}
        if isinstance(self.source, data.Table):
            about["columns"] = {name: list(of) for name, of in self.source.columns._asdict().items()}
        if isinstance(self.source, data.Folder) and self.source.class_names is not None:
            about["classes"] = self.source.class_names
        return about

    def save(self) -> None:
        """Write last.pt: the evaluated model, and all that is needed to continue the run."""
        if not self.ranks.is_main:
            return
        self.metrics.sync()
        checkpoint.save(self.last, self.eval_model, self._training_state())

    def _training_state(self) -> dict[str, Any]:
        """All that a checkpoint needs in addition to the evaluated model, to continue the run."""
        state = self.state
        training = {
            **self._about(),
            "data": self.data_fingerprint,
            "data_identity": self.data_identity,
            "step": state.step,
            "total": state.target_steps,
            "best": state.best,
            "best_step": state.best_step,
            "stale": state.stale,
            "rollbacks": state.rollbacks,
            "mean": state.mean,
            "lowest": state.lowest,
            "chosen": "last.pt" if self.source.validation is None else "best.pt",
            "seconds": self.budget.elapsed(),
            "commit": system.commit(),
            "wandb": self.board.run_id,
            "optimizer": self.optimizer.state_dict(),
            "rng": _rng_states(),
        }
        if self.config.ema:
            training["trained"] = self.model.state_dict()
        return training

    def save_pictures(self, codecs: dict[str, float] | None = None) -> None:
        """Write samples.png and curve.png; ``codecs``: bits/dim of image codecs, drawn into the curve."""
        if self.ranks.is_main:
            options = {"board": self.board, "step": self.state.step, "codecs": codecs, "draw": self._draw}
            options["evaluated"] = self.evaluated
            save_pictures(self.folder, self.config, self.eval_model, self.source, **options)

    def close_progress(self) -> None:
        if self.ranks.is_main:
            self.progress.close()

    def close_events(self) -> None:
        """Write what the board keeps in memory, and close it."""
        if self.ranks.is_main:
            self.board.close()

    def finish(self) -> None:
        """Evaluate on the whole test set; write result.json and the pictures.

        With a validation set, this evaluates best.pt, which it chose, otherwise the last weights.
        """
        config = self.config
        chosen = {}
        if self.source.validation is not None:
            best = checkpoint.read(self.folder / "best.pt", self.device)
            self.eval_model.load_state_dict(best["state_dict"])
            count = min(config.eval_images, len(self.source.validation))
            chosen[f"validation_{self.unit.key}"] = self.state.best
            chosen[f"validation_{self.kind.noun}"] = count
        bounds = self._losses(self.test, self.test_labels, config.final_samples)
        if self.ranks.is_main:
            result = {
                "model": type(self.eval_model).__name__,
                "step": self.state.best_step if chosen else self.state.step,
                **self.kind.result(self.test, bounds, self.eval_model.n_bits),
                **({"rollbacks": self.state.rollbacks} if self.state.rollbacks else {}),
                **chosen,
            }
            self.save_pictures(result.get("codecs_bits_per_dim"))
            with checkpoint.replacing(self.folder / "result.json") as file:
                file.write((json.dumps(result, indent=2) + "\n").encode())
            self.close_events()
            print(self.kind.report(result))
            print(f"{self.folder}: last.pt, best.pt, metrics.csv, curve.png, samples.png")
        self.ranks.barrier()


def read_run(folder: Path | str) -> dict[str, Any]:
    """Read the last checkpoint of a run folder. Raises CheckpointError if the run cannot continue."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run folder")
    if not has_checkpoint(folder):
        expected = "expected last.pt; the command with --out starts a run without one again"
        raise CheckpointError(f"{folder}: got no checkpoint, {expected}")
    contents = checkpoint.read(folder / "last.pt")
    if "step" not in (contents["training"] or {}):
        raise CheckpointError(f"{folder / 'last.pt'}: holds no training state to continue from")
    return contents


def resumed_config(folder: str) -> Config:
    """The Config that continues the run of ``folder`` unchanged."""
    kept = stored_config(read_run(folder)["training"])
    known = {field.name for field in fields(Config)}
    config = Config(**{k: v for k, v in kept.items() if k in known})
    return replace(config, resume=str(folder), out=None, resume_if_present=False, data_changed=False)


def parameter_groups(model: Model, scale_l2: float) -> list[dict[str, Any]]:
    """The parameters as optimizer groups; penalized scales are a group with weight decay."""
    scales = model.weight_scales() if scale_l2 else []
    chosen = {id(p) for p in scales}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    # Adam's weight decay adds its multiple of the weight to the gradient; the gradient of a square has a
    # factor of 2
    return [{"params": rest}, *([{"params": scales, "weight_decay": 2 * scale_l2}] if scales else [])]


@torch.no_grad()
def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Copy the state of parameters into the optimizer's own tensors; zeros if ``saved`` has none yet.

    The learning rate stays. ``Optimizer.load_state_dict`` would replace the tensors that a CUDA graph updates.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        kept = saved["state"].get(number, {})
        for name, value in optimizer.state[parameter].items():
            value.copy_(kept[name]) if name in kept else value.zero_()


def _check_device(config: Config, ranks: Ranks, device: torch.device) -> None:
    if config.cuda_graph and device.type != "cuda":
        raise config_error("cuda_graph", f"device {device}", "a CUDA device")
    least = ranks.world_size * config.accumulate
    if config.batch_size < least:
        product = f"ranks times accumulate, {ranks.world_size} x {config.accumulate}"
        raise config_error("batch_size", config.batch_size, f"at least {least} ({product})")


def _rng_states() -> dict:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def _set_rng_states(states: dict) -> None:
    torch.set_rng_state(states["cpu"].cpu())
    if torch.cuda.is_available() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
