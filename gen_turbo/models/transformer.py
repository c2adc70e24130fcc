"""Diffusion transformers: layers by name patterns, models that take latents and a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import Grid
from gen_turbo.models.adapter import Geometry, LayerSignature, LayerSpec, ModelCall, TextSignature, Unit, units_of
from gen_turbo.models.inputs import num_images, time_of
from gen_turbo.tokens.score import attention_column_mean

_NUM_QUERIES = 256
FrameGrid = tuple[int, Grid | None]
"""Frames, and (height, width) of the tokens of one."""


def patches(model: Any, arguments: Mapping[str, Any]) -> FrameGrid:
    """Frames and grid of latents (B, C, h, w) or (B, C, frames, h, w), by the sizes of the model's patches."""
    return patches_of(model, arguments["hidden_states"])


def patches_of(model: Any, sample: Tensor) -> FrameGrid:
    """The same for given latents."""
    patch = model.config.patch_size
    if isinstance(patch, tuple | list):
        frames, height, width = patch
    else:
        frames, height, width = getattr(model.config, "patch_size_t", None) or 1, patch, patch
    num_frames = sample.shape[2] // frames if sample.ndim == 5 else 1
    return num_frames, (sample.shape[-2] // height, sample.shape[-1] // width)


def no_text(model: Any, arguments: Mapping[str, Any]) -> int:
    """Text, if any, is in cross-attention."""
    return 0


def text_length(model: Any, arguments: Mapping[str, Any]) -> int:
    """Every row of the text that the model is given."""
    return int(arguments["encoder_hidden_states"].shape[1])


def latents(arguments: Mapping[str, Any]) -> ModelCall:
    """Latents, time and text by their usual names."""
    return ModelCall(arguments["hidden_states"], arguments["timestep"], arguments.get("encoder_hidden_states"))


@dataclass(frozen=True)
class TransformerAdapter:
    """One family of transformers; everything in which families differ is a field.

    Attributes:
        models: Names of the model classes.
        attention: The signature of attention layers by name pattern, in which `*` stands for one part of a path.
        whole: The signature of blocks by name pattern; empty where whole-block merging is not offered.
        to_time: From the time that the model is given to the scheduler's, falling; negative where that rises.
        grid: Frames and grid of a call.
        num_text: Text tokens that share attention with the image tokens.
        text: Where the model is given text that can be merged, or why there is none.
        reading: Reads the arguments of a call.
        is_one_stack: Whether each block reads what the one before it gives, from the first stack to the last.
        is_transformer: Whether all blocks follow each other at one resolution.
    """

    models: tuple[str, ...]
    attention: Mapping[str, LayerSignature]
    whole: Mapping[str, LayerSignature] = field(default_factory=dict)
    to_time: Callable[[float], float] = float
    grid: Callable[[Any, Mapping[str, Any]], FrameGrid] = patches
    num_text: Callable[[Any, Mapping[str, Any]], int] = no_text
    text: TextSignature | str | Callable[[Any], TextSignature | str] = "its image tokens share no attention with text"
    reading: Callable[[Mapping[str, Any]], ModelCall] = latents
    is_one_stack: bool = False
    is_transformer: bool = True

    def layers(self, model: nn.Module) -> list[LayerSpec]:
        """Every module with an attention processor, whether the model lists them or not."""
        named = ((name, module) for name, module in model.named_modules() if hasattr(module, "processor"))
        found = ((name, _matching(self.attention, name)) for name, _ in named)
        return [
            LayerSpec(name, signature=signature) if signature else LayerSpec(name, left_alone="not over image tokens")
            for name, signature in found
        ]

    def blocks(self, model: nn.Module) -> list[LayerSpec]:
        """Every block of a known signature."""
        named = ((name, _matching(self.whole, name)) for name, _ in model.named_modules())
        return [LayerSpec(name, signature=signature) for name, signature in named if signature]

    def units(self, model: nn.Module) -> dict[str, Unit]:
        """What can be skipped: the whole transformer and its blocks."""
        return units_of(model, self)

    def text_signature(self, model: nn.Module) -> TextSignature | str:
        """Where the model is given text that can be merged, or why there is none."""
        return self.text(model) if callable(self.text) else self.text

    def read(self, arguments: Mapping[str, Any]) -> ModelCall:
        """Latents, time and text of one call."""
        return self.reading(arguments)

    def time(self, timestep: Any) -> float:
        """The time as the scheduler counts it, falling; negative where the scheduler's time rises."""
        return self.to_time(time_of(timestep))

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        """Frames, grid, text tokens and repeated images of a call."""
        sample = self.reading(arguments).sample
        num_frames, grid = self.grid(model, arguments)
        return Geometry(grid, num_frames, self.num_text(model, arguments), num_images(sample))

    def semantic_value(self, layer: nn.Module, tokens: Tensor, kind: str, condition: Tensor | None) -> Tensor | None:
        """The attention column mean over strided queries for "self", before positions; nothing for other kinds."""
        if kind != "self" or not all(hasattr(layer, name) for name in ("to_q", "to_k", "heads")):
            return None
        queries = tokens[:, :: max(1, tokens.shape[1] // _NUM_QUERIES)]
        channels = int(layer.get_submodule("to_q").out_features) // int(layer.heads)  # type: ignore[arg-type]
        q = _heads(layer, "q", queries, channels)
        k = _heads(layer, "k", tokens, channels)
        return attention_column_mean(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))


def _matching(signatures: Mapping[str, LayerSignature], name: str) -> LayerSignature | None:
    return next((signature for pattern, signature in signatures.items() if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


def _heads(layer: nn.Module, role: str, tokens: Tensor, channels: int) -> Tensor:
    """Projects tokens to normed queries or keys (B, heads, N, channels of a head)."""
    x = layer.get_submodule(f"to_{role}")(tokens)
    norm = getattr(layer, f"norm_{role}", None)
    weight = getattr(norm, "weight", None)
    is_whole = weight is not None and int(weight.shape[-1]) != channels
    x = norm(x) if norm is not None and is_whole else x
    x = x.view(*x.shape[:2], -1, channels)
    x = x if norm is None or is_whole else norm(x)
    return torch.transpose(x, 1, 2)
