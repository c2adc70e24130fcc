"""Schedules made by hand for the tests of PAR in denoisers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from gen_turbo.learned.schedule import Schedule, ScheduleFile, probe_of

TIMES = (900.0, 700.0, 500.0, 300.0)


def by_hand(
    model: nn.Module, skips: Mapping[str, Iterable[int]], times: tuple[float, ...] = TIMES, slope: float = 1.0
) -> ScheduleFile:
    """A file with one schedule of half the cost for a model."""
    frozen = {unit: frozenset(calls) for unit, calls in skips.items()}
    schedule = Schedule(times, frozen, dict.fromkeys(frozen, slope), cost=0.5)
    return ScheduleFile(type(model).__name__, tuple(probe_of(model).tolist()), "DDIMScheduler", (schedule,))
