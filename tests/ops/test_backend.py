"""Which body of an op runs: ``fastflow.backend``, and a whole Glow on each."""

import importlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastflow
from fastflow import ops
from fastflow.models import Glow
from fastflow.nn import ActNorm, AffineCoupling
from fastflow.ops import dispatch
from fastflow.ops.dispatch import Implementations
from tests.support import interpreter
from tests.support.cases import KERNELS, randomize

kernels = pytest.mark.bodies(*KERNELS)
interpreted = pytest.mark.skipif(not interpreter.RUNS, reason="kernels are compiled here, not interpreted")


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: got 'cuda', expected one of auto, reference, triton"):
        fastflow.backend("cuda")


@interpreted
def test_the_block_decides():
    x, h = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)

    def launches():
        with interpreter.traffic() as seen:
            ops.affine_coupling(x, h)
        return len(seen.launches)

    assert launches() == 0
    with fastflow.backend("triton"):
        assert launches() == 1
        with fastflow.backend("reference"):
            assert launches() == 0
        assert launches() == 1
    assert launches() == 0


COUPLE = "import torch, fastflow; print(fastflow.ops.affine_coupling(torch.ones(1, 2), torch.zeros(1, 2))[0].tolist())"
NO_TRITON = "import sys; sys.modules['triton'] = None\n"
# Forks once torch is imported, which takes most of a start. Triton reads its variables at its import, in the fork.
FORKS = """
import os, sys, torch
assert not {"fastflow", "triton"} & sys.modules.keys()
for code, environment in RUNS:
    sys.stdout.flush()
    if os.fork():
        os.wait()
        continue
    os.environ.update(environment)
    try:
        exec(code)
    except Exception as error:
        print(type(error).__name__, *str(error).splitlines())
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.fixture(scope="module")
def printed():
    """The line that COUPLE prints, or its error, by whether Triton is there, FASTFLOW_BACKEND and TRITON_INTERPRET."""
    given = {
        "default": (COUPLE, {}),
        "interpreted": (COUPLE, {"FASTFLOW_BACKEND": "triton", "TRITON_INTERPRET": "1"}),
        "not interpreted": (COUPLE, {"FASTFLOW_BACKEND": "triton"}),
        "no triton": (NO_TRITON + COUPLE, {}),
        "no triton, but told": (NO_TRITON + COUPLE, {"FASTFLOW_BACKEND": "triton"}),
    }
    script = FORKS.replace("RUNS", repr(list(given.values())))
    environment = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return dict(zip(given, done.stdout.splitlines(), strict=True))


def test_triton_without_the_interpreter_is_an_error(printed):
    assert printed["default"] == "[[1.0, 1.0]]"
    assert printed["interpreted"] == "[[1.0, 1.0]]"
    error = printed["not interpreted"]
    assert (
        error.startswith('RuntimeError backend: got "triton" with tensors on the CPU')
        and "TRITON_INTERPRET=1" in error
    )


def test_without_triton(printed):
    assert printed["no triton"] == "[[1.0, 1.0]]"
    assert printed["no triton, but told"].startswith(
        'RuntimeError backend: got "triton", which needs the package triton'
    )


# What Triton raises where it cannot build a kernel's launcher: no compiler, or one that fails.
NO_COMPILER = [
    RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
    subprocess.CalledProcessError(1, ["gcc", "main.c"]),
]


def on_a_gpu(error: Exception, monkeypatch) -> tuple[Implementations, SimpleNamespace]:
    """An op whose Triton launcher raises ``error``, and a stand-in for a CUDA tensor."""

    def launcher(x):
        raise error

    monkeypatch.setattr(dispatch, "_triton_works", True)
    monkeypatch.setattr(dispatch, "triton_kernels", lambda module: SimpleNamespace(double=launcher))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    op = Implementations("double", "double", fallback=lambda x: "reference", triton=True)
    return op, SimpleNamespace(device=torch.device("cuda:0"), is_cuda=True, is_cpu=False, numel=lambda: 3)


@pytest.mark.parametrize("error", NO_COMPILER, ids=lambda error: type(error).__name__)
def test_triton_without_a_c_compiler_falls_back_with_one_warning(error, monkeypatch):
    op, x = on_a_gpu(error, monkeypatch)
    with fastflow.backend("auto"), pytest.warns(UserWarning, match="Install a C compiler") as caught:
        assert [op(x), op(x)] == ["reference", "reference"]
    assert len(caught) == 1


def test_other_errors_of_a_launcher_are_raised(monkeypatch):
    op, x = on_a_gpu(RuntimeError("CUDA error: an illegal memory access"), monkeypatch)
    with fastflow.backend("auto"), pytest.raises(RuntimeError, match="illegal memory access"):
        op(x)


def trained_glow(**kwargs) -> Glow:
    model = Glow(
        **{"image_shape": (3, 16, 16), "levels": 2, "steps": 1, "hidden": 4, "reversible": False, **kwargs}
    )
    context = () if model.classes is None else (torch.tensor([0, 1, 2, 0]),)
    model.initialize(torch.randint(0, 256, (4, *model.shape), dtype=torch.uint8), *context, seed=1)
    return randomize(model, std=0.05)


VARIANTS = {
    "affine": {},
    "classes, logit, sigmoid": {"classes": 3, "logit": True, "scale": "sigmoid"},
    "additive, reverse": {"coupling": "additive", "conv1x1": "reverse"},
}


@kernels
@pytest.mark.parametrize(
    "variant, memory_format",
    [
        ("affine", torch.contiguous_format),
        ("affine", torch.channels_last),
        ("classes, logit, sigmoid", torch.channels_last),
        ("additive, reverse", torch.contiguous_format),
    ],
    ids=str,
)
def test_glow(variant, memory_format, each_backend):
    """Loss, gradients, latents and samples of a whole model are the reference's; every pixel comes back."""
    model = trained_glow(**VARIANTS[variant]).to(memory_format=memory_format)
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8).contiguous(memory_format=memory_format)
    context = () if model.classes is None else (torch.tensor([2, 0]),)

    def everything():
        loss = model(x, *context, seed=3, offset=2**32).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        latents = model.encode(x, *context)
        torch.manual_seed(5)
        return (
            loss.detach(),
            gradients,
            latents,
            model.sample(2, 0.7, *context),
            model.decode(latents, *context),
        )

    *found, sample, images = everything()
    with fastflow.backend("reference"):
        *expected, expected_sample, _ = everything()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert (sample.int() - expected_sample.int()).abs().max() <= 1  # where rounding meets a bin's edge
    assert torch.equal(images, x)


