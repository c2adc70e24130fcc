"""One stream of text and image through every layer, entered by module: Lumina2, Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.base import Form, Observation, Table, TextForm
from gen_turbo.method import Grid
from gen_turbo.models.observe import layout_of, num_pictures, time_of
from gen_turbo.models.transformer import POSITIONS_INSIDE, TransformerHost

_LUMINA = Table("image_rotary_emb", axis=1, has_batch=True)
_Z_TABLES = (Table("freqs_cis", axis=1, has_batch=True),)


class Lumina2Host(TransformerHost):
    """Lumina2: text first. Rows with texts of several lengths are masked and left alone."""

    models = ("Lumina2Transformer2DModel",)
    attention = {
        "layers.*.attn": Form(
            has_text_before=True,
            keys_before=True,
            also=("encoder_hidden_states",),
            tables=(Table("image_rotary_emb", axis=1, has_batch=True, has_text_before=True),),
        ),
        "noise_refiner.*.attn": Form(also=("encoder_hidden_states",), tables=(_LUMINA,)),
    }
    whole = {
        "layers.*": Form(
            is_residual=True,
            has_text_before=True,
            tables=(Table("image_rotary_emb", axis=1, has_batch=True, has_text_before=True),),
        ),
        "noise_refiner.*": Form(is_residual=True, tables=(_LUMINA,)),
    }

    def time(self, arguments: Mapping[str, Any]) -> float:
        """The pipeline passes a share of the way from noise to picture, which rises."""
        return 1000 * (1 - super().time(arguments))

    def text_form(self, model: nn.Module) -> TextForm | str:
        """None."""
        return POSITIONS_INSIDE

    def num_text(self, arguments: Mapping[str, Any]) -> int:
        """Words of the longest text; where rows differ, the layers get a mask."""
        return int(arguments["encoder_attention_mask"].sum(1).max())


class ZImageHost(TransformerHost):
    """Z-Image: image first, then padding and text; latents and texts come as lists."""

    models = ("ZImageTransformer2DModel",)
    attention = {
        "layers.*.attention": Form(has_text_after=True, tables=_Z_TABLES),
        "noise_refiner.*.attention": Form(has_text_after=True, tables=_Z_TABLES),
    }
    whole = {
        "layers.*": Form(
            "x", is_residual=True, has_text_after=True, none=("attn_mask", "noise_mask"), tables=_Z_TABLES
        ),
        "noise_refiner.*": Form(
            "x", is_residual=True, has_text_after=True, none=("attn_mask", "noise_mask"), tables=_Z_TABLES
        ),
    }

    def text_form(self, model: nn.Module) -> TextForm | str:
        """None."""
        return POSITIONS_INSIDE

    def observe(self, model: nn.Module, arguments: Mapping[str, Any]) -> Observation:
        """Reads lists of latents and texts; their first text tells runs of guidance apart."""
        images = arguments["x"]
        is_simple = isinstance(images[0], Tensor) and len({image.shape for image in images}) == 1
        if not is_simple:
            return Observation(_falling(arguments), None, (str(type(images[0])), len(images)), None)
        sample = torch.stack(list(images))
        frames, grid = self.grid(model, {**arguments, "hidden_states": sample})
        text = arguments["cap_feats"][0]
        return Observation(
            _falling(arguments), grid, layout_of(sample), text, frames, num_pictures=num_pictures(sample)
        )

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, Grid | None]:
        """Frames and grid by the patch sizes that the call asks for."""
        patch, patch_frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
        frames, height, width = arguments["hidden_states"].shape[2:]
        return frames // patch_frames, (height // patch, width // patch)


def _falling(arguments: Mapping[str, Any]) -> float:
    return 1000 * (1 - time_of(arguments["t"]))
