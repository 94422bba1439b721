"""The trainer and the command line: what a run leaves, what it refuses, how it stops."""

import contextlib
import io
import json
import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastflow
from fastflow import checkpoint
from fastflow.models import Glow
from fastflow.seeds import derive
from fastflow.trainer import budget, signals, train
from fastflow.trainer import progress as progress_module
from fastflow.trainer import run as run_module
from fastflow.trainer.cli import main
from fastflow.trainer.config import Config, ConfigError, check_changes, validate_config
from fastflow.trainer.evaluate import evaluate, sample
from fastflow.trainer.nonfinite import diagnose
from fastflow.trainer.progress import Metrics, Progress, read_metrics

pytest.importorskip("tyro")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

SMALL = "--levels 2 --steps-per-level 1 --hidden 8 --batch-size 6 --warmup 2 --final-samples 2 --samples 4".split()
SMALL += ["--reversible", "no"]


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """40 dark 8x8 images of 2 classes, the second brighter."""
    path = tmp_path_factory.mktemp("data") / "faces.npz"
    rng = np.random.default_rng(0)
    y = np.arange(40) // 20
    np.savez(
        path, x=(rng.integers(0, 32, (40, 8, 8, 3)) + 100 * y[:, None, None, None]).astype(np.uint8), y=y
    )
    return str(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, arrays):
    """A run of the command line, its folder and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "run"
    argv = ["train", "--data", arrays, "--out", str(run), *SMALL, "--steps", "12", "--eval-every", "5"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(argv) == 0
    return run, printed.getvalue()


def failed(capsys, argv, code=1):
    """The one line that a failing command prints."""
    assert main(argv) == code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


def test_what_a_run_leaves(finished):
    run, printed = finished
    names = {f.name for f in run.iterdir() if not f.name.startswith("events")}
    assert names == {".lock", "last.pt", "best.pt", "metrics.csv", "samples.png", "curve.png", "result.json"}
    rows = read_metrics(run / "metrics.csv")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row["test_bits_per_dim"] is not None] == [5, 10, 12]
    assert [row["epoch"] for row in rows] == [6 * step // 36 for step in range(1, 13)]
    assert all(row["grad_norm"] > 0 and math.isfinite(row["train_bits_per_dim"]) for row in rows)
    with Image.open(run / "samples.png") as picture:
        assert picture.size == (8 * (2 * 8 + 6), 8 * (2 * 8 + 6))  # 2 by 2 images of 8 pixels, enlarged
    with Image.open(run / "curve.png") as picture:
        assert picture.size[0] > 600 and len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert isinstance(fastflow.load(run / "last.pt"), Glow) and isinstance(
        fastflow.load(run / "best.pt"), Glow
    )
    assert checkpoint.read(run / "best.pt")["training"].keys() == {"config"}  # not what resuming needs
    assert "bits/dim on 4 test images" in printed and "PNG" in printed and "WebP" in printed


def test_tensorboard_has_the_numbers_of_metrics(finished):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    run, _ = finished
    events = accumulator.EventAccumulator(str(run))
    events.Reload()
    rows = read_metrics(run / "metrics.csv")
    for name, column in (
        ("train/bits_per_dim", "train_bits_per_dim"),
        ("test/bits_per_dim", "test_bits_per_dim"),
    ):
        logged = {e.step: e.value for e in events.Scalars(name)}
        assert logged == pytest.approx(
            {r["step"]: r[column] for r in rows if r[column] is not None}, abs=1e-5
        )
    assert len(events.Scalars("images_per_second")) == 12 and events.Images("samples")


def test_evaluate_gives_the_numbers_that_train_printed(finished, capsys):
    run, printed = finished
    assert main(["evaluate", str(run), "--samples", "2"]) == 0
    table = capsys.readouterr().out
    assert table.strip() in printed
    result = json.loads((run / "result.json").read_text())
    assert f"Glow  {result['test_bits_per_dim']:.3f}" in table
    assert (
        main(["evaluate", str(run / "best.pt"), "--samples", "1", "--data", "photos"]) == 1
    )  # a size that photos lack


def test_images_that_are_not_square(tmp_path, capsys):
    path, run = tmp_path / "wide.npz", tmp_path / "run"
    np.savez(path, x=np.random.default_rng(0).integers(0, 256, (20, 4, 8, 3)).astype(np.uint8))
    argv = ["train", "--data", str(path), "--out", str(run), *SMALL, "--levels", "1", "--steps", "1"]
    assert main(argv) == 0
    assert main(["evaluate", str(run), "--samples", "1"]) == 0
    assert "bits/dim on 2 test images" in capsys.readouterr().out
    assert main(["interpolate", str(run), "--pairs", "1", "--out", str(tmp_path / "x.png")]) == 0


def test_sample_is_a_function_of_the_seed(finished, tmp_path):
    run, _ = finished
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = str(tmp_path / f"{name}.png")
        assert (
            main(["sample", str(run), "--out", out, "--n", "6", "--temperature", "0.9", "--seed", seed]) == 0
        )
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_the_suffix_decides_the_format_and_a_folder_gets_the_file(finished, tmp_path, monkeypatch, capsys):
    run = str(finished[0])
    monkeypatch.chdir(tmp_path)
    assert main(["sample", run, "--n", "2", "--out", "."]) == 0
    assert capsys.readouterr().out.startswith("samples.png: 2 samples")
    assert main(["sample", run, "--n", "2", "--temperature", "0.5", "1", "--out", "x.JPG"]) == 0
    assert main(["interpolate", run, "--pairs", "1", "--out", "x.webp"]) == 0
    formats = {"samples.png": "PNG", "x.JPG": "JPEG", "x.webp": "WEBP"}
    for name, expected in formats.items():
        with Image.open(name) as picture:
            assert picture.format == expected
    capsys.readouterr()
    assert "out: got x.bin, expected a folder, or a file .png, .jpg" in failed(
        capsys, ["sample", run, "--out", "x.bin"]
    )


def test_same_seed_same_bits_other_seed_other(arrays, tmp_path):
    runs = []
    for i, seed in enumerate((3, 3, 4)):
        torch.manual_seed(i)
        config = Config(
            data=arrays, out=str(tmp_path / str(i)), steps=4, levels=2, steps_per_level=1, hidden=8, seed=seed
        )
        runs.append(train.train(config)[0])
    a, b, c = ((run / "metrics.csv").read_bytes() for run in runs)
    assert a == b != c


def test_class_conditional(arrays, tmp_path, capsys):
    run = tmp_path / "run"
    argv = [
        "train",
        "--data",
        arrays,
        "--out",
        str(run),
        *SMALL,
        "--steps",
        "150",
        "--lr",
        "0.01",
        "--class-conditional",
    ]
    assert main([*argv, "--n-bits", "6"]) == 0
    model = fastflow.load(run / "last.pt")
    assert model.classes == 2 and model.n_bits == 6
    dark, bright = (sample(model, 32, labels=torch.full((32,), c)).float().mean() for c in (0, 1))
    assert bright > dark + 10
    assert (
        main(["sample", str(run), "--out", str(tmp_path / "s.png"), "--classes", "1", "0", "--n", "4"]) == 0
    )
    assert main(["evaluate", str(run)]) == 0
    capsys.readouterr()
    assert "classes: got (2,), expected labels from 0 to 1" in failed(
        capsys, ["sample", str(run), "--classes", "2"]
    )


def test_bf16_trains(arrays, tmp_path):
    """The networks start at zero, so it takes some steps before their rounding shows."""
    config = Config(
        data=arrays,
        out=str(tmp_path / "run"),
        steps=12,
        lr=1e-2,
        warmup=2,
        levels=2,
        steps_per_level=1,
        hidden=8,
        bf16=True,
    )
    run, model = train.train(config)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    exact = train.train(replace(config, bf16=False, out=str(tmp_path / "exact")))[0]
    a, b = (read_metrics(r / "metrics.csv")[11]["train_bits_per_dim"] for r in (run, exact))
    assert a != b and a == pytest.approx(b, abs=0.05)


def test_learning_rate():
    config = Config(lr=2.0, warmup=4, steps=14)
    rates = [train.learning_rate(config, step, 14, 100) for step in range(14)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0] and rates[9] == pytest.approx(1.0)
    assert all(a > b > 0 for a, b in zip(rates[4:], rates[5:], strict=False))
    constant = replace(config, schedule="constant")
    assert {train.learning_rate(constant, step, 14, 100) for step in range(3, 14)} == {2.0}


def rates_of(optimizer, scheduler, count):
    """The learning rates of torch's scheduler in so many epochs."""
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_by_epoch_are_those_of_torch():
    # 10 images in batches of 4: the steps of the epochs are 0-2, 3-4, 5-7, 8-9
    lengths = [3, 2, 3, 2]
    config = Config(lr=0.5, warmup=0, batch_size=4, steps=10, schedule="exponential", gamma=0.9)
    parameter = torch.nn.Parameter(torch.zeros(1))

    def repeated(make):
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        by_epoch = rates_of(optimizer, make(optimizer), 4)
        return [rate for rate, length in zip(by_epoch, lengths, strict=True) for _ in range(length)]

    found = [train.learning_rate(config, step, 10, 10) for step in range(10)]
    expected = repeated(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9))
    assert found == pytest.approx(expected, rel=1e-12)
    cosine = replace(config, schedule="cosine", gamma=None, schedule_by="epoch")
    found = [train.learning_rate(cosine, step, 10, 10) for step in range(10)]
    assert found == pytest.approx(
        [0.25 * (1 + math.cos(math.pi * first / 10)) for first in (0, 0, 0, 3, 3, 5, 5, 5, 8, 8)], rel=1e-12
    )


