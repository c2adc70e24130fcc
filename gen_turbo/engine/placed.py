"""Taking the place of one module's `forward`, and giving it back."""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from types import MethodType
from typing import Any

from torch import nn


class NotPickled:
    """What hangs on a model while a processor is attached."""

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model with a gen_turbo processor attached cannot be pickled; call gen_turbo.detach before and attach "
            "again afterwards"
        )


class Placed(NotPickled, ABC):
    """Stands in front of a module from `install` until `remove`; copies of the module are stock again.

    What a subclass reads to be stock, when it is off, it has as attributes of its class.

    A bound method takes the place of `forward`, because torch.compile lets modules share a graph that differ in
    nothing but the object behind a bound method.

    Attributes:
        name: Path of the module; empty for the model itself.
        inner: The forward that was there before.
        is_outermost: Whether it stands before the hooks of diffusers on the module (caches, offloading) instead of
            behind them, so that what a cache repeats is what was restored.
    """

    is_outermost = True

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self.inner: Any = module.forward
        self._module = weakref.ref(module)
        self._before: Any = None
        self._placed: Any = None

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What a call of the module gives while this is in place."""

    @property
    def module(self) -> nn.Module:
        """The module; raises ReferenceError once it is gone."""
        module = self._module()
        if module is None:
            raise ReferenceError("the model of this attachment no longer exists")
        return module

    def install(self) -> None:
        """Takes the place of the module's forward, or of what the hooks of diffusers on it call in the end.

        What is in place already stays as it is.
        """
        if self._placed is not None:
            return
        module: Any = self.module
        references = [] if self.is_outermost else _references(module)
        owner, attribute = references[0] if references else (module, "forward")
        self._before = vars(owner).get(attribute)
        self.inner = getattr(owner, attribute)
        self._placed = self.forward
        setattr(owner, attribute, self._placed)

    def remove(self) -> None:
        """Puts back what was there; where another forward was placed over this one, it stays and ours is stock."""
        module: Any = self._module()
        if module is None or self._placed is None:
            return
        for owner, attribute in [(module, "forward"), *_references(module)]:
            if vars(owner).get(attribute) is self._placed:
                if self._before is not None:
                    setattr(owner, attribute, self._before)
                elif owner is module:
                    del module.forward
                else:
                    setattr(owner, attribute, self.inner)
                self._placed = self._before = None
                return

    def __deepcopy__(self, memo: dict[int, Any]) -> Placed:
        """What stands in front of a copy of the module: one of these that is off, so that the copy is stock."""
        module = self._module()
        twin = memo.get(id(module)) if module is not None else None
        if twin is None:
            return self
        off = object.__new__(type(self))
        off.name, off._module, off._before, off._placed = self.name, weakref.ref(twin), None, None
        stock = MethodType(type(twin).forward, twin)
        off.inner = stock if self._before is None else copy.deepcopy(self._before, memo)
        return off


def _references(module: nn.Module) -> list[tuple[Any, str]]:
    """Where the hooks of diffusers on a module keep what they call, the innermost first."""
    registry: Any = getattr(module, "_diffusers_hook", None)
    found = []
    for reference in getattr(registry, "_fn_refs", ()):
        found.append((reference, "forward" if reference.original_forward is None else "original_forward"))
    return found
