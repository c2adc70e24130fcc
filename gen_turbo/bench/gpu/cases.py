"""What `bench gpu` measures: published configurations with random weights, and their tiny forms for a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.bench.denoisers import DENOISERS, Denoiser
from gen_turbo.bench.gpu.pipeline import BarePipeline

_LATENT_SCALE, _FRAME_SCALE = 8, 4
_DIVISOR = 16
_SHRINK = 4
"""On a CPU every side has a quarter of its pixels."""
_TIMES = 1000
_GUIDANCE = 3.5

WAN = Denoiser(
    "wan-1.3b",
    "WanTransformer3DModel",
    {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960},
    {"num_layers": 30},
    text=(512, 4096),
    latent_channels=16,
    patch=2,
)
"""Wan 2.1, 1.3 billion weights."""
PUBLISHED = DENOISERS | {WAN.name: WAN}

_TINY: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1},
    "sdxl": {"block_out_channels": (32, 64, 64), "attention_head_dim": (2, 4, 4), "layers_per_block": 1},
    "pixart-sigma": {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32},
    "sd3-medium": {"num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32},
    "flux": {"num_attention_heads": 1},
    "wan-1.3b": {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64},
}
_TINY_DEPTH = 2


@dataclass(frozen=True)
class Case:
    """One denoiser at one size.

    Attributes:
        name: As `--models` takes it.
        model: The configuration's name; cases of one model share a process.
        height: In pixels.
        width: In pixels.
        frames: Of a video; 1 for an image.
        batch: 2 where guidance calls the model on two branches at once.
        dtype: Of weights and latents on a GPU.
        share: Of the time that the whole benchmark may take, against the other cases.
        rounds: The most alternating rounds.
        run_steps: Steps of a run by default in diffusers' pipeline of the model, over which the user's line is
            measured; None for those that the benchmark takes for everything else.
    """

    name: str
    model: str
    height: int
    width: int
    frames: int = 1
    batch: int = 2
    dtype: str = "float16"
    share: float = 1.0
    rounds: int = 3
    run_steps: int | None = None

    @property
    def pixels(self) -> str:
        """Width, height and, of a video, frames."""
        size = f"{self.width}x{self.height}"
        return f"{size}x{self.frames}" if self.frames > 1 else size

    def shrunk(self) -> Case:
        """The same on a CPU: a quarter of each side, in float32, in short runs."""
        height, width = (side // _SHRINK // _DIVISOR * _DIVISOR for side in (self.height, self.width))
        frames = min(self.frames, _FRAME_SCALE + 1)
        return replace(self, height=height, width=width, frames=frames, dtype="float32", run_steps=None)


def _square(model: str, pixels: int, **more: Any) -> Case:
    return Case(f"{model}-{pixels}", model, pixels, pixels, **more)


CASES = (
    _square("sd15", 512, run_steps=50),
    _square("sd15", 1024, share=1.1, run_steps=50),
    _square("sdxl", 1024, share=1.4, run_steps=50),
    _square("sd3-medium", 1024, share=1.2, run_steps=28),
    _square("pixart-sigma", 1024, run_steps=20),
    _square("pixart-sigma", 2048, share=2.5, rounds=2, run_steps=20),
    _square("flux", 1024, batch=1, dtype="bfloat16", share=2.0, rounds=2, run_steps=28),
    Case("wan-1.3b-480", "wan-1.3b", 480, 832, 17, batch=1, dtype="bfloat16", share=1.6, rounds=2, run_steps=50),
)
"""In the order of measurement."""


def cases(patterns: list[str], known: tuple[str, ...] = ()) -> list[Case]:
    """Those whose name or model matches a shell pattern; all where there is no pattern.

    Raises:
        ValueError: If a pattern matches neither a case nor one of the `known` other names.
    """
    names = [*(case.name for case in CASES), *(case.model for case in CASES), *known]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no model matches {pattern!r}; there are: {', '.join(dict.fromkeys(names))}")
    return [c for c in CASES if not patterns or any(fnmatchcase(n, p) for p in patterns for n in (c.name, c.model))]


def build(case: Case, device: torch.device, seed: int) -> nn.Module:
    """The case's model with random weights, on a CPU at tiny width."""
    denoiser, depths = PUBLISHED[case.model], dict(PUBLISHED[case.model].depths)
    if device.type == "cpu":
        denoiser = replace(denoiser, config=denoiser.config | _TINY[case.model])
        depths = dict.fromkeys(depths, _TINY_DEPTH)
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(seed)
    # Made in its own type at once: twelve billion weights in float32 would not fit beside themselves.
    with default_dtype(dtype):
        model = denoiser.build(depths, device=str(device))
    _cast(model, dtype)
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts as `from_pretrained` does: what its class wants in float32 stays so."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(torch.float32 if kept & {*path.split("."), name} else dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating-point tensors have this type inside of the `with` block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def pipeline(case: Case, model: nn.Module, denoiser: Denoiser | None = None) -> BarePipeline:
    """A loop around the model that denoises latents of the case's size.

    Args:
        case: Size and batch.
        model: What denoises.
        denoiser: Its configuration; the published one of the case by default.
    """
    denoiser = denoiser or PUBLISHED[case.model]
    anything: Any = model
    device, dtype = anything.device, anything.dtype
    generator = torch.Generator().manual_seed(0)
    shapes = _SHAPES.get(denoiser.model, _published)(denoiser, case)
    inputs = _filled(shapes, generator, device, dtype)
    inputs.pop("timestep", None)
    if denoiser.model == "FluxTransformer2DModel":
        inputs |= _flux_positions(case, denoiser, device, dtype)
    takes = "sample" if "sample" in inputs else "hidden_states"
    latents = inputs.pop(takes)
    inputs = _repeated(inputs, case.batch)
    is_flux = denoiser.model == "FluxTransformer2DModel"
    time = torch.zeros(case.batch, device=device, dtype=dtype if is_flux else torch.float32)
    if denoiser.model == "UNet2DConditionModel":
        time = time[0]
    return BarePipeline(model, latents, inputs, time, 1 / _TIMES if is_flux else 1.0, case.batch > 1)


