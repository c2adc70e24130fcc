"""Optimisers of the embedded models: orthogonalised momentum for matrices, AdamW for the rest."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Muon:
    """Momentum steps whose update is orthogonalised by five Newton-Schulz iterations."""

    def __init__(self, parameters: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.parameters, self.momentum, self.lr = parameters, momentum, 0.0
        self.buffers = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for parameter, buffer in zip(self.parameters, self.buffers, strict=True):
            if parameter.grad is None:
                continue
            buffer.mul_(self.momentum).add_(parameter.grad)
            update = (parameter.grad + self.momentum * buffer).reshape(parameter.shape[0], -1)
            update = orthogonalise(update)
            scale = 0.2 * math.sqrt(max(update.shape))
            parameter.mul_(1 - self.lr * 0.01).add_(update.reshape(parameter.shape), alpha=-self.lr * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Brings the singular values of a matrix near 1."""
    x = matrix / (matrix.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if is_tall else x


def optimisers(*models: nn.Module, keep_plain: tuple[str, ...]) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for matrices and convolutions, AdamW for the rest and for names that begin with `keep_plain`."""
    named = [pair for model in models for pair in model.named_parameters()]
    matrices, rest = [], []
    for name, parameter in named:
        is_plain = parameter.ndim < 2 or any(part in name for part in keep_plain)
        (rest if is_plain else matrices).append(parameter)
    return Muon(matrices), torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)


def set_learning_rate(muon: Muon, adam: torch.optim.AdamW, rate: float) -> None:
    """Muon takes `rate`, AdamW half of it."""
    muon.lr = rate
    for group in adam.param_groups:
        group["lr"] = rate / 2
