"""LLaVA-1.5: a CLIP or SigLIP tower, a projector, a causal language model."""

from __future__ import annotations

from typing import Any

from torch import nn

from gen_turbo.hosts.vlm.family import Family, TowerFacts, VlmHost, square_grids


def _last_block(model: nn.Module) -> int:
    """The block whose output is projected; hidden state 0 is what enters the first block."""
    config: Any = model.config
    layer = config.vision_feature_layer
    last: int = max(layer) if isinstance(layer, (list, tuple)) else layer
    return last if last < 0 else last - 1


def _num_leading(model: nn.Module) -> int:
    embeddings = model.get_submodule("model.vision_tower.embeddings")
    return 1 if hasattr(embeddings, "class_embedding") else 0


_FAMILY = Family(
    tower=TowerFacts("model.vision_tower", num_leading=_num_leading, last_block=_last_block), grids=square_grids
)

LLAVA = VlmHost(("LlavaForConditionalGeneration",), _FAMILY)
