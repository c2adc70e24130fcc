"""Settings that nothing reads at a place of a vision-language model are named, and no others."""

from __future__ import annotations

import pytest

from gen_turbo import PARProcessor, ToMeProcessor, TurboProcessor
from gen_turbo.methods.eadaprune import EAdaPruneProcessor
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor as Vision
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor as Grouping
from gen_turbo.methods.vscan import VScanProcessor

GRID = "image tokens on a grid"
VALUE = {"value_weight": "a semantic value, as place='tower' and place='pre_llm' have"}
NO_ALPHA = dict.fromkeys(("scale", "beta", "gamma"), "alpha with a semantic value")
NO_TOWER = dict.fromkeys(("num_removed", "num_merges"), "place='tower'")
NO_RATIO = dict.fromkeys(("num_merges", "ratio", "keep", "beyond_half"), "num_removed=0")
NO_HALF = {"beyond_half": "ratio above 0.5"}
NO_VALUE = dict.fromkeys(("alpha", "value_weight"), "a semantic value")
NO_ATTENTION = dict.fromkeys(("semantic", "alpha", "value_weight"), "place='tower' and place='pre_llm'")
NO_DENOISER = dict.fromkeys(("ratio", "schedule", "threshold", "inner"), "denoisers")
NO_ROUTER = ("keep", "adaptive", "text_ratio", "across_frames", "proportional_attention")
NO_DENOISER |= dict.fromkeys(NO_ROUTER, "methods without a router; give tokens")
STAGED = {"adaptive": "methods that remove tokens at one place", "layer": "methods that cut at one layer"}
LEARNED = dict.fromkeys(("ratio", "keep", "first_block"), "weights=None, for weights bring their own")
CASES = [
    (Vision(), "tower", True, NO_ALPHA),
    (Vision(), "pre_llm", True, NO_ALPHA | NO_TOWER),
    (Vision(0.5), "tower", True, NO_ALPHA | NO_HALF),
    (Vision(0.5), "pre_llm", True, NO_ALPHA | NO_TOWER | NO_HALF),
    (Vision(0.5, keep=3), "tower", True, NO_ALPHA),
    (Vision(0.5, text_ratio=0.6), "pre_llm", True, NO_ALPHA | NO_TOWER),
    (Vision(alpha=0.1), "tower", True, {"value_weight": "alpha=None"}),
    (Vision(semantic="none"), "tower", True, NO_ALPHA | NO_VALUE),
    (Vision(semantic="none", alpha=0.1), "tower", True, NO_ALPHA | NO_VALUE),
    (Vision(num_removed=3), "tower", True, NO_ALPHA | NO_RATIO),
    (Vision(num_removed=3), "pre_llm", True, NO_ALPHA | NO_TOWER),
    (Vision(), "decoder", True, NO_ALPHA | NO_TOWER | NO_ATTENTION),
    (Vision(), "projector", True, NO_ALPHA | NO_TOWER | NO_ATTENTION),
    (Vision(semantic="none"), "decoder", True, NO_ALPHA | NO_TOWER | NO_VALUE),
    (EAdaPruneProcessor(), "pre_llm", True, {"adaptive": "methods whose images all have one budget"}),
    (Grouping(), "projector", True, {}),
    (Grouping(ratio=0), "projector", True, {}),
    (Grouping(num_tokens=4), "projector", True, dict.fromkeys(("ratio", "keep"), "num_tokens=0")),
    (Grouping(weights="x"), "projector", True, LEARNED),
    (Grouping(ratio=0, weights="x"), "projector", True, {}),
    (PyramidDropProcessor(), "decoder", True, STAGED),
    (VScanProcessor(), "pre_llm", True, STAGED),
    (PARProcessor(), "pre_llm", True, NO_DENOISER | {"first": "given tokens or layers"}),
    (PARProcessor(tokens=0.5), "pre_llm", True, NO_DENOISER | {"budget": "tokens=None and layers=None"}),
    (PARProcessor(layers=3), "pre_llm", True, NO_DENOISER | {"budget": "tokens=None and layers=None"}),
    (TurboProcessor(0.5), "pre_llm", True, {}),
    (TurboProcessor(0.5), "pre_llm", False, {"tile": GRID}),
    (TurboProcessor(0.5), "tower", True, {"tile": GRID}),
    (TurboProcessor(0.5), "tower", False, {"tile": GRID}),
    (TurboProcessor(0.5), "decoder", True, VALUE),
    (TurboProcessor(0.5), "projector", True, VALUE),
    (TurboProcessor(0.5, semantic="none"), "pre_llm", True, VALUE),
    (TurboProcessor(0.5, semantic="text"), "pre_llm", True, {"semantic": "denoisers, where it reads cross-attention"}),
    (ToMeProcessor(0.5, is_hashed=False), "pre_llm", True, {"seed": "is_hashed=True"}),
    (ToMeProcessor(0.5, is_hashed=False), "pre_llm", False, {"is_hashed": GRID, "seed": "is_hashed=True"}),
    (ToMeProcessor(0.5, is_hashed=True), "pre_llm", True, {}),
    (ToMeProcessor(0.5, is_hashed=True), "pre_llm", False, {"is_hashed": GRID, "seed": GRID}),
]


@pytest.mark.parametrize(("processor", "place", "has_grid", "expected"), CASES)
def test_what_nothing_reads_is_named_with_where_it_is_read(processor, place, has_grid, expected):
    """Catches a setting refused where it is read, one taken in silence where it is not, and one by another's name."""
    assert processor.unread(place, has_grid) == expected
