"""What a trained model shows: each function on small models, ``fastflow sample | interpolate``, and the scripts of docs/examples."""

import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import fastflow
from fastflow import explore
from fastflow.models import IAF, MAF, NICE, FlowModel, Glow, VectorGlow, mnist_flow, published
from fastflow.nn import Affine, GaussianPrior
from fastflow.trainer.cli import main

pytest.importorskip("tyro")
pytest.importorskip("tqdm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def images(n, c=1, size=28):
    return torch.randint(
        0, 256, (n, c, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n)
    )


def shaken(model, x, context=None):
    """With weights that do something: coupling networks and the splits' priors start as nothing."""
    model.initialize(x, context, seed=0)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model.eval()


@pytest.fixture(scope="module")
def glow():
    return shaken(
        Glow(image_shape=(3, 8, 8), levels=3, steps=1, hidden=8, classes=2),
        images(16, 3, 8),
        torch.arange(16) % 2,
    )


@pytest.fixture(scope="module")
def multiscale():
    return shaken(mnist_flow("multiscale", reversible=False), images(8))


@pytest.fixture(scope="module")
def plane():
    return shaken(
        VectorGlow(prior="mixture"), torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    )


@pytest.mark.parametrize("method", explore.METHODS)
def test_paths_end_at_the_samples(method, glow, multiscale, plane):
    labels = torch.tensor([0, 1, 1])
    x = images(6, 3, 8)
    path = explore.interpolate(glow, x[:3], x[3:], 5, labels, method)
    assert path.shape == (3, 5, 3, 8, 8) and path.dtype == torch.uint8
    assert torch.equal(path[:, 0], x[:3]) and torch.equal(path[:, -1], x[3:])
    x = images(4)
    path = explore.interpolate(multiscale, x[:2], x[2:], 3, method=method)
    assert torch.equal(path[:, 0], x[:2]) and torch.equal(path[:, -1], x[2:])
    noisy = explore.interpolate(multiscale, x[:2], x[2:], 3, method=method, seed=1)
    assert (noisy[:, 0].int() - x[:2].int()).abs().max() <= 1 and not torch.equal(noisy[:, 1], path[:, 1])
    x = torch.randn(6, 2)
    path = explore.interpolate(plane, x[:3], x[3:], 4, method=method)
    assert torch.allclose(path[:, 0], x[:3], atol=1e-4) and torch.allclose(path[:, -1], x[3:], atol=1e-4)


def test_all_latents_are_interpolated(multiscale):
    x = images(2)
    # in batches of one, as interpolate has here: a convolution rounds differently in a larger batch
    ends = zip(multiscale.encode(x[:1]), multiscale.encode(x[1:]), strict=True)
    halves = tuple((z0 + z1) / 2 for z0, z1 in ends)
    assert torch.equal(explore.interpolate(multiscale, x[:1], x[1:], 3)[:, 1], multiscale.decode(halves))


def test_latents_are_mixed_normalized_unless_raw_ones_are_asked_for(glow):
    x, labels = images(2, 3, 8), torch.tensor([1])
    middle = {}
    for normalized in (True, False):
        ends = [glow.encode(end, labels, normalized=normalized) for end in x.split(1)]
        halves = tuple((z0 + z1) / 2 for z0, z1 in zip(*ends, strict=True))
        path = explore.interpolate(glow, x[:1], x[1:], 3, labels, normalized=normalized)
        middle[normalized] = path[:, 1]
        assert torch.equal(path[:, 1], glow.decode(halves, labels, normalized=normalized))
    assert not torch.equal(middle[True], middle[False])
    default = explore.interpolate(glow, x[:1], x[1:], 3, labels)
    assert torch.equal(default[:, 1], middle[True])


def test_one_dimension_of_one_latent_varies(glow, plane):
    x, labels = images(2, 3, 8), torch.tensor([0, 1])
    c, h, w = glow.latent_shapes()[1]
    varied = explore.vary(glow, x, 1, (2, 1, 0), [-2.0, 0.0, 2.0], labels)
    assert varied.shape == (2, 3, 3, 8, 8) and varied.dtype == torch.uint8
    assert torch.equal(varied, explore.vary(glow, x, -2, 2 * h * w + w, torch.tensor([-2.0, 0, 2]), labels))
    latents = list(glow.encode(x, labels, normalized=True))
    latents[1][:, 2, 1, 0] = -2
    assert torch.equal(varied[:, 0], glow.decode(tuple(latents), labels, normalized=True))
    own = glow.encode(x[:1], labels[:1], normalized=True)[1][0, 2, 1, 0].item()
    assert torch.equal(explore.vary(glow, x[:1], 1, (2, 1, 0), [own], labels[:1])[:, 0], x[:1])
    assert explore.vary(plane, torch.zeros(4, 2), 0, 1, []).shape == (4, 0, 2)


def test_each_end_has_its_own_noise(multiscale, monkeypatch):
    latents, encode = [], multiscale.encode
    monkeypatch.setattr(
        multiscale, "encode", lambda *args, **kw: latents.append(encode(*args, **kw)) or latents[-1]
    )
    x = images(2)
    explore.interpolate(multiscale, x, x, 2, seed=0)
    first, last = latents
    assert all((z0 != z1).any() for z0, z1 in zip(first, last, strict=True))


def test_an_arc_keeps_the_distance_from_0():
    z0, z1 = torch.randn(2, 5, 400)
    z0, z1 = (20 * z / z.norm(dim=1, keepdim=True) for z in (z0, z1))
    for t in (0.25, 0.5, 0.75):
        assert torch.allclose(explore._arc(z0, z1, t).norm(dim=1), torch.tensor(20.0), rtol=1e-5)
    angle = torch.nn.functional.cosine_similarity(z0, z1).acos()
    quarter = torch.nn.functional.cosine_similarity(z0, explore._arc(z0, z1, 0.25)).acos()
    assert torch.allclose(quarter, angle / 4, rtol=1e-3)
    for other in (z0, -z0, torch.zeros_like(z0)):  # no arc, or any
        assert torch.allclose(explore._arc(z0, other, 0.25), explore._line(z0, other, 0.25), atol=1e-4)


def test_the_model_is_left_in_the_mode_it_was_in(multiscale):
    multiscale.train()
    explore.interpolate(multiscale, images(1), images(1), 2)
    explore.dequantized(multiscale, images(1), draws=1)
    assert multiscale.training and not multiscale.eval().training


def test_fine_latents_are_drawn_anew_given_the_coarse_ones(glow):
    labels = torch.tensor([0, 1])
    latents = glow.encode(images(2, 3, 8), labels)
    x = explore.resample(glow, latents, 3, context=labels, seed=1)
    assert x.shape == (2, 3, 3, 8, 8) and x.dtype == torch.uint8
    assert torch.equal(x, explore.resample(glow, latents, 3, context=labels, seed=1))
    assert not torch.equal(x, explore.resample(glow, latents, 3, context=labels, seed=2))
    assert not torch.equal(x[0, 0], x[0, 1])
    means = []
    y = latents[-1]
    for i in (2, 1, 0):  # at temperature 0 a split gives the mean of its prior given what stays
        y = glow.flows[i].inverse(y)[0]
        if i:
            means.insert(0, glow.splits[i - 1].mean_and_log_scale(y)[0])
            y = glow.splits[i - 1].inverse(y, means[0])
    cold = explore.resample(glow, latents, 1, temperature=0, context=labels)[:, 0]
    assert torch.equal(cold, glow.decode((*means, latents[-1]), labels))
    finest = explore.resample(glow, latents, 1, levels=1, temperature=0, context=labels)[:, 0]
    kept = glow.sample(2, 0.0, labels, latents=(None, *latents[1:]))
    assert torch.equal(finest, kept) and not torch.equal(finest, cold)


def test_samples_with_every_latent_given_are_decoded(glow, multiscale):
    x = images(2)
    assert torch.equal(multiscale.sample(2, latents=multiscale.encode(x)), x)
    with pytest.raises(ValueError, match=r"latents\[0\]: got None, expected a tensor"):
        multiscale.decode((None, multiscale.encode(x)[1]))
    with pytest.raises(ValueError, match=r"latents\[1\]: got shape \[2, 8, 7, 7\], expected \[3, 8, 7, 7\]"):
        multiscale.sample(3, latents=(None, multiscale.encode(x)[1]))


def test_dequantized_values_fall_into_their_bins(glow, multiscale):
    x = images(2, 3, 8)
    y = explore.dequantized(glow, x, seed=3, draws=4)
    assert y.shape == (4, 2, 3, 8, 8) and y.dtype == torch.float32
    assert all(torch.equal(glow.dequantize.inverse(draw)[0], x) for draw in y)
    assert torch.equal(y, explore.dequantized(glow, x, seed=3, draws=4)) and not torch.equal(y[0], y[1])
    x = images(2)
    for draw in explore.dequantized(
        multiscale, x, draws=2
    ):  # past the logit, values at a bin's edge may be rounded across it
        assert (multiscale.dequantize.inverse(draw)[0].int() - x.int()).abs().max() <= 1


def test_density_lies_on_the_grid_as_plotted(plane):
    limits = (-8.0, 8.0), (-7.0, 9.0)
    values, integral = explore.density(plane, limits, size=320, batch_size=10_000)
    assert (
        values.shape == (320, 320)
        and values.dtype == torch.float64
        and integral == pytest.approx(1, abs=0.01)
    )
    cell = 16 / 320
    point = torch.tensor([[-8 + (200 + 0.5) * cell, -7 + (130 + 0.5) * cell]])  # column 200, row 130
    assert values[130, 200].item() == pytest.approx(plane.log_prob(point).exp().item(), rel=1e-4)


def test_scores_of_anomaly():
    train = torch.tensor([1.0, 1.2, 1.4])
    assert torch.allclose(
        explore.typicality(torch.tensor([0.2, 1.2, 2.2]), train), torch.tensor([1.0, 0.0, 1.0]), atol=1e-6
    )
    data, outliers = torch.randn(50), torch.randn(40) + 1
    expected = ((outliers[:, None] > data).double() + (outliers[:, None] == data).double() / 2).mean().item()
    assert explore.auroc(data, outliers) == pytest.approx(expected)
    assert (
        explore.auroc(data, data) == pytest.approx(0.5)
        and explore.auroc(torch.zeros(3), torch.zeros(2)) == 0.5
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda m: explore.interpolate(m, images(2), images(2), method="cubic"),
            "method: got 'cubic', expected one of 'linear'",
        ),
        (lambda m: explore.interpolate(m, images(2), images(2), 1), "steps: got 1, expected 2 or more"),
        (lambda m: explore.interpolate(m, images(2), images(3)), "x1: got 3 samples, expected 2, like x0"),
        (lambda m: explore.resample(m, m.encode(images(1)), 2, levels=2), "levels: got 2, expected 1 to 1"),
        (lambda m: explore.resample(m, m.encode(images(1)), 0), "n: got 0, expected a positive integer"),
        (
            lambda m: explore.resample(NICE(4, 1, 4, 1), (torch.zeros(1, 4),), 2),
            "model: got one latent, expected a multi-scale model",
        ),
        (
            lambda m: explore.dequantized(VectorGlow(), torch.zeros(1, 2)),
            "model: got continuous samples, expected a model of uint8",
        ),
        (lambda m: explore.vary(m, images(1), 2, 0, [0.0]), "level: got 2, expected an index of 2 latents"),
        (
            lambda m: explore.vary(m, images(1), 1, (8, 0, 0), [0.0]),
            r"dimension: got \(8, 0, 0\), expected an index of a latent of shape \[8, 7, 7\]",
        ),
        (lambda m: explore.vary(m, images(1), 1, 392, [0.0]), "dimension: got 392, expected an index"),
        (
            lambda m: explore.vary(m, images(1), 1, (0, 0), [0.0]),
            r"dimension: got \(0, 0\), expected an index",
        ),
        (
            lambda m: explore.vary(m, images(1), 1, 0, [float("nan")]),
            "values: got inf or NaN, expected finite numbers",
        ),
        (
            lambda m: explore.vary(m, images(1), 1, 0, 1.0),
            r"values: got shape \[\], expected finite numbers \[M\]",
        ),
        (lambda m: explore.dequantized(m, images(1), draws=0), "draws: got 0, expected a positive integer"),
        (
            lambda m: explore.density(m, ((0, 1), (0, 1))),
            r"model: got samples of shape \[1, 28, 28\], expected continuous vectors",
        ),
        (
            lambda m: explore.density(VectorGlow(4), ((0, 1), (0, 1))),
            r"model: got samples of shape \[4\], expected continuous vectors",
        ),
    ],
)
def test_what_cannot_be(call, words, multiscale):
    with pytest.raises(ValueError, match=words):
        call(multiscale)


