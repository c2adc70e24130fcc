"""Video transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gen_turbo.models.adapter import Adapter, LayerSignature, TokenArg
from gen_turbo.models.conditions import TextSignature
from gen_turbo.models.families.common import ROTARY, SELF, block, thousandths
from gen_turbo.models.transformer import TransformerAdapter, patches_of, sizes_given, text_length

_ROTARY_PER_SAMPLE = (TokenArg("image_rotary_emb", axis=1, has_batch=True),)
LTX = TransformerAdapter(
    ("LTXVideoTransformer3DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(none=SELF, token_args=_ROTARY_PER_SAMPLE)},
    {"transformer_blocks.*": block(none=(), token_args=_ROTARY_PER_SAMPLE)},
    regions=sizes_given,
)


def _cogvideox_text(model: Any) -> TextSignature | str:
    embed = model.patch_embed
    is_fixed = embed.use_positional_embeddings or embed.use_learned_positional_embeddings
    return "its table of positions fixes the length of the text" if is_fixed else TextSignature()


COGVIDEOX = TransformerAdapter(
    ("CogVideoXTransformer3DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(keys_before=True, has_text_keys=True, token_args=ROTARY)},
    {"transformer_blocks.*": block(none=(), token_args=ROTARY)},
    # Latents are (batch, frames, channels, height, width).
    regions=lambda model, arguments: patches_of(model, arguments["hidden_states"].transpose(1, 2)),
    num_text=text_length,
    text=_cogvideox_text,
)
MOCHI = TransformerAdapter(
    ("MochiTransformer3DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(none=(), token_args=ROTARY)},
    {"transformer_blocks.*": block(none=(), token_args=ROTARY)},
    to_time=lambda time: -time,
    num_text=text_length,
    text="its attention drops padding by itself",
)


def _ltx2_rotary(name: str) -> tuple[TokenArg, ...]:
    """Interleaved tables have no axis of heads, split ones have."""
    return tuple(TokenArg(name, axis=axis, has_batch=True, num_axes=axis + 2) for axis in (1, 2))


_LTX2_OF_TOKENS = tuple(
    TokenArg(name, axis=1, has_batch=True) for name in ("temb", "temb_ca_scale_shift", "temb_ca_gate")
)
"""Modulations, one for each token where frames are given, else one for all."""


def _sound(model: Any, arguments: Mapping[str, Any]) -> int:
    given = arguments.get("audio_hidden_states")
    return 0 if given is None else int(given.shape[1])


LTX2 = TransformerAdapter(
    ("LTX2VideoTransformer3DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(none=SELF, token_args=_ltx2_rotary("query_rotary_emb"))},
    {
        # Of a block's six attentions video tokens ask in three and are asked by the audio in one.
        "transformer_blocks.*": block(
            none=("self_attention_mask", "a2v_cross_attention_mask", "v2a_cross_attention_mask"),
            token_args=(*_ltx2_rotary("video_rotary_emb"), *_ltx2_rotary("ca_video_rotary_emb"), *_LTX2_OF_TOKENS),
            carries="audio_hidden_states",
        )
    },
    regions=sizes_given,
    num_sound=_sound,
)
# In blocks of 8 x 8 tokens, in which sparse attention wants them, they stay as they are.
KANDINSKY5 = TransformerAdapter(
    ("Kandinsky5Transformer3DModel",),
    {
        "visual_transformer_blocks.*.self_attention": LayerSignature(
            none=("encoder_hidden_states", "sparse_params"),
            token_args=(TokenArg("rotary_emb", axis=1, has_batch=True),),
        )
    },
    {
        "visual_transformer_blocks.*": block(
            tokens="visual_embed", none=("sparse_params",), token_args=(TokenArg("rope", axis=1, has_batch=True),)
        )
    },
    # Latents are (batch, frames, height, width, channels).
    regions=lambda model, arguments: patches_of(model, arguments["hidden_states"].permute(0, 4, 1, 2, 3)),
)

# Its faces are read between blocks, by every token for itself.
CONSISID = replace(COGVIDEOX, models=("ConsisIDTransformer3DModel",))
# Modulations are one for each token where frames have times of their own.
_COSMOS_OF_TOKENS = tuple(
    TokenArg(name, axis=1, has_batch=True, num_axes=3) for name in ("embedded_timestep", "temb", "extra_pos_emb")
)
COSMOS = TransformerAdapter(
    ("CosmosTransformer3DModel",),
    {"transformer_blocks.*.attn1": LayerSignature(none=SELF, token_args=ROTARY)},
    {"transformer_blocks.*": block(none=("controlnet_residual",), token_args=(*ROTARY, *_COSMOS_OF_TOKENS))},
    to_time=thousandths,
    ends_span=lambda model, name: bool(model.config.controlnet_block_every_n),
)
# Video and sound run through one block, each with attention to the other.
KANDINSKY6 = TransformerAdapter(
    ("Kandinsky6Transformer3DModel",),
    {
        "visual_transformer_blocks.*.video_dec_block.self_attention": LayerSignature(
            none=("encoder_hidden_states", "attn_mask"), token_args=(TokenArg("rotary_emb"),)
        )
    },
    {"visual_transformer_blocks.*": block(tokens="vis", none=(), token_args=(TokenArg("vis_rope"),), carries="aud")},
    regions=KANDINSKY5.regions,
    num_sound=_sound,
)

ADAPTERS: tuple[Adapter, ...] = (LTX, LTX2, COGVIDEOX, MOCHI, KANDINSKY5, KANDINSKY6, CONSISID, COSMOS)
