"""What the tiny real models of all families share: what a family is, and random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

NUM_TEXT = 5
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True)
class Family:
    """One model class in one variant.

    Attributes:
        build: Makes the model.
        inputs: All arguments of a call but the latents and the time, for a batch and (height, width) of its tokens.
        latents: The shape of the latents behind the batch, for (height, width) of the tokens.
        time: From a falling time in thousandths to what the model is told.
        num_frames: Frames of the latents in tokens.
        first: Arguments of a call before the others, which fills a cache that they read; none where there is none.
        then: Arguments of the others.
        num_hidden: Condition tokens that no row of a batch shows.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, tuple[int, int]], dict[str, object]]
    latents: Callable[[tuple[int, int]], tuple[int, ...]]
    time: Callable[[int, int], dict[str, object]] = lambda time, batch: {"timestep": torch.full((batch,), float(time))}
    num_frames: int = 1
    first: dict[str, object] = field(default_factory=dict)
    then: dict[str, object] = field(default_factory=dict)
    num_hidden: int = 0


def random(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers that do not touch the global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(batch: int, width: int = 32) -> dict[str, object]:
    """Another text in every row."""
    return {"encoder_hidden_states": random(batch, NUM_TEXT, width)}


def patched(channels: int = 4) -> Callable[[tuple[int, int]], tuple[int, ...]]:
    """Latents of which 2 x 2 make a token."""
    return lambda grid: (channels, 2 * grid[0], 2 * grid[1])


def rotary(length: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables."""
    angle = random(length, width, seed=2)
    return angle.cos(), angle.sin()


def thousandth(time: int, batch: int) -> dict[str, object]:
    """Flux and Qwen-Image."""
    return {"timestep": torch.full((batch,), time / 1000)}


def rising(time: int, batch: int) -> dict[str, object]:
    """Lumina2."""
    return {"timestep": torch.full((batch,), 1 - time / 1000)}


def frames(num_frames: int, channels: int = 4) -> Callable[[tuple[int, int]], tuple[int, ...]]:
    """Video latents, channels before frames."""
    return lambda grid: (channels, num_frames, 2 * grid[0], 2 * grid[1])
