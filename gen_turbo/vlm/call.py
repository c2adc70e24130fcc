"""State of the calls that are running, and what stays of them: each thread, task and nested call has its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import torch

T = TypeVar("T")

_STATES: ContextVar[WeakKeyDictionary[Any, Any] | None] = ContextVar("gen_turbo_vlm", default=None)
"""By owner. The dictionary is replaced, never written to, for a new thread's or task's context may share it."""


class Calls(Generic[T]):
    """The calls of one module that run here, each with a state of its own; those inside of others end first.

    A call begins and ends in one thread and awaits nothing: its state is the thread's, which compiled code can read.

    Args:
        make: Gives the state of a call that begins.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._here = threading.local()

    @property
    def is_running(self) -> bool:
        """Whether a call has begun here and not ended."""
        return self._entry is not None

    @property
    def now(self) -> T:
        """The state of the innermost call; a new one, which nobody keeps, where none is running."""
        found = self._entry
        state: T = self._make() if found is None else found[0]
        return state

    def begin(self, state: T | None = None) -> T:
        """Begins a call, with a state of its own or the one given, which it gives.

        What is known of the call around it waits for `end`.
        """
        state = self._make() if state is None else state
        self._here.entry = (state, self._entry)
        return state

    def end(self) -> None:
        """Ends the call that `begin` began; without one, nothing happens."""
        found = self._entry
        self._here.entry = None if found is None else found[1]

    @property
    def _entry(self) -> Any:
        """The state of the innermost call and, the same way, of those around it; None where none is running."""
        return getattr(self._here, "entry", None)


class Last(Generic[T]):
    """What was noted last in the thread or task that is running, and stays after the call that noted it.

    Args:
        make: Gives the value where nothing was noted.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make

    @property
    def value(self) -> T:
        """What was noted."""
        found = _get(self)
        value: T = self._make() if found is None else found[0]
        return value

    @value.setter
    def value(self, value: T) -> None:
        _put(self, (value,))

    def forget(self) -> None:
        """Drops it."""
        _put(self, None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _get(owner: object) -> Any:
    states = _STATES.get()
    return states.get(owner) if states is not None else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _put(owner: object, entry: Any) -> None:
    states: WeakKeyDictionary[Any, Any] = WeakKeyDictionary(_STATES.get() or {})
    states.pop(owner, None)
    if entry is not None:
        states[owner] = entry
    _STATES.set(states)
