"""What merging is applied to: attention, whole blocks, or keys and values alone, from few tokens removed to many."""

from __future__ import annotations

from typing import Any

from gen_turbo.bench.settings import Method, Setting

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7)
_CORRECT: dict[str, Any] = {"restore": "correct", "refresh": 3, "order": 1}
_SCOPES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention-correct": ("attention, corrected", _CORRECT),
    "block-correct": ("blocks, corrected", _CORRECT | {"scope": "block"}),
    "block-copy": ("blocks, copied", {"restore": "copy", "plan_steps": 1, "scope": "block"}),
    "kv-correct": ("keys and values, corrected", _CORRECT | {"keep_queries": True}),
}
FAMILIES = tuple(family for family, _ in _SCOPES.values())
"""Their records have a table of their own."""


def scope_settings() -> list[Setting]:
    """Every scope at every ratio; the ratio in the middle, which all are compared at, comes first."""
    ratios = sorted(RATIOS, key=lambda ratio: abs(ratio - 0.5))
    return [
        Method(f"{name}-r{ratio:g}", family, "turbo", {"ratio": ratio, **options})
        for ratio in ratios
        for name, (family, options) in _SCOPES.items()
    ]
