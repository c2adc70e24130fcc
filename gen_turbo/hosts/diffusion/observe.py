"""What the root arguments of any diffusers denoiser show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def time_of(timestep: Any) -> float:
    """The denoising time, which a model is told as a number or a tensor of equal ones."""
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)


def layout_of(sample: Tensor) -> tuple[object, ...]:
    """What tells streams of different inputs apart."""
    return tuple(sample.shape), sample.dtype, sample.device


def has_equal_halves(sample: Tensor) -> bool:
    """Whether the batch is one picture twice, as pipelines call a model for guidance."""
    half = len(sample) // 2
    return len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:])
