"""Leaving out units of a denoiser: a schedule of PAR at work on one model, with a gate in front of each unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.layer import argument_names
from gen_turbo.engine.placed import Placed
from gen_turbo.engine.runs import Context
from gen_turbo.engine.values import mapped, refilled, tensors
from gen_turbo.models.adapter import WHOLE, LayerSignature, Unit
from gen_turbo.training.schedule import Schedule

_NUM_USED = 2
_TEXT = "encoder_hidden_states"


class Action(Enum):
    """What a gate does in the running step."""

    PASS = "pass"
    KEEP = "keep"
    FORECAST = "forecast"
    IDLE = "idle"


@dataclass
class UnitMemory:
    """The last results of one module in one context, in tensors of fixed address.

    Attributes:
        reach: How far the line through both results is continued beyond the newer, in their distance; 0-dim.
        newest: The last result.
        older: The one before; zeros as long as there is none.
        like: A result with tensors that hold one number each.
        calls: The calls of the schedule that gave them, newest first.
        is_forecast: Whether results are remembered; of what only idles, nobody reads them.
        error: How far the last forecast would have been off, relative, where the module ran; None if nobody asks.
    """

    reach: Tensor
    newest: list[Tensor] = field(default_factory=list)
    older: list[Tensor] = field(default_factory=list)
    like: Any = None
    calls: list[int] = field(default_factory=list)
    is_forecast: bool = True
    error: float | None = None

    def keep(self, result: Any, values: list[Tensor]) -> None:
        """Remembers a result; the oldest gives way."""
        if self.like is None:
            self.like = mapped(result, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))
        if not self.is_forecast:
            return
        if not self.newest:
            self.newest = [value.detach().clone() for value in values]
            self.older = [torch.zeros_like(value) for value in values]
            return
        if self.error is not None and len(self.calls) == _NUM_USED:
            self.error = _distance(self.forecast(), values)
        for older, newest, value in zip(self.older, self.newest, values, strict=True):
            older.copy_(newest)
            newest.copy_(value.detach())

    def forecast(self) -> list[Tensor]:
        """What the module would give."""
        return [newest.lerp(older, -self.reach) for newest, older in zip(self.newest, self.older, strict=True)]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.newest, *self.older))


class Gate(Placed):
    """Stands in front of a module whose result is remembered and forecast."""

    action = Action.PASS

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.memory: UnitMemory = None  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module or stands for it."""
        if self.action is Action.PASS:
            return self.inner(*args, **kwargs)
        if self.action is Action.IDLE:
            return mapped(self.memory.like, _zeros)
        if self.action is Action.FORECAST:
            return refilled(self.memory.like, self.memory.forecast())
        result = self.inner(*args, **kwargs)
        self.memory.keep(result, tensors(result))
        return result


class BlockGate(Gate):
    """The gate of a block with a residual stream: the change of its input is remembered and forecast."""

    def __init__(self, name: str, module: nn.Module, signature: LayerSignature) -> None:
        super().__init__(name, module)
        self.signature, self.names = signature, argument_names(module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block, or adds the change as it is forecast."""
        if self.action is Action.PASS:
            return self.inner(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False))
        given.update(kwargs)
        if self.action is Action.KEEP:
            result = self.inner(**given)
            self.memory.keep(result, self._changes(given, result))
            return result
        left = iter(self.memory.forecast())
        outputs = self.memory.like if isinstance(self.memory.like, tuple) else (self.memory.like,)
        added: list[Tensor | None] = []
        for index, shape in enumerate(outputs):
            before = self._input_of(given, index, shape)
            added.append(None if shape is None else next(left) if before is None else before + next(left))
        return tuple(added) if isinstance(self.memory.like, tuple) else added[0]

    def _changes(self, given: dict[str, Any], result: Any) -> list[Tensor]:
        changes = []
        for index, value in enumerate(result if isinstance(result, tuple) else (result,)):
            if value is not None:
                before = self._input_of(given, index, value)
                changes.append(value if before is None else value - before)
        return changes

    def _input_of(self, given: dict[str, Any], index: int, output: Tensor | None) -> Tensor | None:
        """The input that an output adds to; None where there is none of its shape."""
        value = given.get(self.signature.tokens if index in self.signature.outputs else _TEXT)
        is_same = isinstance(value, Tensor) and output is not None and value.shape == output.shape
        return value if is_same else None


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
                reach = torch.zeros((), device=context.layout[2])  # type: ignore[call-overload]
                error = None if self.threshold is None else 0.0
                memory = route.memories[module] = UnitMemory(reach, is_forecast=module in forecasts, error=error)
            if actions[module] is Action.FORECAST or (self.threshold is not None and len(memory.calls) == _NUM_USED):
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
                    memory.calls = [route.call, *memory.calls][:_NUM_USED]
        for gate in self.gates.values():
            gate.action = Action.PASS
        self._route, self._actions = None, {}
        return sum(action in (Action.FORECAST, Action.IDLE) for action in actions.values())

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
        return not is_off and len(memory.calls) >= min(_NUM_USED, route.call) > 0

    def _reach(self, module: str, memory: UnitMemory, route: Route) -> float:
        if len(memory.calls) < _NUM_USED or route.schedule is None:
            return 0.0
        name = next(name for name, unit in self.units.items() if unit.module == module)
        newest, older = memory.calls
        return route.schedule.slopes.get(name, 1.0) * (route.call - newest) / (newest - older)


def gates_of(model: nn.Module, units: dict[str, Unit]) -> dict[str, Gate]:
    """A gate for every module of units but the whole model; nothing is changed yet."""
    gates: dict[str, Gate] = {}
    for unit in units.values():
        for name in (unit.module, *unit.idle):
            if not name or name in gates:
                continue
            module = model.get_submodule(name)
            is_block = name == unit.module and unit.signature is not None
            gates[name] = BlockGate(name, module, unit.signature) if is_block else Gate(name, module)  # type: ignore[arg-type]
    return gates


def _zeros(like: Tensor) -> Tensor:
    return like.new_zeros(like.shape)


def _distance(guess: list[Tensor], actual: list[Tensor]) -> float:
    """Relative distance of two lists of tensors."""
    off = sum(float((a - b).float().square().sum()) for a, b in zip(guess, actual, strict=True))
    size = sum(float(tensor.float().square().sum()) for tensor in actual)
    return float(torch.tensor(off / size).sqrt()) if size else 0.0
