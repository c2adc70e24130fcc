"""Names for classes and functions: what a YAML file or a command line says, and what it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """A table from name to class or function; doubled and unknown names raise.

    Attributes:
        kind: What one entry is, in the singular, for messages: "method", "pipeline".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorates a class or function, which is entered under `name` and returned as it is.

        Raises:
            ValueError: If another entry has the name already. Importing one module twice is not an error.
        """

        def enter(entry: T) -> T:
            known = self._entries.get(name)
            if known is not None and _origin(known) != _origin(entry):
                raise ValueError(
                    f"{self.kind} name {name!r} is taken: {_origin(known)} registered it before {_origin(entry)}; "
                    "choose another name"
                )
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        """The entry of that name; KeyError with all known names if there is none."""
        try:
            return self._entries[name]
        except KeyError:
            known = ", ".join(self.names()) or "none"
            raise KeyError(f"unknown {self.kind} {name!r}; known: {known}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """All names in alphabetical order."""
        return sorted(self._entries)


def _origin(entry: object) -> str:
    """Module and name of what was registered."""
    return f"{getattr(entry, '__module__', '?')}.{getattr(entry, '__qualname__', repr(entry))}"


METHODS: Registry[type[Any]] = Registry("method")
"""Token reduction methods: name -> processor dataclass."""

PIPELINES: Registry[Callable[..., Any]] = Registry("pipeline")
"""Pipeline builders: name -> function of a `PipelineConfig` that returns a ready pipeline."""