def test_the_exponential_schedule_by_step_and_its_warm_up():
    config = Config(lr=2.0, warmup=2, schedule="exponential", schedule_by="step", gamma=0.5)
    assert [train.learning_rate(config, step, 5, 7) for step in range(5)] == [1, 1, 0.5, 0.25, 0.125]
    by_default = replace(config, schedule_by=None, gamma=None, batch_size=7)
    assert train.learning_rate(by_default, 3, 5, 7) == pytest.approx(2 * 0.99**3)  # an epoch is one step


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gamma": 0.5}, "gamma: got 0.5, expected no value with schedule cosine"),
        (
            {"gamma": 1.5, "schedule": "exponential"},
            "gamma: got 1.5, expected a factor above 0 and at most 1",
        ),
        ({"schedule_by": "image"}, "schedule_by: got 'image', expected step or epoch"),
    ],
)
def test_schedules_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate_config(Config(**options))


def test_importance_samples_average_probabilities():
    model = Glow(image_shape=(3, 8, 8), levels=1, steps=1, hidden=8)
    x = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    model.initialize(x, seed=0)
    for actnorm in model.flows[0].steps:
        actnorm.actnorm.log_scale.data += 4  # a density so narrow that noise matters
    bounds = evaluate(model, x, samples=4, seed=7, batch_size=2, each=True)
    nats = torch.stack([model.log_prob(x, seed=derive(7, 12, k)).double() for k in range(4)]).detach()
    expected = (math.log(4) - nats.logsumexp(0)) / (192 * math.log(2))
    assert torch.allclose(bounds[-1], expected, atol=1e-6)
    assert torch.allclose(bounds[0], -nats[0] / (192 * math.log(2)), atol=1e-6)
    assert (
        expected < -nats.mean(0) / (192 * math.log(2)) - 1e-3
    ).all()  # tighter than the mean of the bounds
    assert torch.equal(bounds[-1], evaluate(model, x, samples=4, seed=7, batch_size=2))


