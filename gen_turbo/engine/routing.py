"""Which units of a denoiser run in a call: a schedule of PAR at work on one model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gen_turbo.engine.clock import Clock, RunFacts, Stream
from gen_turbo.engine.memory import Memories, RouteMemory
from gen_turbo.engine.units import Unit
from gen_turbo.training.schedule import Schedule


@dataclass
class UnitStats:
    """Calls since attaching in which a unit ran, or was skipped for its own sake or with what holds it."""

    num_run: int = 0
    num_skipped: int = 0


class _Here(threading.local):
    """The call that is running in this thread."""

    def __init__(self) -> None:
        self.memory: RouteMemory | None = None
        self.actions: dict[str, str] = {}
        self.entered: dict[str, dict[str, Any]] = {}


class Routing:
    """The schedules of one model and the route of the running call; its gates ask it and tell it what ran.

    Attributes:
        units: What the schedules skip, by name.
        threshold: Largest relative error of a unit's last forecast, where it ran, at which it is still skipped.
        unmatched: Told once per run that no schedule is for.
    """

    def __init__(
        self,
        model: nn.Module,
        clock: Clock,
        run_facts: Callable[[], RunFacts | None],
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
        self._clock = clock
        self._run_facts = run_facts
        self.units = {name: units[name] for name in used}
        self.schedules = schedules
        self.threshold = threshold
        self.unmatched = unmatched
        self.memories = Memories()
        self._here = _Here()
        self.stats = {name: UnitStats() for name in used}
        self._unit_of = {unit.module: unit for unit in self.units.values()}

    @property
    def memory(self) -> RouteMemory | None:
        """Of the stream whose call is running; None between calls and where no schedule is for the run."""
        return self._here.memory

    @property
    def actions(self) -> dict[str, str]:
        """What is done instead of running a module in this call: its unit's name to forecast it, or "idle"."""
        return self._here.actions

    @property
    def entered(self) -> dict[str, dict[str, Any]]:
        """The arguments of blocks that are running and whose change is wanted."""
        return self._here.entered

    def begin(self, form: object) -> None:
        """Finds the route of the call that begins; with another `form` of result than before nothing is skipped."""
        self.end()
        stream = self._clock.current
        memory = None if stream is None else self._memory_of(stream)
        if stream is None or memory is None or memory.schedule is None:
            return
        call = memory.schedule.find(stream.observation.timestep, memory.call)
        if call is None:
            return
        memory.enter(call, form)
        self._here.memory = memory
        for name in memory.schedule.skipped_at(call):
            self._skip(self.units[name], memory)
        stream.num_reduced += len(self.actions)
        for name, unit in self.units.items():
            is_skipped = unit.module in self.actions or "" in self.actions
            self.stats[name].num_skipped += is_skipped
            self.stats[name].num_run += not is_skipped

    def end(self) -> None:
        """Notes that the call is over."""
        if self._here.memory is not None:
            self.memories.note_bytes()
        self._here.memory, self._here.actions, self._here.entered = None, {}, {}

    def _memory_of(self, stream: Stream) -> RouteMemory:
        memory = self.memories.of(stream)
        if memory is None:
            time = stream.observation.timestep
            schedule = next((schedule for schedule in self.schedules if self._fits(schedule, time)), None)
            memory = self.memories.open(stream, schedule)
            if schedule is None:
                self.unmatched()
        return memory

    def is_skipped(self, module: str) -> bool:
        """Whether a block is not run in this call."""
        return module in self.actions

    def is_kept(self, module: str) -> bool:
        """Whether the result of a module in this call will be part of a forecast."""
        memory, unit = self.memory, self._unit_of.get(module)
        if memory is None or memory.schedule is None or unit is None or module in self.actions:
            return False
        return any(call > memory.call for call in memory.schedule.skips.get(unit.name, ()))

    def keep(self, module: str, result: Callable[[], list[Tensor]]) -> None:
        """Remembers a result if it will be part of a forecast."""
        if self.memory is not None and self.is_kept(module):
            self.memory.keep(module, result(), self.threshold is not None)

    def forecast(self, module: str) -> list[Tensor]:
        """What a module would give in the running call."""
        memory = self.memory
        assert memory is not None and memory.schedule is not None
        return memory.forecast(module, memory.schedule.slopes.get(self._unit_of[module].name, 1.0))

    def _skip(self, unit: Unit, memory: RouteMemory) -> None:
        """Leaves a unit out, unless its forecast has nothing to go by or was too far off when last checked."""
        is_off = self.threshold is not None and memory.errors.get(unit.module, 0.0) > self.threshold
        needed = [unit.module, *unit.idle]
        if is_off or not memory.is_ready(unit.module) or any(name not in memory.shapes for name in needed):
            return
        self._here.actions |= dict.fromkeys(unit.idle, "idle") | {unit.module: unit.name}

    def _fits(self, schedule: Schedule, time: float) -> bool:
        facts = self._run_facts()
        is_as_long = facts is None or len(facts.marker) == len(schedule.times)  # type: ignore[arg-type]
        return is_as_long and schedule.find(time, -1) is not None
