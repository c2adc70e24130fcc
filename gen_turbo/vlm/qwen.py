"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, positions in three axes, features for later layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from gen_turbo.method import Grid
from gen_turbo.vlm.family import Family, TowerFacts
from gen_turbo.vlm.host import VlmHost
from gen_turbo.vlm.videos import packed_frames


def _grids(base: nn.Module, kwargs: dict[str, Any], lengths: list[int]) -> list[Grid | None]:
    """The grids of the merged patches. Beams repeat images in an order of their own, so sizes decide."""
    sizes = kwargs.get("image_grid_thw")
    if sizes is None:
        return [None] * len(lengths)
    config: Any = base.config
    merge = config.vision_config.spatial_merge_size
    grids = {t * h * w // merge**2: (t * h // merge, w // merge) for t, h, w in sizes.tolist()}
    return [grids.get(length) for length in lengths]


_TOWER = TowerFacts(
    "model.visual",
    ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision", "qwen3_vl_moe_vision"),
    encoder="",
    blocks="blocks",
    attention="attn",
    norm2="norm2",
    has_qkv=True,
    is_packed=True,
)
_FAMILY = Family(grids=_grids, tower=_TOWER, frames=packed_frames)

QWEN = VlmHost(
    (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    ),
    _FAMILY,
)
