"""The user's own model under `bench gpu --model`: a pipeline, a pipeline's folder or a denoiser's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.api import denoiser
from gen_turbo.bench.denoisers import Denoiser
from gen_turbo.bench.gpu.cases import PUBLISHED, Case, pipeline
from gen_turbo.bench.gpu.pipeline import BarePipeline
from gen_turbo.factory import build_pipeline, load_pipeline
from gen_turbo.schemas import PipelineConfig

_LATENT_SCALE = 8
_PROMPT = "a photograph of a red barn in a field"
_WIDE = ("Flux", "Wan")
"""Classes whose activations leave the range of float16."""
_TEXT_WIDTH = ("cross_attention_dim", "joint_attention_dim", "text_dim")


class _SeenError(Exception):
    """Ends a pipeline's run once its denoiser has been called."""


def load(name: str, pixels: int | None, device: torch.device) -> tuple[BarePipeline, dict[str, Any]]:
    """Loads a model and puts a denoising loop around it.

    Args:
        name: A pipeline configuration, such as "tiny", a YAML file, or the folder of a diffusers pipeline or model.
        pixels: Side of the images; the model's own by default.
        device: Where it is to run, in a half type on a GPU.

    Returns:
        The loop, and what defines model and size for the records.

    Raises:
        ValueError: If there is no such model, or it is of a class whose inputs are not known.
    """
    folder = Path(name)
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        return _of_model(folder, pixels, device)
    if (folder / "model_index.json").is_file():
        pipe: Any = build_pipeline(PipelineConfig(checkpoint=name, pipeline="text-to-image", device="cpu"))
    else:
        pipe = load_pipeline(name, processor=None, device="cpu")
    try:
        model = denoiser(pipe)
    except TypeError as error:
        raise ValueError(f"{name} makes no images that can be measured here: {error}") from error
    pipe.to(device, _dtype(type(model).__name__, device))
    pipe.set_progress_bar_config(disable=True)
    loop = _of_pipeline(pipe, model, pixels)
    return loop, _params(folder.name, model, loop)


def _of_model(folder: Path, pixels: int | None, device: torch.device) -> tuple[BarePipeline, dict[str, Any]]:
    import diffusers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config.get("_class_name", "")
    like = next((known for known in PUBLISHED.values() if known.model == name), None)
    if like is None:
        known = ", ".join(dict.fromkeys(known.model for known in PUBLISHED.values()))
        raise ValueError(f"the inputs of a {name or 'model without a class'} are not known; name the folder of its "
                         f"whole pipeline, or of one of: {known}")  # fmt: skip
    model: Any = getattr(diffusers, name).from_pretrained(folder, torch_dtype=_dtype(name, device))
    model.eval().to(device)
    own = dict(model.config)
    width = next((own[key] for key in _TEXT_WIDTH if key in own), like.text[1])
    described = Denoiser(folder.name, name, own, {}, (like.text[0], width), own["in_channels"], like.patch)
    if name == "PixArtTransformer2DModel":
        described = Denoiser(folder.name, name, own, {}, (like.text[0], own["caption_channels"]), own["in_channels"], 2)
    side = pixels or int(own.get("sample_size") or 128) * _LATENT_SCALE
    is_guided = not name.startswith(_WIDE)
    case = Case(folder.name, folder.name, side, side, batch=1 + is_guided)
    loop = pipeline(case, model, described)
    return loop, _params(folder.name, model, loop)


def _of_pipeline(pipe: Any, model: nn.Module, pixels: int | None) -> BarePipeline:
    """A loop that calls the denoiser with what the pipeline gives it in its first step."""
    seen: dict[str, Any] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, args=args)
        raise _SeenError

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    size = {} if pixels is None else {"height": pixels, "width": pixels}
    try:
        pipe(_PROMPT, num_inference_steps=2, output_type="latent", **size)
    except _SeenError:
        pass
    finally:
        handle.remove()
    args = list(seen.pop("args"))
    sample = args.pop(0) if args else seen.pop("hidden_states" if "hidden_states" in seen else "sample")
    time = args.pop(0) if args else seen.pop("timestep")
    seen.pop("return_dict", None)
    if args or not isinstance(sample, Tensor) or not isinstance(time, Tensor):
        raise ValueError(f"{type(pipe).__name__} calls its denoiser in a way that cannot be repeated here")
    half, rest = divmod(len(sample), 2)
    is_guided = rest == 0 and bool(torch.equal(sample[:half], sample[half:]))
    scale = float(time.reshape(-1)[0]) / float(pipe.scheduler.timesteps[0])
    return BarePipeline(model, sample[:half] if is_guided else sample, seen, time, scale, is_guided)


def _params(name: str, model: Any, loop: BarePipeline) -> dict[str, Any]:
    dtype = str(model.dtype).removeprefix("torch.")
    return {"model": name, "pixels": "x".join(map(str, loop.latent_shape[2:])) + " latents", "dtype": dtype}


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if name.startswith(_WIDE) else torch.float16
