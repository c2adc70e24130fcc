"""Pipelines that share one UNet: one after the other, and in threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from torch import Tensor

from tests.tiny_hosts import image, sd_pipeline
from tests.tiny_pipelines import prompt_image

draw_image = partial(image, steps=3)


def with_another() -> Any:
    """Two pipelines of one UNet, each with a scheduler of its own."""
    first = sd_pipeline()
    rest = first.components | {"scheduler": DDIMScheduler(clip_sample=False)}
    first.other = StableDiffusionImg2ImgPipeline(**rest, requires_safety_checker=False)
    first.other.set_progress_bar_config(disable=True)
    return first


def alternating(pipe: Any) -> Tensor:
    """Three images, the one between by the other pipeline."""
    first = draw_image(pipe, seed=1)
    return torch.cat([first, draw_image(pipe.other, image=prompt_image(), seed=2), draw_image(pipe)])


def two_pipelines() -> list[Any]:
    """Two of one UNet."""
    pipe = sd_pipeline()
    return [pipe, _sharing(pipe)]


def _sharing(pipe: Any) -> Any:
    # A tokenizer pads as the last caller in any thread asked it to, so threads need one each.
    scheduler, tokenizer = DDIMScheduler(clip_sample=False, steps_offset=1), copy.deepcopy(pipe.tokenizer)
    own = {"scheduler": scheduler, "tokenizer": tokenizer}
    other = type(pipe)(**pipe.components | own, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def in_threads(pipes: list[Any]) -> Tensor:
    """One image of each, at once."""
    # What computes on one core in the main thread does so in these from their first operation on.
    with ThreadPoolExecutor(len(pipes), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return torch.cat(list(pool.map(draw_image, pipes, range(len(pipes)))))
