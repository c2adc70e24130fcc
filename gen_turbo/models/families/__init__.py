"""The families of diffusers denoisers that can be reduced, one entry each; those of one file share their blocks."""

from __future__ import annotations

from gen_turbo.models.adapter import Adapter
from gen_turbo.models.families import flux, hunyuan, images, qwen, recent, videos, wan
from gen_turbo.models.unet import UNetAdapter
from gen_turbo.models.video_unet import ADAPTERS as VIDEO_UNETS

_GRID = "its linear attention convolves over the grid of all tokens in every block"
REFUSED = {
    "SanaTransformer2DModel": _GRID,
    "SanaVideoTransformer3DModel": _GRID,
    "SanaControlNetModel": _GRID,
}
"""Why some models cannot be reduced, by the name of the class."""
_FILES = (images, flux, qwen, wan, hunyuan, videos, recent)
ADAPTERS: tuple[Adapter, ...] = (
    UNetAdapter(),
    *VIDEO_UNETS,
    *(adapter for file in _FILES for adapter in file.ADAPTERS),
)
