"""Tiny real image transformers with random weights: a builder and the inputs of one call for each family."""

from __future__ import annotations

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DiTTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImage21Transformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from torch import nn

from tests.tiny_family import HEADS, NUM_TEXT, Family, frames, patched, random, rising, rotary, text, thousandth
from tests.tiny_flux import (
    bria,
    chroma,
    chroma_inputs,
    flux,
    flux2,
    flux2_inputs,
    flux_inputs,
    image_positions,
    longcat,
    longcat_inputs,
)


def pixart(**settings: object) -> nn.Module:
    """PixArt: the latents' grid fixes the positions."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 16, "cross_attention_dim": 32}
    return PixArtTransformer2DModel(**HEADS, **shape, caption_channels=32, use_additional_conditions=False, **settings)


def dit() -> nn.Module:
    """DiT, told a class."""
    return DiTTransformer2DModel(**HEADS, in_channels=4, num_layers=2, sample_size=16, num_embeds_ada_norm=10)


def aura_flow() -> nn.Module:
    """AuraFlow; the class leaves positions and registers as they come."""
    widths = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pos_embed_max_size": 256}
    return AuraFlowTransformer2DModel(**HEADS, **widths, sample_size=16, num_mmdit_layers=1, num_single_dit_layers=2)


def hunyuan() -> nn.Module:
    """HunyuanDiT with one long skip connection."""
    return HunyuanDiT2DModel(
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=32,
        text_len=NUM_TEXT,
        text_len_t5=NUM_TEXT,
        use_style_cond_and_image_meta_size=False,
    )


def hunyuan_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Two texts and rotary tables."""
    mask = torch.ones(batch, NUM_TEXT)
    return {
        **text(batch),
        "text_embedding_mask": mask,
        "encoder_hidden_states_t5": random(batch, NUM_TEXT, 32, seed=3),
        "text_embedding_mask_t5": mask,
        "image_meta_size": None,
        "style": None,
        "image_rotary_emb": rotary(grid[0] * grid[1]),
    }


def sd3(**settings: object) -> nn.Module:
    """SD3; `dual_attention_layers` and `qk_norm` make it SD3.5."""
    shape = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3, "pos_embed_max_size": 16}
    widths = {"joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 16}
    return SD3Transformer2DModel(**HEADS, **shape, **widths, **settings)


def lumina() -> nn.Module:
    """Lumina2 with grouped keys."""
    widths = {"hidden_size": 32, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8, "cap_feat_dim": 32}
    axes = {"axes_dim_rope": (4, 2, 2), "axes_lens": (64, 32, 32)}
    return Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, num_layers=2, num_refiner_layers=1, **widths, **axes
    )


def z_image() -> nn.Module:
    """Z-Image."""
    widths = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
    model = ZImageTransformer2DModel(in_channels=4, **widths, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64])
    # The class leaves these two uninitialised.
    for padding in (model.x_pad_token, model.cap_pad_token):
        nn.init.normal_(padding)
    return model


def cogview(cls: type[nn.Module] = CogView4Transformer2DModel, **settings: object) -> nn.Module:
    """CogView4 or CogView3Plus."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 16, "sample_size": 16}
    return cls(**HEADS, **shape, text_embed_dim=32, time_embed_dim=16, condition_dim=4, **settings)


def cogview_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Sizes as conditions."""
    size = torch.tensor([[64.0, 64.0]]).repeat(batch, 1)
    return {**text(batch), "original_size": size, "target_size": size, "crop_coords": torch.zeros_like(size)}


def qwen(**settings: object) -> nn.Module:
    """Qwen-Image."""
    widths = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
    return QwenImageTransformer2DModel(**HEADS, num_layers=2, patch_size=2, **widths, **settings)


def qwen_21(num_layers: int = 2) -> nn.Module:
    """Qwen-Image 2.1: the target behind a prefix whose keys are cached."""
    widths = {"in_channels": 16, "out_channels": 16, "context_in_dim": 32, "axes_dims_rope": (4, 6, 6)}
    return QwenImage21Transformer2DModel(**HEADS, num_layers=num_layers, **widths)


def qwen_21_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text of which the last row has less, and slots of the target behind it."""
    slots = torch.cat([torch.zeros(NUM_TEXT), torch.ones(grid[0] * grid[1] // 4)]).bool().repeat(batch, 1)
    mask = torch.ones(batch, NUM_TEXT).bool()
    mask[-1, -1] = False
    return {
        **text(batch),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, *grid)]] * batch,
        "img_mask": slots,
        "kv_cache": QwenImage21KVCache(2),
    }


def hunyuan_image(**settings: object) -> nn.Module:
    """HunyuanImage 2.1, without glyphs unless told their width."""
    widths = {"text_embed_dim": 32, "rope_axes_dim": (8, 8), "patch_size": (2, 2)}
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    return HunyuanImageTransformer2DModel(**HEADS, **shape, **widths, **settings)


def hunyuan_image_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text of which the last row has less."""
    mask = torch.ones(batch, NUM_TEXT).long()
    mask[-1, NUM_TEXT - 1] = 0
    return {**text(batch), "encoder_attention_mask": mask}


