"""Everything that a model holds, for exact comparison before and after."""

from __future__ import annotations

import torch
from torch import nn


def model_state(model: nn.Module) -> dict[str, object]:
    """Every attribute of every submodule by identity, hooks, state-dict keys, parameter bytes, global random state."""
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_container = isinstance(value, dict)
            state[f"{name}.{key}"] = {k: id(v) for k, v in value.items()} if is_container else id(value)
    state["keys"] = list(model.state_dict())
    state["bytes"] = [part.clone() for value in model.state_dict().values() for part in _parts(value)]
    state["random"] = torch.get_rng_state()
    return state


def _parts(value: torch.Tensor) -> list[torch.Tensor]:
    """A tensor, or those that a quantised one is stored as."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    return [part for name in value.__tensor_flatten__()[0] for part in _parts(getattr(value, name))]


def differences(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Names of what is not the same."""
    return [key for key in {**before, **after} if not _is_equal(before.get(key), after.get(key))]


def _is_equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape if a.is_meta else torch.equal(a, b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_is_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b
