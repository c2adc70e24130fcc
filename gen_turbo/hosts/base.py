"""What a host is: the facts about one architecture family that attaching needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from gen_turbo.contract import Grid, TokenReducer


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


@dataclass(frozen=True)
class SiteReport:
    """One attention layer.

    Attributes:
        name: Its path in the model.
        downsample: How many times coarser than the latent its grid is.
        status: "reduced", "lost" (a later call replaced the processor) or why it is left alone.
        grid: (height, width) of its tokens; None before the first call.
        num_tokens: Tokens that reach it; 0 before the first call.
        num_kept: Tokens that its attention runs on in a reduced call.
        num_full: Calls that ran in full.
        num_reduced: Calls that ran on fewer tokens.
        flops: Floating point operations of its attention so far, with projections.
        stock_flops: The same for the stock model.
    """

    name: str
    downsample: int
    status: str
    grid: Grid | None = None
    num_tokens: int = 0
    num_kept: int = 0
    num_full: int = 0
    num_reduced: int = 0
    flops: int = 0
    stock_flops: int = 0


class Part(Protocol):
    """A reducer on one model, as `attach` and `report` see it."""

    reducer: TokenReducer

    @property
    def model(self) -> nn.Module:
        """The model; raises ReferenceError once it is gone."""
        ...

    @property
    def site_names(self) -> tuple[str, ...]:
        """The layers that are reduced; never empty."""
        ...

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now between the calls of the model."""
        ...

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once so far."""
        ...

    def rows(self) -> list[SiteReport]:
        """One row per layer, reduced or left alone."""
        ...

    def install(self) -> None:
        """Puts everything in place."""
        ...

    def remove(self) -> None:
        """Makes the model what it was, object for object; doing it twice is harmless."""
        ...


class Host(Protocol):
    """One architecture family: the only code that knows its argument names."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the classes that it takes; subclasses are taken too."""
        ...

    def attachment(self, model: nn.Module, reducer: TokenReducer, pipeline: Any | None) -> Part:
        """Prepares a reducer for one model and changes nothing yet.

        Raises:
            ValueError: If no layer would be reduced, or a setting does not fit the model.
        """
        ...


class DenoiserHost(Protocol):
    """One family of diffusers denoisers."""

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
