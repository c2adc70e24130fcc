"""InternVL: its own tower, pixel shuffle, a projector, a causal language model."""

from __future__ import annotations

from gen_turbo.vlm.family import Family, TowerFacts, square_grids
from gen_turbo.vlm.host import VlmHost
from gen_turbo.vlm.llava import feature_block

_TOWER = TowerFacts(
    "model.vision_tower",
    ("internvl_vision",),
    blocks="layer",
    attention="attention",
    norm2="layernorm_after",
    num_leading=lambda model: 1,
    last_block=feature_block,
)

INTERNVL = VlmHost(("InternVLForConditionalGeneration",), Family(tower=_TOWER, grids=square_grids))
