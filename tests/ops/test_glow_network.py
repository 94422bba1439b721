"""fastflow::glow_network; the generic tests of test_specs.py compare its bodies with the reference."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import fastflow
from fastflow import nn, ops
from tests.support import interpreter
from tests.support.cases import CUDA, KERNELS, assert_as_reference, lay_out, leaf, name

OP = torch.ops.fastflow.glow_network.default
BACKWARD = torch.ops.fastflow.glow_network_backward.default
LAST = torch.channels_last
each_body = pytest.mark.usefixtures("each_backend")
in_kernels = pytest.mark.bodies(*KERNELS)
interpreted = pytest.mark.skipif(not interpreter.RUNS, reason="kernels are compiled here, not interpreted")


def inputs(c, hidden, out, n=2, h=4, w=4, dtype=torch.float64):
    """x, weights and biases; activations of all layers have a variance near 1."""

    def weight(*size):
        return (torch.randn(size) * (2 / (size[1] * size[2] * size[3])) ** 0.5).to(dtype)

    x = torch.randn(n, c, h, w).to(dtype)
    biases = [torch.randn(size).to(dtype) for size in (hidden, hidden, out)]
    weights = weight(hidden, c, 3, 3), weight(hidden, hidden, 1, 1), weight(out, hidden, 3, 3)
    return x, *(v for pair in zip(weights, biases, strict=True) for v in pair)


def exactly(*args):
    with fastflow.backend("reference"):
        return ops.glow_network(*(a.double() for a in args))


def by_columns(x, w1, b1, w2, b2, w3, b3):
    """The network as products with the 3x3 neighbourhoods of each pixel."""
    n, _, h, w = x.shape
    h1 = (w1.flatten(1) @ F.unfold(x, 3, padding=1) + b1[:, None]).relu()
    h2 = (w2.view(len(w2), -1) @ h1 + b2[:, None]).relu()
    return (w3.flatten(1) @ F.unfold(h2.view(n, -1, h, w), 3, padding=1) + b3[:, None]).view(n, -1, h, w)


@each_body
@pytest.mark.bodies("reference", "compiled", CUDA)  # the Triton kernel does not take float64
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 4)], ids=str)
def test_formula(size):
    args = inputs(3, 5, 4, 2, *size)
    torch.testing.assert_close(ops.glow_network(*args), by_columns(*args), rtol=1e-12, atol=1e-12)


@each_body
@pytest.mark.bodies("reference", "compiled", CUDA)
def test_gradients():
    args = [leaf(v) for v in inputs(2, 3, 2, 1, 3, 2)]
    assert gradcheck(ops.glow_network, args)
    assert gradgradcheck(ops.glow_network, args)


@each_body
@pytest.mark.bodies("reference", "compiled", *KERNELS)
def test_gradients_are_those_of_the_convolutions(each_backend):
    """In every dtype, for a 1x1 weight of two dimensions, and with biases in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        x, w1, b1, w2, b2, w3, b3 = inputs(2, 8, 4, dtype=dtype)
        args = [leaf(v) for v in (x, w1, b1.float(), w2[:, :, 0, 0], b2.float(), w3, b3.float())]
        exact = [leaf(v.double()) for v in args]
        dy = torch.randn(2, 4, 4, 4, dtype=dtype)
        found = torch.autograd.grad(ops.glow_network(*args), args, dy)
        expected = torch.autograd.grad(by_columns(*exact), exact, dy.double())
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        for ours, truth, v in zip(found, expected, args, strict=True):
            assert ours.dtype == v.dtype and ours.shape == v.shape
            assert (ours.double() - truth).norm() <= tolerance * truth.norm()


# C = 4 to 96; odd sizes, one pixel, more pixels than a tile; hidden channels that no tile divides
CASES = [
    {"dtype": dtype, "layout": layout, "channels": c, "hidden": hidden, "size": size}
    for dtype, layout, c, hidden, size in (
        ("bfloat16", "channels_last", 4, 20, (5, 3)),
        ("bfloat16", "contiguous", 96, 16, (1, 1)),
        ("bfloat16", "sliced", 12, 300, (4, 4)),
        ("float16", "channels_last", 24, 64, (8, 8)),
        ("float16", "transposed", 6, 33, (3, 7)),
        ("float32", "contiguous", 12, 136, (7, 5)),
        ("float32", "channels_last", 48, 32, (4, 4)),
        ("float32", "expanded", 4, 1, (9, 9)),
    )
]