def hidream() -> nn.Module:
    """HiDream-I1: a choice of experts for each token, and Llama's text of another layer for each block."""
    shape = {"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "max_resolution": (16, 20)}
    widths = {"caption_channels": [32, 32], "text_emb_dim": 16, "axes_dims_rope": (8, 4, 4), "llama_layers": [0, 1]}
    model = HiDreamImageTransformer2DModel(**HEADS, **shape, **widths, num_routed_experts=2, num_activated_experts=1)
    return model


def hidream_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Three texts."""
    return {
        "encoder_hidden_states_t5": random(batch, NUM_TEXT, 32),
        "encoder_hidden_states_llama3": random(2, batch, NUM_TEXT, 32, seed=3),
        "pooled_embeds": random(batch, 16, seed=4),
    }


def krea() -> nn.Module:
    """Krea 2: keys that two heads share, text of two layers of an encoder; its tables begin as zeros."""
    heads = HEADS | {"num_key_value_heads": 1, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    widths = {"in_channels": 8, "intermediate_size": 32, "text_hidden_dim": 32, "text_intermediate_size": 32}
    stages = {"num_layers": 2, "num_text_layers": 2, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1}
    model = Krea2Transformer2DModel(**heads, **widths, **stages, timestep_embed_dim=16, axes_dims_rope=(4, 4, 8))
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            nn.init.normal_(parameter, std=0.3)
    return model


def krea_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text of which the last row has less, and positions of text and image."""
    mask = torch.ones(batch, NUM_TEXT).bool()
    mask[-1, -1] = False
    return {
        "encoder_hidden_states": random(batch, NUM_TEXT, 2, 32),
        "encoder_attention_mask": mask,
        "position_ids": torch.cat([torch.zeros(NUM_TEXT, 3), image_positions(*grid)]),
    }


def kandinsky() -> nn.Module:
    """The UNet of Kandinsky 2.2: attention on maps, with keys of the text before its own."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        resnet_time_scale_shift="scale_shift",
    )


IMAGES: dict[str, Family] = {
    "kandinsky": Family(kandinsky, lambda b, g: text(b), lambda g: (4, *g)),
    "pixart-alpha": Family(pixart, lambda b, g: {**text(b), "added_cond_kwargs": {}}, patched()),
    "pixart-sigma": Family(
        lambda: pixart(interpolation_scale=2), lambda b, g: {**text(b), "added_cond_kwargs": {}}, patched()
    ),
    "dit": Family(
        dit,
        lambda b, g: {"class_labels": torch.arange(b)},
        patched(),
        lambda time, batch: {"timestep": torch.full((batch,), int(time))},
    ),
    "hunyuan-dit": Family(hunyuan, hunyuan_inputs, patched()),
    "sd3": Family(sd3, lambda b, g: {**text(b), "pooled_projections": random(b, 16)}, patched()),
    "sd3.5-dual": Family(
        lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        lambda b, g: {**text(b), "pooled_projections": random(b, 16)},
        patched(),
    ),
    "aura-flow": Family(aura_flow, lambda b, g: text(b), patched(), thousandth),
    "chroma": Family(chroma, chroma_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "flux": Family(flux, flux_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "flux-double": Family(lambda: flux(2, 0), flux_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "flux-single": Family(lambda: flux(0, 2), flux_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "flux2": Family(flux2, flux2_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "longcat-image": Family(longcat, longcat_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "ovis-image": Family(
        lambda: longcat(OvisImageTransformer2DModel),
        lambda b, g: longcat_inputs(b, g, 0, 0),
        lambda g: (g[0] * g[1], 8),
        thousandth,
    ),
    "bria": Family(bria, lambda b, g: longcat_inputs(b, g, 0, 0), lambda g: (g[0] * g[1], 8)),
    "lumina2": Family(
        lumina, lambda b, g: {**text(b), "encoder_attention_mask": torch.ones(b, NUM_TEXT).long()}, patched(), rising
    ),
    "z-image": Family(
        z_image,
        lambda b, g: {"cap_feats": list(random(b, NUM_TEXT, 32))},
        frames(1),
        lambda time, batch: {"t": torch.full((batch,), 1 - time / 1000)},
    ),
    "cogview4": Family(lambda: cogview(rope_axes_dim=(16, 16)), cogview_inputs, patched()),
    "cogview3plus": Family(lambda: cogview(CogView3PlusTransformer2DModel), cogview_inputs, patched()),
    "qwen-image-2.1": Family(
        qwen_21,
        qwen_21_inputs,
        lambda g: (g[0] * g[1], 16),
        thousandth,
        first={"kv_cache_mode": "extract"},
        then={"kv_cache_mode": "cached"},
    ),
    "hunyuan-image": Family(hunyuan_image, hunyuan_image_inputs, patched()),
    "hidream": Family(
        hidream, hidream_inputs, patched(), lambda time, batch: {"timesteps": torch.full((batch,), float(time))}
    ),
    "krea2": Family(krea, krea_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "qwen-image": Family(
        qwen,
        lambda b, g: {
            **text(b),
            "encoder_hidden_states_mask": torch.ones(b, NUM_TEXT).bool(),
            "img_shapes": [[(1, *g)]] * b,
        },
        lambda g: (g[0] * g[1], 16),
        thousandth,
    ),
}
"""Transformers that make images, and the UNet that they share their checks with, by name."""
