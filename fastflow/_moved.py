"""Import paths of version 0.1.0 that have moved. They work for one more release, with a DeprecationWarning.

The table has names only. A new module is imported when its old path is imported.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = {
    "fastflow.check": "fastflow.validation",
    **{
        f"fastflow.{name}": f"fastflow.trainer.{name}"
        for name in ("build", "config", "data", "evaluate", "picture", "progress", "ranks", "step", "train")
    },
    **{
        f"fastflow.nn.{name}": f"fastflow.nn.networks.{name}"
        for name in ("encoder_decoder", "gated_network", "glow_network", "mlp", "residual_network")
    },
    **{
        f"fastflow.nn.{name}": f"fastflow.nn.priors.{name}"
        for name in ("gaussian", "logistic", "mixture", "prior")
    },
}
# names that moved to another module or were renamed
NAMES = {
    "fastflow.check.beside": "fastflow.validation.same_device_and_precision",
    "fastflow.check.count": "fastflow.validation.positive_int",
    "fastflow.check.error": "fastflow.validation.argument_error",
    "fastflow.check.floating": "fastflow.validation.floating_point",
    "fastflow.config.check": "fastflow.trainer.config.validate_config",
    "fastflow.data.derive": "fastflow.seeds.derive",
    "fastflow.ranks.join": "fastflow.trainer.ranks.init_process_group",
    "fastflow.ranks.pooled": "fastflow.distributed.merge_statistics",
    "fastflow.ranks.share": "fastflow.trainer.ranks.shard_bounds",
    "fastflow.train.NonFiniteError": "fastflow.trainer.nonfinite.NonFiniteError",
    "fastflow.train.diagnose": "fastflow.trainer.nonfinite.diagnose",
    "fastflow.train.read_run": "fastflow.trainer.run.read_run",
    "fastflow.train.resumed": "fastflow.trainer.run.resumed_config",
}


class _MovedModule(Loader, MetaPathFinder):
    """Finds the old paths and makes modules that forward to the new ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = MODULES[old]
        # stacklevel skips frames of the import system, so 2 is the line of the import
        warnings.warn(
            f"{old} has moved to {new}; the old path will be removed", DeprecationWarning, stacklevel=2
        )

        def attribute(name: str) -> object:
            path, _, name = NAMES.get(f"{old}.{name}", f"{new}.{name}").rpartition(".")
            return getattr(importlib.import_module(path), name)

        module.__doc__ = f"Moved to :mod:`{new}`."
        module.__getattr__ = attribute
        importlib.import_module(new)


def install() -> None:
    """Makes the old paths importable."""
    if not any(isinstance(finder, _MovedModule) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModule())
