"""The denoisers that `gen-turbo bench step` times: published configurations with random weights, and their calls."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.bench.denoisers import DENOISERS, Denoiser

MODELS = ("sd15", "sdxl", "flux")
_LATENT_SCALE = 8
_LAST_TIME = 999
_NORM_GROUPS = 32
_GUIDANCE = 3.5
_HALVES = 2


def times_of(steps: int) -> tuple[int, ...]:
    """The times, in thousandths, of a run of so many steps."""
    return tuple(_LAST_TIME - step * (_LAST_TIME // steps) for step in range(steps))


@dataclass(frozen=True)
class StepModel:
    """One denoiser and the inputs of a run.

    Attributes:
        model: Its class's own, with random weights.
        sample: What is denoised; a guided UNet gets it twice.
        arguments: Everything else but the time.
        time_scale: From a time in thousandths to the model's own scale.
    """

    model: nn.Module
    sample: Tensor
    arguments: dict[str, Any]
    time_scale: float

    @torch.no_grad()
    def run(self, steps: int) -> Tensor:
        """Denoises for some steps from the same noise every time, without gradients."""
        sample = self.sample
        for step_time in times_of(steps):
            time = torch.full((len(sample),), self.time_scale * step_time)
            prediction = self.model(sample, timestep=time, **self.arguments, return_dict=False)[0]
            sample = sample - 0.05 * prediction
        return sample


def make(name: str, latents: int, width_scale: float, blocks: int | None, seed: int) -> StepModel:
    """Builds one of MODELS.

    Args:
        name: Which.
        latents: Side of the latent image; Flux has a token for four latents.
        width_scale: Factor on all widths.
        blocks: The most equal blocks of each kind; None for as many as published.
        seed: Of weights and inputs.

    Raises:
        ValueError: If a width becomes no multiple of what the model needs.
    """
    denoiser = _scaled(DENOISERS[name], width_scale)
    depths = {kind: min(depth, blocks or depth) for kind, depth in denoiser.depths.items()}
    torch.manual_seed(seed)
    model = denoiser.build(depths, device="cpu")
    generator = torch.Generator().manual_seed(0)
    inputs = {key: _filled(value, generator) for key, value in denoiser.inputs(latents * _LATENT_SCALE).items()}
    inputs.pop("timestep")
    if name != "flux":
        guided: dict[str, Any] = _twice(inputs)
        return StepModel(model, guided.pop("sample"), guided, 1.0)
    side = latents // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inputs["img_ids"] = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    inputs |= {"txt_ids": torch.zeros_like(inputs["txt_ids"]), "guidance": torch.full((1,), _GUIDANCE)}
    return StepModel(model, inputs.pop("hidden_states"), inputs, 1 / (_LAST_TIME + 1))


def _scaled(denoiser: Denoiser, scale: float) -> Denoiser:
    if denoiser.model == "FluxTransformer2DModel":
        heads = int(24 * scale)
        if heads < 1:
            raise ValueError(f"--width-scale {scale} gives none of the 24 heads; raise it")
        return replace(denoiser, config=denoiser.config | {"num_attention_heads": heads})
    published = denoiser.config.get("block_out_channels", (320, 640, 1280, 1280))
    widths = tuple(int(width * scale) for width in published)
    if any(width == 0 or width % _NORM_GROUPS for width in widths):
        raise ValueError(f"--width-scale {scale} gives widths {widths}; they must be multiples of {_NORM_GROUPS}")
    return replace(denoiser, config=denoiser.config | {"block_out_channels": widths})


def _filled(value: Any, generator: torch.Generator) -> Any:
    """Random numbers in the shape of what has a shape alone."""
    if isinstance(value, dict):
        return {key: _filled(inner, generator) for key, inner in value.items()}
    return torch.randn(value.shape, generator=generator) if isinstance(value, Tensor) else value


def _twice(inputs: dict[str, Any]) -> dict[str, Any]:
    """The image twice, as guidance calls a model, with another text for each half."""
    made: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, dict):
            made[key] = _twice(value)
        else:
            made[key] = value.repeat(_HALVES, *[1] * (value.ndim - 1))
    if "encoder_hidden_states" in made:
        made["encoder_hidden_states"][0] *= -1
    return made
