"""Schedules of PAR made by hand, to compare what skipping saves with what it should save."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from gen_turbo.api import adapter_of, attach
from gen_turbo.bench.settings import Setting
from gen_turbo.bench.step_models import times_of
from gen_turbo.methods.par import PARProcessor
from gen_turbo.training.schedule import Schedule, ScheduleFile, probe_of

_COST = 0.5


@dataclass(frozen=True)
class Skipping(Setting):
    """Units left out at some calls of a run.

    Attributes:
        units: Shell patterns of the units.
        calls: The calls at which they are forecast, from 2 on.
        steps: Calls of the run.
    """

    units: tuple[str, ...] = ()
    calls: tuple[int, ...] = ()
    steps: int = 6

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Attaches PAR with this schedule and without merging.

        Raises:
            ValueError: If no unit of the model fits.
        """
        known: Any = adapter_of(target)
        names = [name for name in known.units(target) if any(fnmatchcase(name, unit) for unit in self.units)]
        if not names:
            raise ValueError(f"{type(target).__name__} has no unit that fits {', '.join(self.units)}")
        times = tuple(float(time) for time in times_of(self.steps))
        schedule = Schedule(times, dict.fromkeys(names, frozenset(self.calls)), cost=_COST)
        file = ScheduleFile(type(target).__name__, tuple(probe_of(target).tolist()), "none", (schedule,))
        return attach(target, PARProcessor(budget=_COST, schedule=file, inner=None))


def skipping_settings(steps: int) -> list[Setting]:
    """The finest blocks, the inside of the UNet and both, left out at two calls of every three from the third on."""
    calls = tuple(call for call in range(2, steps) if call % 3 != 1)
    finest = ("down_blocks.0.attentions.*", "up_blocks.3.attentions.*")
    chosen = {"finest": finest, "deep.3": ("deep.3",), "deep.6": ("deep.6",), "both": (*finest, "deep.6")}
    return [Skipping(f"par-{name}", "PAR by hand", units, calls, steps) for name, units in chosen.items()]
