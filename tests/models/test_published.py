"""Published MNIST weights: the model that they make against a plain one with multiplied masks, and every file that is refused."""

import math
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal

import fastflow
from fastflow import CheckpointError
from fastflow.models import load_published, mnist_flow
from fastflow.models.mnist_flow import VARIANTS

ROOT = Path(__file__).parents[2]
CHECKPOINTS = Path(os.environ.get("FASTFLOW_PUBLISHED", ROOT.parent / "shared" / "data" / "checkpoints"))
# the file of a year; bits/dim of the plain model on MNIST's first n test digits with 8 importance samples
SIMPLE = {
    "2020": ("MNISTFlow_simple_2020-10.ckpt", 512, 1.0690),
    "2022": ("MNISTFlow_simple_2022-06.ckpt", 64, 1.0245),
}
TEST_IMAGES = ROOT / "data" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"

# the rest of the file of a year
AROUND = {
    "2020": {"epoch": 199, "global_step": 78000, "pytorch-lightning_version": "1.0.2"},
    "2022": {"result": {"test": [{"test_bpd": 1.1}], "time": 0.02}},
}

# what the three models are made of, in the order of their layers: (channels that the network sees, changes, has inside)
SQUEEZE, SPLIT = "squeeze", "split"
VARDEQ = [(2, 1, 16)] * 4
LAYERS = {
    "simple": [None, *[(1, 1, 32)] * 8],
    "vardeq": [VARDEQ, *[(1, 1, 32)] * 8],
    "multiscale": [VARDEQ, *[(1, 1, 32)] * 2, SQUEEZE, *[(4, 4, 48)] * 2, SPLIT, SQUEEZE, *[(8, 8, 64)] * 4],
}


