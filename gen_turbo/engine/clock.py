"""The one clock: which run a call of the denoiser belongs to, which step it is, and what the run remembers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gen_turbo.engine.base import Observation
from gen_turbo.engine.text import MergedText
from gen_turbo.tokens.token_map import TokenMap

_MAX_STREAMS = 4


@dataclass
class PlannedAt:
    """A plan, the step that made it and how many were made before it."""

    plan: TokenMap
    step: int
    num_plans: int


@dataclass
class Memory:
    """What one layer remembers of its last full step: the plan used there and the detail that merging missed.

    Attributes:
        shape: Of the sequence that the layer ran on; a call of another shape can have none of it.
    """

    planned: PlannedAt
    step: int
    shape: tuple[int, ...]
    detail: list[Tensor | None]
    slope: list[Tensor | None] | None = None

    def is_for(self, plan: TokenMap) -> bool:
        """Whether the detail is what a plan of as many slots missed; of another ratio it says nothing of a change."""
        return self.planned.plan.num_slots == plan.num_slots

    @property
    def num_bytes(self) -> int:
        """Bytes held by the remembered tensors."""
        return sum(t.numel() * t.element_size() for t in [*self.detail, *(self.slope or [])] if t is not None)


@dataclass
class Projected:
    """What a projection of text gave, and for what: the very tensors, and how often each had been written to."""

    text: Tensor
    weights: list[tuple[Tensor, int]]
    version: int
    output: Tensor

    def is_for(self, text: Tensor, weights: list[tuple[Tensor, int]]) -> bool:
        """Whether text and weights are the same objects, and as often written to."""
        same = zip(self.weights, weights, strict=False)
        is_same = len(weights) == len(self.weights) and all(a is b and n == m for (a, n), (b, m) in same)
        return is_same and text is self.text and text._version == self.version

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.output.numel() * self.output.element_size()


@dataclass
class Stream:
    """One sequence of calls: a run, or the conditional or unconditional half of one that calls twice per step."""

    observation: Observation
    step: int = 0
    num_reduced: int = 0
    plans: dict[tuple[object, ...], PlannedAt] = field(default_factory=dict)
    memories: dict[str, Memory] = field(default_factory=dict)
    text: MergedText | None = None
    projected: dict[str, Projected] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes remembered by all layers."""
        held = sum(memory.num_bytes for memory in self.memories.values())
        return held + sum(projected.num_bytes for projected in self.projected.values())


@dataclass(frozen=True)
class RunFacts:
    """What a pipeline knows of its run and a bare model does not.

    Attributes:
        marker: An object that is another one in every run, the scheduler's timestep tensor.
        last_timestep: The denoising time of the run's last call.
        tolerance: How far from it a time still is that time; models are told rounded or scaled times.
    """

    marker: object
    last_timestep: float
    tolerance: float

    def is_last(self, observation: Observation) -> bool:
        """Whether a call is the run's last, by its time."""
        return abs(abs(observation.timestep) - self.last_timestep) <= self.tolerance


class _Here(threading.local):
    """What a clock knows in one thread."""

    def __init__(self) -> None:
        self.facts: RunFacts | None = None
        self.streams: list[Stream] = []
        self.current: Stream | None = None


class Clock:
    """Tells runs, streams and steps apart, and forgets everything when a run ends or another begins.

    Within a run the denoising time falls. A pipeline also shows when a run begins and which call is its last; for
    a bare model a time that does not fall begins a new run. Every thread has runs of its own.
    """

    def __init__(self, run_facts: Callable[[], RunFacts | None]) -> None:
        self._run_facts = run_facts
        self._here = _Here()
        self.most_bytes = 0

    @property
    def current(self) -> Stream | None:
        """The stream of the call that runs now in this thread."""
        return self._here.current

    def note_bytes(self) -> None:
        """Keeps the most that was ever remembered."""
        self.most_bytes = max(self.most_bytes, self.num_bytes)

    def begin(self, observation: Observation) -> Stream:
        """Notes that the root is called, and gives the stream that the call belongs to."""
        facts = self._run_facts()
        if (facts.marker if facts else None) is not (self._here.facts.marker if self._here.facts else None):
            self.forget()
        self._here.facts = facts
        stream = self._find(observation)
        if stream is not None and self._restarts(observation, stream):
            self.forget()
            stream = None
        if stream is None:
            stream = self._open(observation)
        else:
            stream.step += 1
            stream.observation = observation
        self._here.current = stream
        return stream

    def end(self) -> Stream | None:
        """Notes that the root has returned; after a run's last call its memory goes and the stream is given back."""
        stream, self._here.current = self.current, None
        if stream is None or self._here.facts is None or not self._here.facts.is_last(stream.observation):
            return None
        self._here.streams = [other for other in self._here.streams if other is not stream]
        return stream

    def forget(self) -> None:
        """Drops all that is remembered."""
        self._here.streams.clear()
        self._here.current = None

    @property
    def num_bytes(self) -> int:
        """Bytes remembered now."""
        return sum(stream.num_bytes for stream in self._here.streams)

    def _restarts(self, observation: Observation, stream: Stream) -> bool:
        before = stream.observation.timestep
        # Second-order schedulers call twice at one time; without a pipeline that cannot be told from a new run.
        return observation.timestep > before or (self._here.facts is None and observation.timestep == before)

    def _find(self, observation: Observation) -> Stream | None:
        for stream in self._here.streams:
            seen = stream.observation
            if seen.layout == observation.layout and _is_same(seen.condition, observation.condition):
                return stream
        return None

    def _open(self, observation: Observation) -> Stream:
        stream = Stream(observation)
        self._here.streams = [*self._here.streams[-_MAX_STREAMS + 1 :], stream]
        return stream


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two conditioning tensors are one; contents are compared only where a pipeline made a new object."""
    if a is b:
        return True
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def run_facts_of(pipeline: Any | None) -> Callable[[], RunFacts | None]:
    """A function that reads scheduler and guidance of a pipeline, without keeping the pipeline alive."""
    if pipeline is None or getattr(pipeline, "scheduler", None) is None:
        return lambda: None
    reference = weakref.ref(pipeline)
    last: list[Any] = [None, 0.0, 0.0]  # the times last seen, the last of them, half its distance to the others

    def read() -> RunFacts | None:
        owner = reference()
        times = getattr(owner.scheduler, "timesteps", None) if owner is not None else None
        if times is None or len(times) == 0:
            return None
        if last[0] is not times:
            values = [float(time) for time in times]
            last[:] = [times, values[-1], _half_gap(values)]
        return RunFacts(times, last[1], last[2])

    return read


def _half_gap(times: list[float]) -> float:
    """Half the distance of the last time to its nearest other one."""
    return min((abs(time - times[-1]) for time in times if time != times[-1]), default=1.0) / 2
