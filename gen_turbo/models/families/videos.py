"""Video transformers."""

from __future__ import annotations

from typing import Any

from gen_turbo.models.adapter import Adapter, LayerSignature, TextSignature, TokenArg
from gen_turbo.models.families.common import ROTARY, SELF, block
from gen_turbo.models.transformer import TransformerAdapter, patches_of, sizes_given, text_length

WAN = TransformerAdapter(
    ("WanTransformer3DModel",),
    {"blocks.*.attn1": LayerSignature(none=SELF, token_args=(TokenArg("rotary_emb", axis=1),))},
    {"blocks.*": block(none=(), token_args=(TokenArg("rotary_emb", axis=1),))},
)


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
    text="its attention leaves padding out by itself",
)
_KEY_MASK = TokenArg("attention_mask", axis=3, has_batch=True)
_HUNYUAN_VIDEO = LayerSignature(none=(), has_text_keys=True, token_args=(*ROTARY, _KEY_MASK))
HUNYUAN_VIDEO = TransformerAdapter(
    ("HunyuanVideoTransformer3DModel",),
    {"transformer_blocks.*.attn": _HUNYUAN_VIDEO, "single_transformer_blocks.*.attn": _HUNYUAN_VIDEO},
    # A first frame that is given stays with attention scope.
    {
        "transformer_blocks.*": block(none=("token_replace_emb",), token_args=(TokenArg("freqs_cis"), _KEY_MASK)),
        "single_transformer_blocks.*": block(none=("token_replace_emb",), token_args=(*ROTARY, _KEY_MASK)),
    },
    is_one_stack=True,
    num_text=text_length,
    # What the mask hides nobody reads, and it stays behind what is shown.
    text=TextSignature(mask="encoder_attention_mask", hides=True),
)

ADAPTERS: tuple[Adapter, ...] = (WAN, LTX, COGVIDEOX, MOCHI, HUNYUAN_VIDEO)
