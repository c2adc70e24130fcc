"""What an attachment does to a model is a list of stages, each placed as a whole and taken off as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from gen_turbo.vlm.call import Last
from gen_turbo.vlm.hooks import settle
from gen_turbo.vlm.images import Encoded


class Handle(Protocol):
    """What takes one hook or method off again."""

    def remove(self) -> None:
        """Takes it off; doing it twice is harmless."""
        ...


class Stage(ABC):
    """One thing that is done to a model, with settings of its own.

    Attributes:
        is_idle: Whether nothing is ever removed. Compiled code then has no such stage, so that one graph holds the
            model.
    """

    is_idle = False

    @abstractmethod
    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks and methods in place, one after the other, and gives what takes each off."""

    def install(self, model: nn.Module) -> Callable[[], None]:
        """Puts everything in place; where that fails half way, nothing stays.

        Returns:
            What takes everything off; doing it twice is harmless.
        """
        handles: list[Handle] = []

        def undo() -> None:
            while handles:
                handles.pop().remove()

        try:
            for handle in self.place(model):
                handles.append(handle)
            settle(model, handles, self.is_idle)
        except BaseException:
            undo()
            raise
        return undo

    @property
    def num_bytes(self) -> int:
        """Bytes held between the calls of the model."""
        return 0

    def forget(self) -> None:  # noqa: B027  most keep nothing
        """Drops what is held between the calls of the model."""


class Encoder(Stage):
    """A stage on the vision tower, or behind it, which knows the images of its last call."""

    def __init__(self) -> None:
        self._last: Last[Encoded] = Last(Encoded)

    def encoded(self) -> Encoded:
        """What is known of the images of the last call."""
        return self._last.value

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Keeps what is known of the last call while others run inside of the one that reads it."""
        last = self._last.value
        try:
            yield
        finally:
            self._last.value = last

    def forget(self) -> None:
        """Drops what is known of the last call."""
        self._last.forget()
