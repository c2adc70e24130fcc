"""What diffusers' attention layers do before they call their processor, so that a call can go to it at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

_NAMES = frozenset(
    {"inspect", "signature", "processor", "__call__", "parameters", "keys", "items", "set", "len"}
    | {"logger", "warning", "__class__", "__name__"}
)


def only_calls_processor(forward: Any) -> bool:
    """Whether a bound forward does nothing but pass its arguments on to the processor that takes them.

    So it is where it is diffusers' own, looks up what the processor takes, and names nothing else.
    """
    function: Any = getattr(forward, "__func__", None)
    if not getattr(function, "__module__", "").startswith("diffusers.") or not hasattr(function, "__code__"):
        return False
    names = set(_names(function.__code__))
    return "signature" in names and names <= _NAMES


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


class _Arguments(dict[type, frozenset[str]]):
    """Of each class of processors, the arguments that can be given by name and are None where they are not."""

    def __missing__(self, processor: type) -> frozenset[str]:
        """Looks them up, once; none where a call needs more than the tokens."""
        given = list(inspect.signature(processor.__call__).parameters.values())[2:]
        named = [one for one in given if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        is_free = all(one.default is None for one in named[1:])
        return self.setdefault(processor, frozenset(one.name for one in named) if is_free else frozenset())


ARGUMENTS = _Arguments()
