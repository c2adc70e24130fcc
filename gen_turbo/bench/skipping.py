"""Schedules of PAR made by hand: to compare what skipping saves with what it should, and plain rules to beat."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import nn

from gen_turbo.api import adapter_of, attach, denoiser
from gen_turbo.bench.settings import Method, Setting
from gen_turbo.bench.step_models import times_of
from gen_turbo.methods.par import PARProcessor
from gen_turbo.training.schedule import WHOLE, Schedule
from gen_turbo.training.schedule_file import ScheduleFile, probe_of

GENERIC, GENERIC_MERGED = "PAR, generic", "PAR, generic, with merging"
_COST = 0.5
_FIRST = 3
_JOINT = "SD3Transformer2DModel"


@dataclass(frozen=True)
class Skipping(Setting):
    """Units left out at some calls of a run.

    Attributes:
        units: Shell patterns of the units.
        calls: The calls at which they are forecast, from 2 on.
        num_calls: Of the run.
        slope: Share of the last slope that forecasts continue.
    """

    units: tuple[str, ...] = ()
    calls: tuple[int, ...] = ()
    num_calls: int = 6
    slope: float = 1.0

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Attaches PAR with this schedule and without merging.

        Raises:
            ValueError: If no unit of the model fits.
        """
        model = denoiser(target)
        names = self._names(model)
        if not names:
            raise ValueError(f"{type(model).__name__} has no unit that fits {', '.join(self.units)}")
        slopes = dict.fromkeys(names, self.slope)
        skips = dict.fromkeys(names, frozenset(self.calls))
        return _attached(target, Schedule(_times(target, self.num_calls), skips, slopes, cost=_COST))

    def misfit(self, model: nn.Module) -> str:
        """The model must have such units."""
        return "" if self._names(model) else f"it has no unit that fits {', '.join(self.units)}"

    def _names(self, model: nn.Module) -> list[str]:
        known: Any = adapter_of(model)
        return [name for name in known.units(model) if any(fnmatchcase(name, unit) for unit in self.units)]


@dataclass(frozen=True)
class PlainSkipping(Setting):
    """The whole model every few steps, three first and the last in full, its result forecast between.

    Attributes:
        every: Every how many steps it runs.
        order: 0 holds the last result, 1 continues a line through two in time, 2 a parabola through three.
        num_calls: Of the run.
    """

    every: int = 2
    order: int = 0
    num_calls: int = 28

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Attaches PAR with this schedule and without merging."""
        times = _times(target, self.num_calls)
        runs = sorted({*range(_FIRST), *range(_FIRST, self.num_calls, self.every), self.num_calls - 1})
        weights = {
            call: _lagrange(times, [run for run in runs[::-1] if run < call][: self.order + 1], call)
            for call in range(self.num_calls)
            if call not in runs
        }
        return _attached(target, Schedule(times, {WHOLE: frozenset(weights)}, weights={WHOLE: weights}, cost=_COST))


@dataclass(frozen=True)
class Calibrated(Method):
    """PAR on the schedules that ship for a model and a number of steps."""

    num_calls: int = 25

    def misfit(self, model: nn.Module) -> str:
        """There must be one."""
        try:
            found = self._processor().schedules(model)
        except ValueError as error:
            return str(error)
        is_there = any(isinstance(one, Schedule) and len(one.times) == self.num_calls for one in found)
        return "" if is_there else f"no schedule of {self.num_calls} steps ships for it"


@dataclass(frozen=True)
class FirstBlock(Setting):
    """The rule of diffusers' FirstBlockCache.

    Attributes:
        threshold: The change of what the first block adds up to which the others are left out.
    """

    threshold: float = 0.1

    @property
    def is_adaptive(self) -> bool:
        """It decides by what it sees."""
        return True

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Replaces the blocks' forward."""
        from gen_turbo.bench.block_caches import first_block_cache

        return first_block_cache(denoiser(target), self.threshold)

    def misfit(self, model: nn.Module) -> str:
        """Blocks must be joint ones, as those of Stable Diffusion 3."""
        return "" if type(model).__name__ == _JOINT else f"it is written for a {_JOINT} alone"


