"""What people combine with a processor; each is a row of COMBINATIONS.md, which tests.contracts.outcomes writes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import accelerate
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    TaylorSeerCacheConfig,
)
from diffusers.guiders import ClassifierFreeGuidance
from stated import TurboProcessor
from torch import Tensor

from gen_turbo import attach
from tests.contracts import quantised, sharing
from tests.contracts.sharing import draw_image
from tests.tiny_hosts import TEXT_WIDTH, UNETS, image, sd_pipeline
from tests.tiny_pipelines import (
    adapter_pipeline,
    control_pipeline,
    flux,
    ip_adapter_pipeline,
    latents_of,
    prompt_image,
    save_lora,
)
from tests.tiny_transformers import NUM_TEXT, random

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Combination:
    """One use.

    Attributes:
        make: Makes the pipeline, or whatever `draw` takes.
        draw: Draws with it.
        add: Adds to the pipeline what is combined, after it was made.
        target: What a processor is attached to.
        needs: A package that has to be there; empty for none.
    """

    make: Callable[[], Any] = sd_pipeline
    draw: Callable[[Any], Tensor] = draw_image
    add: Callable[[Any], object] = lambda pipe: None
    target: Callable[[Any], Any] = lambda pipe: pipe
    needs: str = ""

    def model(self, made: Any) -> torch.nn.Module:
        """The denoiser."""
        target = self.target(made)
        return target if isinstance(target, torch.nn.Module) else getattr(target, "unet", None) or target.transformer

    def whole(self) -> Any:
        """The pipeline with everything added."""
        made = self.make()
        self.add(made)
        return made


def _of(cls: type, **kwargs: object) -> Any:
    pipe = cls(**sd_pipeline().components, **kwargs, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory()
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _lora() -> Path:
    save_lora(_folder() / "lora")
    return _folder() / "lora"


def _fuse_lora(pipe: Any) -> None:
    pipe.load_lora_weights(_lora())
    pipe.fuse_lora()
    pipe.unload_lora_weights()


def _load_adapter(pipe: Any) -> None:
    pipe.load_ip_adapter(str(_folder()), subfolder="", weight_name="adapter.safetensors")


def _tile(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8


def _offload_models(pipe: Any) -> None:
    # `enable_model_cpu_offload` asks for an accelerator; this is the hook that it installs.
    accelerate.cpu_offload_with_hook(pipe.unet, CPU)


def _mixed(pipe: Any) -> Tensor:
    for call in ({"height": 48, "width": 24}, {"num_images_per_prompt": 2}, {"guidance_scale": 1.0}):
        draw_image(pipe, **call)
    return draw_image(pipe)


def _flux() -> Any:
    pipe, pipe.call = flux()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _draw_flux(pipe: Any, steps: int = 8, **kwargs: object) -> Tensor:
    return latents_of(pipe, pipe.call, steps=steps, **kwargs)


def _true_guidance(pipe: Any) -> Tensor:
    texts = {"negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=6)}
    return _draw_flux(pipe, **texts, negative_pooled_prompt_embeds=random(1, 16, seed=7), true_cfg_scale=3.0)


def _padded() -> Any:
    pipe, padding = _flux(), random(1, 1, 32, seed=5).expand(1, 12, -1)
    pipe.call = pipe.call | {"prompt_embeds": torch.cat([random(1, 4, 32), padding], 1)}
    return pipe


@torch.no_grad()
def _by_guider(unet: Any) -> Tensor:
    """Three steps with a guider, which has the model called for each condition on its own."""
    guider, sample = ClassifierFreeGuidance(guidance_scale=3.0), random(1, 4, 16, 16)
    texts = {"encoder_hidden_states": (random(1, NUM_TEXT, TEXT_WIDTH), random(1, NUM_TEXT, TEXT_WIDTH, seed=3))}
    for step, time in enumerate((900, 600, 300)):
        guider.set_state(step, 3, torch.tensor(time))
        calls = guider.prepare_inputs(texts)
        for call in calls:
            guider.prepare_models(unet)
            call.noise_pred = unet(sample, time, call.encoder_hidden_states).sample
            guider.cleanup_models(unet)
        sample = sample - 0.1 * guider(calls).pred
    return sample


def _cached(make: Callable[[Any], Any]) -> Combination:
    return Combination(_flux, _draw_flux, lambda pipe: pipe.transformer.enable_cache(make(pipe)))


def _now(pipe: Any) -> Callable[[], float]:
    return lambda: pipe.current_timestep


def _drawn(**kwargs: object) -> Combination:
    return Combination(draw=partial(draw_image, **kwargs))


def _faster(pipe: Any) -> FasterCacheConfig:
    ranges = {"spatial_attention_timestep_skip_range": (-1, 901)}
    return FasterCacheConfig(current_timestep_callback=_now(pipe), is_guidance_distilled=True, **ranges)


COMBINATIONS: dict[str, Combination] = {
    "text to image": Combination(),
    "image to image": Combination(
        lambda: _of(StableDiffusionImg2ImgPipeline), partial(image, steps=4, image=prompt_image(), strength=0.8)
    ),
    "inpaint": Combination(
        lambda: _of(StableDiffusionInpaintPipeline),
        partial(draw_image, image=prompt_image(), mask_image=prompt_image(), height=32, width=32),
    ),
    "ControlNet": Combination(control_pipeline, partial(draw_image, image=prompt_image())),
    "ControlNet, reduced instead of the UNet": Combination(
        control_pipeline, partial(draw_image, image=prompt_image()), target=lambda pipe: pipe.controlnet
    ),
    "ControlNet, reduced besides the UNet": Combination(
        control_pipeline,
        partial(draw_image, image=prompt_image()),
        lambda pipe: attach(pipe, TurboProcessor(0.4, warmup_steps=1)),
        lambda pipe: pipe.controlnet,
    ),
    "two ControlNets": Combination(
        partial(control_pipeline, 2),
        partial(draw_image, image=[prompt_image()] * 2, controlnet_conditioning_scale=[1.0, 0.5]),
    ),
    "two ControlNets, the first reduced": Combination(
        partial(control_pipeline, 2),
        partial(draw_image, image=[prompt_image()] * 2, controlnet_conditioning_scale=[1.0, 0.5]),
        target=lambda pipe: pipe.controlnet.nets[0],
    ),
    "T2I-Adapter": Combination(adapter_pipeline, partial(draw_image, image=prompt_image())),
    "IP-Adapter": Combination(
        lambda: ip_adapter_pipeline(_folder()), partial(draw_image, ip_adapter_image=prompt_image()), _load_adapter
    ),
    "LoRA": Combination(add=lambda pipe: pipe.load_lora_weights(_lora())),
    "LoRA, fused and unloaded": Combination(add=_fuse_lora),
    "perturbed-attention guidance": Combination(lambda: _of(StableDiffusionPAGPipeline), draw_image),
    "the same in two images": Combination(
        lambda: _of(StableDiffusionPAGPipeline), partial(draw_image, num_images_per_prompt=2)
    ),
    "the same in a layer that is reduced": Combination(
        lambda: _of(StableDiffusionPAGPipeline, pag_applied_layers=["down_blocks.0"]), draw_image
    ),
    "fused projections": Combination(add=lambda pipe: pipe.fuse_qkv_projections(vae=False)),
    "attention slicing": Combination(add=lambda pipe: pipe.enable_attention_slicing(1)),
    "FreeU": Combination(add=lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)),
    "autoencoder in tiles": Combination(add=_tile),
    "offloading of models": Combination(add=_offload_models),
    "offloading of layers": Combination(add=lambda pipe: accelerate.cpu_offload(pipe.unet, CPU)),
    "offloading of groups": Combination(
        add=lambda pipe: pipe.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    ),
    "layerwise casting": Combination(
        add=lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    ),
    "no guidance": _drawn(guidance_scale=1.0),
    "negative prompt": _drawn(negative_prompt="a small blue cross"),
    "several prompts": _drawn(prompt=["a large red circle", "a small blue cross"]),
    "several images of a prompt": _drawn(num_images_per_prompt=3),
    "72 x 104 latents": _drawn(height=144, width=208, guidance_scale=1.0),
    "other sizes and batches between": Combination(draw=_mixed),
    "two pipelines of one UNet": Combination(sharing.with_another, sharing.alternating),
    "two threads, one UNet": Combination(sharing.two_pipelines, sharing.in_threads, target=lambda pipes: pipes[0].unet),
    "a guider of its own": Combination(UNETS["sd15"], _by_guider),
    "Flux, separate calls for guidance": Combination(_flux, _true_guidance),
    "Flux, padded text": Combination(_padded, _draw_flux),
    "Flux, fused projections": Combination(_flux, _draw_flux, lambda pipe: pipe.transformer.fuse_qkv_projections()),
    "Flux, offloading of groups": Combination(
        _flux, _draw_flux, lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, offload_type="leaf_level")
    ),
    "Flux, layerwise casting": Combination(
        _flux,
        _draw_flux,
        lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    ),
    "Flux, torchao int8 weights": Combination(quantised.torchao, _draw_flux, needs="torchao"),
    "Flux, bitsandbytes 4-bit weights": Combination(quantised.bitsandbytes, _draw_flux, needs="bitsandbytes"),
    "Flux, GGUF weights": Combination(quantised.gguf, _draw_flux, needs="gguf"),
    "Flux, FirstBlockCache": _cached(lambda pipe: FirstBlockCacheConfig(threshold=0.05)),
    "Flux, FasterCache": _cached(_faster),
    "Flux, PyramidAttentionBroadcast": _cached(
        lambda pipe: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 900),
            current_timestep_callback=_now(pipe),
        )
    ),
    "Flux, TaylorSeerCache": _cached(lambda pipe: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2)),
    "Flux, MagCache": _cached(
        lambda pipe: MagCacheConfig(num_inference_steps=8, mag_ratios=torch.ones(8), threshold=0.1)
    ),
}
"""Every use by the name of its row."""
