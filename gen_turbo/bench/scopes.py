"""What merging is applied to: attention, whole blocks, or keys and values alone, from few tokens removed to many."""

from __future__ import annotations

from typing import Any

from gen_turbo.bench.settings import Method, Setting

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7)
_CORRECT: dict[str, Any] = {"restore": "residual", "full_every": 3, "extrapolation_order": 1}
_SCOPES: dict[str, tuple[str, dict[str, Any]]] = {
    "attention-correct": ("attention, corrected", _CORRECT),
    "block-correct": ("blocks, corrected", _CORRECT | {"scope": "block"}),
    "block-copy": ("blocks, copied", {"restore": "copy", "match_every": 1, "scope": "block"}),
    "kv-correct": ("keys and values, corrected", _CORRECT | {"kv_only": True}),
}
_LEVELS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", "", {}),
    ("-2levels", ", two levels", {"max_downsample": 2}),
)
FAMILIES = tuple(family + where for _, where, _ in _LEVELS for family, _ in _SCOPES.values())
"""Their records have a table of their own."""


def scope_settings() -> list[Setting]:
    """Every scope at every ratio, at the finest level and at two; the ratio in the middle comes first.

    The finest level of the embedded UNet matters so little that what is rounded off in images hides differences.
    """
    ratios = sorted(RATIOS, key=lambda ratio: abs(ratio - 0.5))
    return [
        Method(f"{name}-r{ratio:g}{suffix}", family + where, "turbo", {"ratio": ratio, **options, **levels})
        for ratio in ratios
        for suffix, where, levels in _LEVELS
        for name, (family, options) in _SCOPES.items()
    ]
