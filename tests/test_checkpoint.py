"""Checkpoints: written whole or not at all, read without running anything, refused in one line."""

import io
import random
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as save_tensors

import fastflow
from fastflow import CheckpointError, checkpoint
from fastflow import nn as fnn
from fastflow.models import FlowModel, Glow, VectorGlow


def tiny(**changes):
    model = Glow(**{"image_shape": (3, 8, 8), "levels": 2, "steps": 1, "hidden": 8} | changes)
    x = torch.randint(
        0, 2**model.n_bits, (8, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    model.initialize(x, torch.arange(8) % 2 if model.classes else None, seed=0)
    return model


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def rewrite(path, **changes):
    contents = torch.load(path, weights_only=True) | changes
    torch.save({k: v for k, v in contents.items() if v is not ...}, path)


def refused(path, *words):
    """The message of the refusal: one line that begins with the path and holds the words."""
    with pytest.raises(CheckpointError) as caught:
        fastflow.load(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    for word in words:
        assert word in message
    assert isinstance(caught.value, ValueError)


def test_round_trip_keeps_the_dtype_of_each_weight(tmp_path):
    model = tiny()
    model.flows[0].double()
    fastflow.save(tmp_path / "model.pt", model)
    assert same_state(model, fastflow.load(tmp_path / "model.pt"))


@pytest.mark.parametrize("double", [False, True])
def test_round_trip_keeps_every_bit_and_the_model_in_eval_mode(tmp_path, double):
    model = tiny(classes=2, n_bits=5)
    model = model.double() if double else model
    fastflow.save(
        tmp_path / "model.pt", model, {"step": 3, "state": {"a": torch.arange(3)}, "list": [1, None, 2.5]}
    )
    generator = torch.get_rng_state()
    loaded = fastflow.load(tmp_path / "model.pt")
    assert torch.equal(torch.get_rng_state(), generator)  # whoever draws next draws as without loading
    assert same_state(model, loaded) and not loaded.training and loaded.config == model.config
    x = torch.randint(0, 32, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 1, 0])
    assert torch.equal(loaded(x, labels, seed=1), model.eval()(x, labels, seed=1))
    training = checkpoint.read(tmp_path / "model.pt")["training"]
    assert training["step"] == 3 and training["list"] == [1, None, 2.5]
    assert torch.equal(training["state"]["a"], torch.arange(3))


def test_a_checkpoint_of_an_old_version_loads():
    """FastFlow 0.1.0 wrote the file, with the log-probabilities that its model gave to some images."""
    path = Path(__file__).parent / "data" / "glow_0.1.0.pt"
    contents = torch.load(path, weights_only=True)
    model, kept = checkpoint.opened(path)
    config = contents["config"]
    config["activation_checkpoint_every"] = config.pop("checkpoint_every")  # renamed since
    config |= {
        "network": "auto",
        "context_features": None,
        "context_image": False,
        "standardize": False,
        "output_start": None,
        "bins": 4,
        "bound": 3.0,
        "components": 8,
    }  # added since
    assert model.flows[0].steps[0].coupling.net.network == "auto"
    assert type(model) is Glow and model.config == config and model.classes == 2
    assert all(torch.equal(v, contents["state_dict"][k]) for k, v in model.state_dict().items())
    log_prob = model.log_prob(kept["x"], kept["labels"], seed=1)
    torch.testing.assert_close(log_prob, kept["log_prob"], rtol=1e-12, atol=1e-10)


def test_a_loaded_model_never_initialises_again(tmp_path):
    model = tiny()
    fastflow.save(tmp_path / "model.pt", model)
    loaded = fastflow.load(tmp_path / "model.pt").train()
    loaded(torch.full((4, 3, 8, 8), 200, dtype=torch.uint8), seed=0)
    assert same_state(model, loaded)


@pytest.mark.parametrize("after", [0, 10, 5_000, 20_000, "all but a byte"])
def test_a_full_disk_leaves_the_former_file_and_nothing_beside(after, tmp_path):
    """The disk is a limit on the size of a file: a write past it fails as one on a full disk does."""
    resource = pytest.importorskip("resource")
    path, model = tmp_path / "model.pt", tiny()
    fastflow.save(path, model, {"step": 1})
    before, kept = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    after = len(before) - 1 if after == "all but a byte" else after
    assert after < len(before)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, kept[1]))
    try:
        with pytest.raises(OSError, match="not written, model.pt is unchanged: File too large") as error:
            fastflow.save(path, model, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert error.value.filename == str(path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["model.pt"]


def test_only_models_are_saved(tmp_path):
    with pytest.raises(CheckpointError, match="model: got Linear, expected a model of fastflow.models"):
        fastflow.save(tmp_path / "model.pt", torch.nn.Linear(2, 2))
    assert list(tmp_path.iterdir()) == []


def test_truncated_anywhere_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    fastflow.save(path, tiny())
    whole = path.read_bytes()
    for length in (1, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "truncated or damaged")
    path.write_bytes(b"")
    refused(path, "not a", "checkpoint")


def test_a_flipped_bit_never_changes_a_weight(tmp_path):
    path, model = tmp_path / "model.pt", tiny()
    fastflow.save(path, model)
    whole, rng, caught = path.read_bytes(), random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = fastflow.load(path)
        except CheckpointError as error:
            caught += "\n" not in str(error)
        else:
            assert same_state(model, loaded)  # the bit was in the padding
    assert caught > 20


def test_files_of_something_else(tmp_path):
    path = tmp_path / "model.pt"
    refused(path, "no such file")
    path.mkdir()
    refused(path, "folder")
    path.rmdir()
    path.write_text("step,loss\n")
    refused(path, "not a", "checkpoint")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "text")
    refused(path)
    torch.save(tiny().state_dict(), path)
    refused(path, "not a", "checkpoint")
    torch.save([1, 2], path)
    refused(path, "not a", "checkpoint")


class _Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_run(tmp_path):
    path, trace = tmp_path / "model.pt", tmp_path / "trace"
    torch.save({"format": 1, "fastflow": "0", "model": _Opens(trace)}, path)
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert trace.exists()  # it would act
    trace.unlink()
    refused(path, "more than tensors and plain values")
    assert not trace.exists()


def test_other_models_versions_and_weights(tmp_path):
    path = tmp_path / "model.pt"

    def written(**changes):
        fastflow.save(path, tiny())
        rewrite(path, **changes)
        return path

    refused(
        written(format=2, fastflow="9.0"),
        "format 2",
        "fastflow 9.0",
        f"fastflow {fastflow.__version__}",
        "format 1",
    )
    refused(written(model="Gloom"), "'Gloom'", "Glow")
    refused(written(model="__all__"), "'__all__'")
    refused(written(state_dict=...), "without state_dict")
    refused(written(config={"image_shape": (3, 8, 8), "depth": 3}), "configuration", "depth")
    config, state = tiny().config, tiny().state_dict()
    refused(written(config=config | {"levels": 7}), "configuration", "levels")
    refused(written(config=config | {"hidden": 16}), "do not fit Glow", "(8", "expected (16")
    refused(written(config=config | {"steps": 2}), "do not fit Glow", "missing")
    name = next(iter(state))
    refused(
        written(state_dict={k: v for k, v in state.items() if k != name}), "1 missing, 0 unexpected", name
    )
    refused(written(state_dict=state | {"more": torch.zeros(1)}), "0 missing, 1 unexpected", "more")


# models of one's own layers ---------------------------------------------------------------------------------------------------


def own(hidden=5, scale="soft_clamp", features=3):
    """A flow with a network that is not FastFlow's."""
    net = torch.nn.Sequential(torch.nn.Linear(1, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, 4))
    torch.nn.init.normal_(net[2].weight)
    flow = fnn.Sequential(
        fnn.ActNorm(features), fnn.Permute(3, "random"), fnn.AffineCoupling(net, scale=scale)
    )
    return FlowModel(flow, fnn.GaussianPrior((3,), learned=True))


@pytest.mark.parametrize("double", [False, True])
def test_a_model_of_own_layers_is_filled(tmp_path, double):
    path, model = tmp_path / "model.pt", own().double() if double else own()
    x = torch.randn(8, 3, dtype=torch.float64 if double else torch.float32)
    model.initialize(x)
    fastflow.save(path, model)
    into = own()
    kept = list(into.parameters())
    assert fastflow.load(path, into=into) is into and same_state(into, model) and not into.training
    assert all(a is b for a, b in zip(into.parameters(), kept, strict=True)), "an optimizer has these"
    assert torch.equal(into.log_prob(x), model.eval().log_prob(x))
    with torch.device("meta"):
        into = own()
    fastflow.load(path, into=into)
    assert torch.equal(into.log_prob(x), model.log_prob(x))
    refused(path, "holds the weights of 'FlowModel' without its options", "into=model")


def test_ready_models_are_filled_too(tmp_path):
    fastflow.save(tmp_path / "model.pt", tiny())
    assert same_state(fastflow.load(tmp_path / "model.pt", into=tiny()), fastflow.load(tmp_path / "model.pt"))


def test_into_another_model(tmp_path):
    path = tmp_path / "model.pt"
    fastflow.save(path, own())
    for into, words in (
        (VectorGlow(3, steps=1), "holds the model 'FlowModel'; into: got VectorGlow"),
        (own(hidden=6), "flows.0.flows.2.net.0.weight: got (5, 1), expected (6, 1)"),
        (FlowModel(fnn.ActNorm(3), fnn.GaussianPrior((3,))), "weights do not fit FlowModel: 3 missing, 11 unexpected"),
        (FlowModel(own().flow, own().prior, standardize=True), "2 missing, 0 unexpected, such as standardize.mean"),
    ):  # fmt: skip
        before = {k: v.clone() for k, v in into.state_dict().items()}
        with pytest.raises(CheckpointError) as error:
            fastflow.load(path, into=into)
        assert str(error.value).startswith(str(path)) and words in str(error.value)
        torch.testing.assert_close(into.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="into: got Linear, expected a model of fastflow.models"):
        fastflow.load(path, into=torch.nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"flows.0.flows.2: was .*'soft_clamp'.*, into: has .*'tanh'"):
        fastflow.load(path, into=own(scale="tanh"))


def test_damaged_and_tampered_files(tmp_path):
    path = tmp_path / "model.pt"
    fastflow.save(path, own())
    for name, config in (("os.system", None), ("os.system", {}), ("Linear", {}), ("Model", {})):
        rewrite(path, model=name, config=config)
        refused(path, repr(name))
        with pytest.raises(CheckpointError, match=f"holds the model '{name}'; into: got FlowModel"):
            fastflow.load(path, into=own())
    fastflow.save(path, own())
    for state in ({"a": 1}, None, [torch.zeros(1)]):
        rewrite(path, state_dict=state)
        with pytest.raises(CheckpointError, match="weights do not fit FlowModel: not a dict of tensors"):
            fastflow.load(path, into=own())
    fastflow.save(path, own())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        fastflow.load(path, into=own())
    torch.save({"state_dict": own().state_dict()}, path)
    with pytest.raises(CheckpointError, match="published weights, which are loaded without into="):
        fastflow.load(path, into=own())


@pytest.mark.parametrize("double", [False, True])
def test_safetensors_round_trip(tmp_path, double):
    model = tiny(classes=2, n_bits=5)
    model = model.double() if double else model
    fastflow.save(tmp_path / "model.safetensors", model)
    loaded = fastflow.load(tmp_path / "model.safetensors")
    assert same_state(model, loaded) and loaded.config == model.config and not loaded.training


def test_safetensors_of_own_layers_fill_a_model(tmp_path):
    def model():
        return FlowModel(fnn.Sequential(fnn.Affine(3), fnn.LULinear(3)), fnn.GaussianPrior((3,)))

    saved, path = model(), tmp_path / "model.safetensors"
    fastflow.save(path, saved)
    refused(path, "into=model")
    assert same_state(fastflow.load(path, into=model()), saved)


def test_safetensors_that_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="training: got a dict, expected None"):
        fastflow.save(path, tiny(), {"step": 1})
    fastflow.save(path, tiny())
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    assert whole[8:9] == b"{"
    for size in (9, 40, 8 + header, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)
    path.write_bytes((10**10).to_bytes(8, "little") + whole[8:])
    refused(path, "header too large")
    path.write_bytes(save_tensors({"a": torch.zeros(2)}))
    refused(path, "not a checkpoint of FastFlow")
    path.write_bytes(save_tensors({"a": torch.zeros(2)}, metadata={"fastflow": "[" * 10**5}))
    refused(path)


def test_a_zip_bomb_is_refused_unread(tmp_path):
    path, start = tmp_path / "model.pt", time.perf_counter()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(2 * 10**8))
    written = time.perf_counter() - start
    start = time.perf_counter()
    refused(path, "larger than the file")
    assert time.perf_counter() - start < written / 4 + 0.1


@pytest.mark.parametrize("options", [{"hidden": 10**6}, {"steps": 10**9}, {"steps": True, "levels": None}])
def test_options_of_a_model_without_end_are_refused(tmp_path, options):
    fastflow.save(tmp_path / "model.pt", tiny())
    config = torch.load(tmp_path / "model.pt", weights_only=True)["config"]
    rewrite(tmp_path / "model.pt", config=config | options)
    start = time.perf_counter()
    refused(tmp_path / "model.pt")
    assert time.perf_counter() - start < 10
