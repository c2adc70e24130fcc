"""The published configurations whose arithmetic is counted, on tensors that have shapes but no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.bench.by_blocks import BY_BLOCKS
from gen_turbo.models.adapter import Geometry

_LATENT_SCALE = 8
_FLUX_PATCH = 2


@dataclass(frozen=True)
class Denoiser:
    """One published denoiser.

    Attributes:
        name: As `--models` takes it.
        model: Name of its class in diffusers.
        config: What differs from the class's defaults, depths left out.
        depths: How many equal blocks there are of each kind.
        text: Tokens and channels of the text that it is given.
        latent_channels: Channels of its latents.
        patch: Side of the latent patch that is one token.
        joins_text: Whether text shares attention with the image.
        latent_scale: Pixels along a side of a latent.
        frames: Frames of its latents.
        widths: Of a video, the width in pixels by the height; else it is a square.
        merges_text: Whether text can be merged.
    """

    name: str
    model: str
    config: dict[str, Any]
    depths: dict[str, int]
    text: tuple[int, int]
    latent_channels: int = 4
    patch: int = 1
    joins_text: bool = False
    latent_scale: int = _LATENT_SCALE
    frames: int = 1
    widths: Mapping[int, int] = field(default_factory=dict)
    merges_text: bool = True

    def build(self, depths: Mapping[str, int] | None = None, device: str = "meta") -> nn.Module:
        """Makes the model, on the meta device by default, with its own depths or with others."""
        config = self.config | _NESTED.get(self.name, dict)(self.depths if depths is None else depths)
        of_class: Any = BY_BLOCKS.get(self.model) or getattr(import_module("diffusers"), self.model)
        with torch.device(device):
            model: nn.Module = of_class(**config)
        return model.eval().requires_grad_(False)

    def inputs(self, pixels: int) -> dict[str, Any]:
        """Arguments of one call for one sample, as its pipeline passes them."""
        frames = (self.frames,) if self.widths else ()
        sample, text = _empty(1, self.latent_channels, *frames, *self._latents(pixels)), _empty(1, *self.text)
        arguments = {"encoder_hidden_states": text, "timestep": _empty(1)}
        return arguments | _INPUTS[self.model](self, sample)

    def geometry(self, pixels: int) -> Geometry:
        """Where the tokens of such a call are."""
        height, width = (side // self.patch for side in self._latents(pixels))
        return Geometry((height, width), self.frames, num_text=self.text[0] if self.joins_text else 0)

    def image_share(self, pixels: int) -> float:
        """The share of image tokens in sequences that text is in too."""
        geometry = self.geometry(pixels)
        num_image = sum(region.num_tokens for region in geometry.regions)
        return num_image / (num_image + geometry.num_text)

    def _latents(self, pixels: int) -> tuple[int, int]:
        return pixels // self.latent_scale, self.widths.get(pixels, pixels) // self.latent_scale


def _sdxl_depths(depths: Mapping[str, int]) -> dict[str, Any]:
    return {"transformer_layers_per_block": (1, depths["middle"], depths["coarse"])}


_NESTED: dict[str, Callable[[Mapping[str, int]], dict[str, Any]]] = {"sdxl": _sdxl_depths}


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _unet(denoiser: Denoiser, sample: Tensor) -> dict[str, Any]:
    if denoiser.config.get("addition_embed_type") != "text_time":
        return {"sample": sample}
    return {"sample": sample, "added_cond_kwargs": {"text_embeds": _empty(1, 1280), "time_ids": _empty(1, 6)}}


def _pixart(denoiser: Denoiser, sample: Tensor) -> dict[str, Any]:
    return {"hidden_states": sample, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _sd3(denoiser: Denoiser, sample: Tensor) -> dict[str, Any]:
    return {"hidden_states": sample, "pooled_projections": _empty(1, denoiser.config["pooled_projection_dim"])}


def _flux(denoiser: Denoiser, sample: Tensor) -> dict[str, Any]:
    num_tokens = (sample.shape[-1] // _FLUX_PATCH) ** 2
    return {
        "hidden_states": _empty(1, num_tokens, denoiser.config["in_channels"]),
        "pooled_projections": _empty(1, denoiser.config["pooled_projection_dim"]),
        "guidance": _empty(1),
        "img_ids": _empty(num_tokens, 3),
        "txt_ids": _empty(denoiser.text[0], 3),
    }


def _flux2(denoiser: Denoiser, sample: Tensor) -> dict[str, Any]:
    num_tokens = sample.shape[-2] * sample.shape[-1]
    guidance = {"guidance": _empty(1)} if denoiser.config.get("guidance_embeds", True) else {}
    tokens = _empty(1, num_tokens, denoiser.latent_channels)
    return {
        "hidden_states": tokens,
        "img_ids": _empty(num_tokens, 4),
        "txt_ids": _empty(denoiser.text[0], 4),
    } | guidance


def _latents_alone(denoiser: Denoiser, sample: Tensor) -> dict[str, Any]:
    return {"hidden_states": sample}


_INPUTS = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "WanTransformer3DModel": _latents_alone,
    "HunyuanVideo15Transformer3DModel": _latents_alone,
    "QwenImage21Transformer2DModel": _latents_alone,
}

_SD15 = Denoiser(
    "sd15",
    "UNet2DConditionModel",
    {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    {},
    text=(77, 768),
)
_SDXL = Denoiser(
    "sdxl",
    "UNet2DConditionModel",
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    {"middle": 2, "coarse": 10},
    text=(77, 2048),
)
_PIXART = Denoiser(
    "pixart-sigma",
    "PixArtTransformer2DModel",
    {
        "sample_size": 128,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
        "out_channels": 8,
        "use_additional_conditions": False,
    },
    {"num_layers": 28},
    text=(300, 4096),
    patch=2,
)
_SD3 = Denoiser(
    "sd3-medium",
    "SD3Transformer2DModel",
    {
        "sample_size": 128,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 1536,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 192,
    },
    {"num_layers": 24},
    text=(333, 4096),
    latent_channels=16,
    patch=2,
    joins_text=True,
)
_FLUX = Denoiser(
    "flux",
    "FluxTransformer2DModel",
    {"in_channels": 64, "pooled_projection_dim": 768, "guidance_embeds": True},
    {"num_layers": 19, "num_single_layers": 38},
    text=(512, 4096),
    latent_channels=16,
    patch=_FLUX_PATCH,
    joins_text=True,
)
_FLUX2: dict[str, Any] = {"latent_channels": 128, "joins_text": True, "latent_scale": 16}
_FLUX2_DEV = Denoiser(
    "flux2-dev",
    "Flux2Transformer2DModel",
    {},
    {"num_layers": 8, "num_single_layers": 48},
    text=(512, 15360),
    **_FLUX2,
)
_FLUX2_KLEIN = Denoiser(
    "flux2-klein-4b",
    "Flux2Transformer2DModel",
    {"num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False},
    {"num_layers": 5, "num_single_layers": 20},
    text=(512, 7680),
    **_FLUX2,
)
_WAN22 = Denoiser(
    "wan-2.2-14b",
    "WanTransformer3DModel",
    {},
    {"num_layers": 40},
    text=(512, 4096),
    latent_channels=16,
    patch=2,
    frames=21,
    widths={480: 832, 720: 1280},
)
_HUNYUAN_VIDEO_15 = Denoiser(
    "hunyuan-video-1.5",
    "HunyuanVideo15Transformer3DModel",
    {},
    {"num_layers": 54},
    text=(1000 + 256 + 729, 2048),
    latent_channels=65,
    joins_text=True,
    latent_scale=16,
    frames=31,
    widths={480: 848, 720: 1280},
    merges_text=False,
)
_QWEN_IMAGE_21 = Denoiser(
    "qwen-image-2.1",
    "QwenImage21Transformer2DModel",
    {},
    {"num_layers": 32},
    text=(512, 4096),
    latent_channels=64,
    latent_scale=16,
)
_OLDER = (_SD15, _SDXL, _PIXART, _SD3, _FLUX)
_NEWER = (_FLUX2_KLEIN, _FLUX2_DEV, _WAN22, _HUNYUAN_VIDEO_15, _QWEN_IMAGE_21)
DENOISERS = {denoiser.name: denoiser for denoiser in (*_OLDER, *_NEWER)}
"""Stable Diffusion 1.5 and XL, PixArt-Sigma, Stable Diffusion 3 medium and Flux.1-dev; FLUX.2 klein 4B and dev, Wan 2.2
at 81 frames, HunyuanVideo 1.5 at 121 frames with all of its text, Qwen-Image 2.1 behind 512 tokens of text."""
