"""Faster layers of FrEIA."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastflow.integrations.accelerate import Accelerated, Chain, Theirs, not_invertible, per_sample
from fastflow.integrations.coupling_layers import is_plain, pays_for_small_ops
from fastflow.integrations.kept import value_of
from fastflow.ops import actnorm, affine_coupling, conv1x1, positions
from fastflow.reversible import run_reversible

Result = tuple[Sequence[Tensor], Tensor]


# measured on a CPU: the operators of the library take no more time for fewer
FEW_ELEMENTS = 2**14


class AllInOneBlock(Accelerated):
    """``AllInOneBlock``: the coupling is one op; scale, offset and permutation are one product, or a copy."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        if module.GIN:
            return "gin_block=True"
        if module.householder:
            return "learned_householder_permutation"
        if module.w_perm.ndim != 2 + module.input_rank:
            return "w_perm is not a matrix"  # other releases have another formula too
        if module.in_channels % 2:
            return "an odd number of channels"
        return None

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> Result:
        z = x[0]
        if not self._gains(z):
            return super().forward(x, c, rev, jac)
        scale = self.global_scale_activation(self.global_scale)
        log_scale = scale.log().sum() * positions(z)
        if rev:
            z = self._unmixed(z, scale)
        elif self.reverse_pre_permute:
            z = self._permuted(z, "w_perm_inv")
        first = z[:, : self.splits[0]]
        params = 0.1 * self.subnet(torch.cat([first, *c], 1) if self.conditional else first)
        factor = value_of(self, "w_perm", _factors_of, self.clamp)
        form = {"scale": "tanh", "params_layout": "scale_shift", "inverse": rev}
        z, log_det = affine_coupling(z, params, factor, **form)
        if not rev:
            z = self._mixed(z, scale)
        elif self.reverse_pre_permute:
            z = self._permuted(z, "w_perm")
        return (z,), log_det - log_scale if rev else log_det + log_scale

    def _gains(self, z: Tensor) -> bool:
        if z.ndim != 2 + self.input_rank or z.shape[1] != self.in_channels:
            return False
        if not is_plain(z, self.global_scale):
            return False
        if pays_for_small_ops(z):
            return True
        return z.ndim > 2 and z.numel() >= FEW_ELEMENTS

    def _mixed(self, z: Tensor, scale: Tensor) -> Tensor:
        """Scaled, shifted and permuted."""
        if self._is_folded(z):
            matrix = self.w_perm.flatten(1)
            return conv1x1(z, matrix * scale.flatten(), matrix @ self.global_offset.flatten())
        return self._permuted(torch.addcmul(self.global_offset, z, scale), "w_perm")

    def _unmixed(self, z: Tensor, scale: Tensor) -> Tensor:
        if self._is_folded(z):
            matrix = self.w_perm_inv.flatten(1) / scale.view(-1, 1)
            return conv1x1(z, matrix, -(self.global_offset / scale).flatten())
        return (self._permuted(z, "w_perm_inv") - self.global_offset) / scale

    def _is_folded(self, z: Tensor) -> bool:
        """Whether one convolution takes less time: of images, whose channels it mixes."""
        return z.ndim > 2 and value_of(self, "w_perm", _index_of) is None

    def _permuted(self, z: Tensor, name: str) -> Tensor:
        index = value_of(self, name, _index_of)
        return self.permute_function(z, getattr(self, name)) if index is None else z.index_select(1, index)


