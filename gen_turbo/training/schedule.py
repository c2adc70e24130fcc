"""Schedules of PAR for denoisers: at which steps which units are skipped, and the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from gen_turbo.models.adapter import WHOLE as WHOLE
from gen_turbo.output import write_text
from gen_turbo.training.files import ODD_NOTES, check_keys, check_value, reason_of
from gen_turbo.training.probe import is_same_model, weight_probe

T = TypeVar("T")
MERGING = "merging"
"""What is left out at calls that run on all tokens though the schedule merges them at others."""
MOST_WEIGHTS = 4
_PROBE_VALUES, _TOLERANCE = 32, 1e-3
_KEYS = ("model", "probe", "scheduler", "times", "slopes", "levels")
_LEVEL_KEYS = ("cost", "psnr_db", "inner", "skips")
_MOST_BYTES, _MOST_CALLS, _MOST_UNITS = 2**24, 10_000, 10_000


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
            missed, as the corrector of a multistep solver does.
        scheduler: Class of the scheduler that weights are for; empty for any.
    """

    times: tuple[float, ...]
    skips: Mapping[str, frozenset[int]]
    slopes: Mapping[str, float] = field(default_factory=dict)
    cost: float = 1.0
    psnr_db: float | None = None
    inner: str | Mapping[str, Any] | None = None
    weights: Mapping[str, Mapping[int, tuple[float, ...]]] = field(default_factory=dict)
    scheduler: str = ""

    def __post_init__(self) -> None:
        """Checks numbers and calls; raises ValueError for one that is none, or where nothing is known at a skip."""
        for name, value in {"cost": self.cost, "psnr_db": self.psnr_db}.items():
            check_value(name, value, float | None)
        for value in (*self.times, *self.slopes.values()):
            check_value("a time or a slope", value, float)
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

    def _check_weights(self, unit: str, call: int, weights: tuple[float, ...]) -> None:
        check_value("a call with weights", call, int)
        if not 0 < call < len(self.times) or not 1 <= len(weights) <= MOST_WEIGHTS:
            raise ValueError(f"{unit} has {len(weights)} weights at call {call}; 1 to {MOST_WEIGHTS} at calls that are")
        for weight in weights:
            check_value("a weight", weight, float)
        left_out = self.skips[unit] | self.skips.get(WHOLE, frozenset())
        known = (before for before in range(call + (call not in self.skips[unit])) if before not in left_out)
        if len(list(islice(known, len(weights)))) < len(weights):
            raise ValueError(f"{unit} has {len(weights)} weights at call {call}, before which fewer results are known")

    def skipped_at(self, call: int) -> tuple[str, ...]:
        """The units that are skipped at a call; the whole model stands for all."""
        units = tuple(unit for unit, calls in self.skips.items() if call in calls)
        return (WHOLE,) if WHOLE in units else units

    def without_merging(self) -> Schedule:
        """The same, where whatever is attached to merge tokens merges none."""
        return replace(self, skips={**self.skips, MERGING: frozenset(range(len(self.times)))})

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
        most = max((len(w) - (call not in skips) for call, w in given.items()), default=0)
        return max(most, 2 if skips - given.keys() else 1)

    def find(self, time: float, after: int) -> int | None:
        """The first call behind `after` (-1 for any) at a denoising time; None where there is none."""
        for call in range(after + 1, len(self.times)):
            if abs(self.times[call] - time) <= _TOLERANCE * max(1.0, abs(time)):
                return call
        return None


@dataclass(frozen=True)
class ScheduleFile:
    """All schedules of one calibration, for several budgets.

    Attributes:
        model: Class of the model.
        probe: A short sample of its weights.
        scheduler: Class of the scheduler that ran it.
        schedules: All of the same times.
    """

    model: str
    probe: tuple[float, ...]
    scheduler: str
    schedules: tuple[Schedule, ...]

    @property
    def num_calls(self) -> int:
        """Calls of the model in a run."""
        return len(self.schedules[0].times)

    def at(self, budget: float, is_merged: bool | None = None) -> Schedule:
        """The schedule nearest to stock within a budget, of those measured with or without merging, or of all.

        Raises:
            ValueError: If all cost more.
        """
        # One that names settings of its merging is for callers who say nothing of merging, if there are others.
        known = [s for s in self.schedules if is_merged is None or not isinstance(s.inner, Mapping)] or self.schedules
        known = [schedule for schedule in known if is_merged in (None, schedule.inner is not None)] or known
        within = [schedule for schedule in known if schedule.cost <= budget + _TOLERANCE]
        if not within:
            raise ValueError(
                f"budget={budget:g} is less than the cheapest schedule for {self.num_calls} calls costs, "
                f"{min(schedule.cost for schedule in known):.3f}; raise the budget or calibrate a cheaper one"
            )
        best = max(within, key=lambda schedule: (schedule.psnr_db or 0.0, schedule.cost))
        return replace(best, scheduler=self.scheduler)

    def is_for(self, model: nn.Module) -> bool:
        """Whether it was made for these weights."""
        return type(model).__name__ == self.model and is_same_model(probe_of(model), torch.tensor(self.probe))


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


