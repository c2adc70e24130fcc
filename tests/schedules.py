"""Schedules made by hand for the tests of PAR in denoisers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from gen_turbo import PARProcessor
from gen_turbo.api import adapter_of
from gen_turbo.training.schedule import Schedule
from gen_turbo.training.schedule_file import ScheduleFile, probe_of

TIMES = (900.0, 700.0, 500.0, 300.0)


def by_hand(
    model: nn.Module, skips: Mapping[str, Iterable[int]], times: tuple[float, ...] = TIMES, slope: float = 1.0
) -> ScheduleFile:
    """A file with one schedule of half the cost for a model."""
    frozen = {unit: frozenset(calls) for unit, calls in skips.items()}
    schedule = Schedule(times, frozen, dict.fromkeys(frozen, slope), cost=0.5)
    return ScheduleFile(type(model).__name__, tuple(probe_of(model).tolist()), "DDIMScheduler", (schedule,))


def par(model: nn.Module, skips: Mapping[str, Iterable[int]], inner: Any = None, **settings: Any) -> PARProcessor:
    """A processor on a schedule made by hand."""
    slope = settings.pop("slope", 1.0)
    return PARProcessor(budget=0.5, schedule=by_hand(model, skips, slope=slope), inner=inner, **settings)


def blocks_of(model: nn.Module) -> list[str]:
    """Names of the blocks that can be skipped."""
    return [unit for unit, made in adapter_of(model).units(model).items() if made.signature is not None]
