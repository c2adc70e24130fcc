"""Measuring a denoiser for its schedule: how far the result moves where a unit is forecast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.gates import Action, UnitMemory, distance, gates_of
from gen_turbo.engine.layer import argument_names
from gen_turbo.engine.placed import Placed
from gen_turbo.engine.values import refilled, tensors
from gen_turbo.models.adapter import Adapter, Unit

_NUM_SAMPLED = 4096


@dataclass
class Recording:
    """One run of the stock model. Where a step calls it once for each guidance branch, the first stands for all.

    Attributes:
        times: Denoising time of every step.
        outputs: Result of every call, branch after branch.
        samples: Of every unit, up to 4,096 evenly spaced numbers of what is forecast, for every step.
        moved: Relative move of the model's output at a step where a group is forecast from the two steps before it.
    """

    times: list[float] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)
    moved: dict[tuple[str, int], float] = field(default_factory=dict)


@dataclass
class _Sampled(UnitMemory):
    """A memory that keeps a few numbers of every result."""

    samples: list[Tensor] = field(default_factory=list)

    def keep(self, result: Any, values: list[Tensor]) -> None:
        """Remembers a result and takes a sample of it."""
        super().keep(result, values)
        if self.is_forecast:
            flat = torch.cat([value.reshape(-1) for value in values])
            self.samples.append(flat[:: max(1, len(flat) // _NUM_SAMPLED)].float().cpu())


class Probe(Placed):
    """Stands in front of a model and gates on every unit; records runs of the stock model, and replays a beginning.

    Args:
        model: The model.
        adapter: Its family.
        units: What can be skipped.
        groups: Names of the units that are skipped together, by the name of the group.
        num_branches: Calls of a step: more than one where guidance has calls of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        units: Mapping[str, Unit],
        groups: Mapping[str, Sequence[str]],
        num_branches: int = 1,
    ) -> None:
        super().__init__("", model)
        self.units, self.groups, self.num_branches = dict(units), groups, num_branches
        self.names = argument_names(model)
        self._adapter = adapter
        self._gates = gates_of(model, self.units)
        self._memories: dict[str, _Sampled] = {}
        self._recording = Recording()
        self._replayed: Sequence[Any] = ()
        self._probed: frozenset[int] = frozenset()

    @contextmanager
    def recording(self, probed: Sequence[int] = ()) -> Iterator[Recording]:
        """Records the run inside the `with` block; at some of its steps every group is forecast too."""
        self._recording, self._replayed, self._probed = Recording(), (), frozenset(probed)
        forecasts = {unit.module for unit in self.units.values()}
        self._memories = {name: _Sampled([2.0, -1.0], is_forecast=name in forecasts) for name in ("", *self._gates)}
        with self._in_place():
            yield self._recording

    @contextmanager
    def replaying(self, outputs: Sequence[Any]) -> Iterator[None]:
        """Answers the first calls of the run inside the `with` block by given results; the others run."""
        self._recording, self._replayed, self._probed = Recording(), outputs, frozenset()
        with self._in_place():
            yield

    def forecast_at(self, outputs: Sequence[Any], step: int) -> list[Any]:
        """The results of a run up to a step, that one as a straight line through the two before it."""
        first, last = step * self.num_branches, (step + 1) * self.num_branches
        return [*outputs[:first], *(self._line(outputs, call) for call in range(first, last))]

    def _line(self, outputs: Sequence[Any], call: int) -> Any:
        newer, older = (tensors(outputs[call - back * self.num_branches]) for back in (1, 2))
        return refilled(outputs[call], [2 * a - b for a, b in zip(newer, older, strict=True)])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model, replayed or recorded."""
        call = len(self._recording.outputs)
        if self._replayed:
            result = self._replayed[call] if call < len(self._replayed) else self.inner(*args, **kwargs)
        elif call % self.num_branches:
            result = self.inner(*args, **kwargs)
        else:
            arguments = {**dict(zip(self.names[: len(args)], args, strict=True)), **kwargs}
            result = self._recorded(call // self.num_branches, arguments)
        self._recording.outputs.append(result)
        return result

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        placed: list[Placed] = [*self._gates.values(), self]
        for one in placed:
            one.install()
        try:
            yield
        finally:
            for one in reversed(placed):
                one.remove()

    def _recorded(self, step: int, arguments: dict[str, Any]) -> Any:
        def run() -> Any:
            return self.inner(**arguments)

        others = {group: self._forecast(group, run) for group in self.groups} if step in self._probed else {}
        result = self._with_actions(dict.fromkeys(self._gates, Action.KEEP), run)
        self._memories[""].keep(result, tensors(result))
        self._recording.times.append(self._adapter.time(self._adapter.read(arguments).timestep))
        for unit in self.units.values():
            self._recording.samples[unit.name] = self._memories[unit.module].samples
        for group, other in others.items():
            self._recording.moved[group, step] = distance(other, tensors(result))
        return result

    def _forecast(self, group: str, run: Callable[[], Any]) -> list[Tensor]:
        """The result of a call where a group is forecast from the two steps before."""
        units = [self.units[name] for name in self.groups[group]]
        if any(not unit.module for unit in units):
            return self._memories[""].forecast()
        actions = {name: Action.IDLE for unit in units for name in unit.idle}
        return tensors(self._with_actions(actions | {unit.module: Action.FORECAST for unit in units}, run))

    def _with_actions(self, actions: dict[str, Action], run: Callable[[], Any]) -> Any:
        for name, gate in self._gates.items():
            gate.action, gate.memory = actions.get(name, Action.PASS), self._memories[name]
        try:
            return run()
        finally:
            for gate in self._gates.values():
                gate.action = Action.PASS
