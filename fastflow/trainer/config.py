"""What a training run is told: the options of ``fastflow train``."""

import math
from dataclasses import asdict, dataclass

_MAY_CHANGE = set(
    "resume out steps minutes lr clip save_every device workers data_dir accumulate bf16 compile cuda_graph timeout".split()
)


@dataclass(frozen=True)
class Config:
    """Train a flow on images."""

    data: str = "photos"
    """photos, cifar10, mnist, a folder of images, or a .npz file (uint8 x, and y, x_test, y_test at will)."""
    data_dir: str = "data"
    """Where torchvision finds cifar10 and mnist, or downloads them to."""
    image_size: int | None = None
    """Side of an image in pixels: folders are resized to it (32), mnist is padded from 28 to 32 unless it is 28 (as for mnist- models)."""
    n_bits: int = 8
    """Bits a pixel and channel; fewer than 8 drop the lowest."""
    flip: bool | None = None
    """Mirror training images at random; the default is what is usual for the data."""
    class_conditional: bool = False
    """Give the labels to the model."""

    model: str = "glow"
    """glow, realnvp, nice, or one of the UvA tutorial's flows for MNIST: mnist-simple, mnist-vardeq, mnist-multiscale."""
    levels: int | None = None
    """Scales: each but RealNVP's last halves the image's side; the default is 3 for glow and 2 for realnvp."""
    steps_per_level: int = 8
    """Steps of flow a level (K)."""
    hidden: int | None = None
    """Channels inside the coupling networks; the default is 32 for glow, 64 for realnvp, 1000 for nice."""
    blocks: int | None = None
    """Residual blocks of a network of realnvp (8), hidden layers of one of nice (5)."""
    learned_prior: bool = False
    """Learn the last latent's mean and scale, which are else 0 and 1."""
    prior: str = "logistic"
    """Of nice: logistic or gaussian."""
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
    """Images a step, over all ranks."""
    accumulate: int = 1
    """Parts that a rank takes its share of a batch in, to fit its memory."""
    lr: float = 3e-3
    """Adam's learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's averaging of gradients and of their squares."""
    warmup: int = 50
    """Steps over which the learning rate rises linearly."""
    schedule: str = "cosine"
    """After the warm-up: cosine (to zero at the last step) or constant."""
    scale_l2: float = 0.0
    """Coefficient of the squared scales of weight-normalised convolutions in the loss; RealNVP's is 5e-5."""
    clip: float = 100.0
    """Largest norm of the gradient; greater ones are scaled down to it."""
    ema: float = 0.0
    """Decay a step of the averaged weights that are evaluated, sampled and kept in best.pt, such as 0.999; 0: the weights as they are."""
    bf16: bool | None = None
    """Run the networks in bfloat16 (autocast), the state in float32; the default is yes on a GPU, no elsewhere."""
    float64: bool = False
    """Compute in float64, slowly: to compare runs."""
    compile: bool = False
    """Compile the coupling networks (torch.compile)."""
    cuda_graph: bool = False
    """Capture the whole training step in a CUDA graph."""
    seed: int = 0
    """Of weights, batches, noise and samples."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), or a device as torch names it; under torchrun each rank takes its own GPU."""
    timeout: float = 60.0
    """Seconds that a rank waits for the others within a step before it gives up."""
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
    ones = "levels steps_per_level hidden blocks steps batch_size accumulate eval_every eval_images eval_samples final_samples"
    least = dict.fromkeys(f"{ones} sample_every samples save_every n_bits".split(), 1)
    for name, bound in (least | {"seed": 0, "warmup": 0, "temperature": 0}).items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ConfigError(f"{name} is {value}, expected at least {bound}")
    if config.n_bits > 8:
        raise ConfigError(f"n_bits is {config.n_bits}, expected at most 8")
    if config.minutes is not None and not config.minutes > 0:
        raise ConfigError(f"minutes is {config.minutes}, expected a positive number")
    for name in ("lr", "clip", "timeout"):
        if not 0 < getattr(config, name) < math.inf:
            raise ConfigError(f"{name} is {getattr(config, name)}, expected a positive number")
    if not 0 <= config.scale_l2 < math.inf:
        raise ConfigError(f"scale_l2 is {config.scale_l2}, expected 0 or a positive number")
    if not 0 <= config.ema < 1:
        raise ConfigError(f"ema is {config.ema}, expected a decay from 0 to below 1")
    if config.float64 and config.bf16:
        raise ConfigError("bf16 is True with float64, expected one of them")


def check_changes(training, config):
    """Raise ConfigError for a change that a run cannot be resumed with; ``training`` is its checkpoint's state."""
    kept, given = training["config"], asdict(config)
    for name in given:
        if name not in _MAY_CHANGE and kept.get(name, given[name]) != given[name]:
            allowed = ", ".join(sorted(_MAY_CHANGE - {"resume", "out"}))
            raise ConfigError(
                f"{name} is {given[name]}, the run has {kept[name]}; a resumed run may change {allowed}"
            )
    if config.out is not None:
        raise ConfigError(
            f"out is {config.out}, but a resumed run goes on in its own folder, {config.resume}"
        )
    if config.steps < training["step"]:
        raise ConfigError(f"steps is {config.steps}, the run is at step {training['step']} already")