def test_a_non_finite_loss_stops_the_run(arrays, tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["train", "--data", arrays, "--out", str(run), *SMALL, "--steps", "40", "--save-every", "2"]
    line = failed(capsys, [*argv, "--lr", "1e20", "--conv1x1", "reverse"])
    found = re.match(r"error: step (\d+): bits/dim (\S+), gradient norm (\S+); (.*)", line)
    assert found, line
    step = int(found[1])
    model = fastflow.load(run / "last.pt")
    kept = checkpoint.read(run / "last.pt")["training"]["step"]
    assert kept == (step - 1) // 2 * 2 and len(read_metrics(run / "metrics.csv")) == step - 1
    assert not (math.isfinite(float(found[2])) and math.isfinite(float(found[3])))
    layer = re.search(r"not finite: (\S+) \((\w+)\)", line)
    if layer:
        assert type(dict(model.named_modules()).get(layer[1], model)).__name__ == layer[2]
    assert re.search(r"largest gradient (\S+), of (\S+);", line)[2] in dict(model.named_parameters())
    assert line.endswith(f"the last good checkpoint is {run}/last.pt")


def test_a_weight_without_an_inverse_stops_the_run(arrays, tmp_path, capsys):
    run = tmp_path / "run"
    line = failed(
        capsys,
        [
            "train",
            "--data",
            arrays,
            "--out",
            str(run),
            *SMALL,
            "--steps",
            "40",
            "--save-every",
            "1",
            "--lr",
            "1e20",
        ],
    )
    singular = r"lu_weight: diagonal of matrix 0: got \S+ at index \d+, expected a finite nonzero number"
    found = re.match(rf"error: step (\d+): {singular}; the last checkpoint is (.*)", line)
    assert found and found[2] == str(run / "last.pt"), line
    assert checkpoint.read(run / "last.pt")["training"]["step"] == int(found[1]) - 1


def test_diagnosis_names_the_layer_and_the_gradient():
    model = Glow(image_shape=(3, 8, 8), levels=2, steps=2, hidden=8)
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    model.initialize(x, seed=0)
    model(x, seed=0).mean().backward()
    assert "every layer output is finite" in diagnose(model, x, None, 0)
    name, parameter = max(
        model.named_parameters(), key=lambda p: p[1].grad.norm() if p[1].grad is not None else -1
    )
    assert f"largest gradient {parameter.grad.norm():g}, of {name}" in diagnose(model, x, None, 0)
    network = model.get_submodule("flows.1.steps.1.coupling.net")
    next(network.parameters()).data.view(-1)[0] = math.inf
    first = next(iter(network.children()))
    assert f"not finite: flows.1.steps.1.coupling.net.0 ({type(first).__name__})" in diagnose(
        model, x, None, 0
    )
    dict(model.named_parameters())["flows.0.steps.1.actnorm.bias"].grad[0] = math.nan
    assert "largest gradient nan, of flows.0.steps.1.actnorm.bias" in diagnose(model, x, None, 0)


def test_a_run_is_never_overwritten(arrays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = Config(data=arrays, steps=1, levels=2, steps_per_level=1, hidden=8, samples=1, final_samples=1)
    assert [str(train.train(config)[0]) for _ in range(2)] == ["runs/faces-1", "runs/faces-2"]
    before = (tmp_path / "runs/faces-1/last.pt").read_bytes()
    line = failed(capsys, ["train", "--data", arrays, "--out", "runs/faces-1", *SMALL, "--steps", "1"])
    assert "runs/faces-1 exists" in line and "--resume" in line
    assert (tmp_path / "runs/faces-1/last.pt").read_bytes() == before


def test_what_a_resumed_run_may_change(finished, capsys, tmp_path, arrays):
    run, _ = finished
    line = failed(capsys, ["train", "--resume", str(run), "--hidden", "16", "--steps", "20"])
    assert "hidden: got 16, expected 8 as in the run; a resumed run may change" in line
    assert "out: got" in failed(capsys, ["train", "--resume", str(run), "--out", str(tmp_path)])
    assert "steps: got 11, expected at least 12" in failed(
        capsys, ["train", "--resume", str(run), "--steps", "11"]
    )
    assert "no such run folder" in failed(capsys, ["train", "--resume", str(tmp_path / "none")])
    assert "got no checkpoint, expected last.pt" in failed(capsys, ["train", "--resume", str(tmp_path)])
    (tmp_path / "last.pt").write_bytes((run / "best.pt").read_bytes())
    assert "no training state" in failed(capsys, ["train", "--resume", str(tmp_path)])
    (tmp_path / "last.pt").write_bytes((run / "last.pt").read_bytes()[:-100])
    assert "truncated or damaged" in failed(capsys, ["train", "--resume", str(tmp_path)])
    (tmp_path / "last.pt").write_bytes((run / "last.pt").read_bytes())
    (tmp_path / "metrics.csv").write_text(
        "".join((run / "metrics.csv").read_text().splitlines(keepends=True)[:8])
    )
    assert "got 7 rows in order, expected 12, the step of the checkpoint" in failed(
        capsys, ["train", "--resume", str(tmp_path)]
    )
    small = tmp_path / "small.npz"
    with np.load(arrays) as file:
        np.savez(small, x=file["x"][:30], y=file["y"][:30])
    contents = torch.load(tmp_path / "last.pt", weights_only=True)
    contents["training"]["config"]["data"] = str(small)
    torch.save(contents, tmp_path / "last.pt")
    assert "data: got data of sizes" in failed(capsys, ["train", "--resume", str(tmp_path)])


@pytest.mark.parametrize("name, value", [("batch_size", 7), ("seed", 5), ("n_bits", 4), ("float64", True)])
def test_a_resumed_run_keeps_what_its_numbers_depend_on(name, value):
    training = {"config": asdict(Config()), "step": 0}
    with pytest.raises(ConfigError, match=f"{name}: got {value}, expected .* as in the run"):
        check_changes(training, replace(Config(), **{name: value}))


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = Metrics(path, 0)
    for step in range(1, 6):
        metrics.write(step, 0, 0.1, 4.0 + step, 1.0, None)
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + "6,0,0.")
    Metrics(path, 3).write(4, 0, 0.1, 8.0, 1.0, 7.5)
    assert path.read_text() == "".join(whole[:4]) + "4,0,0.1,8,1,7.5\n"
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(
    "argv, words",
    [
        ("--steps 0", "steps: got 0, expected at least 1"),
        ("--n-bits 9", "n_bits: got 9, expected at most 8"),
        ("--lr -1", "lr: got -1.0, expected a positive number"),
        ("--minutes 0", "minutes: got 0.0, expected a positive number"),
        ("--lr nan", "lr: got nan, expected a positive number"),
        ("--data nowhere", "data: got 'nowhere', expected photos"),
        ("--levels 4", "levels"),
        ("--device nowhere", "device: got 'nowhere', expected cpu, cuda"),
        pytest.param(
            "--device cuda",
            "device: got cuda, expected an available device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        ("--cuda-graph --device cpu", "cuda_graph: got device cpu, expected a CUDA device"),
        (
            "--batch-size 3 --accumulate 4",
            "batch_size: got 3, expected at least 4 (ranks times accumulate, 1 x 4)",
        ),
        ("--ema 1", "ema: got 1.0, expected a decay from 0 to below 1"),
        ("--float64 --bf16 True", "bf16: got True, expected False with float64"),
        (
            "--data photos --class-conditional",
            "class_conditional: got True, expected False: photos has no labels",
        ),
    ],
)
def test_settings_that_cannot_be(argv, words, arrays, tmp_path, capsys):
    base = [] if "--data" in argv else ["--data", arrays]
    line = failed(capsys, ["train", "--out", str(tmp_path / "run"), *base, *argv.split()])
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "argv, choices",
    [
        ("train --schedule linear", "'cosine', 'constant', 'exponential'"),
        ("train --coupling quadratic", "'affine', 'additive'"),
        ("train --model flow++", "'glow', 'realnvp', 'nice'"),
        ("interpolate last.pt --method cubic", "'linear', 'spherical'"),
    ],
)
def test_the_command_line_lists_choices(argv, choices, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main(argv.split())
    assert stopped.value.code == 2 and choices in capsys.readouterr().err


def test_a_config_validates_choices_too():
    for options in ({"schedule": "linear"}, {"model": "flow++"}, {"coupling": "quadratic"}):
        (name, value), *_ = options.items()
        with pytest.raises(ConfigError, match=re.escape(f"{name}: got {value!r}, expected one of ")):
            validate_config(Config(**options))


def test_a_config_refuses_averages_that_never_move():
    with pytest.raises(ConfigError, match="ema: got 1"):
        validate_config(Config(ema=1.0))


@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "interpolate"])
def test_every_option_has_a_help_text(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = re.split(r"\n\W+--(?=[a-z])", capsys.readouterr().out)[1:]
    assert len(options) > 5
    for option in options:
        words = re.findall(
            r"(?<![-{|,\w])[A-Za-z]?[a-z]{2,}\b", re.sub(r"\(default: .*?\)", "", option.partition(" ")[2])
        )
        assert len(words) >= 2, option


def test_checkpoints_that_cannot_be_used(finished, tmp_path, capsys):
    run, _ = finished
    path = tmp_path / "damaged.pt"
    path.write_bytes((run / "last.pt").read_bytes()[:1000])
    for argv in (["evaluate", str(path)], ["sample", str(path)]):
        assert failed(capsys, argv) == f"error: {path}: truncated or damaged"
    fastflow.save(tmp_path / "own.pt", fastflow.load(run))
    line = failed(capsys, ["evaluate", str(tmp_path / "own.pt")])
    assert "does not contain the name of its training data" in line
    assert "without classes" in failed(capsys, ["sample", str(run), "--classes", "1"])


def test_an_absent_extra_is_one_line(tmp_path):
    block = "import sys; sys.modules['tyro'] = None; from fastflow.trainer.cli import main; sys.exit(main(['train']))"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == 1
        and done.stderr == "error: tyro is not installed: pip install fastflow-torch[train]\n"
    )


