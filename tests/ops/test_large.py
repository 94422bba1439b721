"""Every kernel at sizes that count on a device, and past 2^31 elements; the same bodies run small without one."""

import contextlib
import fcntl
import math

import pytest
import torch

import fastflow
from fastflow import ops
from fastflow.ops.masked_inverse import AFTER, Affine
from fastflow.ops.masked_inverse.reference import masks_of
from fastflow.ops.residual_network.spec import parameters_of
from tests.support.cases import CUDA, lay_out

GLOW = [(512, 12, 16, 16), (512, 24, 8, 8), (512, 48, 4, 4), (16, 12, 128, 128), (4, 48, 32, 32)]
SMALL = [(3, 12, 8, 8), (2, 4, 48, 64)]


def on_both(name: str, small: list, large: list, backend: str = "interpreter"):
    """Parametrizes by backend and ``name``: ``small`` where kernels run without a device, ``large`` on one."""
    small, large = ([v if "," in name else (v,) for v in values] for values in (small, large))
    cases = [(backend, *v) for v in small] + [pytest.param("cuda", *v, marks=pytest.mark.gpu) for v in large]
    return pytest.mark.parametrize(f"each_backend, {name}", cases, indirect=["each_backend"], ids=str)


shapes = on_both("shape", SMALL, GLOW)
# the interpreter takes seconds to solve for or to search each element: nine blocks of 128 positions, the last one partial
searched_shapes = on_both("shape", [SMALL[0], (2, 4, 33, 32)], GLOW)
each_layout = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def assert_near(found, exact, tolerance=1e-5):
    """Against float64, by the norm of the error and by its largest element."""
    for ours, truth in zip(found, exact, strict=True):
        error = ours.double() - truth
        assert error.norm() <= tolerance * truth.norm() and error.abs().max() <= tolerance * max(
            truth.abs().max(), 1
        )


def exactly(op, *args, **kwargs):
    """``op`` in float64, by its gradients' own definition where it is differentiable: plain PyTorch."""
    with fastflow.backend("reference"):
        return op(
            *(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args),
            **kwargs,
        )