@dataclass(frozen=True)
class BlockCache(Setting):
    """A cache of diffusers on a transformer.

    Attributes:
        kind: "taylorseer" or "magcache".
        interval: Every how many steps TaylorSeer runs in full.
        order: Of its series.
        threshold: The error that MagCache lets add up.
        num_calls: Of the run.
    """

    kind: str = "taylorseer"
    interval: int = 2
    order: int = 1
    threshold: float = 0.06
    num_calls: int = 28

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Puts the hooks of diffusers on."""
        from gen_turbo.bench.block_caches import mag_cache, taylor_seer

        model = denoiser(target)
        if self.kind == "magcache":
            return mag_cache(target, model, self.num_calls, self.threshold)
        return taylor_seer(model, self.interval, self.order)

    def misfit(self, model: nn.Module) -> str:
        """The hooks know transformers alone."""
        return "" if hasattr(model, "transformer_blocks") else "the caches of diffusers are for transformers"


def skipping_settings(steps: int) -> list[Setting]:
    """The finest blocks, the inside of the UNet and both, left out at two calls of every three from the third on."""
    calls = tuple(call for call in range(2, steps) if call % 3 != 1)
    finest = ("down_blocks.0.attentions.*", "up_blocks.3.attentions.*")
    chosen = {"finest": finest, "deep.3": ("deep.3",), "deep.6": ("deep.6",), "both": (*finest, "deep.6")}
    return [Skipping(f"par-{name}", "PAR by hand", units, calls, steps) for name, units in chosen.items()]


def plain_settings(steps: int) -> list[Setting]:
    """What PAR has to beat on a transformer: its generic rule, plain skipping, deep blocks held, diffusers' caches."""
    settings: list[Setting] = [
        Method(f"generic-b{budget:g}", GENERIC, "par", {"budget": budget, "schedule": "generic"})
        for budget in (0.75, 0.65, 0.5, 0.34, 0.25)
    ]
    # Every third step that runs is in full.
    settings += [
        Method(
            f"generic-merged-b{budget:g}",
            GENERIC_MERGED,
            "par",
            {
                "budget": budget,
                "schedule": "generic",
                "inner": "turbo",
                "ratio": 0.5,
                "scope": "block",
                "restore": "residual",
                "full_every": round(3 / budget),
            },
        )
        for budget in (0.75, 0.65, 0.5, 0.34)
    ]
    forecasts = {"held": 0, "linear": 1, "quadratic": 2}
    settings += [
        PlainSkipping(f"plain-k{every}-{name}", f"whole steps left out, {name}", every, order, steps)
        for every in (2, 3, 4)
        for name, order in forecasts.items()
    ]
    deep = ("transformer_blocks.[1-9]*",)
    for every in (2, 3):
        calls = tuple(call for call in range(_FIRST, steps - 1) if (call - _FIRST) % every)
        settings.append(Skipping(f"deep-k{every}", "all blocks but the first held", deep, calls, steps, 0.0))
    for threshold in (0.05, 0.1, 0.2):
        settings.append(FirstBlock(f"firstblock-t{threshold:g}", "first block cache", threshold))
    for every in (2, 3, 4):
        settings.append(
            BlockCache(f"taylorseer-k{every}", "diffusers taylorseer", "taylorseer", every, num_calls=steps)
        )
    for threshold in (0.06, 0.24):
        name = f"magcache-t{threshold:g}"
        settings.append(BlockCache(name, "diffusers magcache", "magcache", threshold=threshold, num_calls=steps))
    return settings


def _attached(target: Any, schedule: Schedule) -> AbstractContextManager[object]:
    model = denoiser(target)
    file = ScheduleFile(type(model).__name__, tuple(probe_of(model).tolist()), "", (schedule,))
    return attach(target, PARProcessor(budget=_COST, schedule=file, inner=None, text_ratio=0.0), graphs=False)


def _times(target: Any, steps: int) -> tuple[float, ...]:
    """The times of a pipeline's run, or of a bare model's as the step benchmark runs it."""
    scheduler = getattr(target, "scheduler", None)
    if scheduler is None:
        return tuple(float(time) for time in times_of(steps))
    scheduler.set_timesteps(steps)
    return tuple(float(time) for time in scheduler.timesteps)


def _lagrange(times: tuple[float, ...], known: list[int], call: int) -> tuple[float, ...]:
    """The weights of the polynomial in time through some calls."""
    return tuple(
        prod((times[call] - times[other]) / (times[one] - times[other]) for other in known if other != one)
        for one in known
    )
