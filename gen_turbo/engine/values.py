"""Results of modules as lists of tensors and back: tensors, tuples, lists and the outputs of diffusers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])


def kept_out(function: _F) -> _F:
    """Keeps a function, with all that it calls, out of compiled graphs."""
    disable: Any = torch.compiler.disable
    outside: _F = disable(function)
    return outside


def skipped(function: _F) -> _F:
    """Keeps a function alone out of graphs, so that what it calls is compiled."""
    disable: Any = torch.compiler.disable
    outside: _F = disable(function, recursive=False)
    return outside


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a result, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, keep)
    return found


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same result with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return type(value)(**{key: mapped(item, change) for key, item in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, change) for item in value)
    return value


def refilled(value: Any, new: list[Tensor]) -> Any:
    """The same result with other tensors in the places of its own."""
    left = iter(new)
    return mapped(value, lambda tensor: next(left))


def num_bytes(*values: Any) -> int:
    """Bytes of the tensors among values."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
