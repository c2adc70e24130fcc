"""UNets of videos: AnimateDiff, Stable Video Diffusion and ModelScope, whose layers over space read frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gen_turbo.models.adapter import Geometry, LayerSpec, ModelCall, Unit, units_of
from gen_turbo.models.inputs import num_images
from gen_turbo.models.unet import UNetAdapter

_OVER_TIME = ("motion_modules", "temp_attentions", "temporal_transformer_blocks", "transformer_in")
"""Modules over the frames of one place, by a part of their path."""


class VideoUNetAdapter(UNetAdapter):
    """Enters the self-attention over space, to which every frame is a row of the batch; layers over time stay.

    Args:
        models: Names of the model classes.
        frame_axis: Of the sample, (B, C, frames, h, w) or (B, frames, C, h, w).
    """

    def __init__(self, models: tuple[str, ...], frame_axis: int) -> None:
        self.models = models
        self._frame_axis = frame_axis

    def units(self, model: nn.Module) -> dict[str, Unit]:
        """What can be skipped: the whole UNet and its transformer blocks over space."""
        return units_of(model, self)

    def layers(self, model: nn.Module) -> list[LayerSpec]:
        """As of any UNet, but for those over time."""
        return [_over_space(spec) for spec in super().layers(model)]

    def blocks(self, model: nn.Module) -> list[LayerSpec]:
        """As of any UNet, but for those over time."""
        return [_over_space(spec) for spec in super().blocks(model)]

    def read(self, arguments: Mapping[str, Any]) -> ModelCall:
        """As of any UNet, with a row for each frame of the sample."""
        call = super().read(arguments)
        return call._replace(sample=call.sample.movedim(self._frame_axis, 1).flatten(0, 1))

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        """Every latent of a frame is a token of the finest level."""
        frames = self.read(arguments).sample
        height, width = frames.shape[-2:]
        return Geometry((height, width), num_images=num_images(frames))

    def semantic_value(self, layer: nn.Module, tokens: Tensor, kind: str, condition: Tensor | None) -> Tensor | None:
        """As of any UNet for "self"; nothing for "text", of which some of these have a row for each frame alone."""
        return None if kind == "text" else super().semantic_value(layer, tokens, kind, condition)


def _over_space(spec: LayerSpec) -> LayerSpec:
    over_time = any(part in spec.name.split(".") for part in _OVER_TIME)
    return replace(spec, left_alone="over frames") if over_time else spec


ADAPTERS = (
    VideoUNetAdapter(("UNetMotionModel", "UNet3DConditionModel"), 2),
    VideoUNetAdapter(("UNetSpatioTemporalConditionModel",), 1),
)
