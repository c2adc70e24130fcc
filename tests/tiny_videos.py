"""Tiny real video transformers with random weights: a builder and the inputs of one call for each family."""

from __future__ import annotations

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import nn

from tests.tiny_family import HEADS, NUM_TEXT, Family, frames, random, rotary, text


def wan(cls: type[nn.Module] = WanTransformer3DModel, **settings: object) -> nn.Module:
    """Wan, or another model of its blocks."""
    widths = {"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    return cls(**HEADS, rope_max_seq_len=32, **widths | settings)


def wan_animate() -> nn.Module:
    """Wan Animate: the face is read behind the first of three blocks."""
    motion = {"motion_encoder_size": 8, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8}
    sizes = {str(size): 4 for size in (4, 8)}
    face = {"face_encoder_hidden_dim": 8, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 3}
    shape = {"in_channels": 12, "latent_channels": 4, "num_layers": 3, "image_dim": 8}
    return wan(WanAnimateTransformer3DModel, **motion, **face, **shape, motion_encoder_channel_sizes=sizes)


def wan_animate_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text, the character, its pose in all frames but the first, and its face in pixels."""
    return {
        **text(batch),
        "encoder_hidden_states_image": random(batch, 3, 8, seed=3),
        "pose_hidden_states": random(batch, 4, 2, 2 * grid[0], 2 * grid[1], seed=4),
        "face_pixel_values": random(batch, 3, 5, 8, 8, seed=5),
    }


def times_of_tokens(time: int, batch: int) -> dict[str, object]:
    """A time for each token, of which the first frame is given."""
    times = torch.full((batch, 3 * 64), float(time))
    times[:, :64] = 0
    return {"timestep": times}


def times_of_frames(time: int, batch: int) -> dict[str, object]:
    """A time for each frame, later for later frames."""
    return {"timestep": torch.tensor([[time - 300, time - 200, time - 100, time]] * batch)}


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


def hunyuan_video_15() -> nn.Module:
    """HunyuanVideo 1.5: two texts and an image beside the video."""
    widths = {"text_embed_dim": 32, "text_embed_2_dim": 16, "image_embed_dim": 16, "rope_axes_dim": (4, 6, 6)}
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "num_refiner_layers": 1, "patch_size": 2}
    return HunyuanVideo15Transformer3DModel(**HEADS, **shape, **widths)


def hunyuan_video_15_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Texts of which the last row has less, and no image, as from text to video."""
    mask = torch.ones(batch, NUM_TEXT).long()
    mask[-1, NUM_TEXT - 2 :] = 0
    return {
        **text(batch),
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": random(batch, 3, 16, seed=4),
        "encoder_attention_mask_2": torch.ones(batch, 3).long(),
        "image_embeds": torch.zeros(batch, 4, 16),
    }


def kandinsky5() -> nn.Module:
    """Kandinsky 5; its modulations begin as zeros, which would leave blocks out."""
    shape = {"in_visual_dim": 4, "out_visual_dim": 4, "num_text_blocks": 1, "num_visual_blocks": 2}
    widths = {"in_text_dim": 32, "in_text_dim2": 16, "time_dim": 16, "model_dim": 32, "ff_dim": 32}
    model = Kandinsky5Transformer3DModel(**shape, **widths, axes_dims=(4, 6, 6))
    for name, parameter in model.named_parameters():
        if "modulation" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def kandinsky5_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text, and the places of frames, rows and columns."""
    places = [torch.arange(3), torch.arange(grid[0]), torch.arange(grid[1])]
    pooled = random(batch, 16, seed=4)
    return {
        **text(batch),
        "pooled_projections": pooled,
        "visual_rope_pos": places,
        "text_rope_pos": torch.arange(NUM_TEXT),
    }


def ltx2(**settings: object) -> nn.Module:
    """LTX-2: sound beside the video."""
    widths = {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 32}
    sound = {"audio_in_channels": 8, "audio_out_channels": 8, "audio_cross_attention_dim": 16}
    heads = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8}
    return LTX2VideoTransformer3DModel(**HEADS, **widths, **sound, **heads, num_layers=2, **settings)


def ltx2_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Texts for both, and four tokens of sound."""
    return {
        **text(batch),
        "audio_encoder_hidden_states": random(batch, NUM_TEXT, 32, seed=3),
        "audio_hidden_states": random(batch, 4, 8, seed=4),
        "audio_timestep": torch.full((batch,), 500.0),
        "num_frames": 3,
        "height": grid[0],
        "width": grid[1],
        "audio_num_frames": 4,
    }


VIDEOS: dict[str, Family] = {
    "wan": Family(wan, lambda b, g: text(b), frames(3), num_frames=3),
    "wan-ti2v": Family(wan, lambda b, g: text(b), frames(3), times_of_tokens, num_frames=3),
    "wan-vace": Family(
        lambda: wan(WanVACETransformer3DModel, num_layers=4, vace_layers=[0, 2], vace_in_channels=6),
        lambda b, g: {**text(b), "control_hidden_states": random(b, 6, 3, 2 * g[0], 2 * g[1], seed=3)},
        frames(3),
        num_frames=3,
    ),
    "wan-animate": Family(wan_animate, wan_animate_inputs, frames(3, 12), num_frames=3),
    "chrono-edit": Family(lambda: wan(ChronoEditTransformer3DModel), lambda b, g: text(b), frames(3), num_frames=3),
    "skyreels-v2": Family(lambda: wan(SkyReelsV2Transformer3DModel), lambda b, g: text(b), frames(3), num_frames=3),
    "skyreels-v2-forcing": Family(
        lambda: wan(SkyReelsV2Transformer3DModel, num_frame_per_block=2),
        lambda b, g: {**text(b), "enable_diffusion_forcing": True},
        frames(4),
        times_of_frames,
        num_frames=4,
    ),
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
    "hunyuan-video-1.5": Family(hunyuan_video_15, hunyuan_video_15_inputs, frames(3), num_frames=3, num_hidden=4),
    "kandinsky5": Family(kandinsky5, kandinsky5_inputs, lambda g: (3, 2 * g[0], 2 * g[1], 4), num_frames=3),
    "ltx2": Family(ltx2, ltx2_inputs, lambda g: (3 * g[0] * g[1], 8), num_frames=3),
    "ltx2-split": Family(
        lambda: ltx2(rope_type="split"), ltx2_inputs, lambda g: (3 * g[0] * g[1], 8), times_of_tokens, num_frames=3
    ),
    "mochi": Family(
        mochi,
        lambda b, g: {**text(b), "encoder_attention_mask": torch.ones(b, NUM_TEXT).bool()},
        frames(3),
        lambda time, batch: {"timestep": torch.full((batch,), 1000.0 - time)},
        num_frames=3,
    ),
}
"""Transformers that make videos, by name."""
