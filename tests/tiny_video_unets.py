"""Tiny UNets of videos with random weights, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel

from tests.tiny_hosts import TEXT_WIDTH

SIDE = 16
_SHAPE = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "sample_size": SIDE,
}


def motion() -> torch.nn.Module:
    """AnimateDiff: motion modules behind the attention of SD 1.5."""
    return UNetMotionModel(
        **_SHAPE, norm_num_groups=4, cross_attention_dim=TEXT_WIDTH, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), motion_num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip


def model_scope() -> torch.nn.Module:
    """ModelScope: an attention over time behind each one over space."""
    return UNet3DConditionModel(
        **_SHAPE, norm_num_groups=4, cross_attention_dim=TEXT_WIDTH, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip


def svd() -> torch.nn.Module:
    """Stable Video Diffusion: frames before channels, a block over time inside of each transformer."""
    return UNetSpatioTemporalConditionModel(
        **{**_SHAPE, "block_out_channels": (32, 64)}, cross_attention_dim=TEXT_WIDTH, num_attention_heads=(2, 4),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip


VIDEO_UNETS: dict[str, Callable[[], torch.nn.Module]] = {"motion": motion, "model_scope": model_scope, "svd": svd}
