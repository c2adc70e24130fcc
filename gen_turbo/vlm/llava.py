"""LLaVA-1.5 and LLaVA-NeXT: a CLIP or SigLIP tower, a projector, a causal language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from gen_turbo.vlm.family import Family, TowerFacts, square_grids
from gen_turbo.vlm.host import VlmHost

KINDS = ("clip_vision_model", "siglip_vision_model")


def feature_block(model: nn.Module) -> int:
    """The block whose output is projected; hidden state 0 is what enters the first block."""
    config: Any = model.config
    layer = config.vision_feature_layer
    last: int = max(layer) if isinstance(layer, (list, tuple)) else layer
    return last if last < 0 else last - 1


def num_class_tokens(model: nn.Module) -> int:
    """One for CLIP, none for SigLIP."""
    return 1 if hasattr(model.get_submodule("model.vision_tower.embeddings"), "class_embedding") else 0


_TOWER = TowerFacts("model.vision_tower", KINDS, num_leading=num_class_tokens, last_block=feature_block)
_PROJECTED = replace(_TOWER, projector="model.multi_modal_projector")

LLAVA = VlmHost(("LlavaForConditionalGeneration",), Family(tower=_PROJECTED, grids=square_grids))
# The features of a picture are a thumbnail and tiles with newlines between, which make no grid.
LLAVA_NEXT = VlmHost(("LlavaNextForConditionalGeneration",), Family(tower=_TOWER))