def _factors_of(matrix: Tensor, clamp: float) -> Tensor:
    return matrix.new_full((matrix.shape[0] // 2,), clamp)


class _Coupling(Accelerated):
    """Block of two couplings, of one half and then of the other: each is one op after its network."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        return None if module.split_len1 == module.split_len2 else "halves of different sizes"

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> Result:
        z, log_dets = x[0], []
        if z.shape[1] != self.channels or not self._gains(z):
            return super().forward(x, c, rev, jac)
        for first in (False, True) if rev else (True, False):
            given = z.narrow(1, self.split_len1 if first else 0, self.split_len1)
            params = self._params(torch.cat([given, *c], 1) if self.conditional else given, first)
            form = {"swap_halves": first, "params_layout": "scale_shift", "inverse": rev}
            z, log_det = affine_coupling(z, params, **form)
            log_dets.append(log_det)
        return (z,), log_dets[0] + log_dets[1]

    def _gains(self, z: Tensor) -> bool:
        return z.ndim == 1 + self.ndims and pays_for_small_ops(z) and is_plain(z)

    def _clamped(self, raw: Tensor) -> Tensor:
        return self.clamp * self.f_clamp(raw)

    @abstractmethod
    def _params(self, given: Tensor, first: bool) -> Tensor:
        """Log-scale and shift of the first half of the channels, or of the second."""
        raise NotImplementedError(f"{type(self).__name__} has no _params")


class GLOWCouplingBlock(_Coupling):
    """``GLOWCouplingBlock``: a network for each half."""

    def _params(self, given: Tensor, first: bool) -> Tensor:
        raw, shift = (self.subnet2 if first else self.subnet1)(given).chunk(2, 1)
        return torch.cat([self._clamped(raw), shift], 1)


class RNVPCouplingBlock(_Coupling):
    """``RNVPCouplingBlock``: two networks for each half."""

    def _params(self, given: Tensor, first: bool) -> Tensor:
        scale, shift = (self.subnet_s2, self.subnet_t2) if first else (self.subnet_s1, self.subnet_t1)
        return torch.cat([self._clamped(scale(given)), shift(given)], 1)


def _index_of(matrix: Tensor) -> Tensor | None:
    """The channels that a permutation matrix selects; None for another matrix, or while it may not be read."""
    if torch.compiler.is_compiling() or matrix.is_meta:
        return None
    m = matrix.detach().flatten(1)
    ones = m == 1
    hard = (ones | (m == 0)).all() & (ones.sum(1) == 1).all()
    return ones.int().argmax(1) if hard else None


class ActNorm(Accelerated):
    """``ActNorm``: one op."""

    def forward(self, x: Sequence[Tensor], rev: bool = False, jac: bool = True) -> Result:
        z = x[0]
        if self.init_on_next_batch or z.shape[1] != self.scale.numel() or not is_plain(z, self.scale):
            return super().forward(x, rev, jac)
        if not pays_for_small_ops(z):
            return super().forward(x, rev, jac)
        y, log_det = actnorm(z, -self.scale.flatten(), -self.bias.flatten(), inverse=not rev)
        return [y], log_det


class Fixed1x1Conv(Accelerated):
    """``Fixed1x1Conv``: the convolution by the op, with a log-det for each sample."""

    def forward(self, x: Sequence[Tensor], rev: bool = False, jac: bool = True) -> Result:
        matrix = self.M_inv if rev else self.M
        if not is_plain(x[0], matrix):
            return super().forward(x, rev, jac)
        log_det = (self.logDetM * positions(x[0])).expand(x[0].shape[0])
        return (conv1x1(x[0], matrix.flatten(1)),), -log_det if rev else log_det


class IRevNetDownsampling(Accelerated):
    """``IRevNetDownsampling``: a copy instead of a convolution."""

    @classmethod
    def refusal(cls, module: Theirs) -> str | None:
        return "legacy_backend=True" if module.legacy_backend else None

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] | None = None, jac: bool = True, rev: bool = False
    ) -> tuple[Sequence[Tensor], float]:
        return ((F.pixel_shuffle if rev else F.pixel_unshuffle)(x[0], 2),), 0.0


class ReversibleSequence(Chain):
    """``SequenceINN`` that recomputes its activations."""

    @classmethod
    def obstacle(cls, module: Theirs) -> str | None:
        if len({c for c in module.conditions if c is not None}) > 1:
            return "several conditions"
        return not_invertible(module.module_list, "FrEIA", INVERTIBLE)

    def forward(
        self, x_or_z: Tensor, c: Sequence[Tensor] | None = None, rev: bool = False, jac: bool = True
    ) -> tuple[Tensor | tuple[Tensor], Tensor]:
        used = {i for i in self.conditions if i is not None}
        x = x_or_z if isinstance(x_or_z, Tensor) else x_or_z[0]
        if not jac or len(used) > 1 or (used and c is None):
            return super().forward(x_or_z, c, rev, jac)  # raises without a condition
        pairs = list(zip(self.module_list, self.conditions, strict=True))
        steps = [_Step(layer, i is not None, rev) for layer, i in pairs]
        context = c[used.pop()] if c is not None and used else None
        z, log_det = run_reversible(steps[::-1] if rev else steps, x, context)
        return (z,) if self.force_tuple_output else z, log_det


class _Step(nn.Module):
    """A layer of a sequence, in one of its directions."""

    def __init__(self, layer: nn.Module, conditional: bool, rev: bool) -> None:
        super().__init__()
        self.layer, self.conditional, self.rev = layer, conditional, rev

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, self.rev)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, not self.rev)

    def _run(self, x: Tensor, context: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        given = {"c": [context]} if self.conditional else {}
        (y,), log_det = self.layer((x,), jac=True, rev=rev, **given)
        return y, per_sample(log_det, x)


class Graph(Chain):
    """``GraphINN``, which is no chain."""

    @classmethod
    def obstacle(cls, module: Theirs) -> str:
        return "a graph, of which SequenceINN is the chain"


# layers whose inverse is a formula, also in training
INVERTIBLE = frozenset(
    {
        "ActNorm",
        "AffineCouplingOneSided",
        "AllInOneBlock",
        "ConditionalAffineTransform",
        "Fixed1x1Conv",
        "Flatten",
        "GINCouplingBlock",
        "GLOWCouplingBlock",
        "HaarDownsampling",
        "HaarUpsampling",
        "IRevNetDownsampling",
        "IRevNetUpsampling",
        "NICECouplingBlock",
        "PermuteRandom",
        "RNVPCouplingBlock",
        "Reshape",
    }
)

# the time of these is that of the modules inside, or of one operator
NOTHING_TO_GAIN = {
    "Concat",
    "Flatten",
    "InvertibleModule",
    "NICECouplingBlock",
    "PermuteRandom",
    "Reshape",
    "Split",
}


def is_layer(c: type) -> bool:
    """Whether a class is a layer of FrEIA that could be faster."""
    return c.__module__.startswith("FrEIA.modules") and c.__name__ not in NOTHING_TO_GAIN
