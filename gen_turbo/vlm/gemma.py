"""Gemma 3: a SigLIP tower, pooling, a language model with sliding windows whose image tokens see each other."""

from __future__ import annotations

from gen_turbo.vlm.family import Family, TowerFacts, square_grids
from gen_turbo.vlm.host import VlmHost

_FAMILY = Family(
    tower=TowerFacts("model.vision_tower", ("siglip_vision_model",), output_norm="post_layernorm"),
    grids=square_grids,
    masks_in_base=True,
)

GEMMA = VlmHost(("Gemma3ForConditionalGeneration",), _FAMILY)
