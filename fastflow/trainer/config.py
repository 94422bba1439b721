"""The options of ``fastflow train``."""

import math
import warnings
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from fastflow.trainer.model_options import MODELS, OPTIONS, ModelOptions

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    ModelName = str
else:
    ModelName = Literal[(*MODELS, "auto")]

# Options that may differ when a run is resumed.
_MAY_CHANGE = set(
    "resume resume_if_present wandb out data data_changed check_contents steps epochs minutes patience lr clip save_every device workers "
    "data_dir accumulate bf16 compile cuda_graph deterministic timeout on_divergence divergence_factor rollbacks "
    "rollback_lr".split()
)
STEPS = 800
GAMMA = 0.99
# Old names of options: checkpoints of runs hold them, and the command line takes them for one more release.
RENAMED = {"flip": "horizontal_flip", "activations_every": "activation_checkpoint_every"}
# Values of ``reversible``, which was a flag: checkpoints of runs hold True or False, and the command line takes
# --reversible and --no-reversible for one more release.
REVERSIBLE = {True: "yes", False: "no"}


@dataclass(frozen=True)
class DataOptions:
    """Options of the data, and the model."""

    data: str = "photos"
    """photos, cifar10, mnist, a folder of images, a .npz file (uint8 x; optional: y, x_test, y_test, x_val,
    y_val), or a table: a .csv, .npy or .parquet file, or a .npz file with a two-dimensional x."""
    columns: str | None = None
    """Columns of a table to model, names separated by commas. Default: all but those of --context."""
    context: str | None = None
    """Columns of a table that the model is conditioned on, names separated by commas. Default: none."""
    data_dir: str = "data"
    """Folder of torchvision's cifar10 and mnist, which are downloaded to it if absent."""
    validation: float | None = None
    """Share of the training set that is held out as a validation set, chosen by the seed; 0: none. Default: the
    validation set of the data if they have one, otherwise none of images and 0.1 of a table."""
    image_size: int | None = None
    """Image side. Folders: default 32. MNIST: 32 (zero-padded) or 28, the default of mnist- models."""
    channels: int | None = None
    """Channels of a folder's images: 3, or 1 to convert them to gray. Default: 1 if all are gray, otherwise 3."""
    skip_damaged: bool = False
    """Decode every image of a folder once, and leave out damaged ones. Default: a damaged image is an error."""
    background: str | None = None
    """Color below transparent images of a folder: a name such as black, or #rrggbb. Default: white."""
    n_bits: int = 8
    """Bits per pixel and channel; values below 8 drop the lowest bits."""
    horizontal_flip: bool | None = None
    """Flip training images at random. Default: yes for photos, cifar10, folders. Deprecated name: --flip."""
    class_conditional: bool = False
    """Condition the model on the labels."""
    model: ModelName = "auto"
    """Model to train; mnist- models are from the UvA tutorial on image flows. auto: glow for images, vector_glow
    for a table."""