class TickingClock:
    """A clock on which 10 ms pass between two looks at it: a step of training looks twice."""

    now = 0.0

    def monotonic(self):
        self.now += 0.01
        return self.now


def test_minutes_end_a_run_in_time(arrays, tmp_path, monkeypatch):
    clock = TickingClock()
    monkeypatch.setattr(budget, "time", clock)
    monkeypatch.setattr(run_module, "time", clock)
    config = Config(
        data=arrays,
        out=str(tmp_path / "run"),
        steps=10**6,
        levels=2,
        steps_per_level=1,
        hidden=8,
        minutes=0.01,
    )
    run, _ = train.train(config)
    rows = read_metrics(run / "metrics.csv")
    assert rows[-1]["test_bits_per_dim"] is not None
    assert len(rows) == 51  # the first estimate is after 50 steps; no time is left then
    assert json.loads((run / "result.json").read_text())["step"] == 51
    state = checkpoint.read(run / "last.pt")["training"]
    assert state["total"] == 51 and state["config"]["steps"] == 10**6


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_is_deterministic_during_a_run_only(before, deterministic, arrays, tmp_path, monkeypatch):
    during, step = [], train.Run.take_step

    def take_step(self, *args):
        during.append(torch.backends.cudnn.deterministic)
        return step(self, *args)

    monkeypatch.setattr(train.Run, "take_step", take_step)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", before)
    small = {"levels": 1, "steps_per_level": 1, "hidden": 2, "steps": 1, "samples": 1, "final_samples": 1}
    train.train(Config(data=arrays, out=str(tmp_path / "run"), deterministic=deterministic, **small))
    assert during == [deterministic or before]
    assert torch.backends.cudnn.deterministic == before


