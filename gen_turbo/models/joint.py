"""Joint attention of an image and a text stream; the text goes through unmerged: SD3, AuraFlow, CogView, Qwen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from gen_turbo.engine.base import SELF_ATTENTION, Form, Observation, Table, TextForm
from gen_turbo.method import Grid
from gen_turbo.models.transformer import POSITIONS_INSIDE, TransformerHost, text_length

_TEXT_FIRST = Form(keys_before=True, has_text_keys=True, none=())
_ROTARY = Form(keys_before=True, has_text_keys=True, none=(), tables=(Table("image_rotary_emb"),))


class JointHost(TransformerHost):
    """A transformer whose text shares attention with the image."""

    def num_text(self, arguments: Mapping[str, Any]) -> int:
        """Every row of the text that the root is given."""
        return text_length(arguments)

    def text_form(self, model: nn.Module) -> TextForm | str:
        """The text, whose order the model does not see."""
        return TextForm()


class SD3Host(JointHost):
    """SD3 and SD3.5: positions are in the tokens; dual layers attend to the image once more."""

    models = ("SD3Transformer2DModel",)
    attention = {"transformer_blocks.*.attn": Form(has_text_keys=True), "transformer_blocks.*.attn2": SELF_ATTENTION}
    whole = {"transformer_blocks.*": Form(is_residual=True, none=(), outputs=(1,))}


class AuraFlowHost(JointHost):
    """AuraFlow: joint blocks, then blocks of one stream, registers and text first."""

    models = ("AuraFlowTransformer2DModel",)
    attention = {
        "joint_transformer_blocks.*.attn": _TEXT_FIRST,
        "single_transformer_blocks.*.attn": Form(has_text_before=True, keys_before=True, has_text_keys=True),
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
        return replace(seen, num_text=seen.num_text + _num_registers(model))

    def text_form(self, model: nn.Module) -> TextForm | str:
        """The text alone; the pipeline makes its padding zero."""
        return TextForm(num_before=_num_registers(model))


class CogViewHost(JointHost):
    """CogView4 and CogView3Plus."""

    models = ("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel")
    attention = {"transformer_blocks.*.attn1": _ROTARY}
    whole = {"transformer_blocks.*": Form(is_residual=True, none=(), tables=(Table("image_rotary_emb"),))}

    def text_form(self, model: nn.Module) -> TextForm | str:
        """The text, with the mask that CogView4 takes."""
        return TextForm(mask="attention_mask")


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

    def text_form(self, model: nn.Module) -> TextForm | str:
        """None."""
        return POSITIONS_INSIDE

    def time(self, arguments: Mapping[str, Any]) -> float:
        """The pipeline passes thousandths."""
        return 1000 * super().time(arguments)

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, Grid | None]:
        """The one picture of every row; several pictures in a row have no common grid."""
        shapes = arguments["img_shapes"]
        pictures = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
        return (pictures[0][0], tuple(pictures[0][1:])) if len(pictures) == 1 else (1, None)


def _num_registers(model: nn.Module) -> int:
    registers: Any = model.register_tokens
    return int(registers.shape[1])