def test_means_of_a_mixture_start_around_0():
    for seed in range(5):
        torch.manual_seed(seed)
        means = VectorGlow(4, steps=1, prior="mixture", components=3).prior.mean
        assert torch.allclose(means.mean(0), torch.zeros(4), atol=1e-6)
        assert means.square().sum(1).mean().item() == pytest.approx(4)
    assert torch.equal(VectorGlow(2, steps=1, prior="mixture", components=1).prior.mean, torch.zeros(1, 2))


@pytest.fixture(scope="module")
def files(tmp_path_factory, multiscale, glow):
    """Checkpoints by name, and MNIST-like data."""
    folder = tmp_path_factory.mktemp("files")
    models = {
        "multiscale": multiscale,
        "simple": shaken(mnist_flow("simple", reversible=False), images(8)),
        "glow": glow,
    }
    models["vectors"] = VectorGlow(steps=1)
    for name, model in models.items():
        fastflow.save(folder / f"{name}.pt", model)
    np.savez(folder / "digits.npz", x=images(24)[:, 0].numpy(), x_test=images(12)[:, 0].numpy())
    np.savez(
        folder / "classes.npz",
        x=images(12, 3, 8).numpy(),
        y=np.arange(12) % 2,
        x_test=images(6, 3, 8).numpy(),
        y_test=np.arange(6) % 2,
    )
    return folder


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