def probe_of(model: nn.Module) -> torch.Tensor:
    """32 values spread over a model's weights, as a schedule's file keeps them."""
    whole = weight_probe([model])
    return whole[torch.arange(_PROBE_VALUES) * len(whole) // _PROBE_VALUES]


def shipped(model: nn.Module) -> list[ScheduleFile]:
    """The files inside the package that were made for a model."""
    folder = _folder()
    files = [read(path) for path in sorted(folder.glob("*.yaml"))] if folder.is_dir() else []
    return [file for file in files if file.is_for(model)]


def read(path: str | Path) -> ScheduleFile:
    """Reads a file of schedules.

    Raises:
        ValueError: If it is not there or is none.
    """
    try:
        file = Path(path).expanduser()
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the schedule {path}: {reason_of(error)}") from error
    try:
        check_keys(tree, _KEYS)
        return _file_of(tree)
    except (ValueError, *ODD_NOTES) as error:
        raise ValueError(f"{path} is no schedule: {reason_of(error)}; make one by gen-turbo calibrate par") from error


def write(path: str | Path, file: ScheduleFile, comment: str) -> None:
    """Writes a file of schedules as YAML; the slopes must be those of all of its schedules."""
    first = file.schedules[0]
    tree = {
        "model": file.model,
        "probe": [float(f"{value:.5g}") for value in file.probe],
        "scheduler": file.scheduler,
        "times": list(first.times),
        "slopes": dict(first.slopes),
        "levels": [
            {
                "cost": schedule.cost,
                "psnr_db": schedule.psnr_db,
                "inner": schedule.inner,
                "skips": {unit: sorted(calls) for unit, calls in schedule.skips.items()},
            }
            | ({"weights": _plain(schedule.weights)} if schedule.weights else {})
            for schedule in file.schedules
        ],
    }
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
    write_text(Path(path), f"# {comment}\n{text}")


def _file_of(tree: dict[str, Any]) -> ScheduleFile:
    model, scheduler = _each("model and scheduler", [tree["model"], tree["scheduler"]], str, 2)
    times = _each("times", tree["times"], float, _MOST_CALLS)
    if any(later > time for time, later in pairwise(times)):
        raise ValueError("its times rise; they must fall from call to call, or stay")
    probe = _each("probe", tree["probe"], float, _PROBE_VALUES)
    slopes = dict(zip(tree["slopes"], _each("slopes", list(tree["slopes"].values()), float, _MOST_UNITS), strict=True))
    levels = _each("levels", tree["levels"], dict, _MOST_CALLS)
    if not times or not levels:
        raise ValueError("it has no times or no levels")
    return ScheduleFile(model, probe, scheduler, tuple(_schedule_of(level, times, slopes) for level in levels))


def _schedule_of(level: Mapping[str, Any], times: tuple[float, ...], slopes: Mapping[str, float]) -> Schedule:
    check_keys(level, _LEVEL_KEYS, ("weights",))
    calls = {unit: _each(f"skips of {unit}", given, int, len(times)) for unit, given in level["skips"].items()}
    _each("units", [*calls, *slopes], str, _MOST_UNITS)
    has_settings = isinstance(inner := level["inner"], dict)
    for value in [*inner, *inner.values()] if has_settings else [inner]:
        check_value("inner", value, str | float | None if has_settings else str | None)
    skips = {unit: frozenset(given) for unit, given in calls.items()}
    weights = {
        unit: {call: _each("weights", given, float, MOST_WEIGHTS) for call, given in by_call.items()}
        for unit, by_call in level.get("weights", {}).items()
    }
    return Schedule(times, skips, slopes, level["cost"], level["psnr_db"], inner, weights)


def _plain(weights: Mapping[str, Mapping[int, tuple[float, ...]]]) -> dict[str, dict[int, list[float]]]:
    return {unit: {call: list(w) for call, w in by_call.items()} for unit, by_call in weights.items()}


def _each(name: str, values: Any, kind: type[T], most: int) -> tuple[T, ...]:
    """Some values of one type; raises ValueError for others, and for more than there can be."""
    if not isinstance(values, list) or len(values) > most:
        raise ValueError(f"{name} must be a list of at most {most}")
    for value in values:
        check_value(name, value, kind)
    return tuple(kind(value) for value in values)  # type: ignore[call-arg]


def _folder() -> Path:
    spec = find_spec("gen_turbo.configs")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "schedule"
