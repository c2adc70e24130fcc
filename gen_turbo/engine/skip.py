"""Leaving out units of a denoiser: a schedule of PAR at work on one model, by the gates in front of its units."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gen_turbo.engine.context import Context
from gen_turbo.engine.gates import NUM_USED, Action, UnitMemory, gates_of
from gen_turbo.engine.values import refilled, tensors
from gen_turbo.models.adapter import WHOLE, Unit
from gen_turbo.training.schedule import Schedule


@dataclass
class Route:
    """The schedule of one context, and what it remembers.

    Attributes:
        schedule: The schedule that its run follows; None where no schedule is for a run like it.
        call: The call of the schedule that is running.
        form: Of the results that the whole model is asked for.
        memories: By module.
    """

    schedule: Schedule | None
    call: int = -1
    form: object = None
    memories: dict[str, UnitMemory] = field(default_factory=dict)


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
        kind: What tells the kind of the running step from others.

    Raises:
        ValueError: If a schedule skips what the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        units: dict[str, Unit],
        schedules: Sequence[Schedule],
        threshold: float | None,
        unmatched: Callable[[], None],
    ) -> None:
        used = list(dict.fromkeys(unit for schedule in schedules for unit in schedule.skips))
        unknown = [name for name in used if name not in units]
        if unknown:
            raise ValueError(
                f"the schedule skips {', '.join(unknown)}, which {type(model).__name__} does not have; "
                f"it has {', '.join(units)}"
            )
        self.units = {name: units[name] for name in used}
        self.schedules, self.threshold, self.unmatched = schedules, threshold, unmatched
        self.stats = {name: UnitStats() for name in used}
        self.gates = gates_of(model, self.units)
        self.kind: tuple[object, ...] = ()
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
                for tensor in memory.older:
                    tensor.zero_()
            self._route_of(context).memories = old.memories

    def begin(self, context: Context, form: object) -> tuple[frozenset[str], bool]:
        """Sets every gate for the running call; gives the units left out, and whether a module is remembered first."""
        self._route, self._actions, self.kind = None, {}, ()
        route = self._route_of(context)
        time = context.time
        call = None if route.schedule is None or time is None else route.schedule.find(time, route.call)
        if call is None or route.schedule is None:
            return frozenset(), False
        self._route, route.call = route, call
        if route.form != form:
            route.form = form
            route.memories.pop("", None)
        actions: dict[str, Action] = {}
        skipped = set()
        for name in route.schedule.skipped_at(call):
            unit = self.units[name]
            if self._may_skip(unit, route):
                actions |= dict.fromkeys(unit.idle, Action.IDLE) | {unit.module: Action.FORECAST}
                skipped.add(name)
        needed = [name for name, calls in route.schedule.skips.items() if any(later > call for later in calls)]
        forecasts = {self.units[name].module for name in self.units}
        actions = dict.fromkeys((m for name in needed for m in self._modules(name)), Action.KEEP) | actions
        for module in actions:
            memory = route.memories.get(module)
            if memory is None:
                reach = torch.zeros((), device=context.layout.device)
                error = None if self.threshold is None else 0.0
                memory = route.memories[module] = UnitMemory(reach, is_forecast=module in forecasts, error=error)
            if actions[module] is Action.FORECAST or (self.threshold is not None and len(memory.calls) == NUM_USED):
                memory.reach.fill_(self._reach(module, memory, route))
            if module:
                self.gates[module].action, self.gates[module].memory = actions[module], memory
        self._actions = actions
        self.kind = tuple(sorted((module, action.value) for module, action in actions.items()))
        for name, unit in self.units.items():
            is_skipped = WHOLE in skipped or actions.get(unit.module) in (Action.FORECAST, Action.IDLE)
            self.stats[name].num_skipped += is_skipped
            self.stats[name].num_run += not is_skipped
        is_first = any(a is Action.KEEP and route.memories[m].like is None for m, a in actions.items() if m)
        return frozenset(skipped), is_first

    def whole(self) -> Any:
        """The result of the whole model as it is forecast."""
        assert self._route is not None
        memory = self._route.memories[""]
        return refilled(memory.like, memory.forecast())

    def end(self, output: Any) -> int:
        """Notes that the call is over and opens all gates; gives how many modules did not run."""
        route, actions = self._route, self._actions
        if route is not None and output is not None:
            if actions.get("") is Action.KEEP:
                route.memories[""].keep(output, tensors(output))
            for module, action in actions.items():
                memory = route.memories[module]
                if action is Action.KEEP and memory.newest:
                    memory.calls = [route.call, *memory.calls][:NUM_USED]
        self.rest()
        return sum(action in (Action.FORECAST, Action.IDLE) for action in actions.values())

    def rest(self) -> None:
        """Opens all gates."""
        for gate in self.gates.values():
            gate.action = Action.PASS
        self._route, self._actions = None, {}

    def num_bytes(self, context: Context) -> int:
        """Bytes that a context holds for forecasts."""
        route = context.extras.get("route")
        return sum(memory.num_bytes for memory in route.memories.values()) if route is not None else 0

    def _modules(self, name: str) -> tuple[str, ...]:
        return self.units[name].module, *self.units[name].idle

    def _route_of(self, context: Context) -> Route:
        route: Route | None = context.extras.get("route")
        if route is None:
            times, time = context.run.times, context.time
            fitting = (s for s in self.schedules if len(times) in (0, len(s.times)))
            schedule = next((s for s in fitting if time is not None and s.find(time, -1) is not None), None)
            route = context.extras["route"] = Route(schedule)
            if schedule is None:
                self.unmatched()
        return route

    def _may_skip(self, unit: Unit, route: Route) -> bool:
        """Whether a unit's forecast has something to go by and was not too far off when last checked."""
        memory = route.memories.get(unit.module)
        if memory is None or any(m not in route.memories or route.memories[m].like is None for m in unit.idle):
            return False
        is_off = self.threshold is not None and (memory.error or 0.0) > self.threshold
        return not is_off and len(memory.calls) >= min(NUM_USED, route.call) > 0

    def _reach(self, module: str, memory: UnitMemory, route: Route) -> float:
        if len(memory.calls) < NUM_USED or route.schedule is None:
            return 0.0
        name = next(name for name, unit in self.units.items() if unit.module == module)
        newest, older = memory.calls
        return route.schedule.slopes.get(name, 1.0) * (route.call - newest) / (newest - older)
