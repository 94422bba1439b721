"""What a run shows to the programs that watch runs: TensorBoard, and Weights & Biases if asked for."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastflow.checkpoint import naming
from fastflow.trainer.config import ConfigError, config_error

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter


class Board:
    """Scalars and pictures of a run, by step; each program gets the same.

    Args:
        folder: the run folder; TensorBoard's events are in it, if tensorboard is installed.
        step: steps done before.
        project: project of Weights & Biases, or None.
        run_id: the run there to continue, or None for a new one.
        settings: shown there with the run.

    Raises ConfigError if ``project`` is given and Weights & Biases cannot be used.
    """

    def __init__(
        self, folder: Path, step: int, project: str | None, run_id: str | None, settings: Mapping[str, object]
    ) -> None:
        self._folder = folder
        self._events = _open_tensorboard(folder, step)
        self._run = None if project is None else _open_wandb(folder, project, run_id, settings)
        self.run_id = run_id if self._run is None else self._run.id

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Show the values that are not None."""
        found = {name: value for name, value in values.items() if value is not None}
        if self._events:
            with naming(self._folder / "events"):
                for name, value in found.items():
                    self._events.add_scalar(name, value, step)
        if self._run:
            self._run.log({**found, "step": step})

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Show a picture, uint8 ``[H, W, 3]``."""
        if self._events:
            with naming(self._folder / "events"):
                self._events.add_image(name, pixels, step, dataformats="HWC")
        if self._run:
            import wandb

            self._run.log({name: wandb.Image(pixels), "step": step})

    def close(self) -> None:
        """Write what waits in memory, and close the files."""
        if self._events:
            with naming(self._folder / "events"):
                self._events.close()
        if self._run:
            self._run.finish()


def _open_tensorboard(folder: Path, step: int) -> "SummaryWriter | None":
    """A writer of TensorBoard events into ``folder``, or None if tensorboard is not installed.

    Also None for a folder whose name is no UTF-8, which TensorBoard cannot write to.
    """
    undecodable = any("\udc80" <= c <= "\udcff" for c in str(folder))
    if undecodable or importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=step + 1 if step else None)


def _open_wandb(
    folder: Path, project: str, run_id: str | None, settings: Mapping[str, object]
) -> "wandb.Run":
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise ConfigError("wandb: wandb is not installed: pip install fastflow-torch[wandb]") from error
    try:
        run = wandb.init(
            project=project,
            name=folder.name,
            id=run_id,
            resume="allow",
            config=dict(settings),
            settings=wandb.Settings(console="off"),
        )
    except (wandb.Error, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise config_error("wandb", project, f"a project that can be used ({reason})") from error
    run.define_metric("*", step_metric="step")  # a rollback goes back to an earlier step
    return run
