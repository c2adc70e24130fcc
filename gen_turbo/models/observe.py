"""What the root arguments of any diffusers denoiser show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COPIES = (2, 3)


def time_of(timestep: Any) -> float:
    """The denoising time, which a model is told as a number or a tensor of equal ones."""
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)


def layout_of(sample: Tensor) -> tuple[object, ...]:
    """What tells streams of different inputs apart."""
    return tuple(sample.shape), sample.dtype, sample.device


def num_pictures(sample: Tensor) -> int:
    """Rows before the batch repeats itself: pipelines call a model on all pictures twice or thrice for guidance."""
    for count in _COPIES:
        num, rest = divmod(len(sample), count)
        if rest == 0 and torch.equal(sample[num:], sample[:-num]):
            return num
    return len(sample)
