"""Files of schedules of PAR: all that one calibration found for a model, for several budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import nn

from gen_turbo.output import write_text
from gen_turbo.training.files import ODD_NOTES, check_keys, check_value, reason_of
from gen_turbo.training.probe import is_same_model, weight_probe
from gen_turbo.training.schedule import MOST_BRANCHES, MOST_WEIGHTS, TOLERANCE, Schedule, Weights

T = TypeVar("T")
_PROBE_VALUES = 32
_KEYS = ("model", "probe", "scheduler", "times", "slopes", "levels")
_LEVEL_KEYS = ("cost", "psnr_db", "inner", "skips")
_MOST_BYTES, _MOST_CALLS, _MOST_UNITS = 2**24, 10_000, 10_000


class _Row(list[Any]):
    """A list that stands in one line of a file, with the lists in it."""


class _InRows(yaml.SafeDumper):  # type: ignore[misc]
    """Writes rows as such."""


_InRows.add_representer(
    _Row, lambda dumper, row: dumper.represent_sequence("tag:yaml.org,2002:seq", row, flow_style=True)
)


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
        within = [schedule for schedule in known if schedule.cost <= budget + TOLERANCE]
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
        check_keys(tree, _KEYS, ("shares",))
        return _file_of(tree)
    except (ValueError, *ODD_NOTES) as error:
        raise ValueError(f"{path} is no schedule: {reason_of(error)}; make one by gen-turbo calibrate par") from error


def write(path: str | Path, file: ScheduleFile, comment: str) -> None:
    """Writes a file of schedules as YAML; the slopes and shares must be those of all of its schedules."""
    first = file.schedules[0]
    tree = {
        "model": file.model,
        "probe": [float(f"{value:.5g}") for value in file.probe],
        "scheduler": file.scheduler,
        "times": list(first.times),
        "slopes": dict(first.slopes),
        **({"shares": [round(share, 5) for share in first.shares]} if first.shares else {}),
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
    text = yaml.dump(tree, Dumper=_InRows, sort_keys=False, default_flow_style=None, width=110)
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
    shares = _each("shares", tree.get("shares", []), float, MOST_BRANCHES)
    return ScheduleFile(model, probe, scheduler, tuple(_schedule_of(level, times, slopes, shares) for level in levels))


def _schedule_of(
    level: Mapping[str, Any], times: tuple[float, ...], slopes: Mapping[str, float], shares: tuple[float, ...]
) -> Schedule:
    check_keys(level, _LEVEL_KEYS, ("weights",))
    calls = {unit: _each(f"skips of {unit}", given, int, len(times)) for unit, given in level["skips"].items()}
    _each("units", [*calls, *slopes], str, _MOST_UNITS)
    has_settings = isinstance(inner := level["inner"], dict)
    for value in [*inner, *inner.values()] if has_settings else [inner]:
        check_value("inner", value, str | float | None if has_settings else str | None)
    skips = {unit: frozenset(given) for unit, given in calls.items()}
    weights = {
        unit: {call: _weights_of(given) for call, given in by_call.items()}
        for unit, by_call in level.get("weights", {}).items()
    }
    return Schedule(times, skips, slopes, level["cost"], level["psnr_db"], inner, weights, shares=shares)


def _weights_of(given: Any) -> Weights:
    if isinstance(given, list) and given and isinstance(given[0], list):
        return tuple(_each("weights", branch, float, MOST_WEIGHTS) for branch in given)
    return _each("weights", given, float, MOST_WEIGHTS)


def _plain(weights: Mapping[str, Mapping[int, Weights]]) -> dict[str, dict[int, list[Any]]]:
    return {
        unit: {call: _Row(list(w) if isinstance(w, tuple) else w for w in of_call) for call, of_call in by_call.items()}
        for unit, by_call in weights.items()
    }


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
