"""Glow in plain PyTorch with the weights of a FastFlow Glow, as the baseline for FastFlow and torch.compile.

A direct port: nothing is folded or fused, steps share no work, and nothing is computed twice. The
parameters are the tensors of the FastFlow model, so outputs and gradients can be compared one by one.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastflow.models import Glow


class ActNorm(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.log_scale, self.bias = like.log_scale, like.bias

    def forward(self, x):
        y = (x + self.bias.view(1, -1, 1, 1)) * self.log_scale.exp().view(1, -1, 1, 1)
        return y, self.log_scale.sum() * (x.shape[2] * x.shape[3])

    def inverse(self, y):
        return y * (-self.log_scale).exp().view(1, -1, 1, 1) - self.bias.view(1, -1, 1, 1)


class Conv1x1(nn.Module):
    """W = P L (U + diag s), the LU decomposition of Glow's equation 10."""

    def __init__(self, like):
        super().__init__()
        self.lower, self.upper, self.log_s = like.lower, like.upper, like.log_s
        c = like.num_features
        self.register_buffer("sign_s", like.sign_s)
        eye = torch.eye(c, dtype=like.lower.dtype, device=like.lower.device)
        self.register_buffer("permutation", eye[like.perm])
        self.register_buffer("eye", eye)

    def factors(self):
        return self.lower.tril(-1) + self.eye, self.upper.triu(1) + torch.diag(self.sign_s * self.log_s.exp())

    def forward(self, x):
        lower, upper = self.factors()
        weight = self.permutation @ (lower @ upper)
        return F.conv2d(x, weight[:, :, None, None]), self.log_s.sum() * (x.shape[2] * x.shape[3])

    def inverse(self, y):
        lower, upper = self.factors()
        inverse = torch.linalg.solve_triangular(lower, self.permutation.mT, upper=False, unitriangular=True)
        inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
        return F.conv2d(y, inverse[:, :, None, None])


class Network(nn.Module):
    def __init__(self, like):
        super().__init__()
        first, _, second, _, last = like
        self.weights = nn.ParameterList([first.conv.weight, second.conv.weight, last.weight])
        self.norms = nn.ModuleList([ActNorm(first.actnorm), ActNorm(second.actnorm)])
        self.bias, self.logs = last.bias, last.logs

    def forward(self, x):
        x = F.relu(self.norms[0](F.conv2d(x, self.weights[0], padding=1))[0])
        x = F.relu(self.norms[1](F.conv2d(x, self.weights[1]))[0])
        return F.conv2d(x, self.weights[2], self.bias, padding=1) * (3 * self.logs).exp().view(1, -1, 1, 1)


class Coupling(nn.Module):
    """y_b = exp(f tanh(h / f)) x_b + t."""

    def __init__(self, like):
        super().__init__()
        self.network, self.log_factor = Network(like.net), like.log_factor

    def shift_and_log_scale(self, x_a):
        shift, scale = self.network(x_a).chunk(2, dim=1)
        factor = self.log_factor.exp().view(1, -1, 1, 1)
        return shift, factor * torch.tanh(scale / factor)

    def forward(self, x):
        x_a, x_b = x.chunk(2, dim=1)
        shift, log_scale = self.shift_and_log_scale(x_a)
        return torch.cat([x_a, x_b * log_scale.exp() + shift], dim=1), log_scale.sum((1, 2, 3))

    def inverse(self, y):
        y_a, y_b = y.chunk(2, dim=1)
        shift, log_scale = self.shift_and_log_scale(y_a)
        return torch.cat([y_a, (y_b - shift) * (-log_scale).exp()], dim=1)


