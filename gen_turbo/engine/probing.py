"""Measuring a denoiser for its schedule: how far the result moves where a unit is forecast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.base import DenoiserHost
from gen_turbo.engine.clock import Clock
from gen_turbo.engine.gate import Gates, RootGate
from gen_turbo.engine.memory import RouteMemory
from gen_turbo.engine.routing import Routing
from gen_turbo.engine.units import Unit
from gen_turbo.engine.values import refilled, tensors
from gen_turbo.training.schedule import Schedule

_NUM_KEPT = 3
_NUM_SAMPLED = 4096


@dataclass
class Recording:
    """One run of the stock model.

    Attributes:
        times: Denoising time of every call.
        outputs: Result of every call.
        samples: Of every unit, up to 4,096 evenly spaced numbers of what is forecast, for every call.
        moved: Relative move of the model's output at a call where a group is forecast from the two calls before it.
    """

    times: list[float] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    samples: dict[str, list[Tensor]] = field(default_factory=dict)
    moved: dict[tuple[str, int], float] = field(default_factory=dict)


class Probe(Routing):
    """Gates on every unit that record runs of the stock model, and replay the beginning of one.

    Args:
        model: The model.
        host: Its family.
        units: What can be skipped.
        groups: Names of the units that are skipped together, by the name of the group.
    """

    def __init__(
        self, model: nn.Module, host: DenoiserHost, units: Mapping[str, Unit], groups: Mapping[str, Sequence[str]]
    ) -> None:
        everything = Schedule((0.0, 0.0), {name: frozenset({1}) for name in units})
        super().__init__(model, Clock(lambda: None), lambda: None, dict(units), [everything], None, lambda: None)
        self.groups = groups
        self._model, self._host = model, host
        self._recording = Recording()
        self._replayed: Sequence[Any] = ()
        self._probed: frozenset[int] = frozenset()
        self._seen = RouteMemory(None)
        self._gates = Gates(model, self, _ProbeGate)

    @contextmanager
    def recording(self, probed: Sequence[int] = ()) -> Iterator[Recording]:
        """Records the run inside the `with` block; at some of its calls every group is forecast too."""
        self._recording, self._replayed, self._probed = Recording(), (), frozenset(probed)
        self._seen = RouteMemory(None, num_kept=_NUM_KEPT)
        self._gates.install()
        try:
            yield self._recording
        finally:
            self._gates.remove()

    @contextmanager
    def replaying(self, outputs: Sequence[Any]) -> Iterator[None]:
        """Answers the first calls of the run inside the `with` block by given results; the others run."""
        self._recording, self._replayed, self._probed = Recording(), outputs, frozenset()
        self._gates.install()
        try:
            yield
        finally:
            self._gates.remove()

    def line(self, outputs: Sequence[Any], call: int) -> Any:
        """The result of a call as a straight line through the two before it."""
        newer, older = tensors(outputs[call - 1]), tensors(outputs[call - 2])
        return refilled(outputs[call], [2 * a - b for a, b in zip(newer, older, strict=True)])

    def answer(self, names: Sequence[str], inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """One call of the model, replayed or recorded."""
        call = len(self._recording.outputs)
        if self._replayed:
            result = self._replayed[call] if call < len(self._replayed) else inner(*args, **kwargs)
            self._recording.outputs.append(result)
            return result
        self._here.memory, self._here.actions, self._seen.call = self._seen, {}, call
        try:
            return self._recorded(call, dict(zip(names, args, strict=False)) | kwargs, lambda: inner(*args, **kwargs))
        finally:
            self.end()

    def _recorded(self, call: int, arguments: dict[str, Any], run: Callable[[], Any]) -> Any:
        result = run()
        self._seen.note_shape("", result)
        self.keep("", lambda: [tensor.clone() for tensor in tensors(result)])
        self._recording.times.append(self._host.observe(self._model, arguments).timestep)
        self._recording.outputs.append(result)
        if call in self._probed:
            for group in self.groups:
                self._recording.moved[group, call] = self._moved(group, run, result)
        return result

    def is_kept(self, module: str) -> bool:
        """Every unit's is, in a recorded call."""
        return self._here.memory is self._seen and module in self._unit_of

    def keep(self, module: str, result: Callable[[], list[Tensor]]) -> None:
        """Remembers a result and takes a sample of it."""
        if not self.is_kept(module):
            return
        values = result()
        self._seen.keep(module, values, is_checked=False)
        flat = torch.cat([value.reshape(-1) for value in values])
        sample = flat[:: max(1, len(flat) // _NUM_SAMPLED)].float().cpu()
        self._recording.samples.setdefault(self._unit_of[module].name, []).append(sample)

    def forecast(self, module: str) -> list[Tensor]:
        """A straight line."""
        memory = self.memory
        assert memory is not None
        return memory.forecast(module, 1.0)

    def _moved(self, group: str, run: Callable[[], Any], result: Any) -> float:
        """Runs the call again with a group forecast from the two calls before, and compares the output."""
        earlier = {name: entries[1:] for name, entries in self._seen.recent.items()}
        self._here.memory = RouteMemory(None, self._seen.call, earlier, dict(self._seen.shapes))
        self._here.actions = {}
        for name in self.groups[group]:
            self._skip(self.units[name], self._here.memory)
        other = self._here.memory.forecast("", 1.0) if "" in self.actions else tensors(run())
        self._here.memory, self._here.actions = self._seen, {}
        off = sum(float((a - b).float().square().sum()) for a, b in zip(other, tensors(result), strict=True))
        return float((off / sum(float(value.float().square().sum()) for value in tensors(result))) ** 0.5)


class _ProbeGate(RootGate):
    """The gate of the whole model, which hands every call to the probe."""

    def answer(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records or replays."""
        probe = self.routing
        assert isinstance(probe, Probe)
        return probe.answer(self.names, inner, args, kwargs)
