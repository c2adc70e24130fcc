"""Schedules of PAR for denoisers: at which calls which units are skipped, and what earlier results weigh there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Any, TypeAlias

from gen_turbo.models.adapter import WHOLE as WHOLE
from gen_turbo.training.files import check_value

MERGING = "merging"
"""What is left out at calls that run on all tokens though the schedule merges them at others."""
BRANCH = "unconditional"
"""The first guidance branch of a batch, the unconditional one, which a call may leave out."""
MOST_WEIGHTS, MOST_BRANCHES = 4, 3
TOLERANCE = 1e-3
"""Of denoising times, relative, and of budgets."""
Weights: TypeAlias = tuple[float, ...] | tuple[tuple[float, ...], ...]
"""What the last results weigh, the newest first; of a guided batch, for each of its branches."""


@dataclass(frozen=True)
class Schedule:
    """One static plan for a run of certain denoising times.

    Attributes:
        times: The denoising time of every call of the model, falling; equal ones where a scheduler calls twice.
        skips: The calls, counted from 0, at which a unit is skipped, by unit.
        slopes: Share of the last slope that a unit's forecast continues: 0 holds, 1 (the default) is a line.
        cost: Share of the stock pipeline's time that it takes, measured; where nothing but whole calls is left out,
            the share of its arithmetic, counted.
        psnr_db: Distance of its images to stock on the calibration prompts; None where it was not measured.
        inner: What merged tokens meanwhile: the name of a method, or `method` and its settings; None for nothing.
        weights: By unit and call, what the unit's last results weigh in its forecast, the newest first: (1,) holds,
            two continue a line, three a curve. Calls that are not named follow the slope. At a call at which the whole
            model runs, the first weight is that of its own result; the others make good what forecasts before it
            missed, as the corrector of a multistep solver does. The whole model may have weights for each guidance
            branch of its batch; batches without them take what these come to where all branches give the same.
        scheduler: Class of the scheduler that weights are for; empty for any.
        shares: What each guidance branch weighs in a guided result, where weights are for each of them.
    """

    times: tuple[float, ...]
    skips: Mapping[str, frozenset[int]]
    slopes: Mapping[str, float] = field(default_factory=dict)
    cost: float = 1.0
    psnr_db: float | None = None
    inner: str | Mapping[str, Any] | None = None
    weights: Mapping[str, Mapping[int, Weights]] = field(default_factory=dict)
    scheduler: str = ""
    shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Checks numbers and calls; raises ValueError for one that is none, or where nothing is known at a skip."""
        for name, value in {"cost": self.cost, "psnr_db": self.psnr_db}.items():
            check_value(name, value, float | None)
        for value in (*self.times, *self.slopes.values(), *self.shares):
            check_value("a time, a slope or a share", value, float)
        for unit, calls in self.skips.items():
            first = 0 if unit == MERGING else 1
            wrong = sorted(call for call in calls if not first <= call < len(self.times))
            if wrong:
                raise ValueError(
                    f"{unit} cannot be skipped at calls {wrong} of a run of {len(self.times)}; skips lie between 1 "
                    f"and {len(self.times) - 1}, for the first call has nothing to forecast from"
                )
        for unit, by_call in self.weights.items():
            if by_call and not self.skips.get(unit):
                raise ValueError(f"{unit} has weights, but is never skipped")
            for call, weights in by_call.items():
                self._check_weights(unit, call, weights)
        self._check_branch()

    def _check_weights(self, unit: str, call: int, weights: Weights) -> None:
        check_value("a call with weights", call, int)
        branches = by_branch(weights)
        if len(branches) > 1 and (unit != WHOLE or len(branches) != len(self.shares)):
            raise ValueError(
                f"{unit} has weights for {len(branches)} guidance branches at call {call}; only {WHOLE} may have them, "
                "and shares say what each of them weighs"
            )
        left_out = self.skips[unit] | self.skips.get(WHOLE, frozenset())
        for branch in branches:
            num = len(branch)
            if not 0 < call < len(self.times) or not 1 <= num <= MOST_WEIGHTS:
                raise ValueError(f"{unit} has {num} weights at call {call}; 1 to {MOST_WEIGHTS} at calls that are")
            for weight in branch:
                check_value("a weight", weight, float)
            known = (before for before in range(call + (call not in self.skips[unit])) if before not in left_out)
            if len(list(islice(known, num))) < num:
                raise ValueError(f"{unit} has {num} weights at call {call}, before which fewer results are known")

    def _check_branch(self) -> None:
        """A branch is left out where nothing else is, and its result is made of earlier ones."""
        others = [unit for unit in self.skips if unit not in (WHOLE, MERGING, BRANCH)]
        for call in self.skips.get(BRANCH, ()):
            weights = by_branch(self.weights.get(WHOLE, {}).get(call, ()))
            is_forecast = len(weights) > 1 and len(weights[0]) > 1 and weights[0][0] == 0
            if others or call in self.skips.get(WHOLE, ()) or not is_forecast:
                raise ValueError(
                    f"a guidance branch is left out at call {call}, where the rest has to run, nothing else may be "
                    "left out, and weights for each branch have to say what stands for it"
                )

    def skipped_at(self, call: int) -> tuple[str, ...]:
        """The units that are skipped at a call; the whole model stands for all."""
        units = tuple(unit for unit, calls in self.skips.items() if call in calls)
        return (WHOLE,) if WHOLE in units else units

    def without_merging(self) -> Schedule:
        """The same, where whatever is attached to merge tokens merges none."""
        return replace(self, skips={**self.skips, MERGING: frozenset(range(len(self.times)))})

    def for_branches(self, weights: Weights, call: int, count: int) -> tuple[tuple[float, ...], ...]:
        """Weights of a call for each of so many guidance branches, or the same for all."""
        branches = by_branch(weights)
        if len(branches) in (1, count):
            return branches
        if call in self.skips.get(BRANCH, ()):
            # Here nothing stands for the first branch: it runs.
            branches = ((1.0,), *branches[1:])
        terms = zip_longest(*branches, fillvalue=0.0)
        return (tuple(sum(s * w for s, w in zip(self.shares, term, strict=True)) for term in terms),)

    def suits(self, scheduler: str) -> bool:
        """Whether it is for runs of a scheduler's class; weights are of one, and an empty name may be that one."""
        return not self.weights or not scheduler or self.scheduler in ("", scheduler)

    def ran_before(self, unit: str, call: int) -> list[int]:
        """The calls before `call` at which a unit was to run, the newest first."""
        left_out = self.skips.get(unit, frozenset()) | self.skips.get(WHOLE, frozenset())
        return [before for before in range(call - 1, -1, -1) if before not in left_out]

    def num_weights(self, unit: str) -> int:
        """Results of a unit that forecasts are made of."""
        given = self.weights.get(unit, {})
        skips = self.skips.get(unit, frozenset())
        most = max((len(b) - (call not in skips) for call, w in given.items() for b in by_branch(w)), default=0)
        return max(most, 2 if skips - given.keys() else 1)

    def find(self, time: float, after: int) -> int | None:
        """The first call behind `after` (-1 for any) at a denoising time; None where there is none."""
        for call in range(after + 1, len(self.times)):
            if abs(self.times[call] - time) <= TOLERANCE * max(1.0, abs(time)):
                return call
        return None


