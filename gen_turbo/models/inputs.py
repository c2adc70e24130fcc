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


def place_of(time: float, times: tuple[float, ...]) -> int | None:
    """The place of a time among those of a run; models are given rounded or scaled ones."""
    if not times:
        return None
    place = min(range(len(times)), key=lambda index: abs(times[index] - abs(time)))
    gaps = [abs(other - times[place]) for other in times if other != times[place]]
    return place if abs(times[place] - abs(time)) <= min(gaps, default=2.0) / 2 else None
