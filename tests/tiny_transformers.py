"""Tiny real diffusion transformers with random weights, by name, and what runs them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.tiny_family import NUM_TEXT as NUM_TEXT
from tests.tiny_family import Family, random
from tests.tiny_images import IMAGES
from tests.tiny_recent import RECENT
from tests.tiny_videos import VIDEOS

FAMILIES: dict[str, Family] = IMAGES | VIDEOS | RECENT
"""Every supported family of transformers and every variant of it, by name."""


def build(name: str) -> nn.Module:
    """The model of a family, with the same weights every time."""
    torch.manual_seed(0)
    return FAMILIES[name].build().eval()


@torch.no_grad()
def run(
    name: str,
    model: nn.Module,
    times: tuple[int, ...] = (900, 700, 500, 300),
    batch: int = 2,
    grid: tuple[int, int] = (8, 8),
    latents: Tensor | None = None,
) -> Tensor:
    """Calls the model once per time on slowly changing latents and stacks the outputs."""
    family, outputs = FAMILIES[name], []
    latents = random(batch, *family.latents(grid)) if latents is None else latents
    inputs = family.inputs(batch, grid)
    if family.first:
        model(hidden_states=latents, **inputs, **family.first, **family.time(times[0] + 50, batch))
    for step, time in enumerate(times):
        sample: object = latents * (1 - 0.05 * step)
        if name == "z-image":
            first: dict[str, object] = {"x": list(sample)}
        else:
            first = {"sample" if name == "kandinsky" else "hidden_states": sample}
        told = family.time(time, batch) if name != "kandinsky" else {"timestep": time}
        output = model(**first, **inputs, **family.then, **told, return_dict=False)
        output = output[0] if isinstance(output, tuple) else output
        outputs.append(torch.stack(list(output)))
    return torch.stack(outputs)
