"""What forecasts are made of: the last results of units in one stream of calls, gone with the stream."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gen_turbo.engine.clock import Stream
from gen_turbo.engine.values import mapped
from gen_turbo.tokens.forecast import forecast
from gen_turbo.training.schedule import Schedule

_NUM_USED = 2


@dataclass
class RouteMemory:
    """What one stream remembers.

    Attributes:
        schedule: The schedule that its run follows; None where no schedule is for a run like it.
        call: The call of the schedule that is running.
        recent: The last results by module, newest first, with the call that gave them.
        shapes: The last result by module with tensors that hold one number each.
        form: Of the results that the whole model is asked for.
        num_kept: Results remembered of each module.
        errors: How far the last forecast of a module would have been off, relative, where it ran.
    """

    schedule: Schedule | None
    call: int = -1
    recent: dict[str, list[tuple[int, list[Tensor]]]] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    form: object = None
    num_kept: int = 2

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        held = (tensor for results in self.recent.values() for _, result in results for tensor in result)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def enter(self, call: int, form: object) -> None:
        """Begins a call; results of another form than before cannot be forecast from them."""
        self.call = call
        if self.form != form:
            self.form = form
            self.recent.pop("", None)

    def is_ready(self, module: str) -> bool:
        """Whether a module can be forecast: from its last two results, or the only one of a run that has just begun."""
        return len(self.recent.get(module, ())) >= min(_NUM_USED, self.call)

    def note_shape(self, module: str, result: Any) -> None:
        """Keeps what a result looks like."""
        self.shapes[module] = mapped(result, lambda tensor: tensor.new_zeros(()).expand(tensor.shape))

    def keep(self, module: str, result: list[Tensor], is_checked: bool) -> None:
        """Keeps a result, the oldest gives way; a check first sees how well it would have been forecast."""
        known = self.recent.get(module, [])
        if is_checked and len(known) >= _NUM_USED:
            self.errors[module] = _distance(self.forecast(module, 1.0), result)
        self.recent[module] = [(self.call, result), *known][: self.num_kept]

    def forecast(self, module: str, slope: float) -> list[Tensor]:
        """What a module would give at the running call."""
        known = self.recent[module]
        calls = [call for call, _ in known]
        return [forecast(values, calls, self.call, slope) for values in zip(*(v for _, v in known), strict=True)]


class Memories:
    """The memory of each stream that is alive."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Stream], RouteMemory]] = {}
        self.most_bytes = 0

    def of(self, stream: Stream) -> RouteMemory | None:
        """The memory of a stream; None before `open`."""
        entry = self._of.get(id(stream))
        return entry[1] if entry is not None else None

    def open(self, stream: Stream, schedule: Schedule | None) -> RouteMemory:
        """Begins the memory of a stream, which lives as long as the stream."""
        key, memory, entries = id(stream), RouteMemory(schedule), self._of
        entries[key] = (weakref.ref(stream, lambda _: entries.pop(key, None)), memory)
        return memory

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(memory.num_bytes for _, memory in self._of.values())

    def note_bytes(self) -> None:
        """Keeps the most that was ever held."""
        self.most_bytes = max(self.most_bytes, self.num_bytes)


def _distance(guess: list[Tensor], actual: list[Tensor]) -> float:
    """Relative distance of two lists of tensors."""
    off = sum(float((a - b).float().square().sum()) for a, b in zip(guess, actual, strict=True))
    size = sum(float(tensor.float().square().sum()) for tensor in actual)
    return float(torch.tensor(off / size).sqrt()) if size else 0.0
