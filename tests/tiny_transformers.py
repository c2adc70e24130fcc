"""Tiny real diffusion transformers with random weights: a builder and the inputs of one call for each family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    MochiTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

NUM_TEXT = 5
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


@dataclass(frozen=True)
class Family:
    """One model class in one variant.

    Attributes:
        build: Makes the model.
        inputs: All arguments of a call but the latents and the time, for a batch and (height, width) of its tokens.
        latents: The shape of the latents behind the batch, for (height, width) of the tokens.
        time: From a falling time in thousandths to what the model is told.
        num_frames: Frames of the latents in tokens.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, tuple[int, int]], dict[str, object]]
    latents: Callable[[tuple[int, int]], tuple[int, ...]]
    time: Callable[[int, int], dict[str, object]] = lambda time, batch: {"timestep": torch.full((batch,), float(time))}
    num_frames: int = 1


def random(*shape: int, seed: int = 1) -> Tensor:
    """Random numbers that do not touch the global generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(batch: int, width: int = 32) -> dict[str, object]:
    """Another text in every row."""
    return {"encoder_hidden_states": random(batch, NUM_TEXT, width)}


def patched(channels: int = 4) -> Callable[[tuple[int, int]], tuple[int, ...]]:
    """Latents of which 2 x 2 make a token."""
    return lambda grid: (channels, 2 * grid[0], 2 * grid[1])


def rotary(length: int, width: int = 16) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables."""
    angle = random(length, width, seed=2)
    return angle.cos(), angle.sin()


def pixart(**settings: object) -> nn.Module:
    """PixArt: the latents' grid fixes the positions."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 16, "cross_attention_dim": 32}
    return PixArtTransformer2DModel(**HEADS, **shape, caption_channels=32, use_additional_conditions=False, **settings)


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


def flux(num_layers: int = 1, num_single_layers: int = 2) -> nn.Module:
    """Flux: double blocks and single blocks."""
    widths = {"in_channels": 8, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}
    return FluxTransformer2DModel(**HEADS, num_layers=num_layers, num_single_layers=num_single_layers, **widths)


def flux_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text and image positions."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    pooled = random(batch, 16, seed=4)
    return {**text(batch), "pooled_projections": pooled, "img_ids": ids, "txt_ids": torch.zeros(NUM_TEXT, 3)}


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


def qwen() -> nn.Module:
    """Qwen-Image."""
    widths = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
    return QwenImageTransformer2DModel(**HEADS, num_layers=2, patch_size=2, **widths)


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


def thousandth(time: int, batch: int) -> dict[str, object]:
    """Flux and Qwen-Image."""
    return {"timestep": torch.full((batch,), time / 1000)}


def rising(time: int, batch: int) -> dict[str, object]:
    """Lumina2."""
    return {"timestep": torch.full((batch,), 1 - time / 1000)}


def frames(num_frames: int, channels: int = 4) -> Callable[[tuple[int, int]], tuple[int, ...]]:
    """Video latents, channels before frames."""
    return lambda grid: (channels, num_frames, 2 * grid[0], 2 * grid[1])


FAMILIES: dict[str, Family] = {
    "kandinsky": Family(kandinsky, lambda b, g: text(b), lambda g: (4, *g)),
    "pixart-alpha": Family(pixart, lambda b, g: {**text(b), "added_cond_kwargs": {}}, patched()),
    "pixart-sigma": Family(
        lambda: pixart(interpolation_scale=2), lambda b, g: {**text(b), "added_cond_kwargs": {}}, patched()
    ),
    "hunyuan-dit": Family(hunyuan, hunyuan_inputs, patched()),
    "sd3": Family(sd3, lambda b, g: {**text(b), "pooled_projections": random(b, 16)}, patched()),
    "sd3.5-dual": Family(
        lambda: sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
        lambda b, g: {**text(b), "pooled_projections": random(b, 16)},
        patched(),
    ),
    "flux": Family(flux, flux_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "flux-double": Family(lambda: flux(2, 0), flux_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "flux-single": Family(lambda: flux(0, 2), flux_inputs, lambda g: (g[0] * g[1], 8), thousandth),
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
    "mochi": Family(
        mochi,
        lambda b, g: {**text(b), "encoder_attention_mask": torch.ones(b, NUM_TEXT).bool()},
        frames(3),
        lambda time, batch: {"timestep": torch.full((batch,), 1000.0 - time)},
        num_frames=3,
    ),
}
"""Every supported family of transformers and every variant of it, by name."""


def build(name: str) -> nn.Module:
    """The model of a family, with the same weights every time."""
    torch.manual_seed(0)
    return FAMILIES[name].build().eval()


@torch.no_grad()
def run(
    name: str,
    model: nn.Module,
    times: tuple[int, ...] = (900, 700, 500, 300),
    batch: int = 2,
    grid: tuple[int, int] = (8, 8),
    latents: Tensor | None = None,
) -> Tensor:
    """Calls the model once per time on slowly changing latents and stacks the outputs."""
    family, outputs = FAMILIES[name], []
    latents = random(batch, *family.latents(grid)) if latents is None else latents
    inputs = family.inputs(batch, grid)
    for step, time in enumerate(times):
        sample: object = latents * (1 - 0.05 * step)
        if name == "z-image":
            first: dict[str, object] = {"x": list(sample)}
        else:
            first = {"sample" if name == "kandinsky" else "hidden_states": sample}
        told = family.time(time, batch) if name != "kandinsky" else {"timestep": time}
        output = model(**first, **inputs, **told, return_dict=False)[0]
        outputs.append(torch.stack(list(output)))
    return torch.stack(outputs)
