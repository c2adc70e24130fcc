"""What the arguments of any diffusers denoiser show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COPIES = (2, 3)


def time_of(timestep: Any) -> float:
    """The denoising time, which a model is given as a number or a tensor; waits for the device.

    Of different ones the latest counts: frames that are given, not made, have the time zero.
    """
    return float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)


def num_images(sample: Tensor) -> int:
    """Rows before the batch repeats itself: pipelines call a model on all images twice or thrice for guidance."""
    for count in _COPIES:
        num, rest = divmod(len(sample), count)
        if rest == 0 and torch.equal(sample[num:], sample[:-num]):
            return num
    return len(sample)
