"""A short sample of a model's weights, by which a learned artefact knows the model it was trained for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_PER_WEIGHT = 16
# A little above twice the rounding of bfloat16, which has 8 bits of mantissa.
_RELATIVE, _ABSOLUTE = 2.0**-7, 1e-6


def weight_probe(modules: Iterable[nn.Module]) -> Tensor:
    """Samples up to 16 evenly spaced values of every parameter: (n,) float32 on the CPU, in the order of names."""
    samples = []
    for module in modules:
        for _, weight in sorted(module.named_parameters()):
            flat = weight.detach().reshape(-1)
            place = torch.arange(min(_PER_WEIGHT, len(flat)), device=flat.device) * len(flat) // _PER_WEIGHT
            samples.append(flat[place].float().cpu())
    return torch.cat(samples) if samples else torch.zeros(0)


def is_same_model(probe: Tensor, other: Tensor) -> bool:
    """Whether two samples are of the same weights, loaded in whatever floating type."""
    return probe.shape == other.shape and torch.allclose(probe, other, rtol=_RELATIVE, atol=_ABSOLUTE)
