"""What an attachment to one model is, as `attach` and `report` see it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

from torch import nn

from gen_turbo.method import Grid, TokenReducer


class NoEffectWarning(UserWarning):
    """A whole run goes by without one reduced layer."""


def counted(number: int, noun: str) -> str:
    """A number of things in words, as "1 step" and "2 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: Its path in the model.
        downsample: How many times coarser than the latent its grid is.
        status: "reduced" or why it is left alone.
        grid: (height, width) of its tokens; None before the first call.
        num_tokens: Tokens that reach it; 0 before the first call.
        num_kept: Tokens that it runs on in a reduced call.
        num_full: Calls that ran in full.
        num_reduced: Calls that ran on fewer tokens.
        flops: Floating point operations so far, with projections.
        stock_flops: The same for the stock model.
        plan_age: The most steps that a map had served when this layer used it.
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
    plan_age: int = 0


class Part(Protocol):
    """A reducer on one model."""

    reducer: TokenReducer

    @property
    def model(self) -> nn.Module:
        """The model; raises ReferenceError once it is gone."""
        ...

    @property
    def layer_names(self) -> tuple[str, ...]:
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

    def rows(self) -> list[LayerReport]:
        """One row per layer, reduced or left alone."""
        ...

    def reference(self) -> Callable[[], Part | None]:
        """What gives the part back for as long as its model lives, and does not keep the model alive."""
        ...

    def install(self) -> None:
        """Puts everything in place."""
        ...

    def remove(self) -> None:
        """Makes the model what it was, object for object; doing it twice is harmless."""
        ...


class OnModel:
    """What holds on to a model without keeping it alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        """The model; raises ReferenceError once it is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this attachment no longer exists")
        return model

    def reference(self) -> Callable[[], Self | None]:
        """The part itself, where it holds nothing that keeps the model alive."""
        return lambda: self