def test_python_threads_share_the_ops_and_the_setting(monkeypatch):
    """Forward and backward in eight threads at once give the bits of one; a setting holds in each of them."""
    model = trained_glow(reversible=True)
    batches = [torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8) for _ in range(8)]

    def gradients(x):
        loss = model(x, seed=3).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    # not the backend that each_backend left for the module: Triton's interpreter runs in one thread
    with fastflow.backend("auto"), ThreadPoolExecutor(8) as threads:
        alone = [gradients(x) for x in batches]
        together = list(threads.map(gradients, batches))
        torch.testing.assert_close(together, alone, rtol=0, atol=0)
        monkeypatch.setattr(Implementations, "_compiled", None)  # a compiled op would be an error
        with fastflow.backend("reference"):
            torch.testing.assert_close(list(threads.map(gradients, batches)), alone, rtol=2e-5, atol=2e-5)


@kernels
def test_initialization(each_backend):
    layer = ActNorm(3)
    x = 5 + 2 * torch.randn(16, 3, 4, 4)
    y, _ = layer(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)


@kernels
def test_compile(each_backend, monkeypatch):
    """torch.compile(fullgraph=True) keeps each op as one node, whose body is still the kernel."""
    flow = randomize(AffineCoupling(nn.Conv2d(2, 4, 1)))
    x = torch.randn(3, 4, 2, 4)
    affine_coupling = importlib.import_module("fastflow.triton_kernels.affine_coupling")
    torch._dynamo.reset()
    compiled = torch.compile(flow, fullgraph=True, backend="aot_eager")
    outputs = [
        torch.autograd.grad(sum(v.square().sum() for v in f(x)), list(flow.parameters()))
        for f in (flow, compiled)
    ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    launched = []
    launch = affine_coupling.launch
    monkeypatch.setattr(
        affine_coupling,
        "launch",
        lambda kernel, *args, **kwargs: (launched.append(kernel), launch(kernel, *args, **kwargs)),
    )
    with torch.no_grad():
        compiled(x)
    assert launched == [affine_coupling.affine_coupling_kernel]
    torch._dynamo.reset()
