"""Layers of nflows and normflows that compute the same as FastFlow's layers, with their weights.

    pip install --no-deps nflows normflows

Networks are shared if their forms agree; everything else is copied into the library's own form. ``forward``
maps data to latents and returns the log-det; ``inverse`` maps back without it.
"""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models import plain_glow
from fastflow.nn import AffineCoupling, GlowStep

SHIFT_FIRST = "sigmoid, shift first"  # the coupling of OpenAI's Glow
# each coupling exists in one of the libraries only
COUPLINGS = {"soft_clamp": "nflows", SHIFT_FIRST: "normflows"}
DEPRECATED = r"torch\.(triangular_solve|lu) is deprecated"  # functions that they call


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


@torch.no_grad()
def settle(step: GlowStep, coupling: str) -> None:
    """Gives a step a coupling, and weights that nflows can represent: no permutation, positive diagonals."""
    if coupling == SHIFT_FIRST:
        step.coupling = AffineCoupling(
            step.coupling.net, scale="sigmoid", affine_order="shift_first", params_layout="interleaved"
        )
    conv = step.conv1x1
    conv.perm.copy_(torch.arange(conv.num_features))
    conv.sign_s.fill_(1)
    for p in (conv.lower, conv.upper, conv.log_s):
        p.mul_(0.1)  # near the identity: without pivots the L U of a rotation has a poor inverse


# nflows -------------------------------------------------------------------------------


class Nflows(nn.Module):
    def __init__(self, transform: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.transform = transform.to(like)  # its dtype and device

    def forward(self, x):
        return self.transform(x)

    def inverse(self, y):
        return self.transform.inverse(y)[0]


class NflowsNetwork(plain_glow.Network):
    def forward(self, x, context=None):
        return super().forward(x)


@torch.no_grad()
def nflows_actnorm(like):
    """nflows' ActNorm, which shifts after it scales."""
    from nflows import transforms

    made = transforms.ActNorm(like.num_features).to(like.bias)
    made.log_scale.copy_(like.log_scale)
    made.shift.copy_(like.bias * like.log_scale.exp())
    made.initialized.fill_(True)
    return made


@torch.no_grad()
def nflows_conv1x1(like):
    from nflows import transforms

    made = transforms.OneByOneConvolution(like.num_features).to(like.lower)
    made.permutation._permutation.copy_(torch.arange(like.num_features))
    made.lower_entries.copy_(like.lower[made.lower_indices[0], made.lower_indices[1]])
    made.upper_entries.copy_(like.upper[made.upper_indices[0], made.upper_indices[1]])
    made.unconstrained_upper_diag.copy_(torch.log(torch.expm1(like.log_s.exp() - made.eps)))
    return made


def nflows_coupling(like, c: int):
    """nflows' affine coupling with the scale function soft_clamp, or its additive coupling."""
    from nflows import transforms

    class SoftClamp(transforms.AffineCouplingTransform):
        def _scale_and_shift(coupling, raw):
            shift, scale = raw.chunk(2, dim=1)
            factor = coupling.log_factor.exp().view(1, -1, 1, 1)
            return torch.exp(factor * torch.tanh(scale / factor)), shift

    kind = transforms.AdditiveCouplingTransform if like.scale == "none" else SoftClamp
    made = kind(torch.arange(c) >= c // 2, lambda i, o: NflowsNetwork(like.net))
    if like.scale != "none":
        made.log_factor = like.log_factor
    return made


def nflows_step(like: GlowStep):
    from nflows import transforms

    c = like.conv1x1.num_features
    return transforms.CompositeTransform(
        [nflows_actnorm(like.actnorm), nflows_conv1x1(like.conv1x1), nflows_coupling(like.coupling, c)]
    )


def nflows_squeeze():
    from nflows import transforms

    return transforms.SqueezeTransform()


def nflows_permute(like):
    from nflows import transforms

    return transforms.Permutation(like.perm)


# normflows ----------------------------------------------------------------------------


class Normflows(nn.Module):
    """A flow of normflows, which maps latents to data."""

    def __init__(self, flow: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.flow = flow.to(like)  # its dtype and device

    def forward(self, x):
        return self.flow.inverse(x)

    def inverse(self, y):
        return self.flow(y)[0]


@torch.no_grad()
def normflows_actnorm(like):
    from normflows.flows import ActNorm

    made = ActNorm((like.num_features, 1, 1)).to(like.bias)
    made.s.copy_(-like.log_scale.view_as(made.s))
    made.t.copy_(-like.bias.view_as(made.t))
    made.data_dep_init_done.fill_(1)
    return made


@torch.no_grad()
def normflows_conv1x1(like):
    from normflows.flows import Invertible1x1Conv

    made = Invertible1x1Conv(like.num_features, use_lu=True).to(like.lower)
    made.P.copy_(made.eye[like.perm])
    made.sign_S.copy_(like.sign_s)
    for own, other in ((made.L, like.lower), (made.U, like.upper), (made.log_S, like.log_s)):
        own.copy_(other)
    return made


@torch.no_grad()
def normflows_coupling(like):
    """normflows' affine coupling (scale and shift interleaved) or its additive coupling.

    Both subtract the shift, so the network's output for it is negated.
    """
    from normflows.flows import AffineCouplingBlock

    network = plain_glow.Network(like.net)
    sign = torch.ones_like(network.bias)
    # in the weights, so that the timed part has no further pass
    sign[0 :: 1 if like.scale == "none" else 2] = -1
    network.weights[2] = nn.Parameter(network.weights[2] * sign.view(-1, 1, 1, 1))
    network.bias = nn.Parameter(network.bias * sign)
    return AffineCouplingBlock(network, scale=like.scale != "none", scale_map="sigmoid")


def normflows_step(like: GlowStep):
    from normflows.flows import GlowBlock

    made = GlowBlock(like.conv1x1.num_features, hidden_channels=1, scale_map="sigmoid", use_lu=True)
    made.flows = nn.ModuleList(
        [normflows_coupling(like.coupling), normflows_conv1x1(like.conv1x1), normflows_actnorm(like.actnorm)]
    )
    return made


def normflows_squeeze():
    from normflows.flows import Squeeze

    return Squeeze()


def normflows_permute(like):
    from normflows.flows import Permute

    made = Permute(like.num_features, mode="shuffle")  # applied from latents to data
    made.perm.copy_(like.perm.argsort())
    made.inv_perm.copy_(like.perm)
    return made


def step(library: str) -> Callable[[GlowStep], nn.Module]:
    """Function that makes the library's Glow step from FastFlow's."""
    if library == "nflows":
        return lambda like: Nflows(nflows_step(like), like.actnorm.bias)
    return lambda like: Normflows(normflows_step(like), like.actnorm.bias)
