"""Glow's coupling network as one op: it computes what three convolutions compute, wherever it is chosen."""

import copy
import json

import pytest
import torch

import fastflow
from fastflow import ops
from fastflow.nn import GlowLevel, GlowNetwork, GlowStep
from fastflow.nn.networks import fastest
from fastflow.nn.networks import glow_network as module
from fastflow.nn.networks.glow_network import network_args_of
from fastflow.ops import extension
from tests.support.cases import KERNELS, randomize

X = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def level_of(
    network, reversible=True, coupling="affine", dtype=torch.float32, channels_last=False, std=0.2, steps=3
):
    torch.manual_seed(0)
    level = GlowLevel([GlowStep(8, 5, coupling, network=network) for _ in range(steps)], reversible)
    if std:  # as after a first batch
        randomize(level, std)
        for name, flag in level.named_buffers():
            if name.endswith("initialized"):
                flag.fill_(True)
    return level.to(dtype, memory_format=torch.channels_last if channels_last else torch.preserve_format)


def autocast(dtype, device="cpu"):
    return torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16)


def results(level, dtype, device="cpu"):
    """Output, log-det, input of the inverse, and all gradients, the first one by x."""
    x = X.to(device, torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    with autocast(dtype, device):
        z, log_det = level(x)
        found = [z.detach(), log_det.detach(), level.inverse(z.detach())[0].detach()]
    gradients = torch.autograd.grad(z.square().sum() + log_det.sum(), [x, *level.parameters()])
    assert all(g.abs().sum() > 0 for g in gradients)
    return [*found, *gradients]


@pytest.fixture
def fused_calls(monkeypatch):
    """The arguments of every call of the op."""
    calls, op = [], ops.glow_network

    def spy(x, *weights, **options):
        calls.append(weights)
        return op(x, *weights, **options)

    monkeypatch.setattr(ops, "glow_network", spy)
    return calls


@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "coupling, channels_last",
    [("affine", False), ("affine", True), ("additive", True), ("spline", True), ("mixture", True)],
)
def test_it_computes_what_the_plain_network_computes(dtype, reversible, coupling, channels_last, fused_calls):
    options = {"reversible": reversible, "coupling": coupling, "channels_last": channels_last}
    # the steps only differ by rounding, which a deep network amplifies, and the inverse of a flat function too
    if dtype == torch.bfloat16 or coupling in ("spline", "mixture"):
        options["std"] = 0.05
    plain, fused = (level_of(network, dtype=_dtype(dtype), **options) for network in ("plain", "fused"))
    expected = results(plain, dtype)
    assert not fused_calls
    found = results(fused, dtype)
    assert len(fused_calls) == (9 if reversible else 6)  # three in forward, in the inverse, in backward
    assert_equal_to_rounding(found, expected, dtype, lambda: results(plain, torch.float32))
    for gradient, parameter in zip(found[4:], fused.parameters(), strict=True):
        assert gradient.stride() == parameter.stride()  # or accumulation would copy it