def test_a_run_folder_loads_as_its_last_checkpoint(files, tmp_path):
    (tmp_path / "last.pt").write_bytes((files / "vectors.pt").read_bytes())
    assert isinstance(fastflow.load(tmp_path), VectorGlow)


def test_published_weights_load_too(files, multiscale, tmp_path):
    state = multiscale.state_dict()
    theirs = {
        name: ours if isinstance(ours, torch.Tensor) else state[ours]
        for name, ours in published._names(multiscale).items()
    }
    path = tmp_path / "flow.ckpt"
    torch.save({"state_dict": theirs, "pytorch-lightning_version": "1.0"}, path)
    x = images(2)
    assert torch.equal(fastflow.load(path)(x, seed=0), multiscale(x, seed=0))
    data = ["--data", str(files / "digits.npz")]
    assert (
        main(
            [
                "interpolate",
                str(path),
                *data,
                "--pairs",
                "1",
                "--steps",
                "2",
                "--out",
                str(tmp_path / "out.png"),
            ]
        )
        == 0
    )
    assert main(["evaluate", str(path), *data, "--images", "2", "--samples", "1"]) == 0


def test_interpolate_writes_a_row_for_each_pair(files, tmp_path, capsys):
    out = tmp_path / "out.png"
    argv = [
        "interpolate",
        str(files / "multiscale.pt"),
        "--data",
        str(files / "digits.npz"),
        "--out",
        str(out),
    ]
    assert main([*argv, "--pairs", "2", "--steps", "5"]) == 0
    assert size_of(out) == (2 * (5 * 30 + 2), 2 * (2 * 30 + 2))
    assert capsys.readouterr().out == f"{out}: 2 pairs of digits, linear in 2 latents\n"
    linear = out.read_bytes()
    assert main([*argv, "--pairs", "2", "--steps", "5", "--method", "spherical"]) == 0
    assert out.read_bytes() != linear
    classes = ["--data", str(files / "classes.npz"), "--pairs", "3", "--out", str(out)]
    assert main(["interpolate", str(files / "glow.pt"), *classes]) == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        ("interpolate FILES/none.pt --data FILES/digits.npz", "none.pt: no such file"),
        ("interpolate FILES/multiscale.pt", "does not contain the name of its training data; give --data"),
        ("interpolate FILES/multiscale.pt --data FILES/classes.npz", "image_size: got 28"),
        (
            "interpolate FILES/multiscale.pt --data FILES/digits.npz --pairs 0",
            "pairs: got 0, expected at least 1",
        ),
        (
            "interpolate FILES/multiscale.pt --data FILES/digits.npz --pairs 7",
            "pairs: got 7, expected at most 6: digits has 12 test images",
        ),
        (
            "interpolate FILES/multiscale.pt --data FILES/digits.npz --steps 1",
            "steps: got 1, expected at least 2",
        ),
        (
            "interpolate FILES/vectors.pt --data FILES/digits.npz",
            "got a VectorGlow of vectors [2], expected a model of images",
        ),
        (
            "interpolate FILES/multiscale.pt --data FILES/digits.npz --out FILES/none/out.png",
            "No such file or directory",
        ),
        ("sample FILES/multiscale.pt --n 0", "n: got 0, expected at least 1"),
        (
            "sample FILES/multiscale.pt --temperature 0.5 -1",
            "temperature: got -1.0, expected 0 or a positive number",
        ),
    ],
)
def test_commands_that_cannot_be(argv, words, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv.replace("FILES", str(files)).split()) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert not list(tmp_path.iterdir())


