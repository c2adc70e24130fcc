"""Models built as LLaVA is: a vision tower, a projector, a causal language model.

LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Aya Vision and Mistral 3 with towers of CLIP, SigLIP or Pixtral.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gen_turbo.method import Grid
from gen_turbo.vlm.family import Family, TowerFacts, square_grids
from gen_turbo.vlm.host import VlmHost
from gen_turbo.vlm.videos import pooled_frames

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


def _grids(base: nn.Module, kwargs: dict[str, Any], lengths: list[int]) -> list[Grid | None]:
    """Square, but for Pixtral's towers, whose images have the sizes of the call. Beams repeat them: sizes decide."""
    sizes = kwargs.get("image_sizes")
    if sizes is None:
        return square_grids(base, kwargs, lengths)
    config: Any = base.config
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    found: dict[int, set[Grid]] = {}
    for height, width in torch.as_tensor(sizes).tolist():
        grid = (height // side, width // side)
        found.setdefault(grid[0] * grid[1], set()).add(grid)
    # Of images with as many tokens in other shapes, none is known to have which.
    return [next(iter(found[length])) if len(found.get(length, ())) == 1 else None for length in lengths]


_TOWER = TowerFacts("model.vision_tower", KINDS, num_leading=num_class_tokens, last_block=feature_block)
_PROJECTED = replace(_TOWER, projector="model.multi_modal_projector")

# The features of an image are a thumbnail and tiles with newlines between, which make no grid.
_TILED = ("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration")

LLAVA = VlmHost(("LlavaForConditionalGeneration",), Family(tower=_PROJECTED, grids=_grids))
LLAVA_TILED = VlmHost(_TILED, Family(tower=_TOWER, frames=pooled_frames))
AYA = VlmHost(("AyaVisionForConditionalGeneration",), Family(tower=_TOWER, grids=square_grids))
MISTRAL = VlmHost(("Mistral3ForConditionalGeneration",), Family(grids=_grids))
