"""Joint attention of an image and a text stream; the text goes through unmerged: SD3, AuraFlow, CogView, Qwen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from gen_turbo.contract import Grid
from gen_turbo.hosts.base import SELF_ATTENTION, Form, Observation, Table
from gen_turbo.hosts.diffusion.transformer import TransformerHost, text_length

_TEXT_FIRST = Form(keys_before=True, none=())
_ROTARY = Form(keys_before=True, none=(), tables=(Table("image_rotary_emb"),))


class JointHost(TransformerHost):
    """A transformer whose text shares attention with the image."""

    def num_text(self, arguments: Mapping[str, Any]) -> int:
        """Every row of the text that the root is given."""
        return text_length(arguments)


class SD3Host(JointHost):
    """SD3 and SD3.5: positions are in the tokens; dual layers attend to the image once more."""

    models = ("SD3Transformer2DModel",)
    attention = {"transformer_blocks.*.attn": Form(has_text_keys=True), "transformer_blocks.*.attn2": SELF_ATTENTION}
    whole = {"transformer_blocks.*": Form(is_residual=True, none=(), outputs=(1,))}
    text = ("encoder_hidden_states",)


class AuraFlowHost(JointHost):
    """AuraFlow: joint blocks, then blocks of one stream, registers and text first."""

    models = ("AuraFlowTransformer2DModel",)
    attention = {
        "joint_transformer_blocks.*.attn": _TEXT_FIRST,
        "single_transformer_blocks.*.attn": Form(has_text_before=True, keys_before=True),
    }
    whole = {
        "joint_transformer_blocks.*": Form(is_residual=True, none=(), outputs=(1,)),
        "single_transformer_blocks.*": Form(is_residual=True, none=(), has_text_before=True),
    }

    def time(self, arguments: Mapping[str, Any]) -> float:
        """The pipeline passes thousandths."""
        return 1000 * super().time(arguments)

    def observe(self, model: nn.Module, arguments: Mapping[str, Any]) -> Observation:
        """The model puts its registers before the text."""
        seen = super().observe(model, arguments)
        registers: Any = model.register_tokens
        return replace(seen, num_text=seen.num_text + int(registers.shape[1]))


class CogViewHost(JointHost):
    """CogView4 and CogView3Plus."""

    models = ("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel")
    attention = {"transformer_blocks.*.attn1": _ROTARY}
    whole = {"transformer_blocks.*": Form(is_residual=True, none=(), tables=(Table("image_rotary_emb"),))}


class QwenImageHost(JointHost):
    """Qwen-Image: the rotary tables of image and text come side by side."""

    models = ("QwenImageTransformer2DModel",)
    attention = {"transformer_blocks.*.attn": Form(keys_before=True, tables=(Table("image_rotary_emb", items=(0,)),))}
    whole = {
        "transformer_blocks.*": Form(
            is_residual=True,
            none=("modulate_index",),
            outputs=(1,),
            tables=(Table("image_rotary_emb", items=(0,)),),
        )
    }

    def time(self, arguments: Mapping[str, Any]) -> float:
        """The pipeline passes thousandths."""
        return 1000 * super().time(arguments)

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, Grid | None]:
        """The one picture of every row; several pictures in a row have no common grid."""
        shapes = arguments["img_shapes"]
        pictures = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
        return (pictures[0][0], tuple(pictures[0][1:])) if len(pictures) == 1 else (1, None)