def test_several_temperatures_are_rows_of_one_noise(files, tmp_path, capsys):
    out = tmp_path / "out.png"
    argv = ["sample", str(files / "multiscale.pt"), "--out", str(out), "--n", "2", "--temperature"]
    assert main([*argv, "0", "0.5", "1"]) == 0
    assert capsys.readouterr().out == f"{out}: 2 samples at temperature 0, 0.5, 1\n"
    width, height = size_of(out)
    main([*argv, "1", "0"])
    assert size_of(out)[1] < height and width > 100
    with Image.open(out) as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def gaussian(mean, scale):
    """A model of two features with that mean and scale, and nothing to learn."""
    model = FlowModel(Affine(2), GaussianPrior((2,)))
    with torch.no_grad():
        model.flow.shift.copy_(torch.tensor(mean))
        model.flow.log_scale.copy_(torch.tensor(scale).log())
    return model


def test_divergences_of_gaussians():
    """Against their formula, within a few standard errors."""
    p, q = gaussian([0.0, 1.0], [1.0, 2.0]), gaussian([0.5, 0.0], [1.5, 1.0])
    for first, second, exact in (
        (p, q, 0.5 * (1 / 2.25 - 1 + math.log(2.25) + 0.25 / 2.25) + 0.5 * (4 - 1 - math.log(4) + 1)),
        (q, p, 0.5 * (2.25 - 1 - math.log(2.25) + 0.25) + 0.5 * (0.25 - 1 + math.log(4) + 0.25)),
    ):
        found, error = explore.kl_divergence(first, second, 20_000, batch_size=6000)
        assert abs(found - exact) < 4 * error < 0.1
        again = explore.kl_divergence(first, second, 20_000, batch_size=6000)
        assert again == (found, error)
    assert explore.kl_divergence(p, p, 100) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))


