"""Taking the place of one module's `forward`, and giving it back."""

from __future__ import annotations

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn


class InForward(ABC):
    """Stands in front of a module: its calls go to `answer` from `install` until `remove`.

    Attributes:
        name: Path of the module; empty for the model itself.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._module = weakref.ref(module)
        self._before: Any = None
        self._placed: Any = None

    @abstractmethod
    def answer(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call gives; `inner` is the forward that was there before."""

    def install(self) -> None:
        """Replaces the module's forward by one of the same signature."""
        module: Any = self._module()
        self._before = vars(module).get("forward")
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.answer(inner, args, kwargs)

        self._placed = module.forward = self.as_placed(forward)

    def as_placed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The new forward as it is put onto the module."""
        return forward

    def remove(self) -> None:
        """Puts back what was there; a forward that was placed over ours stays, and `answer` lets everything through."""
        module: Any = self._module()
        if module is None or vars(module).get("forward") is not self._placed:
            return
        if self._before is None:
            del module.forward
        else:
            module.forward = self._before
        self._placed = self._before = None
