"""Diffusion transformers: layers by name patterns, models that take latents and a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.models.adapter import Geometry, LayerSignature, LayerSpec, ModelCall, Unit, units_of
from gen_turbo.models.conditions import Region, Text
from gen_turbo.models.inputs import num_images, time_of
from gen_turbo.tokens.score import attention_column_mean

_NUM_QUERIES = 256
_FUSED = "to_qkv_mlp_proj"
_PROJECTIONS = (("to_q", "to_query"), ("to_k", "to_key"))
_NORMS = (("norm_q", "query_norm", "q_rms_norm"), ("norm_k", "key_norm", "k_rms_norm"))
Regions = tuple[Region, ...]
"""The target first, then what stands behind it in the sequence; empty where the tokens are no rectangles."""


def patches(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """Frames and grid of latents (B, C, h, w) or (B, C, frames, h, w), by the sizes of the model's patches."""
    return patches_of(model, arguments["hidden_states"])


def patches_of(model: Any, sample: Tensor) -> Regions:
    """The same for given latents."""
    patch = model.config.patch_size
    if not isinstance(patch, tuple | list):
        patch = getattr(model.config, "patch_size_t", None) or 1, patch, patch
    frames, height, width = (1, *patch)[-3:]
    num_frames = sample.shape[2] // frames if sample.ndim == 5 else 1
    return (Region(num_frames, (sample.shape[-2] // height, sample.shape[-1] // width)),)


def sizes_given(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """As the call says; none where coordinates say it."""
    frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    return (Region(frames, (height, width)),) if frames and height and width else ()


def no_text(model: Any, arguments: Mapping[str, Any]) -> int:
    """Text, if any, is in cross-attention."""
    return 0


def text_length(model: Any, arguments: Mapping[str, Any]) -> int:
    """Every row of the text that the model is given."""
    return int(arguments["encoder_hidden_states"].shape[1])


def nothing_between(model: Any, name: str) -> bool:
    """Blocks hand their tokens to each other."""
    return False


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
        regions: Frames and grids of a call, the target's first.
        has_references: Whether images may stand beside the target.
        left_alone: Why a call cannot run on merged tokens; empty if it can.
        num_text: Text tokens that share attention with the image tokens.
        num_sound: Tokens of the sound beside a video.
        counts: Tokens that modules read which are not one per image or text token, by the beginning of their names.
        caches_text: Whether text gives keys and values alone, for the model keeps them or has no queries of it.
        text: Where the model is given text that can be merged or cut, or why there is none.
        reading: Reads the arguments of a call.
        is_one_stack: Whether each block reads what the one before it gives, from the first stack to the last.
        ends_span: Whether a model reads every token between a block, by name, and the next one.
        positions: Modules that make positions, by path, each called once a call, and the arguments of the model that
            these depend on beside shapes.
        is_transformer: Whether all blocks follow each other at one resolution.
    """

    models: tuple[str, ...]
    attention: Mapping[str, LayerSignature]
    whole: Mapping[str, LayerSignature] = field(default_factory=dict)
    to_time: Callable[[float], float] = float
    regions: Callable[[Any, Mapping[str, Any]], Regions] = patches
    has_references: bool = False
    left_alone: Callable[[Mapping[str, Any]], str] = lambda arguments: ""
    num_text: Callable[[Any, Mapping[str, Any]], int] = no_text
    num_sound: Callable[[Any, Mapping[str, Any]], int] = no_text
    counts: Callable[[Mapping[str, Any]], Mapping[str, int]] = lambda arguments: {}
    caches_text: bool = False
    text: Text | Callable[[Any], Text] = "its image tokens share no attention with text"
    reading: Callable[[Mapping[str, Any]], ModelCall] = latents
    is_one_stack: bool = False
    ends_span: Callable[[Any, str], bool] = nothing_between
    positions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_transformer: bool = True

    def layers(self, model: nn.Module) -> list[LayerSpec]:
        """Every module with an attention processor, whether the model lists them or not."""
        named = ((name, module) for name, module in model.named_modules() if hasattr(module, "processor"))
        found = ((name, module, _matching(self.attention, name)) for name, module in named)
        return [
            LayerSpec(name, signature=signature, unread=_unread(module))
            if signature
            else LayerSpec(name, left_alone="not over image tokens")
            for name, module, signature in found
        ]

    def blocks(self, model: nn.Module) -> list[LayerSpec]:
        """Every block of a known signature."""
        named = ((name, _matching(self.whole, name)) for name, _ in model.named_modules())
        return [
            LayerSpec(name, signature=signature, ends_span=self.ends_span(model, name))
            for name, signature in named
            if signature
        ]

    def units(self, model: nn.Module) -> dict[str, Unit]:
        """What can be skipped: the whole transformer and its blocks."""
        return units_of(model, self)

    def text_signature(self, model: nn.Module) -> Text:
        """Where the model is given text that can be merged or cut, or why there is none."""
        return self.text(model) if callable(self.text) else self.text

    def read(self, arguments: Mapping[str, Any]) -> ModelCall:
        """Latents, time and text of one call."""
        return self.reading(arguments)

    def time(self, timestep: Any) -> float:
        """The time as the scheduler counts it, falling; negative where the scheduler's time rises."""
        return self.to_time(time_of(timestep))

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        """Frames, grid, text tokens, repeated images and references of a call."""
        num_text, repeated = self.num_text(model, arguments), num_images(self.reading(arguments).sample)
        regions, why = self.regions(model, arguments), self.left_alone(arguments)
        return Geometry(
            regions[0].grid if regions else None,
            regions[0].num_frames if regions else 1,
            num_text,
            repeated,
            regions[1:],
            why,
            self.caches_text,
            self.num_sound(model, arguments),
            tuple(self.counts(arguments).items()),
        )

    def semantic_value(self, layer: nn.Module, tokens: Tensor, kind: str, condition: Tensor | None) -> Tensor | None:
        """The attention column mean over strided queries for "self", before positions; nothing for other kinds."""
        if kind != "self" or not _knows_heads(layer):
            return None
        queries = tokens[:, :: max(1, tokens.shape[1] // _NUM_QUERIES)]
        q, k = _heads(layer, 0, queries), _heads(layer, 1, tokens)
        return attention_column_mean(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))


def _matching(signatures: Mapping[str, LayerSignature], name: str) -> LayerSignature | None:
    return next((signature for pattern, signature in signatures.items() if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


def _unread(layer: Any) -> tuple[int, ...]:
    """The text, by the sign of diffusers, where no layer follows that would read it."""
    return (1,) if getattr(layer, "context_pre_only", False) else ()


def _knows_heads(layer: nn.Module) -> bool:
    return _number_of_heads(layer) > 0 and any(hasattr(layer, name) for name in ("to_q", "to_query", _FUSED))


def _number_of_heads(layer: Any) -> int:
    return int(getattr(layer, "heads", 0) or getattr(layer, "num_heads", 0))


def _heads(layer: Any, role: int, tokens: Tensor) -> Tensor:
    """Projects tokens to normed queries (role 0) or keys (1), (B, heads, N, channels of a head)."""
    fused = getattr(layer, _FUSED, None)
    if fused is not None:
        x = fused(tokens)[..., role * layer.inner_dim : (role + 1) * layer.inner_dim]
        channels = layer.inner_dim // _number_of_heads(layer)
    else:
        x = _first_of(layer, _PROJECTIONS[role])(tokens)
        channels = _first_of(layer, _PROJECTIONS[0]).out_features // _number_of_heads(layer)
    norm = _first_of(layer, _NORMS[role])
    weight = getattr(norm, "weight", None)
    is_whole = weight is not None and int(weight.shape[-1]) != channels
    x = norm(x) if norm is not None and is_whole else x
    x = x.view(*x.shape[:2], -1, channels)
    x = x if norm is None or is_whole else norm(x)
    return torch.transpose(x, 1, 2)


def _first_of(layer: nn.Module, names: tuple[str, ...]) -> Any:
    """The first of several attributes that a layer has; None where it has none."""
    return next((getattr(layer, name) for name in names if hasattr(layer, name)), None)