def test_a_student_becomes_its_teacher():
    """A Gaussian with a covariance: the student is of the same family, and the divergence goes to 0."""
    torch.manual_seed(0)
    teacher = MAF(features=2, steps=1, hidden=4)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.5 * torch.randn_like(p))
    teacher.train()
    before = {name: v.clone() for name, v in teacher.state_dict().items()}
    student = IAF(features=2, steps=3, hidden=16, activation="tanh")
    found = explore.distill(teacher, student, 300, batch_size=256, lr=1e-2)
    assert len(found) == 300 and found[0] > 0.5 and abs(sum(found[-20:]) / 20) < 0.05
    for pair in ((student, teacher), (teacher, student)):
        divergence, error = explore.kl_divergence(*pair, 5000)
        assert -3 * error < divergence < 0.05
    assert teacher.training and all(torch.equal(v, before[name]) for name, v in teacher.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters()) and not student.training


def test_a_student_of_contexts():
    torch.manual_seed(0)
    teacher, student = (kind(features=2, context_features=1, steps=2, hidden=8) for kind in (MAF, IAF))
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.2 * torch.randn_like(p))
    context = torch.randn(50, 1)
    before = explore.kl_divergence(teacher, student, 2000, context=context)[0]
    found = explore.distill(teacher, student, 200, batch_size=128, lr=5e-3, context=context, seed=1)
    assert explore.kl_divergence(teacher, student, 2000, context=context)[0] < 0.2 * before
    other = IAF(features=2, context_features=1, steps=2, hidden=8)
    torch.manual_seed(0)
    first = [kind(features=2, context_features=1, steps=2, hidden=8) for kind in (MAF, IAF)][1]
    other.load_state_dict(first.state_dict())
    assert explore.distill(teacher, other, 200, batch_size=128, lr=5e-3, context=context, seed=1) == found


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda p: explore.distill(p, torch.nn.Linear(2, 2)),
            "model: got Linear, expected a model of continuous",
        ),
        (
            lambda p: explore.distill(Glow((3, 8, 8), levels=1, steps=1, hidden=4), p),
            "model: got uint8 samples",
        ),
        (lambda p: explore.distill(p, MAF(3, hidden=4)), "model: got samples of shape [3], expected [2]"),
        (lambda p: explore.distill(p, p, 0), "steps: got 0, expected a positive integer"),
        (lambda p: explore.distill(p, p, lr=-1.0), "lr: got -1.0, expected a positive number"),
        (lambda p: explore.kl_divergence(p, p, 1), "n: got 1, expected an integer of 2 or more"),
        (
            lambda p: explore.distill(gaussian([0.0, 0.0], [1e-30, 1.0]), p, 2),
            "divergence of step 1: got inf",
        ),
    ],
)
def test_distillation_errors(call, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call(gaussian([0.0, 0.0], [1.0, 1.0]))


def log_density(x):
    """3 times a Gaussian density of mean (1, -2) and deviations (0.5, 2)."""
    mean, deviation = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    log_p = torch.distributions.Normal(mean, deviation).log_prob(x.float()).sum(1)
    return log_p + math.log(3)


def test_fit_density_finds_a_density_and_its_normalizer():
    torch.manual_seed(0)
    model = VectorGlow(2, steps=2, hidden=8, layers=1)
    model.initialize(torch.randn(100, 2))
    found = explore.fit_density(model, log_density, 600, lr=1e-2, n=4000, temperature=2.0, progress=False)
    assert len(found.divergences) == 600 and found.divergences[-1] == pytest.approx(-math.log(3), abs=0.05)
    assert found.log_normalizer == pytest.approx(math.log(3), abs=0.02)
    assert 0.9 < found.effective_share <= 1
    assert found.samples.shape == (4000, 2) and found.log_weights.shape == (4000,)
    assert found.log_weights.exp().sum().item() == pytest.approx(1)
    mean = (found.log_weights.exp()[:, None] * found.samples).sum(0)
    assert (mean - torch.tensor([1.0, -2.0])).abs().max() < 0.15
    assert "effective sample size" in str(found) and not model.training


def test_the_effective_sample_size_is_that_of_the_weights():
    """A model that stays the standard Gaussian: weights of another one, whose moments are known."""
    model = VectorGlow(2, steps=1, hidden=4, layers=1)
    model.initialize(torch.randn(1000, 2))
    found = explore.fit_density(model, log_density, 1, lr=1e-12, n=3000, progress=False)
    with torch.no_grad():
        weights = (log_density(found.samples) - model.log_prob(found.samples)).double().exp()
    share = weights.sum().square() / weights.square().sum() / 3000
    assert found.effective_share == pytest.approx(share.item(), rel=1e-3)
    assert found.log_normalizer == pytest.approx(weights.mean().log().item(), abs=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.5}, "temperature: got 0.5, expected a number of at least 1"),
        ({"n": 1}, "n: got 1, expected an integer of 2 or more"),
        ({"steps": 0}, "steps: got 0, expected a positive integer"),
        ({"lr": -1}, "lr: got -1, expected a positive number"),
        ({"log_density": lambda x: x}, r"log_density: got shape [512, 2], expected [512]"),
        (
            {"log_density": lambda x: x[:, 0] * torch.nan},
            "divergence of step 1: got nan, expected a finite number",
        ),
    ],
)
def test_fit_density_names_wrong_arguments(options, message):
    given = {"log_density": log_density, "steps": 2, "progress": False} | options
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        explore.fit_density(VectorGlow(2, steps=1, hidden=4), **given)