def by_branch(weights: Weights) -> tuple[tuple[float, ...], ...]:
    """Weights for each guidance branch; one for all where they have the same."""
    return weights if weights and isinstance(weights[0], tuple) else (weights,)  # type: ignore[return-value]


def carried_over(schedule: Schedule, times: Sequence[float]) -> Schedule:
    """The same parts left out at the same times of a run of other calls; what it costs is not known.

    Args:
        schedule: What was calibrated.
        times: The denoising time of every call of the other run, falling. A call skips what the last call of
            `schedule` at or before its time skips; the first call runs in full.
    """
    begun = [max(sum(known >= time for known in schedule.times) - 1, 0) for time in times]
    skips = {
        unit: frozenset(call for call, place in enumerate(begun) if place in calls and (call or unit == MERGING))
        for unit, calls in schedule.skips.items()
        if unit != BRANCH  # What stands for it is said by weights, which are of the other run.
    }
    return Schedule(tuple(times), {u: c for u, c in skips.items() if c}, schedule.slopes, inner=schedule.inner)


def undominated(schedules: Sequence[Schedule]) -> tuple[Schedule, ...]:
    """In order, those that no other beats: both with merging or both without, as cheap and as near to stock.

    Of several that cost the same and are as near, the first stays.
    """
    places = [(s.inner is not None, s.cost, -(s.psnr_db or 0.0), number) for number, s in enumerate(schedules)]

    def is_beaten(own: tuple[bool, float, float, int]) -> bool:
        rivals = (place for place in places if place[0] == own[0] and place[1] <= own[1] and place[2] <= own[2])
        return any(rival[1:] < own[1:] for rival in rivals)

    return tuple(schedule for schedule, place in zip(schedules, places, strict=True) if not is_beaten(place))
