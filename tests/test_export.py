"""Export: the log-density and the decoder of every model in onnxruntime; torch.export keeps FastFlow's ops."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastflow import export
from fastflow import nn as fnn
from fastflow.models import FlowModel, mnist_flow
from tests.support.models import data, glow, labels, nice, realnvp, trained, vector_glow

PAGE = Path(__file__).parents[1] / "docs" / "export.md"


def flow_model(**_):
    flow = fnn.Sequential(
        fnn.InvertibleConv1x1(3, lu=False), fnn.AffineCoupling(fnn.MLP(1, 4, 2, 1, context_features=2))
    )
    return FlowModel(flow, fnn.GaussianPrior((3,), context_features=2), standardize=True)


TINY = {
    "Glow": lambda **kw: glow(image_shape=(1, 4, 4), levels=2, steps=1, hidden=2, classes=2, **kw),
    # its own network takes seconds to export in each coupling: exported once, by itself
    "RealNVP": lambda **kw: realnvp(
        image_shape=(1, 2, 2), scales=1, network=lambda i, o: nn.Conv2d(i, o, 1), **kw
    ),
    "NICE": lambda **kw: nice(features=4, couplings=1, hidden=2, layers=1, **kw),
    "mnist_flow": lambda **kw: mnist_flow("simple", depth=1, width=2, blocks=1, **kw),
    "VectorGlow": lambda **kw: vector_glow(features=2, steps=1, hidden=2, layers=1, context_features=1, **kw),
    "FlowModel": flow_model,
}


class Both(nn.Module):
    """Both directions of several models in one graph, which is exported once: each export takes seconds."""

    def __init__(self, models):
        super().__init__()
        self.network = fnn.ResidualNetwork(1, 2, hidden=2, blocks=1)
        self.log_prob = nn.ModuleList(map(export.LogProb, models))
        self.decoder = nn.ModuleList(map(export.Decoder, models))

    def forward(self, inputs):
        log_probs = [f(*args) for f, (args, _) in zip(self.log_prob, inputs, strict=True)]
        x = [f(*args) for f, (_, args) in zip(self.decoder, inputs, strict=True)]
        latents, _ = inputs[1][1]  # of RealNVP, one channel
        return log_probs, x, self.network(latents[0])


def context_of(model, n):
    if isinstance(model, FlowModel):
        return torch.randn(n, 2)
    return labels(model, n) if model.context_shape is None else torch.randn(n, *model.context_shape)


def inputs_of(model, n):
    x, context = data(model, n), context_of(model, n)
    noise = None if model.n_bits is None else torch.rand(x.shape)
    latents = tuple(torch.randn(n, *shape) for shape in model.latent_shapes())
    return (x, noise, context), (latents, context)


@pytest.mark.slow
def test_every_model_runs_in_onnxruntime(tmp_path):
    """VectorGlow is the example of the page, below."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    models = {}
    for name in (name for name in TINY if name != "VectorGlow"):
        model = TINY[name]()
        model.initialize(data(model, 8), context_of(model, 8))
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        models[name] = model.eval()
    both, batch = Both(models.values()).eval(), torch.export.Dim("batch")
    inputs = [inputs_of(model, 2) for model in models.values()]
    shapes = torch.utils._pytree.tree_map_only(torch.Tensor, lambda _: {0: batch}, inputs)
    program = torch.onnx.export(
        both, (inputs,), dynamic_shapes=(shapes,), dynamo=True, verbose=False, optimize=False
    )
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "models.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "models.onnx")
    for n in (1, 5):
        inputs = [inputs_of(model, n) for model in models.values()]
        given = [v.numpy() for v in torch.utils._pytree.tree_leaves(inputs) if v is not None]
        found = session.run(None, dict(zip((i.name for i in session.get_inputs()), given, strict=True)))
        expected = torch.utils._pytree.tree_leaves(both(inputs))
        for name, a, b in zip([*models, *models, "network"], found, expected, strict=True):
            a = torch.from_numpy(a)
            if b.dtype == torch.uint8:  # rounding at the edge of a bin
                assert (a.int() - b.int()).abs().max() <= 1, (name, n)
                assert (a != b).float().mean() < 0.01, (name, n)
            else:
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), (name, n)