def test_fit_density_needs_continuous_samples():
    with pytest.raises(ValueError, match="^model: got a model of uint8 samples"):
        explore.fit_density(NICE(4, hidden=3, layers=1), log_density)


ARGUMENTS = {
    "affine": ["--steps", "2", "--samples", "50"],
    "reversible": "--blocks 1 --epochs 1 --batch 500 --measured 1 --size 8 --channels 4".split(),
    "vae": "--data digits.npz --minutes 1e-4 --parts 2 --hidden 8 --latents 8 --draws 2".split(),
    "reverse_kl": ["--samples", "200", "--epochs", "1", "--steps", "2", "--size", "5"],
    "continuous": ["--samples", "200", "--steps", "1", "--batch", "20", "--size", "5"],
    "autoregressive": ["--samples", "200", "--epochs", "1", "--size", "20"],
    "masks": [],
    "nice": ["--data", "digits.npz", "--hidden", "8", "--epochs", "1"],
    "one_dimension": ["--samples", "100", "--epochs", "1"],
    "permutations": "--samples 60 --side 4 --steps 1 --epochs 1 --seeds 1".split(),
    "piecewise": ["--samples", "2000"],
    "quantization": ["--samples", "2000"],
    "scaling_factors": ["glow.pt"],
    "splines": ["--samples", "200", "--epochs", "1", "--size", "20"],
    "anomaly": ["multiscale.pt", "--data", "digits.npz", "--images", "8"],
    "conditional": ["--steps", "5", "--size", "20"],
    "distillation": "--samples 200 --epochs 1 --steps 3 --size 20".split(),
    "density": ["--steps", "2", "--size", "20"],
    "dequantization": ["simple.pt", "multiscale.pt", "--data", "digits.npz", "--images", "2"],
    "levels": ["--steps", "2"],
    "interpolation": ["multiscale.pt", "--data", "digits.npz", "--pairs", "1", "--steps", "3"],
    "residual": "--samples 100 --steps 1 --batch 20 --blocks 1 --size 5".split(),
    "residual_batch_norm": "--steps 2 --every 2 --samples 120 --side 8 --hidden 2 --batch 4".split(),
    "fit": ["--samples", "60", "--epochs", "2"],
    "resampling": ["multiscale.pt", "--data", "digits.npz", "--rows", "1", "--n", "2"],
    "vary": ["multiscale.pt", "--data", "digits.npz", "--dimensions", "1"],
    "temperature": ["multiscale.pt", "--n", "2", "--temperatures", "0.5", "1"],
}


