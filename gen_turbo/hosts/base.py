"""What a host is: the facts about one architecture family that attaching needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from gen_turbo.contract import Grid


@dataclass(frozen=True)
class Layer:
    """One attention layer of a model.

    Attributes:
        name: Its path in the model.
        downsample: How many times coarser than the model's input its token grid is.
        left_alone: Why it cannot be reduced; empty if it can.
    """

    name: str
    downsample: int = 0
    left_alone: str = ""


@dataclass(frozen=True)
class Observation:
    """What one call of a model's root shows.

    Attributes:
        timestep: The denoising time; falls during a run.
        grid: (height, width) of the model's input in tokens.
        layout: Shape, dtype and device of the input; another layout is another stream.
        condition: The conditioning tensor; another object is another stream (separate calls for guidance).
    """

    timestep: float
    grid: Grid
    layout: tuple[object, ...]
    condition: Tensor | None


class Host(Protocol):
    """One architecture family: the only code that knows its argument names."""

    def accepts(self, model: nn.Module) -> bool:
        """Whether the model is of this family."""
        ...

    def layers(self, model: nn.Module) -> list[Layer]:
        """Every attention layer, those that can be reduced and those that are left alone."""
        ...

    def observe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Observation:
        """Reads the arguments of one call of the root."""
        ...

    def semantic_value(self, attn: nn.Module, tokens: Tensor, kind: str) -> Tensor | None:
        """The semantic value of tokens (B, N, C) at a layer as (B, N); None where there is none of that kind."""
        ...


def coarsened(grid: Grid, downsample: int) -> Grid:
    """The grid after repeated halving, each rounding up as a padded stride-2 convolution does."""
    height, width = grid
    while downsample > 1:
        height, width, downsample = (height + 1) // 2, (width + 1) // 2, downsample // 2
    return height, width