def assert_equal_to_rounding(found, expected, dtype, exact):
    if dtype == torch.bfloat16:  # by the error of the plain network
        for ours, theirs, truth in zip(found, expected, exact(), strict=True):
            assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 0.01 * truth.norm()
    else:
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.bodies(*KERNELS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_kernels_compute_it_too(dtype, each_backend, fused_calls, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    device = "cuda" if each_backend == "cuda" else "cpu"
    options = {"channels_last": True, "std": 0.05 if dtype == torch.bfloat16 else 0.2, "steps": 1}
    plain, fused = (level_of(network, **options).to(device) for network in ("plain", "fused"))
    with fastflow.backend("reference"):
        expected = results(plain, dtype, device)
    found = results(fused, dtype, device)
    assert len(fused_calls) == 3
    assert_equal_to_rounding(found, expected, dtype, lambda: results(plain, torch.float32, device))


def _dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def test_weights_of_a_level_are_prepared_once_as_the_op_reads_them(fused_calls):
    level = level_of("fused").to(
        memory_format=torch.channels_last
    )  # on a GPU they always are, as the kernel reads
    with torch.no_grad(), autocast(torch.bfloat16):
        level(X)
    for w1, b1, w2, b2, w3, b3 in fused_calls:
        assert {w.dtype for w in (w1, w2, w3)} == {torch.bfloat16}
        assert {b.dtype for b in (b1, b2, b3)} == {torch.float32}
        for w in (w1, w3):
            assert w.permute(0, 2, 3, 1).is_contiguous()
        assert w2.is_contiguous()
    storages = {args[0].untyped_storage().data_ptr() for args in fused_calls}
    assert len(fused_calls) == 3 and len(storages) == 1


@pytest.mark.parametrize("first_batch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_recomputation_gives_the_bits_of_forward(dtype, first_batch):
    """The last step's coupling leaves its network's input as it is, so that backward has the same one."""
    level, seen = level_of("fused", std=0 if first_batch else 0.2), []
    if first_batch:
        for step in level.steps:
            torch.nn.init.normal_(step.coupling.net[4].weight, std=0.1)
    level.steps[-1].coupling.net.register_forward_hook(lambda net, inputs, h: seen.append(h.detach()))
    with autocast(dtype):
        z, log_det = level(X)
    (z.square().sum() + log_det.sum()).backward()
    assert len(seen) == 2 and torch.equal(*seen) and seen[0].any()


def test_the_first_batch_initializes_as_in_the_plain_network(fused_calls):
    plain, fused = level_of("plain", std=0), level_of("fused", std=0)
    expected, found = results_of_first_batch(plain), results_of_first_batch(fused)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(fused_calls) == 3 and all(step.coupling.net[0].actnorm.initialized for step in fused.steps)
    uninitialized = level_of("fused", std=0).eval()
    torch.testing.assert_close(uninitialized(X), level_of("plain", std=0).eval()(X))


def results_of_first_batch(level):
    """The state after a batch; the last convolutions are zero at the start, so that it is exact."""
    level.initialize(X)
    return level.state_dict()


class Leaky(torch.nn.LeakyReLU):
    pass


def exchanged(level):
    level.steps[1].coupling.net[1] = Leaky()


def of_larger_kernel(level):
    first = level.steps[1].coupling.net[0]
    first.conv = torch.nn.Conv2d(4, 5, 5, padding=2, bias=False)


def watched(level):
    level.steps[1].coupling.net[2].register_forward_hook(lambda *_: None)


def one_plain(level):
    level.steps[1].coupling.net.network = "plain"


def other_network(level):
    level.steps[1].coupling.net = torch.nn.Conv2d(4, 8, 1)


def wider(level):
    torch.manual_seed(1)
    level.steps[1].coupling.net = randomize(GlowNetwork(4, 8, 7, network="fused"), 0.1)


@pytest.mark.parametrize(
    "change, calls",
    [(exchanged, 2), (of_larger_kernel, 2), (watched, 2), (one_plain, 2), (other_network, 2), (wider, 3)],
)
def test_networks_that_are_not_the_op_s_stay_plain(change, calls, fused_calls):
    """The others of the level are still fused."""
    torch.manual_seed(0)
    fused = level_of("fused")
    change(fused)
    plain = copy.deepcopy(fused)
    for step in plain.steps:
        step.coupling.net.network = "plain"
    expected = plain(X)
    assert not fused_calls
    torch.testing.assert_close(fused(X), expected, rtol=1e-4, atol=1e-4)
    assert len(fused_calls) == calls


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="network: got 'fast', expected one of 'plain', 'fused', 'auto'"):
        GlowStep(4, 4, network="fast")


ROW = {
    "gpu": "Some GPU",
    "dtype": "bfloat16",
    "in_channels": 4,
    "hidden": 5,
    "out_channels": 8,
    "pixels": 18,
    "mode": "training",
    "fastest": "fused",
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the rows of a table, which the networks then read, on a GPU with the name ``Some GPU``."""

    def write(*rows):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"rows": rows}))
        monkeypatch.setattr(fastest, "TABLE", path)
        return path

    monkeypatch.setattr(module, "gpu_name", lambda device: "Some GPU")
    return write


@pytest.mark.parametrize(
    "change, fused",
    [
        ({}, True),
        ({"pixels": 1}, True),
        ({"pixels": 19}, False),  # the level has 3 * 3 * 2 pixels
        ({"fastest": "plain, channels_last"}, False),
        ({"fastest": "im2col"}, False),
        ({"gpu": "Another GPU"}, False),
        ({"dtype": "float32"}, False),
        ({"in_channels": 8}, False),
        ({"hidden": 6}, False),
        ({"out_channels": 4}, False),
        ({"mode": "evaluation"}, False),
    ],
)
def test_auto_follows_the_table(change, fused, table, fused_calls):
    table(ROW | change)
    level = level_of("auto")
    with torch.no_grad(), autocast(torch.bfloat16):
        z, _ = level(X)
        level.inverse(z)
    assert len(fused_calls) == (6 if fused else 0)


def test_auto_takes_the_row_of_most_pixels_and_its_mode(table, fused_calls):
    table(ROW | {"pixels": 4, "fastest": "plain"}, ROW, ROW | {"mode": "evaluation", "fastest": "plain"})
    level = level_of("auto")
    with torch.no_grad(), autocast(torch.bfloat16):
        level(X)
        assert len(fused_calls) == 3
        level(X[:1])
        level.eval()(X)
    assert len(fused_calls) == 3


def test_forward_and_backward_take_the_same_row(table, fused_calls):
    table(ROW)
    level = level_of("auto")
    with autocast(torch.bfloat16):
        z, log_det = level(X)
    level.eval()  # backward has the mode of forward
    (z.square().sum() + log_det.sum()).backward()
    assert len(fused_calls) == 6


def test_the_table_of_the_package_is_read_and_only_gpus_have_rows(fused_calls):
    fastest.read_table(fastest.TABLE)
    assert fastest.gpu_name(torch.device("cpu")) is fastest.gpu_name(torch.device("meta")) is None
    level = level_of("auto")
    with autocast(torch.bfloat16):
        level(X)
    assert not fused_calls


def test_auto_on_a_cpu(fused_calls, monkeypatch):
    """One op if the extension has it for this CPU, in the dtypes that it takes."""
    compiled = extension.cpu and "avx2" in extension.build["cpu_targets"]
    here = compiled and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    level_of("auto")(X)
    assert bool(fused_calls) == here == fastest.is_fused_on_cpu(torch.float64)
    assert not fastest.is_fused_on_cpu(torch.bfloat16)
    for other in ("reference", "triton"):  # they do not run C++
        with fastflow.backend(other):
            assert not fastest.is_fused_on_cpu(torch.float32)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not fastest._has_wide_vectors.__wrapped__()


@pytest.mark.parametrize(
    "rows, said",
    [
        ([1], r"rows\[0\]: got 1, expected the columns gpu, dtype, in_channels"),
        ([ROW, ROW | {"more": 1}], r"rows\[1\]: got .*, expected the columns"),
        ([ROW | {"pixels": 0}], r"rows\[0\]: pixels: got 0, expected a positive integer"),
        ([ROW | {"hidden": "512"}], r"rows\[0\]: hidden: got '512', expected a positive integer"),
        ([ROW | {"gpu": None}], r"rows\[0\]: gpu: got None, expected a name"),
        ([ROW | {"fastest": "hope"}], r"rows\[0\]: fastest: got 'hope', expected one of plain, "),
        (
            [ROW | {"mode": "forward"}],
            r"rows\[0\]: mode: got 'forward', expected one of evaluation, training",
        ),
        ([ROW, ROW | {"fastest": "plain"}], r"rows\[1\]: got a second row of the same setting"),
    ],
)
def test_a_malformed_table_is_refused_with_its_path(rows, said, table):
    path = table(*rows)
    with pytest.raises(ValueError, match=said) as error:
        level_of("auto")(X)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": {}}', "\xff"])
def test_a_file_that_is_no_table_is_refused_with_its_path(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match="table.json: got .*, expected"):
        fastest.read_table(path)


def test_arguments_of_networks_of_several_kinds():
    """Only networks that are all fused share the preparation of their weights."""
    fused, plain = GlowNetwork(2, 4, 3, "fused").eval(), GlowNetwork(2, 4, 3, "plain").eval()
    cpu = torch.device("cpu")
    assert [len(args) for args in network_args_of([fused, fused], cpu, 4)] == [6, 6]
    assert network_args_of([fused, plain], cpu, 4) == [(), ()]
    assert network_args_of([fused.train()], cpu, 4) == [()]  # its first batch initializes it