@dataclass(frozen=True)
class Config(ModelOptions, DataOptions):
    """Train a flow on images or on a table."""

    steps: int | None = None
    """Number of optimizer steps. Default: 800, or those of --epochs."""
    epochs: int | None = None
    """Number of passes over the training set, instead of --steps."""
    minutes: float | None = None
    """Time limit, final evaluation and pictures included. If the steps do not fit, their number and the
    learning-rate schedule are shortened. Default: 2.9 for photos, no limit (inf) for other data."""
    batch_size: int = 32
    """Images or rows per step, over all ranks."""
    accumulate: int = 1
    """Gradient-accumulation steps per rank."""
    lr: float = 3e-3
    """Learning rate of Adam after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the averages of gradients and of squared gradients."""
    warmup: int = 50
    """Steps over which the learning rate rises linearly."""
    schedule: Literal["cosine", "constant", "exponential"] = "cosine"
    """Learning rate after the warm-up: cosine decay to zero at the last step, constant, or multiplied by --gamma
    after every epoch or step."""
    schedule_by: Literal["step", "epoch"] | None = None
    """Unit after which the learning rate changes. Default: epoch for exponential, otherwise step."""
    gamma: float | None = None
    """Factor of the exponential schedule per epoch, or per step with --schedule-by step. Default: 0.99."""
    on_divergence: Literal["stop", "rollback"] = "stop"
    """After a loss or gradient that is not finite: stop, or go back to the best weights with a lower learning
    rate. rollback also does so after a jump of the loss."""
    divergence_factor: float = 2.0
    """With rollback: a loss above this factor times the lowest running mean is a jump."""
    rollbacks: int = 3
    """With rollback: largest number of rollbacks; the next collapse stops the run."""
    rollback_lr: float = 0.5
    """With rollback: factor on the learning rate, for each rollback."""
    scale_l2: float = 0.0
    """Weight in the loss of squared scales of weight-normalized convolutions (realnvp; paper: 5e-5)."""
    clip: float = 100.0
    """Largest norm of the gradient; larger gradients are scaled down to it."""
    ema: float = 0.0
    """EMA decay per step, e.g. 0.999; the average is evaluated, sampled and saved. 0 disables EMA."""
    bf16: bool | None = None
    """Run the networks in bfloat16; the flow's state stays float32. Default: yes for images on a GPU, otherwise
    no."""
    float64: bool = False
    """Compute in float64 (slow), to compare runs."""
    compile: bool = False
    """Compile the coupling networks with torch.compile."""
    reversible: Literal["auto", "yes", "no"] = "auto"
    """Recompute activations in backward (yes) or store them (no). auto: store them if they are estimated to
    fit in half of the free memory. Deprecated forms: --reversible without a value, --no-reversible."""
    cuda_graph: bool | None = None
    """Capture training steps, evaluation and sampling in CUDA graphs. Default: on a GPU, if it is possible;
    with True it is an error if it is not. --cuda-graph without a value is True, --no-cuda-graph is False."""
    deterministic: bool = True
    """Use only deterministic cuDNN algorithms, so that a GPU run can be resumed bit for bit."""
    seed: int = 0
    """Random seed for weights, batches, noise and samples."""
    device: str = "auto"
    """auto (cuda if available, otherwise cpu) or a torch device. Under torchrun each rank has its own GPU."""
    timeout: float = 60.0
    """Seconds that a rank waits for the other ranks within a step before it fails."""
    workers: int | None = None
    """Number of data-loading processes. Default: 0 for data in memory, up to 4 for a folder."""

    eval_every: int = 100
    """Steps between evaluations on the validation set, or on the test set if there is none."""
    patience: int = 0
    """Stop after this many evaluations in a row without a new best; 0: never. Needs a validation set."""
    eval_images: int = 1000
    """Number of images or rows in these evaluations, taken from the start; the final one uses the whole test
    set."""
    eval_samples: int = 1
    """Importance samples in these evaluations; without effect for a table, whose densities are exact."""
    final_samples: int = 8
    """Importance samples in the final evaluation; without effect for a table."""
    sample_every: int = 400
    """Steps between pictures of samples."""
    samples: int | None = None
    """Number of samples in these pictures. Default: 64 images, 1,000 rows."""
    temperature: float | None = None
    """Factor on the latents' standard deviation in these pictures. Default: 0.7 for images, 1 for a table."""
    save_every: int = 100
    """Steps between checkpoints."""

    out: str | None = None
    """Folder of the run, which must not exist or be empty. Default: the first unused runs/DATA-N."""
    resume: str | None = None
    """Continue the run in this folder with its own settings, few of which can be changed."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the scalars and pictures as well. Its WANDB_MODE=offline keeps them here."""
    resume_if_present: bool = False
    """Continue the run in --out if it has a checkpoint, otherwise start it: for schedulers that restart jobs."""
    data_changed: bool = False
    """Continue a run although its data changed since it started: with the data as they are now."""
    check_contents: bool = False
    """Read all files of the data at the start, so that a resumed run notices any change. Default: names, sizes, times
    and the first and last 4 KiB of 64 files."""

    def __post_init__(self) -> None:
        if isinstance(self.reversible, bool):
            value = REVERSIBLE[self.reversible]
            warnings.warn(
                f'reversible={self.reversible} is now "{value}"; bools will be refused',
                DeprecationWarning,
                stacklevel=3,
            )
            object.__setattr__(self, "reversible", value)


@dataclass(frozen=True)
class RunConfig(Config):
    """The settings of a run on its data, which leave none of these options open."""

    steps: int = STEPS
    samples: int = 64
    temperature: float = 1.0


class ConfigError(ValueError):
    """Settings that cannot be used; the message is one line."""


def config_error(option: str, got: object, expected: str) -> ConfigError:
    """The error of an option that has a wrong value."""
    return ConfigError(f"{option}: got {got}, expected {expected}")


def check_values(options: "DataclassInstance", least: dict[str, int]) -> None:
    """Raise ConfigError for an empty text, and for whole numbers below ``least`` or too large for a tensor's size.

    ``options``: the options of a command; those that are None are open.
    """
    for field in fields(options):
        given = getattr(options, field.name)
        for value in given if isinstance(given, tuple) else (given,):
            if value == "":
                raise config_error(field.name, "an empty text", "a value, or no such option")
            if field.name in least and value is not None and not value >= least[field.name]:
                raise config_error(field.name, value, f"at least {least[field.name]}")
            most = 2**63 - 1 if field.name == "seed" else 2**31 - 1
            if type(value) is int and value > most:
                raise config_error(field.name, value, f"at most {most}")
            if field.name == "temperature" and value is not None and not 0 <= value < math.inf:
                raise config_error(field.name, value, "0 or a positive number")


