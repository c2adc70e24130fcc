"""Transformers with self-attention over image tokens alone: DiT, PixArt, HunyuanDiT."""

from __future__ import annotations

from gen_turbo.engine.base import SELF_ATTENTION, Form, Table
from gen_turbo.models.transformer import TransformerHost


class PixArtHost(TransformerHost):
    """DiT, PixArt-alpha and Sigma: positions are in the tokens, text, if any, in cross-attention."""

    models = ("PixArtTransformer2DModel", "DiTTransformer2DModel")
    attention = {"transformer_blocks.*.attn1": SELF_ATTENTION}
    whole = {"transformer_blocks.*": Form(is_residual=True)}


class HunyuanDiTHost(TransformerHost):
    """HunyuanDiT: rotary positions, long skip connections."""

    models = ("HunyuanDiT2DModel",)
    attention = {
        "blocks.*.attn1": Form(none=("encoder_hidden_states", "attention_mask"), tables=(Table("image_rotary_emb"),))
    }
    whole = {"blocks.*": Form(is_residual=True, also=("skip",), tables=(Table("image_rotary_emb"),))}
