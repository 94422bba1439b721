"""The command ``export``: a trained model as one file without the state of its training, and a card that describes it."""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

import fastflow
from fastflow import checkpoint
from fastflow.models.model import Model
from fastflow.trainer.config import config_error
from fastflow.trainer.kinds import kind_of
from fastflow.trainer.output import output

FORMATS = (".safetensors", ".pt")
_LONGEST = 2**20  # characters of result.json
# options of a run that describe it to a reader
_TRAINING = ("batch_size", "lr", "schedule", "warmup", "clip", "ema", "seed", "validation", "bf16", "float64")


@dataclass(frozen=True)
class Export:
    """Write a trained model as one file, and a card beside it: model, data, training, result, versions."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint, or a run folder: best.pt if a validation set chose it, otherwise last.pt."""
    out: str | None = None
    """File to write, .safetensors or .pt; the card has its name with the suffix .md. Default: model.safetensors."""


def export(options: Export) -> None:
    """Write the file, then its card. Raises CheckpointError, ConfigError or OSError."""
    path, out = Path(options.checkpoint), output(options.out, "model.safetensors", FORMATS)
    card = out.with_suffix(".md")
    if out.resolve() in [p.resolve() for p in (path, path / "last.pt", path / "best.pt")]:
        raise config_error("out", str(out), "another file than a checkpoint of the run")
    model, training = checkpoint.opened(path)
    checkpoint.save(out, model)
    with checkpoint.replacing(card) as file:
        file.write(model_card(model, training, _result(path), out.name).encode())
    print(f"{out}: {type(model).__name__}\n{card}: its card")


def _result(path: Path) -> dict | None:
    """What the run of a folder measured at its end."""
    file = (path if path.is_dir() else path.parent) / "result.json"
    if not file.is_file():
        return None
    try:
        with open(file, encoding="utf-8") as read:
            return json.loads(read.read(_LONGEST))
    except (ValueError, RecursionError) as error:
        raise checkpoint.CheckpointError(f"{file}: damaged, no JSON") from error


def model_card(model: Model, training: dict | None, result: dict | None, file: str) -> str:
    """The card as Markdown."""
    name, run = type(model).__name__, (training or {}).get("config", {})
    parts = [f"# {name}, trained on {Path(run['data']).name}" if run.get("data") else f"# {name}"]
    weights = sum(p.numel() for p in model.parameters())
    about = {"model": name, "samples": f"{list(model.shape)}, {_values(model)}", "parameters": f"{weights:,}"}
    parts += ["## Model", _table(about | (model.config or {}))]
    if training is not None:
        done = {"data": run.get("data"), "steps": training.get("step")}
        if training.get("seconds") is not None:
            done["minutes"] = f"{training['seconds'] / 60:.1f}"
        parts += ["## Training", _table(done | {k: run[k] for k in _TRAINING if run.get(k) is not None})]
    if result is not None:
        parts += ["## Result", f"```\n{kind_of(model.shape).report(result)}\n```"]
    trained = (training or {}).get("commit")
    made = [f"FastFlow {fastflow.__version__}"] + ([f"trained at commit {trained}"] if trained else [])
    parts += ["## Use", f"Written by {', '.join(made)}.", _use(file, model)]
    return "\n\n".join(parts) + "\n"


def _values(model: Model) -> str:
    return "continuous" if model.n_bits is None else f"uint8 with {model.n_bits} bits"


def _table(rows: dict) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items())])


def _use(file: str, model: Model) -> str:
    context = ", context=context" if model.classes is not None or model.context_shape is not None else ""
    return f"""```python
import fastflow

model = fastflow.load("{file}")
samples = model.sample(16{context})
log_prob = model.log_prob(samples{context})  # nats per sample
```"""