def validate_config(config: Config) -> None:
    """Raise ConfigError, naming the option, for a value that no run can have."""
    for field in fields(config):
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        value = getattr(config, field.name)
        if choices and value not in choices:
            raise config_error(field.name, repr(value), f"one of {', '.join(choices)}")
    ones = "batch_size accumulate eval_every eval_images eval_samples final_samples sample_every samples"
    ones += " save_every n_bits steps epochs image_size rollbacks"
    least: dict[str, int] = dict.fromkeys(ones.split(), 1)
    least |= dict.fromkeys("seed warmup patience workers".split(), 0)
    check_values(config, least)
    if config.steps is not None and config.epochs is not None:
        raise config_error("epochs", config.epochs, f"none with steps {config.steps}: give one of the two")
    if config.validation is not None and not 0 <= config.validation < 1:
        raise config_error("validation", config.validation, "a share from 0 to below 1")
    if config.channels not in (None, 1, 3):
        raise config_error("channels", config.channels, "1 or 3")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise config_error("betas", config.betas, "two decay rates from 0 to below 1")
    if config.n_bits > 8:
        raise config_error("n_bits", config.n_bits, "at most 8")
    if config.minutes is not None and not config.minutes > 0:
        raise config_error("minutes", config.minutes, "a positive number")
    for name in ("lr", "clip", "timeout"):
        if not 0 < getattr(config, name) < math.inf:
            raise config_error(name, getattr(config, name), "a positive number")
    if not 0 <= config.scale_l2 < math.inf:
        raise config_error("scale_l2", config.scale_l2, "0 or a positive number")
    if not 0 <= config.ema < 1:
        raise config_error("ema", config.ema, "a decay from 0 to below 1")
    _validate_schedule(config)
    _validate_rollback(config)
    if config.float64 and config.bf16:
        raise config_error("bf16", True, "False with float64")


def _validate_schedule(config: Config) -> None:
    if config.schedule_by not in (None, "step", "epoch"):
        raise config_error("schedule_by", repr(config.schedule_by), "step or epoch")
    if config.gamma is None:
        return
    if config.schedule != "exponential":
        raise config_error("gamma", config.gamma, f"no value with schedule {config.schedule}")
    if not 0 < config.gamma <= 1:
        raise config_error("gamma", config.gamma, "a factor above 0 and at most 1")


def _validate_rollback(config: Config) -> None:
    if not 1 < config.divergence_factor < math.inf:
        raise config_error("divergence_factor", config.divergence_factor, "a number above 1")
    if not 0 < config.rollback_lr < 1:
        raise config_error("rollback_lr", config.rollback_lr, "a factor between 0 and 1")


def stored_config(training: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run from the training state of its checkpoint, by their present names and values."""
    options: dict[str, Any] = training["config"]
    kept = {RENAMED.get(name, name): value for name, value in options.items()}
    if isinstance(kept.get("reversible"), bool):
        kept["reversible"] = REVERSIBLE[kept["reversible"]]
    kept.setdefault("validation", 0.0)  # older runs have none
    if "data" in training:
        kept.setdefault("channels", training["data"][2])  # gray folders of older runs have 3
    if (model := MODELS.get(kept.get("model", ""))) is not None:
        # defaults of other models' options, which may be others now
        kept = {name: value for name, value in kept.items() if name not in OPTIONS - model.options().keys()}
    if kept.get("epochs") is not None:
        kept["steps"] = None  # those of the epochs
    return kept


def with_steps(config: Config, images: int) -> RunConfig:
    """``config`` with the number of its steps, for this many training images; its other options have values."""
    steps = STEPS if config.steps is None else config.steps
    if config.epochs is not None:
        steps = -(-config.epochs * images // config.batch_size)
    return RunConfig(**vars(config) | {"steps": steps})


def with_choice_kept(training: dict[str, Any], config: Config) -> Config:
    """``config`` with the choices that the run made at its start, where it leaves them open."""
    kept = stored_config(training)
    if config.validation is None:
        config = replace(config, validation=kept["validation"])
    if config.channels is None:
        config = replace(config, channels=kept.get("channels"))
    if config.reversible != "auto":
        return config
    return replace(config, reversible=kept.get("reversible", "auto"))


def check_changes(training: dict[str, Any], config: Config) -> None:
    """Raise ConfigError if ``config`` changes an option that a resumed run cannot change."""
    kept, given = stored_config(training), asdict(config)
    for name in given:
        if name not in _MAY_CHANGE and kept.get(name, given[name]) != given[name]:
            allowed = ", ".join(sorted(_MAY_CHANGE - {"resume", "resume_if_present", "out"}))
            expected = f"{kept[name]} as in the run; a resumed run may change {allowed}"
            raise config_error(name, given[name], expected)
    if config.out is not None:
        raise config_error("out", config.out, f"none: a resumed run continues in its folder, {config.resume}")