@pytest.mark.parametrize("script", sorted(p.stem for p in EXAMPLES.glob("*.py")))
def test_examples_run(script, files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(files)
    out = tmp_path / "out.png"
    runpy.run_path(str(EXAMPLES / f"{script}.py"))["main"]([*ARGUMENTS[script], "--out", str(out)])
    assert min(size_of(out)) > 50
    printed = capsys.readouterr().out
    if script == "anomaly":
        rows = [line.rsplit(maxsplit=3) for line in printed.splitlines()[1:]]
        assert {row[0] for row in rows} >= {"test", "inverted", "constant"}
        assert all(math.isfinite(float(v)) for row in rows for v in row[1:])
    if script == "distillation":
        assert printed.count("KL(student, teacher)") == printed.count("KL(teacher, student)") == 2
    if script == "conditional":
        assert printed.count("KL(exact, flow)") == 3
    if script == "nice":
        losses = re.findall(r"loss (-?[\d.]+), (-?[\d.]+) nats, (-?[\d.]+) bits/dim", printed)
        assert len(losses) == 2
        for loss, nats, bits in (map(float, row) for row in losses):
            assert nats == pytest.approx(loss + 720.43, abs=0.1)  # 392 ln(2 pi)
            assert bits == pytest.approx(nats / 543.43 + 7.9944, abs=1e-3)  # 784 ln 2, log2 255
    if script == "reversible":
        assert printed.count("% of 400 test digits") == 2 and printed.count(" blocks: stored") == 1
    if script == "vae":
        found = re.findall(r"ELBO (-[\d.]+), bound of 2 draws (-[\d.]+) nats", printed)
        assert len(found) == 3 and all(float(elbo) < float(weighted) for elbo, weighted in found)
    if script == "density":
        assert printed.count("integral of the density") == 2 and "10 Gaussians" in printed