class ShiftFirstCoupling(nn.Module):
    """y_b = sigmoid(h + 2) (x_b + t), t and h interleaved in the network's output, as in OpenAI's Glow."""

    def __init__(self, like):
        super().__init__()
        self.network = Network(like.net)

    def shift_and_scale(self, x_a):
        # faster to differentiate than slices of every second channel
        shift, scale = self.network(x_a).unflatten(1, (-1, 2)).unbind(2)
        return shift, torch.sigmoid(scale + 2)

    def forward(self, x):
        x_a, x_b = x.chunk(2, dim=1)
        shift, scale = self.shift_and_scale(x_a)
        return torch.cat([x_a, (x_b + shift) * scale], dim=1), scale.log().sum((1, 2, 3))

    def inverse(self, y):
        y_a, y_b = y.chunk(2, dim=1)
        shift, scale = self.shift_and_scale(y_a)
        return torch.cat([y_a, y_b / scale - shift], dim=1)


class Step(nn.Module):
    def __init__(self, like):
        super().__init__()
        coupling = ShiftFirstCoupling if like.coupling.affine_order == "shift_first" else Coupling
        self.layers = nn.ModuleList([ActNorm(like.actnorm), Conv1x1(like.conv1x1), coupling(like.coupling)])

    def forward(self, x):
        log_det = 0.0
        for layer in self.layers:
            x, more = layer(x)
            log_det = log_det + more
        return x, log_det

    def inverse(self, y):
        for layer in reversed(self.layers):
            y = layer.inverse(y)
        return y


class Split(nn.Module):
    def __init__(self, like):
        super().__init__()
        self.weight, self.bias, self.logs = like.net.weight, like.net.bias, like.net.logs

    def parameters_of_prior(self, x_a):
        scale = (3 * self.logs).exp().view(1, -1, 1, 1)
        return (F.conv2d(x_a, self.weight, self.bias, padding=1) * scale).chunk(2, dim=1)

    def forward(self, x):
        x_a, z = x.chunk(2, dim=1)
        mean, log_std = self.parameters_of_prior(x_a)
        return x_a, gaussian(z, mean, log_std)

    def inverse(self, x_a, noise):
        mean, log_std = self.parameters_of_prior(x_a)
        return torch.cat([x_a, mean + log_std.exp() * noise], dim=1)


def gaussian(z, mean, log_std):
    return (-0.5 * math.log(2 * math.pi) - log_std - 0.5 * ((z - mean) * (-log_std).exp()) ** 2).sum(
        (1, 2, 3)
    )


class PlainGlow(nn.Module):
    """A Glow in plain PyTorch.

    Args:
        model: an unconditional Glow without logit, with LU convolutions and affine couplings (soft_clamp or
            OpenAI's).
        step: makes each step from one of ``model``'s.
    """

    def __init__(self, model: Glow, step=Step):
        super().__init__()
        self.levels = nn.ModuleList([nn.ModuleList([step(s) for s in level.steps]) for level in model.flows])
        self.splits = nn.ModuleList([Split(split) for split in model.splits])
        self.latent_shapes = model.latent_shapes()
        self.shape, self.n_bits = model.shape, model.n_bits

    def forward(self, x, noise):
        """bits/dim ``[N]`` of uint8 images with dequantization noise ``[N, C, H, W]`` in [0, 1)."""
        y = (x + noise) / 2**self.n_bits - 0.5
        log_prob = -self.n_bits * math.log(2) * math.prod(self.shape)
        for i, level in enumerate(self.levels):
            y = F.pixel_unshuffle(y, 2)
            for step in level:
                y, log_det = step(y)
                log_prob = log_prob + log_det
            if i < len(self.splits):
                y, more = self.splits[i](y)
                log_prob = log_prob + more
        zero = torch.zeros((), device=y.device, dtype=y.dtype)
        return (log_prob + gaussian(y, zero, zero)) / (-math.log(2) * math.prod(self.shape))

    @torch.no_grad()
    def sample(self, noise):
        """uint8 images from standard normal noise, fine to coarse as in ``latent_shapes``."""
        *noise, y = noise
        for i in reversed(range(len(self.levels))):
            if i < len(self.splits):
                y = self.splits[i].inverse(y, noise[i])
            for step in reversed(self.levels[i]):
                y = step.inverse(y)
            y = F.pixel_shuffle(y, 2)
        return ((y + 0.5) * 2**self.n_bits).floor().clamp(0, 2**self.n_bits - 1).to(torch.uint8)