GRADIENT_CASES = [
    {"dtype": dtype, "layout": layout, "channels": c, "hidden": hidden, "size": size}
    for dtype, layout, c, hidden, size in (
        ("bfloat16", "channels_last", 4, 20, (5, 3)),
        ("bfloat16", "contiguous", 56, 16, (1, 1)),
        ("bfloat16", "sliced", 12, 70, (3, 4)),
        ("float16", "channels_last", 16, 64, (4, 2)),
        ("float16", "transposed", 6, 33, (5, 5)),
        ("float32", "contiguous", 12, 40, (3, 5)),
        ("float32", "expanded", 4, 1, (5, 5)),
    )
]


@pytest.fixture
def one_program_per_tile(monkeypatch):
    """A block in which tiles are never shared among programs, as for many pixels."""
    tiles = fastflow.ops.dispatch.triton_kernels("glow_network")
    chosen = tiles.tiles, tiles.gradient_tiles

    @contextmanager
    def block():
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "PROGRAMS", 0)
            for sizes in chosen:
                sizes.cache_clear()
            yield tiles
        for sizes in chosen:
            sizes.cache_clear()

    return block


@each_body
@in_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda c: name(c).replace(" ", ""))
def test_kernel_is_the_reference(case, each_backend):
    c = case["channels"]
    args = inputs(c // 2, case["hidden"], c, 3, *case["size"], dtype=getattr(torch, case["dtype"]))
    x, *weights = args
    assert_as_reference(OP, lay_out(x, case["layout"]), *weights, False, twice=each_backend == "cuda")


# On the CPU: groups of several images, the last one with fewer; tiles that end within a row; rows that no vector
# divides; one pixel; several parts of the sum
@each_body
@pytest.mark.bodies("compiled")
@pytest.mark.parametrize(
    "n, c, hidden, size, layout, dtype",
    [
        (9, 12, 40, (4, 4), "contiguous", torch.float32),
        (3, 6, 33, (16, 16), "channels_last", torch.float32),
        (5, 2, 16, (7, 7), "sliced", torch.float64),
        (2, 4, 8, (5, 30), "transposed", torch.float32),
        (70, 1, 5, (1, 1), "contiguous", torch.float64),
        (3, 3, 1, (1, 70), "expanded", torch.float32),
    ],
    ids=str,
)
def test_cpu_is_the_reference(n, c, hidden, size, layout, dtype):
    x, *weights = inputs(c, hidden, c + 1, n, *size)
    args = [lay_out(x, layout), *weights, False, torch.randn(n, c + 1, *size, dtype=torch.float64)]
    with fastflow.backend("reference"):
        truth = OP(*args[:-1]), *BACKWARD(*args)
    args = [v.to(dtype) if isinstance(v, torch.Tensor) else v for v in args]
    found, again = [], []
    for threads, results in ((1, found), (3, again)):
        torch.set_num_threads(threads)
        results += OP(*args[:-1]), *BACKWARD(*args)
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "threads change the bits"
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for ours, exact in zip(found, truth, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@each_body
@in_kernels
@pytest.mark.parametrize("dtype, hidden", [(torch.bfloat16, 300), (torch.float32, 90)])
def test_one_program_computes_all_blocks_of_hidden_channels(dtype, hidden, one_program_per_tile):
    """As for many pixels. The sums of the blocks are added in memory, not when columns are added."""
    args = inputs(2, hidden, 4, 1, 7, 10, dtype=dtype)
    sizes = 70, 2, hidden, 4, dtype.itemsize, dtype == torch.float32
    shared = ops.glow_network(*args)
    assert fastflow.ops.dispatch.triton_kernels("glow_network").tiles(*sizes).splits > 1
    with one_program_per_tile() as tiles:
        assert tiles.tiles(*sizes).splits == 1
        alone = ops.glow_network(*args)
    torch.testing.assert_close(alone, shared, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-5)


@each_body
@in_kernels
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: name(c).replace(" ", ""))
def test_gradient_kernels_are_the_reference(case, each_backend):
    c = case["channels"]
    x, *weights = inputs(c // 2, case["hidden"], c, 3, *case["size"], dtype=getattr(torch, case["dtype"]))
    dy = torch.randn(3, c, *case["size"]).to(x.dtype)
    x, dy = lay_out(x, case["layout"]), lay_out(dy, case["layout"])
    assert_as_reference(BACKWARD, x, *weights, False, dy, twice=each_backend == "cuda")


@each_body
@in_kernels
@pytest.mark.parametrize("dtype, tf32", [(torch.bfloat16, False), (torch.float32, True)], ids=str)
def test_one_program_computes_the_gradients_of_all_hidden_channels(dtype, tf32, one_program_per_tile):
    """As for many pixels; the columns of dx are added in another order."""
    args = inputs(2, 40, 4, 1, 7, 10, dtype=dtype)
    dy = torch.randn(1, 4, 7, 10).to(dtype)
    sizes = 70, 4, 40, dtype.itemsize, False, False
    shared = BACKWARD(*args, tf32, dy)
    assert fastflow.ops.dispatch.triton_kernels("glow_network").gradient_tiles(*sizes).splits > 1
    with one_program_per_tile() as tiles:
        assert tiles.gradient_tiles(*sizes).splits == 1
        alone = BACKWARD(*args, tf32, dy)
    tolerance = 1e-5 if tf32 else 1.6e-2
    torch.testing.assert_close(alone, shared, rtol=tolerance, atol=tolerance)


@each_body
@pytest.mark.bodies("compiled", *KERNELS)
def test_memory_formats():
    """Weights of any layout and either shape; y has the memory format of x."""
    x, w1, b1, w2, b2, w3, b3 = inputs(3, 8, 4, dtype=torch.float32)
    expected = ops.glow_network(x, w1, b1, w2, b2, w3, b3)
    last = [v.contiguous(memory_format=LAST) for v in (x, w1, w3)]
    found = ops.glow_network(last[0], last[1], b1, w2[:, :, 0, 0].t().contiguous().t(), b2, last[2], b3)
    assert torch.equal(found, expected)
    assert expected.is_contiguous() and found.is_contiguous(memory_format=LAST)


# largest error over the largest value that the kernel may have; docs/precision.md has the measured ones
ERRORS = {"bfloat16": 1e-2, "float16": 1.5e-3, "float32": 1e-6, "float32 tf32": 3e-3}


@each_body
@in_kernels
@pytest.mark.parametrize("precision", ERRORS)
def test_error(precision):
    dtype, *tf32 = precision.split()
    args = inputs(6, 128, 12, 1, 8, 8, getattr(torch, dtype))
    truth = exactly(*args)
    error = (ops.glow_network(*args, tf32=bool(tf32)).double() - truth).abs().max() / truth.abs().max()
    assert error <= ERRORS[precision]


# largest 2-norm of a gradient's error over the 2-norm of the gradient; docs/backends.md has the measured ones
# They come from ReLUs: an activation near zero may have the other sign; its gradient is then lost or extra.
GRADIENT_ERRORS = {"bfloat16": 6e-2, "float16": 3e-2, "float32": 1e-6, "float32 tf32": 6e-2}


@each_body
@in_kernels
@pytest.mark.parametrize("precision", GRADIENT_ERRORS)
def test_gradient_error(precision):
    dtype, *tf32 = precision.split()
    dtype = getattr(torch, dtype)
    args, dy = inputs(6, 64, 12, 1, 8, 4, dtype), torch.randn(1, 12, 8, 4).to(dtype)
    found = BACKWARD(*args, bool(tf32), dy)
    with fastflow.backend("reference"):
        exact = BACKWARD(*(a.double() for a in args), False, dy.double())
    for ours, truth in zip(found, exact, strict=True):
        assert (ours.double() - truth).norm() <= GRADIENT_ERRORS[precision] * truth.norm()


@each_body
@in_kernels
def test_gradients_of_no_images():
    x, *weights = inputs(2, 3, 4, dtype=torch.float32)
    found = BACKWARD(x[:0], *weights, False, torch.empty(0, 4, 4, 4))
    assert [v.shape for v in found] == [(0, 2, 4, 4), *(w.shape for w in weights)]
    assert not any(v.any() for v in found)


@interpreted
def test_the_kernels_run_unless_the_gradient_is_differentiated():
    args, gradients = [leaf(v) for v in inputs(2, 8, 4, dtype=torch.float32)], {}
    for backend in ("triton", "reference"):
        for create_graph in (False, True):
            with fastflow.backend(backend), interpreter.traffic() as found:
                y = ops.glow_network(*args)
                first = torch.autograd.grad(y.square().sum(), args, create_graph=create_graph)
            kernels = [kernel for kernel, _ in found.launches]
            runs = backend == "triton" and not create_graph
            assert ("glow_network_gradients_kernel" in kernels) == runs
        with fastflow.backend(backend):
            second = torch.autograd.grad(sum(v.square().sum() for v in first), args[:-1])
        gradients[backend] = *first, *second
    torch.testing.assert_close(gradients["triton"], gradients["reference"], rtol=1e-4, atol=1e-4)


@each_body
@in_kernels
def test_gradient_of_nan_stays_within_two_pixels():
    args, dy = inputs(2, 8, 4, 1, 7, 7, torch.float32), torch.randn(1, 4, 7, 7)
    dy[0, 0, 0, 0] = torch.nan
    dx, *_, db3 = BACKWARD(*args, False, dy)
    assert dx[:, :, :2, :2].isnan().any() and not dx[:, :, 3:].isnan().any() and not dx[..., 3:].isnan().any()
    assert db3.isnan().tolist() == [True, False, False, False]


@each_body
@pytest.mark.bodies("compiled", *KERNELS)
def test_nan_stays_within_its_neighbourhood():
    x, *weights = inputs(2, 8, 4, 1, 6, 6, torch.float32)
    x[0, 0, 0, 0] = torch.nan
    y = ops.glow_network(x, *weights)
    assert y[:, :, :3, :3].isnan().all() and y.isnan().sum() == y[:, :, :3, :3].numel()


@interpreted
@pytest.mark.parametrize("hidden", [8, 136])
def test_bytes(hidden):
    """Each pixel reads nine neighbours, each tile all weights; hidden activations are neither read nor written."""
    n, c, out, side = 3, 2, 4, 8
    x, *weights = inputs(c, hidden, out, n, side, side, torch.float32)
    x, *weights = (v.contiguous(memory_format=LAST) if v.ndim == 4 else v for v in (x, *weights))
    with fastflow.backend("triton"), interpreter.traffic() as found:
        ops.glow_network(x, *weights, tf32=True)
    tile, programs_of_a_tile = 64, 1 if hidden == 8 else 2
    tiles, neighbours = n * side**2 // tile, n * (3 * side - 2) ** 2
    w1, b1, w2, b2, w3, b3 = (v.numel() for v in weights)
    columns = 9 * out * programs_of_a_tile
    elements = programs_of_a_tile * (neighbours * c + tiles * (w1 + b1)) + tiles * (w2 + b2 + w3)
    tiles_of_y = -(-n * side**2 // (2048 // 4))
    assert found.read == 4 * (elements + neighbours * out * programs_of_a_tile + tiles_of_y * b3)
    assert found.written == 4 * (n * side**2 * (columns + out))
    assert [kernel for kernel, _ in found.launches] == ["glow_network_kernel", "glow_network_columns_kernel"]
    assert found.operations == []


@interpreted
@pytest.mark.parametrize("dtype, passes", [(torch.bfloat16, 10), (torch.float32, 11)], ids=str)
def test_passes_over_hidden_activations_in_backward(dtype, passes, one_program_per_tile, monkeypatch):
    """Kernels write h1, h2 and their gradients, and read h1 and h2; the rest are factors of weight gradients.

    Each tile also reads all weights, each pixel nine neighbors. In float32, columns of dx are a product too.
    """
    n, c, hidden, out, side = 2, 2, 16, 4, 8
    x, *weights = inputs(c, hidden, out, n, side, side, dtype)
    x, *weights = (v.contiguous(memory_format=LAST) if v.ndim == 4 else v for v in (x, *weights))
    dy, factors, mm = torch.randn_like(x.repeat(1, 2, 1, 1)), [], torch.mm

    def spy(a, b):
        factors.extend((a, b))
        return mm(a, b)

    monkeypatch.setattr(torch, "mm", spy)
    with one_program_per_tile(), fastflow.backend("triton"), interpreter.traffic() as found:
        BACKWARD(x, *weights, True, dy)
    pixels, tiles, neighbors = n * side**2, 2, n * (3 * side - 2) ** 2
    read_in_products = sum(v.numel() for v in factors if set(v.shape) == {pixels, hidden})
    w1, b1, w2, b2, w3, _ = (v.numel() for v in weights)
    columns = 9 * c * pixels * (dtype == torch.bfloat16)  # in float32, and otherwise made by a product
    kernels_read = 2 * pixels * hidden + neighbors * (c + out) + tiles * (2 * w2 + w1 + b1 + b2 + w3)
    kernels_read += tiles * w1 * (dtype == torch.bfloat16)
    kernels_written = 4 * pixels * hidden + 9 * pixels * (c + out) + pixels * c
    sums = 4 * 2 * tiles * hidden
    assert found.read == kernels_read * dtype.itemsize + 4 * neighbors * c + sums
    assert found.written == kernels_written * dtype.itemsize + 4 * columns + sums + (b1 + b2) * dtype.itemsize
    assert 6 * pixels * hidden + read_in_products == passes * pixels * hidden
    assert [kernel.removeprefix("glow_network_") for kernel, _ in found.launches] == [
        "hidden_kernel",
        "gradients_kernel",
        "columns_kernel",
        "sum_slots_kernel",
    ]


@interpreted
@pytest.mark.parametrize("tf32, passes", [(True, 12), (False, 11)])
def test_passes_in_float32_over_512_hidden_activations(tf32, passes, one_program_per_tile):
    """In TF32, two programs share a tile and read h2."""
    args, dy = inputs(2, 512, 4, 1, 4, 4, torch.float32), torch.randn(1, 4, 4, 4)
    hidden = 16 * 512
    with one_program_per_tile(), fastflow.backend("triton"), interpreter.traffic(hidden) as found:
        BACKWARD(*args, tf32, dy)
    assert found.read + found.written == passes * 4 * hidden


def test_networks_that_the_kernel_does_not_take_run_in_pytorch():
    eligible = fastflow.ops.registry.OPS["glow_network"].eligible
    meta = partial(torch.empty, device="meta")

    def takes(channels, hidden, dtype, tf32):
        rest = [None] * 5
        return eligible(meta(1, channels, 4, 4, dtype=dtype), meta(hidden, channels, 3, 3), *rest, tf32)

    assert takes(56, 512, torch.bfloat16, False) and takes(56, 512, torch.float32, True)
    assert takes(28, 512, torch.float32, False) and not takes(29, 512, torch.float32, False)
    assert not takes(57, 512, torch.bfloat16, False) and not takes(56, 513, torch.bfloat16, False)
    assert not takes(4, 4, torch.float64, True)

    eligible = fastflow.ops.registry.OPS["glow_network_backward"].eligible

    def takes_gradient(out, dtype):
        w3, rest = meta(out, 4, 3, 3), [None] * 3
        return eligible(
            meta(1, 4, 4, 4, dtype=dtype), meta(4, 4, 3, 3), *rest, w3=w3, b3=None, tf32=False, dy=None
        )

    assert takes_gradient(56, torch.float16) and not takes_gradient(57, torch.float16)
    assert takes_gradient(28, torch.float32) and not takes_gradient(29, torch.float32)


@interpreted
def test_offsets_of_a_tile_fit_32_bits():
    small = fastflow.ops.dispatch.triton_kernels("glow_network").with_small_offsets
    x = torch.empty_strided((3, 2, 8, 8), (2**30, 64, 8, 1), device="meta")
    assert small(x, 64) is not x and small(x[:2], 64) is not None
    assert small(x[:1], 64).stride() == x[:1].stride() and small(x[:2], 64).stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_to_the_network(dtype):
    """Glow's network with ActNorm's factors in the weights."""
    network = nn.GlowNetwork(2, 4, hidden=8).to(dtype)
    for p in network.parameters():
        p.data.normal_(std=0.3)
    first, _, second, _, last = network.eval()
    x, args = torch.randn(2, 2, 4, 4, dtype=dtype), []
    for layer in (first, second):
        s = layer.actnorm.log_scale.exp()
        args += [layer.conv.weight * s.view(-1, 1, 1, 1), layer.actnorm.bias * s]
    s = (3 * last.logs).exp()
    args += [last.weight * s.view(-1, 1, 1, 1), last.bias * s]
    torch.testing.assert_close(ops.glow_network(x, *args), network(x))
