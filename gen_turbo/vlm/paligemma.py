"""PaliGemma: a SigLIP tower, a projector, a language model that sees its whole prompt at once."""

from __future__ import annotations

from gen_turbo.vlm.family import Family, TowerFacts, square_grids
from gen_turbo.vlm.host import VlmHost

_FAMILY = Family(
    tower=TowerFacts(
        "model.vision_tower",
        ("siglip_vision_model",),
        projector="model.multi_modal_projector",
        output_norm="post_layernorm",
    ),
    grids=square_grids,
    masks_in_base=True,
)

PALIGEMMA = VlmHost(("PaliGemmaForConditionalGeneration",), _FAMILY)