def test_progress_on_a_terminal_and_off(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(20, 10, batch_size=4)
    for bits in (5.0, 4.0):
        progress.update(bits, 20)
    progress.close()
    bar = capsys.readouterr().err
    assert re.search(r"step 12/20 \|.*\| 4\.950 bits/dim, \d+ images/s, \d\d:\d\d left", bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    progress = Progress(20, 0, batch_size=8)
    for _ in range(6):
        progress.update(3.0, 20)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 3/20: 3.000 bits/dim, 2 images/s, 68 s left",
        "step 6/20: 3.000 bits/dim, 2 images/s, 56 s left",
    ]


def test_signals_that_repeat_and_are_given_back(monkeypatch):
    import signal

    def send(*times):
        for now in times:
            monkeypatch.setattr(signals.time, "monotonic", lambda now=now: now)
            os.kill(os.getpid(), signal.SIGTERM)

    before, outside = {signum: signal.getsignal(signum) for signum in signals.STOP_SIGNALS}, []
    signal.signal(signal.SIGTERM, lambda *_: outside.append(signals.time.monotonic()))
    try:
        with signals.received_signals() as received:
            send(5.0, 7.0, 7.1)  # the first, its repetition, one that does not wait
        assert received == [signal.SIGTERM] * 2 and outside == [7.1]
        send(8.0)
        with pytest.raises(signals.Interrupted), signals.received_signals() as received:
            send(20.0)
            raise signals.Interrupted("saved", signal.SIGTERM)
        assert outside == [7.1, 8.0]
        send(21.0, 23.0)  # while the process ends
        assert received == [signal.SIGTERM] * 2 and outside == [7.1, 8.0, 23.0]
    finally:
        for signum, kept in before.items():
            signal.signal(signum, kept)


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(checkpoint.CheckpointError, ValueError)


FAULTS = """
import resource, torch
from fastflow.trainer.cli import keep_memory

def faults():
    for i in range(30):
        if i == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        x = [torch.ones(2**k, dtype=torch.uint8) for k in (22, 24, 26)]
        del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
keep_memory()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another than glibc")
def test_the_command_line_keeps_memory_that_tensors_free():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 1000 < given_back, (kept, given_back)


def test_wandb_has_the_scalars_and_pictures_of_tensorboard(arrays, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged, log = [], wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, values: (logged.append(values), log(run, values))[1])
    small = ["--data", arrays, *SMALL, "--eval-every", "2", "--eval-images", "4", "--wandb", "flows"]
    assert main(["train", *small, "--steps", "2", "--out", "run"]) == 0
    rows = read_metrics("run/metrics.csv")
    assert [v["train/bits_per_dim"] for v in logged if "train/bits_per_dim" in v] == pytest.approx(
        [row["train_bits_per_dim"] for row in rows], abs=1e-5
    )
    assert [v["step"] for v in logged if "test/bits_per_dim" in v] == [2]
    pictures = [v["samples"] for v in logged if "samples" in v]
    assert pictures and all(isinstance(p, wandb.Image) for p in pictures)
    (first,) = Path("wandb").glob("offline-run-*")

    assert main(["train", "--resume", "run", "--steps", "4"]) == 0
    kept = checkpoint.read("run/last.pt")["training"]["wandb"]
    assert first.name.endswith(kept)
    assert {path.name.rsplit("-", 1)[1] for path in Path("wandb").glob("offline-run-*")} == {kept}