class OtherLayers(nn.Module):
    """Both directions of layers that no model has, and one of LULinear, whose inverse solves equations."""

    def __init__(self):
        super().__init__()
        self.linear = fnn.LULinear(4, identity_init=False)
        flows = [
            fnn.Coupling(fnn.ResidualMLP(2, 6, 3, 1), fnn.PiecewiseLinear(3)),
            fnn.Inverse(fnn.Coupling(fnn.MLP(2, 10, 2), fnn.PiecewiseQuadratic(3))),
            fnn.Sequential(fnn.CircularShift(9.0), fnn.LeakyReLU(0.5), fnn.Softplus(), fnn.Log()),
            fnn.Sequential(fnn.Exp(), fnn.Inverse(fnn.Softplus())),
            fnn.Sequential(fnn.Tanh(), fnn.Inverse(fnn.SoftClip(1.0))),
            fnn.Sequential(fnn.Sigmoid(), fnn.Logit()),
        ]
        masked = [
            fnn.MaskedAutoregressive(fnn.MaskedNetwork(2, 2, (5, 4), residual=True, order="reverse")),
            fnn.Inverse(fnn.MaskedAutoregressive(fnn.MaskedNetwork(2, 8, (5,)), "spline", bins=3)),
        ]
        self.flows, self.masked = nn.ModuleList(flows), nn.ModuleList(masked)

    def forward(self, x):
        pairs = x[:, :2]  # the graph of an inverse has a part for each feature
        given = [(flow, x) for flow in self.flows] + [(flow, pairs) for flow in self.masked]
        return *self.linear(x), *(v for flow, w in given for d in (flow, flow.inverse) for v in d(w))


@pytest.mark.slow
def test_other_layers_run_in_onnxruntime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    layers = OtherLayers().eval()
    for p in layers.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, shapes = torch.randn(2, 4), {"x": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(
        layers, (x,), dynamic_shapes=shapes, dynamo=True, verbose=False, optimize=False
    )
    assert {node.domain for node in program.model.graph} == {""}
    program.save(tmp_path / "layers.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layers.onnx")
    for n in (1, 5):
        x = torch.randn(n, 4)
        found = map(torch.from_numpy, session.run(None, {"x": x.numpy()}))
        torch.testing.assert_close(list(found), list(layers(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_example_of_the_page(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    (block,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    exec(block, names)
    model, x = names["model"].eval(), names["x"]
    session = names["onnxruntime"].InferenceSession("log_prob.onnx")
    (log_prob,) = session.run(None, {"x": x})
    with torch.no_grad():
        expected = model.log_prob(torch.from_numpy(x))
    torch.testing.assert_close(torch.from_numpy(log_prob), expected, rtol=1e-4, atol=1e-4)
    assert x.shape == (100, 2) and names["log_prob"].shape == (100,)
    z = torch.randn(7, 2)
    session = names["onnxruntime"].InferenceSession("decoder.onnx")
    (x,) = session.run(None, {"latents_0": z.numpy()})
    torch.testing.assert_close(torch.from_numpy(x), model.decode((z,)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_modules_are_the_model(name):
    model = TINY[name]().eval()
    (x, noise, context), (latents, _) = inputs_of(model, 3)
    log_prob, decoder = export.LogProb(model), export.Decoder(model)
    if noise is None:
        torch.testing.assert_close(log_prob(x, None, context), model.log_prob(x, context))
    else:
        within = model._log_prob_dequantized(*model.dequantize(x, noise=noise), context)
        torch.testing.assert_close(log_prob(x, noise, context), within)
    torch.testing.assert_close(decoder(latents, context), model.decode(latents, context))
    given = log_prob.arguments(
        context if context is None else context[:1].clone() if name == "FlowModel" else None
    )
    assert log_prob(*given["args"]).shape == (2,)
    assert given["input_names"] == [
        k for k, v in zip(("x", "noise", "context"), (x, noise, context), strict=True) if v is not None
    ]


def test_torch_export_keeps_the_ops():
    model = trained(lambda **_: vector_glow(features=2, steps=1, hidden=2, layers=1))
    module, x = export.LogProb(model), torch.randn(5, 2)
    program = torch.export.export(module, **module.arguments(names=False))
    for exported in (program, program.run_decompositions()):
        ops = {str(node.target) for node in exported.graph.nodes if "fastflow" in str(node.target)}
        assert ops == {
            f"fastflow.{op}.default" for op in ("actnorm", "conv1x1", "affine_coupling", "gaussian_log_prob")
        }
    assert torch.equal(program.module()(x), module(x))


def test_a_snapshot():
    model = trained(vector_glow)
    module, x = export.LogProb(model), torch.randn(3, 4)
    before = module(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(module(x), before) and not any(p.requires_grad for p in module.parameters())
    assert not module.model.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: export.LogProb(nn.Linear(2, 2)), "model: got Linear, expected a model of fastflow.models"),
        (lambda: export.LogProb(vector_glow())(torch.zeros(2, 3)), "x: got shape [2, 3], expected"),
        (lambda: export.LogProb(vector_glow())(torch.zeros(2, 4), torch.zeros(2, 4)), "noise: got a tensor, expected None"),
        (lambda: export.LogProb(nice())(data(nice())), "noise: got None, expected a tensor shape [3, 8] of values"),
        (lambda: export.Decoder(vector_glow())((torch.zeros(2, 3),)), "latents[0]: got shape [2, 3], expected [N, 4]"),
        (lambda: export.Decoder(flow_model()).arguments(torch.zeros(2, 2)[:, None].expand(-1, 2, -1)[:, 0].double()),
         "context: got shape [2, 2], expected one row [1, ...]"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
