"""State of the call that is running: each thread, each task and each nested call has its own."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar, overload
from weakref import WeakKeyDictionary

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class _State:
    """Values of one call, and the state of the call that it is nested in."""

    outer: _State | None = None
    values: dict[str, Any] = field(default_factory=dict)


_STATES: ContextVar[WeakKeyDictionary[Any, _State] | None] = ContextVar("gen_turbo_vlm", default=None)
"""By stage. What is in it is replaced, never written to, for a new thread's or task's context may share it."""


class CallState(Generic[T]):
    """An attribute of a stage whose value belongs to the call that is running.

    Args:
        make: Gives the value of a call that has set none.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        """Remembers the attribute's name."""
        self._name = name

    @overload
    def __get__(self, stage: None, owner: type) -> Self: ...
    @overload
    def __get__(self, stage: object, owner: type) -> T: ...
    def __get__(self, stage: object | None, owner: type) -> T | Self:
        """The value in the call that is running here."""
        if stage is None:
            return self
        state = _state(stage)
        if state is None or self._name not in state.values:
            return self._make()
        found: T = state.values[self._name]
        return found

    def __set__(self, stage: object, value: T) -> None:
        """Sets the value for the call that is running here."""
        _set(stage, self._name, value)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def begin(stage: object) -> None:
    """Begins a call of a stage: what it knew of the call around it waits for `end`."""
    _put(stage, _State(_state(stage)))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def begin_anew(stage: object) -> None:
    """Begins what nothing can be nested in: what was known of the last call is dropped."""
    _put(stage, _State())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def end(stage: object) -> None:
    """Ends the call that `begin` began; without one, nothing happens."""
    state = _state(stage)
    _put(stage, state.outer if state is not None else None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _state(stage: object) -> _State | None:
    states = _STATES.get()
    return states.get(stage) if states is not None else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _set(stage: object, name: str, value: object) -> None:
    state = _state(stage) or _State()
    _put(stage, _State(state.outer, {**state.values, name: value}))


def _put(stage: object, state: _State | None) -> None:
    states: WeakKeyDictionary[Any, _State] = WeakKeyDictionary(_STATES.get() or {})
    states.pop(stage, None)
    if state is not None:
        states[stage] = state
    _STATES.set(states)
