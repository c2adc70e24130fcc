"""One tiny real pipeline for each way in which pipelines call a denoiser, and what draws one image with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from torch import Tensor

from tests import tiny_pipelines, tiny_transformers
from tests.tiny_family import NUM_TEXT, random
from tests.tiny_hosts import image, sd_pipeline
from tests.tiny_pipelines import latents_of

Draw = Callable[..., Tensor]


def stable_diffusion() -> tuple[Any, Draw]:
    """SD 1.x: a UNet, guidance in one batch."""
    pipe = sd_pipeline()

    def draw(steps: int = 5, **kwargs: Any) -> Tensor:
        return image(pipe, steps=steps, **kwargs)

    return pipe, draw


def wan() -> tuple[Any, Draw]:
    """Wan: a video, guidance by two calls in every step."""
    model = tiny_transformers.build("wan")
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), model)
    texts = {"prompt_embeds": random(1, NUM_TEXT, 32), "negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=3)}
    call = {**texts, "latents": random(1, 4, 3, 16, 16), "num_frames": 9, "height": 128, "width": 128}

    def draw(steps: int = 5, **kwargs: Any) -> Tensor:
        return pipe(**{**call, **kwargs}, num_inference_steps=steps, output_type="latent").frames

    return pipe, draw


def transformer(name: str) -> tuple[Any, Draw]:
    """Flux: one call per step. SD3 and PixArt: guidance in one batch."""
    pipe, call = tiny_pipelines.TRANSFORMERS[name]()

    def draw(steps: int = 5, **kwargs: Any) -> Tensor:
        callback = kwargs.pop("callback_on_step_end", None)
        if callback is not None and name == "pixart":
            kwargs |= {"callback": lambda step, time, latents: callback(pipe, step, time, {}), "callback_steps": 1}
        elif callback is not None:
            kwargs["callback_on_step_end"] = callback
        return latents_of(pipe, call, steps, **kwargs)

    return pipe, draw


MAKERS: dict[str, Callable[[], tuple[Any, Draw]]] = {
    "unet": stable_diffusion,
    "sd3": partial(transformer, "sd3"),
    "flux": partial(transformer, "flux"),
    "pixart": partial(transformer, "pixart"),
    "wan": wan,
}


def made(name: str) -> tuple[Any, Draw]:
    """A pipeline with the same weights every time, and what draws with it: `draw(steps, callback_on_step_end=...)`."""
    pipe, draw = MAKERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe, draw


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """What is attached to."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer
