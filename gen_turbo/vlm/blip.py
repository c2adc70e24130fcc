"""BLIP, BLIP-2 and InstructBLIP: a tower of their own, read by cross-attention."""

from __future__ import annotations

from gen_turbo.vlm.family import Family, TowerFacts
from gen_turbo.vlm.host import VlmHost

_TOWER = TowerFacts(
    "vision_model",
    ("blip_vision_model", "blip_2_vision_model", "instructblip_vision_model"),
    num_leading=lambda model: 1,
    has_qkv=True,
    is_restored=False,
    output_norm="post_layernorm",
)

BLIP = VlmHost(
    (
        "BlipForConditionalGeneration",
        "BlipForQuestionAnswering",
        "BlipForImageTextRetrieval",
        "Blip2ForConditionalGeneration",
        "InstructBlipForConditionalGeneration",
    ),
    Family(tower=_TOWER, is_cross=True),
)