def _published(denoiser: Denoiser, case: Case) -> dict[str, Any]:
    shapes = denoiser.inputs(case.height)
    sides = case.height // _LATENT_SCALE, case.width // _LATENT_SCALE
    if sides[0] != sides[1]:
        raise ValueError(f"{case.pixels} is no square, and a {denoiser.model} is measured on squares; leave out a side")
    if denoiser.config.get("use_additional_conditions"):
        added = {"resolution": torch.empty(1, 2, device="meta"), "aspect_ratio": torch.empty(1, 1, device="meta")}
        shapes["added_cond_kwargs"] = added
    return shapes


def _wan(denoiser: Denoiser, case: Case) -> dict[str, Any]:
    frames = (case.frames - 1) // _FRAME_SCALE + 1
    size = (frames, case.height // _LATENT_SCALE, case.width // _LATENT_SCALE)
    return {
        "hidden_states": torch.empty(1, denoiser.latent_channels, *size, device="meta"),
        "encoder_hidden_states": torch.empty(1, *denoiser.text, device="meta"),
    }


_SHAPES: dict[str, Callable[[Denoiser, Case], dict[str, Any]]] = {"WanTransformer3DModel": _wan}


def _flux_positions(case: Case, denoiser: Denoiser, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    side = case.height // _LATENT_SCALE // denoiser.patch
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    return {
        "img_ids": positions.to(device, dtype),
        "txt_ids": torch.zeros(denoiser.text[0], 3, device=device, dtype=dtype),
        "guidance": torch.full((1,), _GUIDANCE, device=device, dtype=dtype),
    }


def _filled(shapes: Mapping[str, Any], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Any:
    """Random numbers in the shape of what has a shape alone."""
    made: dict[str, Any] = {}
    for key, value in shapes.items():
        if isinstance(value, Tensor):
            made[key] = torch.randn(value.shape, generator=generator).to(device, dtype)
        else:
            made[key] = _filled(value, generator, device, dtype) if isinstance(value, dict) else value
    return made


def _repeated(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """What each guidance branch is given, the first with another text."""
    if batch == 1:
        return dict(inputs)
    made: dict[str, Any] = {}
    for key, value in inputs.items():
        if isinstance(value, dict):
            made[key] = _repeated(value, batch)
        else:
            made[key] = value.repeat(batch, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) else value
    if "encoder_hidden_states" in made:
        made["encoder_hidden_states"][0] *= -1
    return made