def mask_of(channels, odd):
    """1 where a value passes through: odd pixels of the checkerboard, the first half of the channels; the others for every second layer."""
    if channels == 1:
        mask = (torch.arange(28).view(-1, 1) + torch.arange(28)).remainder(2).view(1, 1, 28, 28)
    else:
        mask = (torch.arange(channels) < channels // 2).long().view(1, -1, 1, 1)
    return (1 - mask if odd else mask).float()


def coupling_state(prefix, year, seen, changed, hidden, odd):
    def noise(*shape):
        return torch.randn(shape) * 0.3 / max(1, math.prod(shape[1:])) ** 0.5

    def layer(name, out, *rest):
        return {
            f"{prefix}.network.nn.{name}.weight": noise(out, *rest),
            f"{prefix}.network.nn.{name}.bias": 0.3 * torch.randn(out),
        }

    state = {f"{prefix}.scaling_factor": 0.3 * torch.randn(changed), f"{prefix}.mask": mask_of(changed, odd)}
    state |= layer("0", hidden, seen, 3, 3)
    for i in (1, 3, 5):
        if year == "2020":
            state |= layer(f"{i}.net.0", hidden, hidden, 3, 3)
            state |= layer(f"{i}.net.2", 2 * hidden, 2 * hidden, 1, 1)
            state |= layer(f"{i + 1}.layer_norm", hidden)
        else:
            state |= layer(f"{i}.net.1", hidden, 2 * hidden, 3, 3)
            state |= layer(f"{i}.net.3", 2 * hidden, 2 * hidden, 1, 1)
            for name in ("gamma", "beta"):
                state[f"{prefix}.network.nn.{i + 1}.{name}"] = 0.3 * torch.randn(1, hidden, 1, 1)
    return state | layer("8", 2 * changed, 2 * hidden, 3, 3)


def published(variant, year="2020"):
    """A state dict under the published names, with random weights."""
    state, before = {}, 0
    for i, layer in enumerate(LAYERS[variant]):
        if isinstance(layer, tuple):
            before = before + 1 if layer == LAYERS[variant][i - 1] else 0
            state |= coupling_state(f"flows.{i}", year, *layer, before % 2 == 1)
        elif i == 0 and layer:
            for j, inner in enumerate(layer):
                state |= coupling_state(f"flows.0.flows.{j}", year, *inner, j % 2 == 1)
    return state


# the models once more, plainly ------------------------------------------------------------------------------------------------


def both_signs(x):
    return F.elu(torch.cat([x, -x], dim=1))


def network(state, prefix, x):
    def conv(name, x):
        weight = state[f"{prefix}.{name}.weight"]
        return F.conv2d(x, weight, state[f"{prefix}.{name}.bias"], padding=weight.shape[-1] // 2)

    x = conv("0", x)
    for i in (1, 3, 5):
        if f"{prefix}.{i}.net.0.weight" in state:  # of 2020
            inner, last, norm = conv(f"{i}.net.0", x), f"{i}.net.2", ("layer_norm.weight", "layer_norm.bias")
        else:
            inner, last, norm = conv(f"{i}.net.1", both_signs(x)), f"{i}.net.3", ("gamma", "beta")
        first, second = conv(last, both_signs(inner)).chunk(2, dim=1)
        x = x + first * second.sigmoid()
        weight, bias = (state[f"{prefix}.{i + 1}.{which}"].view(1, -1, 1, 1) for which in norm)
        x = (x - x.mean(1, keepdim=True)) / (
            x.var(1, correction=0, keepdim=True) + 1e-5
        ).sqrt() * weight + bias
    return conv("8", both_signs(x))


def coupling(state, prefix, z, beside=()):
    """(z + t) e^s where the mask is 0, with s and t of the network masked by multiplication, and the sum of s."""
    mask, factor = state[f"{prefix}.mask"], state[f"{prefix}.scaling_factor"].exp().view(1, -1, 1, 1)
    s, t = network(state, f"{prefix}.network.nn", torch.cat([z * mask, *beside], dim=1)).chunk(2, dim=1)
    s, t = factor * torch.tanh(s / factor) * (1 - mask), t * (1 - mask)
    return (z + t) * s.exp(), s.flatten(1).sum(1)


def logit_with_log_det(u, alpha=1e-5):
    p = alpha / 2 + (1 - alpha) * u
    log_det = (math.log(1 - alpha) - p.log() - (1 - p).log()).flatten(1).sum(1)
    return p.log() - (1 - p).log(), log_det


def log_prob(state, variant, x, noise):
    x, u, log_p = x.double(), noise, torch.zeros(len(x), dtype=torch.float64)
    layers, normal = LAYERS[variant], Normal(torch.zeros((), dtype=torch.float64), 1.0)
    if layers[0]:
        u, log_p = logit_with_log_det(u)
        for j in range(4):
            u, log_det = coupling(state, f"flows.0.flows.{j}", u, [2 * x / 255 - 1])
            log_p = log_p + log_det
        log_p = log_p + (u.sigmoid().log() + (-u).sigmoid().log()).flatten(1).sum(1)
        u = u.sigmoid()
    z, log_det = logit_with_log_det((x + u) / 256)
    log_p = log_p + log_det - 784 * math.log(256)
    for i, layer in enumerate(layers[1:], start=1):
        if layer == SQUEEZE:
            z = F.pixel_unshuffle(z, 2)
        elif layer == SPLIT:
            z, out = z.chunk(2, dim=1)
            log_p = log_p + normal.log_prob(out).flatten(1).sum(1)
        else:
            z, log_det = coupling(state, f"flows.{i}", z)
            log_p = log_p + log_det
    return log_p + normal.log_prob(z).flatten(1).sum(1)


@pytest.mark.parametrize("year", SIMPLE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_under_their_published_names(tmp_path, variant, year):
    state, path = published(variant, year), tmp_path / "epoch=199 (1), best!.CKPT"
    torch.save({**AROUND[year], "state_dict": state}, path)
    model = load_published(path)
    assert fastflow.load(path).config == model.config
    assert model.config["variant"] == variant and not model.training
    assert model.config["pre_activation"] == (year == "2022")
    assert sum(p.numel() for p in model.parameters()) == sum(
        v.numel() for name, v in state.items() if not name.endswith("mask")
    )
    model, state = model.double(), {name: v.double() for name, v in state.items()}
    x = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    x[0], x[1] = 0, 255
    noise = torch.ops.fastflow.uniform_noise(x.shape, torch.tensor(4), 0, torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            model.log_prob(x, seed=4), log_prob(state, variant, x, noise), rtol=1e-11, atol=0
        )
        assert torch.equal(model.decode(model.encode(x)), x)
    plain = tmp_path / "weights.pt"
    torch.save(state, plain)
    with torch.no_grad():
        expected = model.float().log_prob(x, seed=4)
        assert torch.equal(load_published(str(plain)).log_prob(x, seed=4), expected)


@pytest.mark.parametrize("year", SIMPLE)
def test_the_published_weights(year):
    """Those of the tutorial's simple flow on MNIST's first test digits: as the plain model, whose bits/dim there with 8
    importance samples are known, give or take 0.003 for the noise."""
    name, n, expected = SIMPLE[year]
    path = CHECKPOINTS / name
    if not path.exists():
        pytest.skip(f"no {name} in {CHECKPOINTS}: FASTFLOW_PUBLISHED names its folder")
    if not TEST_IMAGES.exists():
        pytest.skip("MNIST is not in data/MNIST/raw")
    model = load_published(path)
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    x = torch.frombuffer(bytearray(TEST_IMAGES.read_bytes()), dtype=torch.uint8, offset=16)[: n * 784].view(
        n, 1, 28, 28
    )
    noise = torch.ops.fastflow.uniform_noise((2, 1, 28, 28), torch.tensor(4), 0, torch.float64)
    with torch.no_grad():
        plain = log_prob({name: v.double() for name, v in state.items()}, "simple", x[:2], noise)
        parts = list(x.split(64))
        draws = torch.stack(
            [
                torch.cat([model.log_prob(part, seed=s, offset=64 * i) for i, part in enumerate(parts)])
                for s in range(8)
            ]
        )
        torch.testing.assert_close(model.double().log_prob(x[:2], seed=4), plain, rtol=1e-11, atol=0)
    bits = -(torch.logsumexp(draws, 0) - math.log(8)).mean() / (784 * math.log(2))
    assert abs(bits.item() - expected) < 0.003


# refusals ---------------------------------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.abort, ()


def without(state):
    del state["flows.3.network.nn.5.net.2.bias"]


def with_more(state):
    state["flows.9.mask"] = torch.ones(1)


def reshaped(state):
    state["flows.2.network.nn.0.weight"] = torch.zeros(32, 2, 3, 3)


def masked(state):
    state["flows.4.mask"] = 1 - state["flows.4.mask"]


def no_tensor(state):
    state["flows.4.mask"] = 1.0


def integer_mask(state):
    state["flows.5.mask"] = 1 - state["flows.5.mask"].long()


def counted(state):
    state["flows.6.network.nn.0.bias"] = state["flows.6.network.nn.0.bias"].long()


def without_norm(state):
    del state["flows.7.network.nn.2.gamma"]


def flat_norm(state):
    state["flows.8.network.nn.6.beta"] = state["flows.8.network.nn.6.beta"].flatten()


def norm_of_2020(state):
    state["flows.1.network.nn.4.layer_norm.weight"] = state.pop("flows.1.network.nn.4.gamma").flatten()


def convolution_of_2020(state):
    state["flows.1.network.nn.1.net.1.weight"] = torch.zeros(32, 32, 3, 3)


ONE_OF = "expected one of MNISTFlow_simple, MNISTFlow_vardeq, MNISTFlow_multiscale of 2020 or 2022"


@pytest.mark.parametrize(
    "year, change, said",
    [
        ("2020", without, "1 names are missing and 0 unexpected, such as flows.3.network.nn.5.net.2.bias"),
        ("2020", with_more, "0 names are missing and 1 unexpected, such as flows.9.mask"),
        ("2020", reshaped, r"flows.2.network.nn.0.weight is \(32, 2, 3, 3\), expected \(32, 1, 3, 3\)"),
        ("2020", masked, "flows.4.mask differs from the mask of MNISTFlow_simple of 2020"),
        ("2020", integer_mask, "flows.5.mask differs from the mask of MNISTFlow_simple of 2020"),
        ("2020", counted, "flows.6.network.nn.0.bias is torch.int64, expected floating point"),
        ("2020", no_tensor, f"holds no state_dict of tensors, {ONE_OF}"),
        ("2020", dict.clear, f"not a supported published model, {ONE_OF}"),
        ("2022", without_norm, "simple of 2022, 1 names are missing .*, such as flows.7.network.nn.2.gamma"),
        ("2022", flat_norm, r"flows.8.network.nn.6.beta is \(32,\), expected \(1, 32, 1, 1\)"),
        ("2022", norm_of_2020, "1 names are missing and 1 unexpected, such as flows.1.network.nn.4.gamma"),
        ("2022", convolution_of_2020, r"net.1.weight is \(32, 32, 3, 3\), expected \(32, 64, 3, 3\)"),
        ("2022", masked, "flows.4.mask differs from the mask of MNISTFlow_simple of 2022"),
    ],
)
def test_other_weights_are_refused(tmp_path, year, change, said):
    state, path = published("simple", year), tmp_path / "it.ckpt"
    change(state)
    torch.save({"state_dict": state}, path)
    refused(path, said)


@pytest.mark.parametrize(
    "path, device, said",
    [
        (None, "cpu", "path: got None, expected the path of a file"),
        (3, "cpu", "path: got 3, expected the path of a file"),
        ("it.ckpt", None, "device: got None, expected a device that holds data"),
        ("it.ckpt", "nowhere", "device: got 'nowhere', expected a device that holds data"),
        ("it.ckpt", "meta", "device: got 'meta', expected a device that holds data"),
    ],
)
def test_a_wrong_argument_is_named(path, device, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        load_published(path, device)


def test_another_model_s_weights_are_refused(tmp_path):
    path = tmp_path / "it.ckpt"
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    refused(path, f"not a supported published model, {ONE_OF}")
    with pytest.raises(CheckpointError, match=ONE_OF):
        fastflow.load(path)
    fastflow.save(path, mnist_flow("simple"))
    refused(path, f"not a supported published model, {ONE_OF}")


def refused(path, said):
    with pytest.raises(CheckpointError, match=said) as error:
        load_published(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_files_that_hold_no_weights_are_refused(tmp_path):
    path = tmp_path / "it.ckpt"
    refused(path, "no such file")
    refused(tmp_path, "is a folder")
    torch.save([torch.zeros(2)], path)
    refused(path, "holds no state_dict of tensors")
    torch.save({"state_dict": published("simple")}, path)
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "truncated or damaged|no file of torch.save or safetensors")
    path.write_bytes(whole[: len(whole) // 2] + b"\xff" + whole[len(whole) // 2 + 1 :])
    refused(path, "damaged")
    torch.save({"state_dict": published("simple"), "callbacks": Code()}, path)
    refused(path, "holds more than tensors and plain values")
    path.write_bytes(pickle.dumps({"state_dict": Code()}))
    refused(path, "no file of torch.save or safetensors")