def gradients(op, *args, **kwargs):
    """Outputs of ``op`` and the gradients of a weighted sum of them."""
    args = [
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    ]
    outputs = op(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weighted = [
        (v * torch.linspace(-1, 2, v.shape[-1], dtype=v.dtype)).sum() for v in outputs if v.requires_grad
    ]
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    return *(v.detach() for v in outputs), *torch.autograd.grad(sum(weighted), leaves)


@each_layout
@pytest.mark.parametrize("mask", ["halves", "checkerboard"])
@shapes
def test_affine_coupling(shape, mask, layout, each_backend):
    n, c, *size = shape
    k = c // 2 if mask == "halves" else c
    x, h = lay_out(torch.randn(shape), layout), lay_out(torch.randn(n, 2 * k, *size), layout)
    factor = torch.rand(k) + 0.5
    for inverse in (False, True):
        kwargs = {"mask": mask, "scale": "soft_clamp", "inverse": inverse}
        found = gradients(ops.affine_coupling, x, h, factor, **kwargs)
        assert_near(
            found, exactly(lambda *a, kw=kwargs: gradients(ops.affine_coupling, *a, **kw), x, h, factor)
        )
    y, log_det, *_ = found
    args = (x, h, factor, y, log_det)
    kwargs = {"mask": mask, "scale": "soft_clamp"}
    found = ops.affine_coupling_inverse_backward(*args, **kwargs)
    assert_near(found, exactly(ops.affine_coupling_inverse_backward, *args, **kwargs))


@each_layout
@searched_shapes
def test_spline(shape, layout, each_backend):
    n, c, *size = shape
    form = {"bins": 3}
    x, params = lay_out(torch.randn(shape), layout), lay_out(0.3 * torch.randn(n, c // 2 * 8, *size), layout)
    order = torch.randperm(c)
    for inverse in (False, True):
        found = gradients(ops.spline, x, params, order, **form, inverse=inverse)
        exact = exactly(lambda *a, v=inverse: gradients(ops.spline, *a, **form, inverse=v), x, params, order)
        assert_near(found, exact)
    args = x, params, order, found[0], found[1]
    found = ops.spline_inverse_backward(*args, **form)
    assert_near(found, exactly(ops.spline_inverse_backward, *args, **form))


@each_layout
@searched_shapes
def test_mixture_cdf(shape, layout, each_backend):
    n, c, *size = shape
    form = {"components": 2}
    x, params = lay_out(torch.randn(shape), layout), lay_out(0.3 * torch.randn(n, c // 2 * 8, *size), layout)
    order = torch.randperm(c)
    for inverse in (False, True):
        found = gradients(ops.mixture_cdf, x, params, order, **form, inverse=inverse)
        exact = exactly(
            lambda *a, v=inverse: gradients(ops.mixture_cdf, *a, **form, inverse=v), x, params, order
        )
        assert_near(found, exact)
    args = x, params, order, found[0], found[1]
    found = ops.mixture_cdf_inverse_backward(*args, **form)
    assert_near(found, exactly(ops.mixture_cdf_inverse_backward, *args, **form))


@each_layout
@shapes
def test_actnorm(shape, layout, each_backend):
    x, s, b = lay_out(torch.randn(shape), layout), 0.3 * torch.randn(shape[1]), torch.randn(shape[1])
    for inverse in (False, True):
        found = gradients(ops.actnorm, x, s, b, inverse=inverse)
        assert_near(found, exactly(lambda *a, v=inverse: gradients(ops.actnorm, *a, inverse=v), x, s, b))
    args = (x, s, b, found[0], found[1])
    assert_near(ops.actnorm_inverse_backward(*args), exactly(ops.actnorm_inverse_backward, *args))
    assert_near(ops.actnorm_statistics(x + 100), exactly(ops.actnorm_statistics, x + 100))


@each_layout
@shapes
def test_bias_relu(shape, layout, each_backend):
    x, b = lay_out(torch.randn(shape), layout), torch.randn(shape[1])
    found = gradients(ops.bias_relu, x, b)
    assert_near(found, exactly(lambda *a: gradients(ops.bias_relu, *a), x, b))
    assert ops.bias_relu(x, b, inplace=True) is x and torch.equal(x, found[0])


@each_layout
@on_both("shape", SMALL[:1], GLOW)
def test_glow_network(shape, layout, each_backend):
    """On a device up to 512 hidden channels, which one program computes in several blocks."""
    n, c, *size = shape
    hidden = 512 if each_backend == "cuda" else 32
    x = lay_out(torch.randn(shape), layout).chunk(2, dim=1)[0]
    weights = []
    for out, inputs, k in ((hidden, c // 2, 3), (hidden, hidden, 1), (c, hidden, 3)):
        weights += [torch.randn(out, inputs, k, k) / (inputs * k * k) ** 0.5, torch.randn(out)]
    found, exact = ops.glow_network(x, *weights), exactly(ops.glow_network, x, *weights)
    assert_near([found], [exact])


@each_layout
@shapes
def test_squeeze(shape, layout, each_backend):
    x = lay_out(torch.randn(shape), layout)
    for order in ("channel", "space", "realnvp"):
        y = ops.squeeze2d(x, order)
        assert torch.equal(y, exactly(ops.squeeze2d, x, order).float()) and torch.equal(
            ops.unsqueeze2d(y, order), x
        )


@pytest.mark.parametrize("logit", [False, True])
@on_both("shape", [(3, 3, 16, 16), (2, 3, 20, 12)], [(512, 3, 32, 32), (8, 3, 256, 256)])
def test_dequantize(shape, logit, each_backend):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    kwargs = {"scale": 0.95, "shift": 0.025, "logit": logit, "squeeze_order": "channel"}
    y, log_det = ops.dequantize(x, seed=7, offset=2**33, **kwargs)
    assert_near((y, log_det), exactly(ops.dequantize, x, seed=7, offset=2**33, dtype=torch.float64, **kwargs))
    noise = torch.rand(shape)
    found = gradients(lambda u: ops.dequantize(x, noise=u, **kwargs), noise)
    assert_near(found, exactly(lambda u: gradients(lambda v: ops.dequantize(x, noise=v, **kwargs), u), noise))
    centre, _ = ops.dequantize(x, noise=torch.full(shape, 0.5), **kwargs)
    back, log_det_back = ops.dequantize_inverse(centre, **kwargs)
    assert torch.equal(back, x)
    assert_near([log_det_back], [exactly(ops.dequantize_inverse, centre, **kwargs)[1]])


@each_layout
@pytest.mark.parametrize("terms", ["none", "channel", "full"])
@shapes
def test_gaussian(shape, terms, layout, each_backend):
    size = {"none": None, "channel": shape[1:2], "full": shape}[terms]
    mean, log_scale = (None, None) if size is None else (torch.randn(size), 0.3 * torch.randn(size))
    if terms == "full":
        mean, log_scale = lay_out(mean, layout), lay_out(log_scale, layout)
    args = (lay_out(torch.randn(shape), layout), *(v for v in (mean, log_scale) if v is not None))
    found = gradients(ops.gaussian_log_prob, *args)
    assert_near(found, exactly(lambda *a: gradients(ops.gaussian_log_prob, *a), *args))
    sample = ops.gaussian_sample(shape, mean, log_scale, seed=3, temperature=0.7)
    truth = exactly(
        lambda *v: ops.gaussian_sample(shape, *v, seed=3, temperature=0.7, dtype=torch.float64),
        mean,
        log_scale,
    )
    assert_near([sample], [truth])


@each_layout
@on_both("shape", SMALL, GLOW, "emulated")
def test_conv1x1(shape, layout, each_backend):
    x, dy = lay_out(torch.randn(shape), layout), lay_out(torch.randn(shape), layout)
    weight, bias = torch.linalg.qr(torch.randn(shape[1], shape[1])).Q, torch.randn(shape[1])
    assert_near(
        gradients(ops.conv1x1, x, weight, bias),
        exactly(lambda *a: gradients(ops.conv1x1, *a), x, weight, bias),
    )
    args = x, weight, weight.mT, bias, dy
    assert_near(ops.conv1x1_inverse_backward(*args), exactly(ops.conv1x1_inverse_backward, *args))


@on_both("k, c", [(3, 48)], [(32, 12), (32, 24), (32, 48), (64, 64), (4, 512)], "emulated")
def test_lu_weight(k, c, each_backend):
    lower, upper = torch.randn(k, c, c) / c, torch.randn(k, c, c) / c
    perm, log_s, sign_s = (
        torch.stack([torch.randperm(c) for _ in range(k)]),
        0.3 * torch.randn(k, c),
        torch.randn(k, c).sign(),
    )

    def run(lower, upper, log_s, sign_s):
        return gradients(lambda *a: ops.lu_weight(perm, *a, sign_s), lower, upper, log_s)

    assert_near(run(lower, upper, log_s, sign_s), exactly(run, lower, upper, log_s, sign_s))


@on_both(
    "k, n, m", [(2, 48, 200)], [(32, 48, 48), (1, 12, 524_289), (4, 48, 524_289), (2, 512, 4096)], "emulated"
)
def test_triangular_solve(k, n, m, each_backend):
    A, B = torch.randn(k, n, n) / n + 2 * torch.eye(n), torch.randn(k, n, m)
    for upper in (False, True):
        found = gradients(lambda A, B, upper=upper: ops.triangular_solve(A, B, upper=upper), A, B)
        assert_near(
            found,
            exactly(
                lambda A, B, u=upper: gradients(lambda *a: ops.triangular_solve(*a, upper=u), A, B), A, B
            ),
        )


@on_both(
    "n, features, hidden", [(70, 40, 64), (3, 130, 200)], [(1000, 64, 512), (256, 784, 1024)], "compiled"
)
def test_masked_inverses(n, features, hidden, each_backend):
    """Two transformations with contexts, also longer than the sums that are added one by one."""
    sizes, of_context = [features, hidden, hidden, 2 * features], 150
    ends = (torch.arange(1, features + 1) * hidden // features).expand(2, 2, -1).contiguous()
    masks = [m.flatten() for m in masks_of(ends[0], sizes, 2)]
    parameters = [m * torch.randn(2, len(m)) / (len(m) ** 0.25) for m in masks]
    parameters += [0.05 * torch.randn(2, hidden * of_context), 0.1 * torch.randn(2, sum(sizes[1:]))]
    parameters = torch.cat(parameters, 1)
    kept = torch.cat([*masks, torch.ones(parameters.shape[1] - sum(map(len, masks))).bool()])
    places = torch.where(kept, torch.arange(parameters.numel()).view(2, -1), -1)
    z, context = torch.randn(n, features), torch.randn(n, of_context)

    def run(z, parameters, context):
        return ops.masked_inverses(
            z,
            parameters.flatten(),
            context,
            places=places,
            ends=ends,
            order=torch.arange(features).flip(0).expand(2, -1),
            widths=[hidden, hidden],
            layers=[AFTER, AFTER, 0],
            activation="tanh",
            transformer=Affine("sigmoid"),
        )

    assert_near(run(z, parameters, context), exactly(run, z, parameters, context), 5e-5)


@on_both(
    "n, features, hidden", [(70, 40, 64), (3, 130, 200)], [(1000, 64, 512), (256, 784, 1024)], "compiled"
)
def test_masked_inverse(n, features, hidden, each_backend):
    sizes = [features, hidden, hidden, 2 * features]
    ends = (torch.arange(1, features + 1) * hidden // features).expand(2, -1).contiguous()
    matrices = [mask * torch.randn(mask.shape) / mask.shape[1] ** 0.5 for mask in masks_of(ends, sizes, 2)]
    weights = torch.cat([w.flatten() for w in matrices])
    z, added = torch.randn(n, features), 0.1 * torch.randn(sum(sizes[1:]))

    def run(z, weights, added):
        return gradients(
            lambda *a: ops.masked_inverse(
                *a,
                ends=ends,
                order=torch.arange(features).flip(0),
                widths=[hidden, hidden],
                layers=[AFTER, AFTER, 0],
                activation="tanh",
                transformer=Affine("sigmoid"),
            ),
            z,
            weights,
            added,
        )

    assert_near(run(z, weights, added), exactly(run, z, weights, added), 5e-5)


@on_both("n, hidden", [(70, 130), (1100, 40)], [(4096, 512)], "compiled")
def test_residual_network(n, hidden, each_backend):
    parameters = parameters_of(20, 10, hidden, 30, 2, False, torch.float32)
    x, context = torch.randn(n, 20), torch.randn(n, 10)

    def run(x, context, *parameters):
        def network(*v):
            return ops.residual_network(*v[:2], v[2:], blocks=2, activation="silu")[0]

        return gradients(network, x, context, *parameters)

    args = x, context, *parameters
    assert_near(run(*args), exactly(run, *args), 5e-5)


@pytest.mark.bodies("emulated", CUDA)
def test_a_captured_graph(each_backend):
    """Replayed on other values it gives what the ops give; a matrix that became singular is told after the replay."""
    x, dy = torch.randn(8, 12, 8, 8), torch.randn(8, 12, 8, 8)
    perm, sign_s = torch.stack([torch.randperm(12) for _ in range(3)]), torch.ones(3, 12)
    lower, upper, log_s = torch.randn(3, 12, 12) / 12, torch.randn(3, 12, 12) / 12, 0.3 * torch.randn(3, 12)

    def step():
        weight, inverse, log_det = ops.lu_weight(perm, lower, upper, log_s, sign_s)
        y = ops.conv1x1(x, weight[1])
        return (
            *ops.conv1x1_inverse_backward(y, weight[1], inverse[1], None, dy)[:3],
            log_det,
            ops.triangular_solve(weight, inverse, upper=True),
        )

    if each_backend == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()  # compiles, and allocates what a capture must not
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        for v in (x, lower, log_s):
            v.mul_(0.5)
        graph.replay()
    else:
        for v in (x, lower, log_s):
            v.mul_(0.5)
        found = step()
    with fastflow.backend("reference"):
        torch.testing.assert_close(found, step(), rtol=1e-4, atol=1e-4)
    ops.raise_singular()
    log_s[2, 5] = torch.nan
    if each_backend == "cuda":
        graph.replay()
    else:
        ops.lu_weight(perm, lower, upper, log_s, sign_s)
    with pytest.raises(ops.SingularError, match="diagonal of matrix 2"):
        ops.raise_singular()


# past 2^31 elements ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path):
    """Waits until no other process or block holds the lock of this file, and holds it during the block."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def the_only_large_test(tmp_path_factory):
    """Runs the large tests of all workers one after the other, and frees a test's memory on the device.

    A lock, because pytest-xdist's groups have no effect under pytest 9.2 (pytest-xdist issue 1386).
    """
    with locked(tmp_path_factory.getbasetemp().parent / "large.lock"):  # the folder that all workers share
        yield
        torch.cuda.empty_cache()


large = pytest.mark.usefixtures("the_only_large_test")  # for a test of 17 to 30 GB


def test_large_tests_wait_for_each_other(tmp_path):
    path = tmp_path / "lock"
    with locked(path), open(path) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


MANY = on_both("count", [600], [2**31 + 600])  # elements
SHARE = torch.bfloat16  # a tensor of this size takes 4 GB


@large
@MANY
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("samples", ["one", "many"])
def test_past_32_bits(count, samples, layout, each_backend):
    """The last elements are those of a small tensor that holds them alone: where an index wrapped, they would not be."""
    n, c, width = (1, 4, 2) if samples == "one" else (count // 128 // 4 * 4, 4, 2)
    height = math.ceil(count / (n * c * width) / 2) * 2
    shape = (n, c, height, width)

    def random(dtype=SHARE):
        x = torch.empty(
            shape,
            dtype=dtype,
            memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout),
        )
        return x.random_(0, 255) if dtype == torch.uint8 else x.normal_()

    def last(v):
        return v[-1:, :, -6:].clone()

    x, h = random(), random()
    order, form = (
        torch.tensor([2, 0, 1, 3]),
        {"bins": 1, "tails": "circular"},
    )  # 4 GB of x are 3 GB of parameters
    y, _ = ops.spline(x, h[:, :3], order, **form)
    assert torch.equal(last(y), ops.spline(last(x), last(h)[:, :3], order, **form)[0])
    found = ops.spline_inverse_backward(y, h[:, :3], order, x, torch.zeros(n), **form)
    expected = ops.spline_inverse_backward(last(y), last(h)[:, :3], order, last(x), torch.zeros(1), **form)
    assert all(torch.equal(last(v), e) for v, e in zip(found, expected, strict=True))
    del y, found
    y, _ = ops.affine_coupling(x, h)
    assert torch.equal(last(y), ops.affine_coupling(last(x), last(h))[0])
    back, dx, dh, _ = ops.affine_coupling_inverse_backward(y, h, None, x, torch.zeros(n))
    expected = ops.affine_coupling_inverse_backward(last(y), last(h), None, last(x), torch.zeros(1))
    assert all(torch.equal(last(v), e) for v, e in zip((back, dx, dh), expected[:3], strict=True))
    del y, back, dx, dh, h
    s, b = torch.tensor([0.1, -0.2, 0.3, 0.4]), torch.randn(c)
    y, _ = ops.actnorm(x, s, b)
    assert torch.equal(last(y), ops.actnorm(last(x), s, b)[0])
    mean, var = ops.actnorm_statistics(x)
    assert mean.abs().max() < 0.5 and (var - 1).abs().max() < 0.5
    assert torch.equal(last(ops.bias_relu(x, b)), ops.bias_relu(last(x), b))
    z = ops.squeeze2d(y)
    assert torch.equal(z[-1:, :, -3:], ops.squeeze2d(last(y))) and torch.equal(
        last(ops.unsqueeze2d(z)), last(y)
    )
    log_prob = ops.gaussian_log_prob(y)
    assert log_prob.shape == (n,) and log_prob.isfinite().all()
    del y, z, x
    images = random(torch.uint8)
    noisy, _ = ops.dequantize(images, seed=1, dtype=SHARE)
    alone, _ = ops.dequantize(images[-1:], seed=1, offset=n - 1, dtype=SHARE)
    assert torch.equal(noisy[-1:], alone)
    centre = torch.full((), 0.5, dtype=torch.float32).expand(shape)
    assert torch.equal(last(ops.dequantize_inverse(ops.dequantize(images, noise=centre)[0])[0]), last(images))
    noise = ops.gaussian_sample(shape, seed=5, dtype=SHARE)
    assert torch.equal(noise[-1:], ops.gaussian_sample((1, *shape[1:]), seed=5, offset=n - 1, dtype=SHARE))


@large
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@on_both("count", [600], [2**31 + 600], "emulated")
def test_conv1x1_past_32_bits(count, layout, each_backend):
    shape = (1, 4, math.ceil(count / 16) * 2, 2)
    x = torch.empty(
        shape,
        dtype=SHARE,
        memory_format=getattr(torch, f"{layout}_format" if layout == "contiguous" else layout),
    ).normal_()
    weight, bias = torch.linalg.qr(torch.randn(4, 4)).Q, torch.randn(4)
    last = x[:, :, -6:].clone()
    y = ops.conv1x1(x, weight, bias)
    assert torch.equal(y[:, :, -6:], ops.conv1x1(last, weight, bias))
    back, dx, *_ = ops.conv1x1_inverse_backward(y, weight, weight.mT, bias, x)
    expected = ops.conv1x1_inverse_backward(y[:, :, -6:].clone(), weight, weight.mT, bias, last)
    assert torch.equal(back[:, :, -6:], expected[0]) and torch.equal(dx[:, :, -6:], expected[1])


@on_both("width", [601], [2**28 + 1])
def test_dequantize_rows_that_do_not_merge(width, each_backend):
    """Each element's row is found by a division, whose operands must not wrap."""
    x = torch.randint(0, 256, (1, 2, width + 7), dtype=torch.uint8)[:, :, :width]
    noise = torch.full((), 0.5).expand(x.shape)
    y, _ = ops.dequantize(x, noise=noise)
    for end in (slice(0, 9), slice(width - 9, width)):
        assert torch.equal(y[:, :, end], ops.dequantize(x[:, :, end], noise=noise[:, :, end])[0])


@large
@on_both("height", [300], [2**29])
def test_dequantize_many_rows(height, each_backend):
    x = torch.randint(0, 256, (1, 4, height, 2), dtype=torch.uint8)
    y, _ = ops.dequantize(x, seed=1, squeeze_order="channel", dtype=SHARE)
    unsqueezed, _ = ops.dequantize(x, seed=1, dtype=SHARE)
    assert torch.equal(ops.unsqueeze2d(y)[:, :, -50:], unsqueezed[:, :, -50:])
