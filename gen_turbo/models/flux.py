"""Flux and Chroma: blocks of two streams, then blocks of one stream, text first, rotary positions over both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gen_turbo.engine.base import Form, Table, TextForm
from gen_turbo.method import Grid
from gen_turbo.models.transformer import TransformerHost, text_length

_TABLES = (Table("image_rotary_emb", has_text_before=True),)


class FluxHost(TransformerHost):
    """Flux.1 and its relatives; one plan serves the batch, because positions have no batch axis."""

    models = ("FluxTransformer2DModel",)
    attention = {
        "transformer_blocks.*.attn": Form(keys_before=True, has_text_keys=True, outputs=(0, 2), tables=_TABLES),
        "single_transformer_blocks.*.attn": Form(
            none=("encoder_hidden_states", "attention_mask"),
            has_text_before=True,
            keys_before=True,
            has_text_keys=True,
            tables=_TABLES,
        ),
    }
    whole = {
        "transformer_blocks.*": Form(is_residual=True, outputs=(1,), none=(), tables=_TABLES),
        "single_transformer_blocks.*": Form(is_residual=True, outputs=(1,), none=(), tables=_TABLES),
    }

    def time(self, arguments: Mapping[str, Any]) -> float:
        """The pipeline passes thousandths."""
        return 1000 * super().time(arguments)

    def text_form(self, model: nn.Module) -> TextForm | str:
        """The text and its positions."""
        return TextForm(positions="txt_ids")

    def num_text(self, arguments: Mapping[str, Any]) -> int:
        """Every row of the text that the root is given."""
        return text_length(arguments)

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, Grid | None]:
        """Rows and columns by the largest position; pictures of one size that follow each other are frames."""
        height, width = (int(last) + 1 for last in arguments["img_ids"].reshape(-1, 3)[:, 1:].amax(0).tolist())
        num_frames, rest = divmod(arguments["hidden_states"].shape[1], height * width)
        return (num_frames, (height, width)) if rest == 0 else (1, None)


_PAIRS = tuple(Table("attention_mask", axis=axis, has_batch=True, has_text_before=True) for axis in (2, 3))
_MASK = (Table("attention_mask", axis=1, has_batch=True, has_text_before=True),)


class ChromaHost(FluxHost):
    """Chroma: a mask for the padding of the text, and single blocks that get both streams as one."""

    models = ("ChromaTransformer2DModel",)
    attention = {
        "transformer_blocks.*.attn": Form(
            keys_before=True, has_text_keys=True, none=(), outputs=(0, 2), tables=_TABLES + _PAIRS
        ),
        "single_transformer_blocks.*.attn": Form(
            none=("encoder_hidden_states",),
            has_text_before=True,
            keys_before=True,
            has_text_keys=True,
            tables=_TABLES + _PAIRS,
        ),
    }
    whole = {
        "transformer_blocks.*": Form(is_residual=True, outputs=(1,), none=(), tables=_TABLES + _MASK),
        "single_transformer_blocks.*": Form(is_residual=True, none=(), has_text_before=True, tables=_TABLES + _MASK),
    }

    def text_form(self, model: nn.Module) -> TextForm | str:
        """The mask is added to attention's logits and so hides nothing; it goes with the tokens."""
        return TextForm(positions="txt_ids", mask="attention_mask")
