"""Settings that nothing reads at a place of a vision-language model are named, and no others."""

from __future__ import annotations

import pytest

from gen_turbo import ToMeProcessor, TurboProcessor

GRID = "image tokens on a grid"
CASES = [
    (TurboProcessor(0.5), "pre_llm", True, {}),
    (TurboProcessor(0.5), "pre_llm", False, {"tile": GRID}),
    (TurboProcessor(0.5), "tower", True, {"tile": GRID}),
    (TurboProcessor(0.5), "tower", False, {"tile": GRID}),
    (TurboProcessor(0.5), "decoder", True, {"value_weight": "a semantic value, as place='tower'"}),
    (TurboProcessor(0.5), "projector", True, {"value_weight": "a semantic value, as place='tower'"}),
    (TurboProcessor(0.5, semantic="none"), "pre_llm", True, {"value_weight": "a semantic value, as place='tower'"}),
    (TurboProcessor(0.5, semantic="text"), "pre_llm", True, {"semantic": "denoisers, where it reads cross-attention"}),
    (ToMeProcessor(0.5, is_hashed=False), "pre_llm", True, {"seed": "is_hashed=True"}),
    (ToMeProcessor(0.5, is_hashed=False), "pre_llm", False, {"is_hashed": GRID, "seed": "is_hashed=True"}),
    (ToMeProcessor(0.5, is_hashed=True), "pre_llm", True, {}),
    (ToMeProcessor(0.5, is_hashed=True), "pre_llm", False, {"is_hashed": GRID, "seed": GRID}),
]


@pytest.mark.parametrize(("processor", "place", "has_grid", "expected"), CASES)
def test_what_nothing_reads_is_named_with_where_it_is_read(processor, place, has_grid, expected):
    """Catches a setting refused where it is read, one taken in silence where it is not, and one by another's name."""
    found = processor.unread(place, has_grid)
    assert found.keys() == expected.keys() and all(found[name].startswith(why) for name, why in expected.items())
