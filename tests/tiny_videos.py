"""Tiny real video transformers with random weights: a builder and the inputs of one call for each family."""

from __future__ import annotations

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from torch import nn

from tests.tiny_family import HEADS, NUM_TEXT, Family, frames, random, rotary, text


def wan() -> nn.Module:
    """Wan."""
    widths = {"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32}
    return WanTransformer3DModel(**HEADS, num_layers=2, rope_max_seq_len=32, **widths)


def ltx() -> nn.Module:
    """LTX-Video."""
    widths = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 32}
    return LTXVideoTransformer3DModel(**HEADS, num_layers=2, **widths)


def cogvideox(**settings: object) -> nn.Module:
    """CogVideoX."""
    shape = {"sample_width": 16, "sample_height": 16, "sample_frames": 9, "max_text_seq_length": NUM_TEXT}
    widths = {"in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 32}
    return CogVideoXTransformer3DModel(**HEADS, **shape, **widths, num_layers=2, **settings)


def mochi() -> nn.Module:
    """Mochi."""
    widths = {"pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 32, "time_embed_dim": 8}
    return MochiTransformer3DModel(**HEADS, num_layers=2, max_sequence_length=NUM_TEXT, **widths)


def hunyuan_video() -> nn.Module:
    """HunyuanVideo."""
    widths = {"text_embed_dim": 32, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6), "guidance_embeds": False}
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    return HunyuanVideoTransformer3DModel(**HEADS, **shape, **widths)


def hunyuan_video_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text of which the last row has less."""
    mask = torch.ones(batch, NUM_TEXT).long()
    mask[-1, NUM_TEXT - 1] = 0
    return {**text(batch), "encoder_attention_mask": mask, "pooled_projections": random(batch, 16, seed=4)}


VIDEOS: dict[str, Family] = {
    "wan": Family(wan, lambda b, g: text(b), frames(3), num_frames=3),
    "ltx-video": Family(
        ltx,
        lambda b, g: {
            **text(b),
            "encoder_attention_mask": torch.ones(b, NUM_TEXT),
            "num_frames": 3,
            "height": g[0],
            "width": g[1],
        },
        lambda g: (3 * g[0] * g[1], 8),
        num_frames=3,
    ),
    "cogvideox": Family(cogvideox, lambda b, g: text(b), lambda g: (3, 4, 2 * g[0], 2 * g[1]), num_frames=3),
    "cogvideox-rotary": Family(
        lambda: cogvideox(use_rotary_positional_embeddings=True),
        lambda b, g: {**text(b), "image_rotary_emb": rotary(3 * g[0] * g[1])},
        lambda g: (3, 4, 2 * g[0], 2 * g[1]),
        num_frames=3,
    ),
    "hunyuan-video": Family(hunyuan_video, hunyuan_video_inputs, frames(3), num_frames=3),
    "mochi": Family(
        mochi,
        lambda b, g: {**text(b), "encoder_attention_mask": torch.ones(b, NUM_TEXT).bool()},
        frames(3),
        lambda time, batch: {"timestep": torch.full((batch,), 1000.0 - time)},
        num_frames=3,
    ),
}
"""Transformers that make videos, by name."""
