"""The argument and the output under which a transformers model takes and gives its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in _NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})
"""`cache` from transformers 5.24 on, which ignores the older name wherever both are given."""


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, or in an output, whatever its name; None if there is none."""
    return next((given[name] for name in _NAMES if given.get(name) is not None), None)


def with_cache(given: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments of a call with another cache, under the name that this transformers reads."""
    return {**{name: value for name, value in given.items() if name not in _NAMES}, CACHE: cache}
