"""Schedules of PAR for denoisers: at which steps which units are skipped, and the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gen_turbo.models.adapter import WHOLE as WHOLE
from gen_turbo.training.probe import is_same_model, weight_probe

_PROBE_VALUES = 32
_KEYS = ("model", "probe", "scheduler", "times", "slopes", "levels")
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Schedule:
    """One static plan for a run of certain denoising times.

    Attributes:
        times: The denoising time of every call of the model, falling; equal ones where a scheduler calls twice.
        skips: The calls, counted from 0, at which a unit is skipped, by unit.
        slopes: Share of the last slope that a unit's forecast continues: 0 holds, 1 (the default) is a line.
        cost: Share of the stock pipeline's time that it takes, measured.
        psnr_db: Distance of its pictures to stock on the calibration prompts; None where it was not measured.
        inner: Name of the method that merged tokens meanwhile; None for none.
    """

    times: tuple[float, ...]
    skips: Mapping[str, frozenset[int]]
    slopes: Mapping[str, float] = field(default_factory=dict)
    cost: float = 1.0
    psnr_db: float | None = None
    inner: str | None = None

    def __post_init__(self) -> None:
        """Checks the calls; raises ValueError where one does not exist, or nothing could be known at a skip."""
        for unit, calls in self.skips.items():
            wrong = sorted(call for call in calls if not 0 < call < len(self.times))
            if wrong:
                raise ValueError(
                    f"{unit} cannot be skipped at calls {wrong} of a run of {len(self.times)}; skips lie between 1 "
                    f"and {len(self.times) - 1}, for the first call has nothing to forecast from"
                )

    def skipped_at(self, call: int) -> tuple[str, ...]:
        """The units that are skipped at a call; the whole model stands for all."""
        units = tuple(unit for unit, calls in self.skips.items() if call in calls)
        return (WHOLE,) if WHOLE in units else units

    def find(self, time: float, after: int) -> int | None:
        """The first call behind `after` (-1 for any) at a denoising time; None where there is none."""
        for call in range(after + 1, len(self.times)):
            if abs(self.times[call] - time) <= _TOLERANCE * max(1.0, abs(time)):
                return call
        return None


@dataclass(frozen=True)
class ScheduleFile:
    """All schedules that one calibration made, for several budgets.

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

    def at(self, budget: float, is_merged: bool) -> Schedule:
        """The schedule nearest to stock within a budget, of those that were measured with or without merging.

        Raises:
            ValueError: If all cost more.
        """
        known = [schedule for schedule in self.schedules if (schedule.inner is not None) == is_merged]
        within = [schedule for schedule in known or self.schedules if schedule.cost <= budget + _TOLERANCE]
        if not within:
            least = min(schedule.cost for schedule in known or self.schedules)
            raise ValueError(
                f"budget={budget:g} is less than the cheapest schedule for {self.num_calls} calls costs, {least:.3f}; "
                "raise the budget or calibrate a cheaper one"
            )
        return max(within, key=lambda schedule: (schedule.psnr_db or 0.0, schedule.cost))

    def is_for(self, model: nn.Module) -> bool:
        """Whether it was made for these weights."""
        known = torch.tensor(self.probe)
        return type(model).__name__ == self.model and is_same_model(probe_of(model), known)


def carried_over(schedule: Schedule, times: Sequence[float]) -> Schedule:
    """The same parts left out at the same times of a run of other calls; what it costs is not known.

    Args:
        schedule: What was calibrated.
        times: The denoising time of every call of the other run, falling. A call leaves out what the last call of
            `schedule` at or before its time leaves out; the first call runs in full.
    """
    begun = [max(sum(known >= time for known in schedule.times) - 1, 0) for time in times]
    skips = {
        unit: frozenset(call for call, place in enumerate(begun) if call and place in calls)
        for unit, calls in schedule.skips.items()
    }
    kept = {unit: calls for unit, calls in skips.items() if calls}
    return Schedule(tuple(times), kept, schedule.slopes, inner=schedule.inner)


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
        tree = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the schedule {path}: {' '.join(str(error).split())}") from error
    missing = [key for key in _KEYS if not isinstance(tree, dict) or key not in tree]
    if missing:
        raise ValueError(f"{path} is no schedule: it lacks {', '.join(missing)}; make one by gen-turbo calibrate par")
    try:
        return _file_of(tree)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no schedule: {error!r}; make one by gen-turbo calibrate par") from error


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
            for schedule in file.schedules
        ],
    }
    text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)
    Path(path).write_text(f"# {comment}\n{text}", encoding="utf-8")


def _file_of(tree: dict[str, Any]) -> ScheduleFile:
    times = tuple(float(time) for time in tree["times"])
    slopes = {str(unit): float(slope) for unit, slope in tree["slopes"].items()}
    return ScheduleFile(
        str(tree["model"]),
        tuple(float(value) for value in tree["probe"]),
        str(tree["scheduler"]),
        tuple(_schedule_of(level, times, slopes) for level in tree["levels"]),
    )


def _schedule_of(level: Mapping[str, Any], times: Sequence[float], slopes: Mapping[str, float]) -> Schedule:
    skips = {str(unit): frozenset(int(call) for call in calls) for unit, calls in level["skips"].items()}
    return Schedule(tuple(times), skips, slopes, float(level["cost"]), level["psnr_db"], level["inner"])


def _folder() -> Path:
    spec = find_spec("gen_turbo.configs")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "schedule"
