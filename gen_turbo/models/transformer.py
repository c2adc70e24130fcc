"""What the hosts of diffusion transformers share: layers by name patterns, roots that take latents and a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.base import Form, Layer, Observation, Part, TextForm
from gen_turbo.engine.routed import denoiser_part
from gen_turbo.engine.units import Unit, units_of
from gen_turbo.method import Grid, TokenReducer
from gen_turbo.models.observe import layout_of, num_pictures, time_of
from gen_turbo.tokens.score import attention_column_mean

_NUM_QUERIES = 256
POSITIONS_INSIDE = "it gives text its positions inside"
"""Why some models' text cannot be merged: what is left of it would get other positions."""


class TransformerHost:
    """One family of transformers; a subclass says what differs.

    Attributes:
        models: Names of the model classes.
        attention: The form of attention layers by name pattern, in which `*` stands for one part of a path.
        whole: The form of blocks by name pattern; empty where whole-block merging is not offered.
    """

    models: tuple[str, ...] = ()
    attention: Mapping[str, Form] = {}
    whole: Mapping[str, Form] = {}

    def attachment(self, model: nn.Module, reducer: TokenReducer, pipeline: Any | None) -> Part:
        """Prepares a reducer for the transformer."""
        return denoiser_part(model, self, reducer, pipeline)

    def units(self, model: nn.Module) -> dict[str, Unit]:
        """What can be skipped: the whole transformer and its blocks."""
        return units_of(model, self)

    def layers(self, model: nn.Module) -> list[Layer]:
        """Every module with an attention processor, whether the model lists them or not."""
        found = []
        for name, module in model.named_modules():
            if hasattr(module, "processor"):
                form = _matching(self.attention, name)
                why = self.left_alone(name, module) if form else "not over image tokens"
                found.append(Layer(name, left_alone=why, form=form) if form else Layer(name, left_alone=why))
        return found

    def left_alone(self, name: str, module: nn.Module) -> str:
        """Why a layer of a known form cannot be reduced after all; empty if it can."""
        return ""

    def blocks(self, model: nn.Module) -> list[Layer]:
        """Every block of a known form."""
        named = ((name, _matching(self.whole, name)) for name, _ in model.named_modules())
        return [Layer(name, form=form) for name, form in named if form]

    def text_form(self, model: nn.Module) -> TextForm | str:
        """Where the root is given text that can be merged, or why there is none."""
        return "its image tokens share no attention with text"

    def text_projections(self, model: nn.Module) -> list[str]:
        """None: the text that reaches the layers is made anew in every step."""
        return []

    def observe(self, model: nn.Module, arguments: Mapping[str, Any]) -> Observation:
        """Reads latents, time and text of one call."""
        sample = self.sample(arguments)
        num_frames, grid = self.grid(model, arguments)
        return Observation(
            self.time(arguments),
            grid,
            layout_of(sample),
            arguments.get("encoder_hidden_states"),
            num_frames,
            self.num_text(arguments),
            num_pictures=num_pictures(sample),
        )

    def sample(self, arguments: Mapping[str, Any]) -> Tensor:
        """The latents, a batch first."""
        latents: Tensor = arguments["hidden_states"]
        return latents

    def time(self, arguments: Mapping[str, Any]) -> float:
        """The time as the scheduler counts it, falling; negative where the scheduler's time rises."""
        return time_of(arguments["timestep"])

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, Grid | None]:
        """Frames, and (height, width) of the tokens of one."""
        return patches(model, self.sample(arguments))

    def num_text(self, arguments: Mapping[str, Any]) -> int:
        """Text tokens that share attention with the image tokens."""
        return 0

    def semantic_value(self, layer: nn.Module, tokens: Tensor, kind: str, condition: Tensor | None) -> Tensor | None:
        """The attention column mean over strided queries for "self", before positions; nothing for other kinds."""
        if kind != "self" or not all(hasattr(layer, name) for name in ("to_q", "to_k", "heads")):
            return None
        queries = tokens[:, :: max(1, tokens.shape[1] // _NUM_QUERIES)]
        channels = _channels(layer)
        q = _heads(layer, "q", queries, channels)
        k = _heads(layer, "k", tokens, channels)
        return attention_column_mean(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))


def patches(model: Any, sample: Tensor) -> tuple[int, Grid]:
    """Frames and grid of latents (B, C, h, w) or (B, C, frames, h, w), by the sizes of the model's patches."""
    patch = model.config.patch_size
    if isinstance(patch, tuple | list):
        frames, height, width = patch
    else:
        frames, height, width = getattr(model.config, "patch_size_t", None) or 1, patch, patch
    num_frames = sample.shape[2] // frames if sample.ndim == 5 else 1
    return num_frames, (sample.shape[-2] // height, sample.shape[-1] // width)


def text_length(arguments: Mapping[str, Any]) -> int:
    """Rows of the text that the root is given."""
    return int(arguments["encoder_hidden_states"].shape[1])


def _matching(forms: Mapping[str, Form], name: str) -> Form | None:
    return next((form for pattern, form in forms.items() if _matches(pattern, name)), None)


def _matches(pattern: str, name: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts, strict=True))


def _channels(layer: nn.Module) -> int:
    to_q, heads = layer.get_submodule("to_q"), layer.heads
    return int(to_q.out_features) // int(heads)  # type: ignore[arg-type]


def _heads(layer: nn.Module, role: str, tokens: Tensor, channels: int) -> Tensor:
    """Projects tokens to normed queries or keys (B, heads, N, channels of a head)."""
    x = layer.get_submodule(f"to_{role}")(tokens)
    norm = getattr(layer, f"norm_{role}", None)
    is_whole = norm is not None and _norm_size(norm) not in (None, channels)
    x = norm(x) if norm is not None and is_whole else x
    x = x.view(*x.shape[:2], -1, channels)
    x = x if norm is None or is_whole else norm(x)
    return torch.transpose(x, 1, 2)


def _norm_size(norm: Any) -> int | None:
    weight = getattr(norm, "weight", None)
    return None if weight is None else int(weight.shape[-1])
