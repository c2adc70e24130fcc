"""Leaving out units of a denoiser: a schedule of PAR at work on one model, by the gates in front of its units."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gen_turbo.engine.context import Context
from gen_turbo.engine.gates import NUM_USED, Action, UnitMemory, gates_of
from gen_turbo.engine.guided import num_branches
from gen_turbo.engine.route import Route
from gen_turbo.engine.values import kept_out, refilled, tensors
from gen_turbo.models.adapter import Unit
from gen_turbo.training.generic import Generic
from gen_turbo.training.schedule import BRANCH, MERGING, WHOLE, Schedule

_LOGGER = logging.getLogger("gen_turbo")
_GENERIC = "generic route, not calibrated for this model"
_NO_UNITS = (MERGING, BRANCH)
_NEAR = 0.2
"""Share by which a run's guidance may differ from that of its schedule without a word."""


@dataclass
class UnitStats:
    """Calls since attaching in which a unit ran, or was skipped for its own sake or with what holds it."""

    num_run: int = 0
    num_skipped: int = 0


class Skipping:
    """The schedules of one model and the gates that follow them.

    Attributes:
        units: What the schedules skip, by name.
        gates: The gates of all their modules but the whole model.
        kind: Identifies the kind of the running step.
        rows: Of the batch, those that run; None where all do.
        notes: What the schedules are, in words, for reports.

    Raises:
        ValueError: If a schedule skips what the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        units: dict[str, Unit],
        schedules: Sequence[Schedule | Generic],
        threshold: float | None,
        unmatched: Callable[[], None],
    ) -> None:
        self.generic = next((one for one in schedules if isinstance(one, Generic)), None)
        self.schedules = [schedule for schedule in schedules if isinstance(schedule, Schedule)]
        named = [unit for schedule in self.schedules for unit in schedule.skips if unit not in _NO_UNITS]
        used = list(dict.fromkeys([WHOLE, *named] if self.generic else named))
        unknown = [name for name in used if name not in units]
        if unknown:
            raise ValueError(
                f"the schedule skips {', '.join(unknown)}, which {type(model).__name__} does not have; "
                f"it has {', '.join(units)}"
            )
        self.units = {name: units[name] for name in used}
        self.threshold, self.unmatched = threshold, unmatched
        self.notes: list[str] = []
        if self.generic is not None and not self.schedules:
            self.notes.append(f"{_GENERIC}: about {self.generic.budget:.0%} of calls run")
        has_branch = any(BRANCH in schedule.skips for schedule in self.schedules)
        self.stats = {name: UnitStats() for name in [*used, *([BRANCH] if has_branch else [])]}
        self.gates = gates_of(model, self.units)
        self.kind: tuple[object, ...] = ()
        self.rows: slice | None = None
        self._route: Route | None = None
        self._actions: dict[str, Action] = {}

    def install(self) -> None:
        """Puts all gates in place."""
        for gate in self.gates.values():
            gate.install()

    def remove(self) -> None:
        """Takes all gates off."""
        for gate in reversed(self.gates.values()):
            gate.remove()

    @property
    def replaces_all(self) -> bool:
        """Whether the running call is forecast as a whole."""
        return self._actions.get("") is Action.FORECAST

    def enter(self, context: Context) -> None:
        """Empties what a context remembers that runs on the buffers of an earlier one."""
        old: Route | None = context.extras.pop("route", None)
        if old is not None:
            for memory in old.memories.values():
                memory.calls = []
                memory.error = None if memory.error is None else 0.0
                for older in memory.results[1:]:
                    for tensor in older:
                        tensor.zero_()
            self._route_of(context).memories = old.memories

    def begin(self, context: Context, form: object) -> tuple[frozenset[str], bool]:
        """Sets every gate for the running call; gives the units left out, and whether a module is remembered first."""
        self._route, self._actions, self.kind, self.rows = None, {}, (), None
        route = self._route_of(context)
        call = self._call(context, route)
        if call is None or route.schedule is None:
            return frozenset(), False
        self._route, route.call = route, call
        if route.form != form:
            route.form = form
            route.memories.pop("", None)
        skipped, actions = self._chosen(route)
        for module in actions:
            memory = route.memories.get(module) or self._remembered(module, route, context)
            if actions[module] is Action.FORECAST or (self.threshold is not None and len(memory.calls) >= NUM_USED):
                name = next(name for name, unit in self.units.items() if unit.module == module)
                memory.weigh(route.forecast_by(name, module))
            if module:
                self.gates[module].action, self.gates[module].memory = actions[module], memory
        self._actions = actions
        self.kind = tuple(sorted((module, action.value) for module, action in actions.items()))
        self._count()
        is_first = any(a is Action.KEEP and route.memories[m].like is None for m, a in actions.items() if m)
        return skipped, is_first

    def _chosen(self, route: Route) -> tuple[frozenset[str], dict[str, Action]]:
        """The units that are left out of the running call, and what the gates of modules do."""
        assert route.schedule is not None
        names, actions = route.schedule.skipped_at(route.call), dict[str, Action]()
        self.rows = route.rows() if BRANCH in names else None
        # Maps are of the whole batch, so what runs without a branch merges nothing.
        skipped = {MERGING} if MERGING in names or self.rows is not None else set()
        for unit in (self.units[name] for name in names if name in self.units):
            if self._may_skip(unit, route):
                actions |= dict.fromkeys(unit.idle, Action.IDLE) | {unit.module: Action.FORECAST}
                skipped.add(unit.name)
        skips, weights = route.schedule.skips, route.schedule.weights
        later = [n for n in self.units if any(c > route.call for c in (*skips.get(n, ()), *weights.get(n, ())))]
        actions = dict.fromkeys((m for name in later for m in self._modules(name)), Action.KEEP) | actions
        left_out = [m for m, action in actions.items() if action is not Action.KEEP]
        # What lies in a module that is left out does not run, so that it gives nothing to remember.
        return frozenset(skipped), {m: action for m, action in actions.items() if not _lies_in(m, left_out)}

    def _count(self) -> None:
        """Counts what is left out of the running call."""
        left_out = [m for m, action in self._actions.items() if action is not Action.KEEP]
        for name, unit in self.units.items():
            is_skipped = unit.module in left_out or _lies_in(unit.module, left_out)
            self.stats[name].num_skipped += is_skipped
            self.stats[name].num_run += not is_skipped
        if BRANCH in self.stats:
            self.stats[BRANCH].num_skipped += self.rows is not None
            self.stats[BRANCH].num_run += self.rows is None and not self.replaces_all

    def whole(self) -> Any:
        """The result of the whole model as it is forecast."""
        assert self._route is not None
        memory = self._route.memories[""]
        return refilled(memory.like, memory.forecast())

    @kept_out
    def finished(self, output: Any) -> Any:
        """What the model gave, completed where a guidance branch was left out; `end` remembers it."""
        return output if self.rows is None or self._route is None else self._route.completed(output)

    @kept_out
    def corrected(self, output: Any) -> Any:
        """The result of a call that ran, with what forecasts before it missed made good."""
        if self._route is None or self.replaces_all:
            return output
        return self._route.corrected(output)

    def end(self, output: Any) -> int:
        """Notes that the call is over and opens all gates; gives how many modules did not run."""
        route, actions = self._route, self._actions
        if route is not None and output is not None:
            if actions.get("") is Action.KEEP:
                route.memories[""].keep(output, tensors(output))
            for module, action in actions.items():
                memory = route.memories[module]
                if action is Action.KEEP and memory.results:
                    memory.calls = [route.call, *memory.calls][: len(memory.weights)]
        self.rest()
        return sum(action in (Action.FORECAST, Action.IDLE) for action in actions.values())

    def rest(self) -> None:
        """Opens all gates."""
        for gate in self.gates.values():
            gate.action = Action.PASS
        self._route, self._actions, self.rows = None, {}, None

    def num_bytes(self, context: Context) -> int:
        """Bytes that a context holds for forecasts."""
        route = context.extras.get("route")
        return sum(memory.num_bytes for memory in route.memories.values()) if route is not None else 0

    def _modules(self, name: str) -> tuple[str, ...]:
        return self.units[name].module, *self.units[name].idle

    def _route_of(self, context: Context) -> Route:
        route: Route | None = context.extras.get("route")
        if route is None:
            run, time = context.run, context.time
            fitting = (s for s in self.schedules if len(run.times) in (0, len(s.times)) and s.suits(run.scheduler))
            schedule = next((s for s in fitting if time is not None and s.find(time, -1) is not None), None)
            if schedule is not None:
                self._compare(schedule, run.guidance, num_branches(context))
            is_generic = schedule is None and self.generic is not None
            if schedule is None and self.generic is not None:
                times = run.times[context.index : run.num_calls or None] if context.index is not None else ()
                schedule = self.generic.schedule(times)
                self._note(schedule if times else None)
            route = Route(schedule, is_generic, context.layout.shape[0], num_branches(context))
            context.extras["route"] = route
            if schedule is None or (is_generic and WHOLE not in schedule.skips):
                run.is_told = True
                self.unmatched()
        return route

    def _compare(self, schedule: Schedule, guidance: float, count: int) -> None:
        """Says once that a run's guidance is another than the one for which branches of a schedule have weights."""
        own = schedule.shares[-1] if len(schedule.shares) == count else guidance
        note = (
            f"calibrated at guidance {own:g}, and a run has {guidance:g}: its images are farther from stock than at "
            f"{own:g}; take that, or calibrate for {guidance:g}"
        )
        if guidance and abs(guidance - own) > _NEAR * own and note not in self.notes:
            self.notes.append(note)
            warnings.warn(note, UserWarning, stacklevel=2)

    def _note(self, schedule: Schedule | None) -> None:
        """Says once that a run follows the rule, without a warning: nothing is wrong."""
        if schedule is not None:
            left_out = len(schedule.skips.get(WHOLE, ()))
            note = f"{_GENERIC}: {left_out} of {len(schedule.times)} calls of a run left out"
            self.notes = [other for other in self.notes if "about" not in other]
            if note not in self.notes:
                self.notes.append(note)
                _LOGGER.info("%s", note)

    def _call(self, context: Context, route: Route) -> int | None:
        """The call of the schedule that the running one is; None where it is none of them."""
        if route.schedule is None:
            return None
        if route.is_generic:
            return context.step if context.step < len(route.schedule.times) else None
        return None if context.time is None else route.schedule.find(context.time, route.call)

    def _remembered(self, module: str, route: Route, context: Context) -> UnitMemory:
        """The memory of a module, for as many results as its forecasts are made of."""
        assert route.schedule is not None
        forecasts = [name for name, unit in self.units.items() if unit.module == module]
        count = max((route.schedule.num_weights(name) for name in forecasts), default=1)
        count = max(count, NUM_USED if self.threshold is not None else 1)
        # The whole is forecast outside of graphs, by numbers that the host knows.
        weights: list[Any] = [torch.zeros((), device=context.layout.device) if module else 0.0 for _ in range(count)]
        error = None if self.threshold is None else 0.0
        memory = route.memories[module] = UnitMemory(weights, is_forecast=bool(forecasts), error=error)
        return memory

    def _may_skip(self, unit: Unit, route: Route) -> bool:
        """Whether a unit's forecast has something to go by and was not too far off when last checked."""
        memory = route.memories.get(unit.module)
        if memory is None or any(m not in route.memories or route.memories[m].like is None for m in unit.idle):
            return False
        if self.threshold is not None and (memory.error or 0.0) > self.threshold:
            return False
        assert route.schedule is not None
        return (
            route.given(unit.name, unit.module) is not None
            or len(memory.calls) >= min(NUM_USED, len(memory.weights), route.call) > 0
        )


def _lies_in(module: str, others: Sequence[str]) -> bool:
    """Whether a module is a part of one of the others; every one is of the whole model, whose path is empty."""
    return any(module.startswith(f"{other}." if other else "") for other in others if other != module)
