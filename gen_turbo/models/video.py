"""Video transformers, whose tokens are frames of one grid: Wan, LTX-Video, CogVideoX, Mochi, HunyuanVideo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gen_turbo.engine.base import Form, Table, TextForm
from gen_turbo.method import Grid
from gen_turbo.models.transformer import TransformerHost, text_length

_SELF = ("encoder_hidden_states", "attention_mask")
_ROTARY = (Table("image_rotary_emb"),)


class WanHost(TransformerHost):
    """Wan: self-attention over frames, text in cross-attention."""

    models = ("WanTransformer3DModel",)
    attention = {"blocks.*.attn1": Form(none=_SELF, tables=(Table("rotary_emb", axis=1),))}
    whole = {"blocks.*": Form(is_residual=True, none=(), tables=(Table("rotary_emb", axis=1),))}


class LTXHost(TransformerHost):
    """LTX-Video: packed latents; frames and size are arguments."""

    models = ("LTXVideoTransformer3DModel",)
    attention = {
        "transformer_blocks.*.attn1": Form(none=_SELF, tables=(Table("image_rotary_emb", axis=1, has_batch=True),))
    }
    whole = {
        "transformer_blocks.*": Form(
            is_residual=True, none=(), tables=(Table("image_rotary_emb", axis=1, has_batch=True),)
        )
    }

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, Grid | None]:
        """As the call says; None where it leaves that to coordinates."""
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        return (frames, (height, width)) if frames and height and width else (1, None)


class CogVideoXHost(TransformerHost):
    """CogVideoX: joint attention, text first; latents are (batch, frames, channels, height, width)."""

    models = ("CogVideoXTransformer3DModel",)
    attention = {"transformer_blocks.*.attn1": Form(keys_before=True, has_text_keys=True, tables=_ROTARY)}
    whole = {"transformer_blocks.*": Form(is_residual=True, none=(), tables=_ROTARY)}

    def num_text(self, arguments: Mapping[str, Any]) -> int:
        """Every row of the text that the root is given."""
        return text_length(arguments)

    def text_form(self, model: nn.Module) -> TextForm | str:
        """The text, where no table of positions fixes how long it is."""
        embed: Any = model.patch_embed
        is_fixed = embed.use_positional_embeddings or embed.use_learned_positional_embeddings
        return "its table of positions fixes the length of the text" if is_fixed else TextForm()

    def grid(self, model: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, Grid | None]:
        """Frames stand before channels."""
        frames, grid = super().grid(model, {"hidden_states": self.sample(arguments).transpose(1, 2)})
        return frames, grid


class MochiHost(TransformerHost):
    """Mochi: joint attention, text behind; the time that the scheduler counts rises."""

    models = ("MochiTransformer3DModel",)
    attention = {"transformer_blocks.*.attn1": Form(none=(), tables=_ROTARY)}
    whole = {"transformer_blocks.*": Form(is_residual=True, none=(), tables=_ROTARY)}

    def time(self, arguments: Mapping[str, Any]) -> float:
        """Its negative falls."""
        return -super().time(arguments)

    def num_text(self, arguments: Mapping[str, Any]) -> int:
        """Every row of the text that the root is given."""
        return text_length(arguments)

    def text_form(self, model: nn.Module) -> TextForm | str:
        """None."""
        return "its attention leaves padding out by itself"


_HUNYUAN = (Table("attention_mask", axis=3, has_batch=True),)


class HunyuanVideoHost(TransformerHost):
    """HunyuanVideo: joint attention, text behind, a mask of keys; a first frame that is given stays with attention."""

    models = ("HunyuanVideoTransformer3DModel",)
    attention = {
        "transformer_blocks.*.attn": Form(none=(), has_text_keys=True, tables=_ROTARY + _HUNYUAN),
        "single_transformer_blocks.*.attn": Form(none=(), has_text_keys=True, tables=_ROTARY + _HUNYUAN),
    }
    whole = {
        "transformer_blocks.*": Form(
            is_residual=True, none=("token_replace_emb",), tables=(Table("freqs_cis"), *_HUNYUAN)
        ),
        "single_transformer_blocks.*": Form(is_residual=True, none=("token_replace_emb",), tables=_ROTARY + _HUNYUAN),
    }

    def num_text(self, arguments: Mapping[str, Any]) -> int:
        """Every row of the text that the root is given."""
        return text_length(arguments)

    def text_form(self, model: nn.Module) -> TextForm | str:
        """The text; what its mask hides nobody reads, and it stays behind what is shown."""
        return TextForm(mask="encoder_attention_mask", hides=True)
