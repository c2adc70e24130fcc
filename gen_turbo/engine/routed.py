"""A reducer that also skips: the part of a denoiser on which a schedule of PAR is at work."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import nn

from gen_turbo.engine.base import LayerReport, OnModel
from gen_turbo.engine.clock import run_facts_of
from gen_turbo.engine.denoiser import DenoiserPart, NoEffectWarning
from gen_turbo.engine.gate import Gates
from gen_turbo.engine.routing import Routing, UnitStats
from gen_turbo.engine.units import SkippingHost
from gen_turbo.method import TokenReducer
from gen_turbo.training.schedule import Schedule


@runtime_checkable
class LayerPruner(Protocol):
    """A reducer that skips layers of a denoiser too.

    Attributes:
        threshold: Largest relative error of a unit's last forecast at which it is still skipped; None for any.
    """

    threshold: float | None

    def merging(self) -> TokenReducer:
        """The reducer of the tokens of what runs."""
        ...

    def schedules(self, model: nn.Module) -> Sequence[Schedule]:
        """One schedule for each kind of run; none where nothing is skipped.

        Raises:
            ValueError: If there is none for this model.
        """
        ...


class RoutedPart(OnModel):
    """A reducer of tokens on one denoiser with a schedule around it.

    Raises:
        ValueError: If the schedule does not fit the model, or skips blocks out of runs that share a short sequence.
    """

    def __init__(self, model: nn.Module, host: SkippingHost, reducer: Any, pipeline: Any | None) -> None:
        super().__init__(model)
        self.reducer: TokenReducer = reducer
        schedules = reducer.schedules(model)
        self.tokens = DenoiserPart(model, host, reducer.merging(), pipeline)
        facts, clock = run_facts_of(pipeline), self.tokens.clock
        self.routing = Routing(
            model, clock, facts, host.units(model), schedules, reducer.threshold, lambda: _warn(schedules)
        )
        self._gates = Gates(model, self.routing)
        joined = [reduction.layer.name for run in self.tokens.runs for reduction in run.reductions]
        inside = [unit for unit in self.routing.units if unit in joined]
        if inside:
            raise ValueError(
                f"the schedule skips {', '.join(inside)}, but merge_span={self.tokens.reducer.merge_span} joins blocks "
                "to runs on one short sequence, in which none can be skipped alone; use merge_span=1"
            )
        for name, block in self.tokens.blocks.items():
            block.is_skipped = partial(self.routing.is_skipped, name)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers whose tokens are reduced and the units that are skipped."""
        return (*self.tokens.layer_names, *self.routing.units)

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now for corrections and forecasts."""
        return self.tokens.remembered_bytes + self.routing.memories.num_bytes

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once so far, of corrections and of forecasts."""
        return self.tokens.most_remembered_bytes + self.routing.memories.most_bytes

    @property
    def text_tokens(self) -> tuple[int, int]:
        """Text tokens of the last prompt whose text was merged, and what was left of them."""
        return self.tokens.text_tokens

    @property
    def skipped_units(self) -> dict[str, UnitStats]:
        """How often each unit of the schedules ran and was skipped."""
        return self.routing.stats

    def rows(self) -> list[LayerReport]:
        """One row per attention layer."""
        return self.tokens.rows()

    def install(self) -> None:
        """Puts the reducer of tokens in place, then the gates."""
        self.tokens.install()
        self._gates.install()

    def remove(self) -> None:
        """Makes the model what it was; doing it twice is harmless. What is remembered goes with the clock's streams."""
        self._gates.remove()
        self.tokens.remove()


def denoiser_part(
    model: nn.Module, host: SkippingHost, reducer: TokenReducer, pipeline: Any | None
) -> DenoiserPart | RoutedPart:
    """Prepares a reducer for one denoiser, with a schedule where it has one, and changes nothing yet."""
    if isinstance(reducer, LayerPruner):
        return RoutedPart(model, host, reducer, pipeline)
    return DenoiserPart(model, host, reducer, pipeline)


def _warn(schedules: Sequence[Schedule]) -> None:
    known = " or ".join(sorted({f"{len(schedule.times)} steps from {schedule.times[0]:g}" for schedule in schedules}))
    warnings.warn(
        f"nothing is skipped in this run: the schedules are for {known}; take as many steps, or calibrate for this run",
        NoEffectWarning,
        stacklevel=2,
    )
