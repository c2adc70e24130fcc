"""The families of diffusers denoisers that can be reduced, one entry each; those of one file share their blocks."""

from __future__ import annotations

from gen_turbo.models.adapter import Adapter
from gen_turbo.models.families import flux, images, qwen, videos
from gen_turbo.models.unet import UNetAdapter

ADAPTERS: tuple[Adapter, ...] = (UNetAdapter(), *images.ADAPTERS, *flux.ADAPTERS, *qwen.ADAPTERS, *videos.ADAPTERS)
