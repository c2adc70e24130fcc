"""Idefics3 and SmolVLM: a SigLIP-like tower, pixel shuffle, tiles with text between, a causal language model."""

from __future__ import annotations

from torch import nn

from gen_turbo.vlm.family import Family, TowerFacts, square_grids
from gen_turbo.vlm.host import VlmHost


def _tile_length(base: nn.Module) -> int:
    length: int = base.image_seq_len  # type: ignore[assignment]
    return length


_FAMILY = Family(
    text="model.text_model",
    tower=TowerFacts("model.vision_model", ("idefics3_vision", "smolvlm_vision")),
    grids=square_grids,
    pieces=_tile_length,
)

IDEFICS = VlmHost(("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"), _FAMILY)
