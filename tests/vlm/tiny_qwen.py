"""Tiny models of Qwen's: images of any size in one row of tokens, positions in three axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.vlm.tiny_kit import IMAGE, TEXT, TinyVlm, maker

ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
# Features that Qwen3-VL adds after the first decoder layers, one for each of these blocks of its tower.
_DEEP = [0]


def _qwen(name: str, vision: dict[str, Any], **text: Any) -> Callable[[str], nn.Module]:
    common = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 3, "in_channels": 3}
    return maker(
        name,
        vision_config=lambda: {**common, **vision},
        text_config=lambda: {**TEXT, "rope_parameters": dict(ROPE), **text},
        image_token_id=IMAGE,
        video_token_id=98,
        vision_start_token_id=97,
        vision_end_token_id=96,
    )


def qwen_images(counts: list[int]) -> dict[str, Tensor]:
    """Images of 64 x 64 pixels: 8 x 8 patches of two frames, 4 x 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(counts) * 64, 3 * 2 * 8 * 8, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 8, 8]] * sum(counts))}


def types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Which tokens are of images."""
    return {"mm_token_type_ids": (ids == IMAGE).int()}


_GLM_VISION = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "image_size": 64,
    "patch_size": 8, "in_channels": 3,
}  # fmt: skip
RECURRENT = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
}  # fmt: skip
_RECURRENT_VISION = {
    "hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "num_position_embeddings": 64,
}  # fmt: skip
_QWEN = {"images": qwen_images, "extra": types}
QWENS = {
    "qwen2": TinyVlm(
        _qwen("Qwen2VLForConditionalGeneration", {"embed_dim": 32, "hidden_size": 32, "num_heads": 4}),
        **_QWEN,
    ),
    "qwen2_5": TinyVlm(
        _qwen(
            "Qwen2_5_VLForConditionalGeneration",
            {"hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
             "window_size": 32, "fullatt_block_indexes": [1]},
        ),
        **_QWEN,
    ),
    "qwen3": TinyVlm(
        _qwen(
            "Qwen3VLForConditionalGeneration",
            {"hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
             "num_position_embeddings": 64, "deepstack_visual_indexes": _DEEP},
            head_dim=8,
        ),
        **_QWEN,
    ),
    "qwen3_moe": TinyVlm(
        _qwen(
            "Qwen3VLMoeForConditionalGeneration",
            {"hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
             "num_position_embeddings": 64, "deepstack_visual_indexes": _DEEP},
            head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        ),
        **_QWEN,
    ),
    "glm4v": TinyVlm(
        maker(
            "Glm4vForConditionalGeneration",
            vision_config=lambda: dict(_GLM_VISION),
            text_config=lambda: {**TEXT, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
            image_token_id=IMAGE, video_token_id=98, image_start_token_id=97, image_end_token_id=96,
            video_start_token_id=95, video_end_token_id=94,
        ),
        has_tower=False,
        **_QWEN,
    ),
    "qwen3_5": TinyVlm(
        _qwen("Qwen3_5ForConditionalGeneration", _RECURRENT_VISION, **RECURRENT), cuts=(), **_QWEN
    ),
    "qwen3_5_moe": TinyVlm(
        _qwen(
            "Qwen3_5MoeForConditionalGeneration",
            _RECURRENT_VISION,
            **RECURRENT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        ),
        cuts=(),
        **_QWEN,
    ),
}  # fmt: skip
