"""Flux and the transformers that share its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gen_turbo.models.adapter import Adapter, LayerSignature, TextSignature, TokenArg
from gen_turbo.models.families.common import ROTARY_WITH_TEXT, SELF, block, thousandths
from gen_turbo.models.transformer import FrameGrid, TransformerAdapter, text_length

_MASK_PAIRS = tuple(TokenArg("attention_mask", axis=axis, has_batch=True, has_text_before=True) for axis in (2, 3))
_MASK = (TokenArg("attention_mask", axis=1, has_batch=True, has_text_before=True),)


def _image_ids(model: Any, arguments: Mapping[str, Any]) -> FrameGrid:
    """Rows and columns by the largest position; images of one size that follow each other are frames."""
    height, width = (int(last) + 1 for last in arguments["img_ids"].reshape(-1, 3)[:, 1:].amax(0).tolist())
    num_frames, rest = divmod(arguments["hidden_states"].shape[1], height * width)
    return (num_frames, (height, width)) if rest == 0 else (1, None)


FLUX = TransformerAdapter(
    ("FluxTransformer2DModel",),
    {
        "transformer_blocks.*.attn": LayerSignature(
            keys_before=True, has_text_keys=True, outputs=(0, 2), token_args=ROTARY_WITH_TEXT
        ),
        "single_transformer_blocks.*.attn": LayerSignature(
            none=SELF, has_text_before=True, keys_before=True, has_text_keys=True, token_args=ROTARY_WITH_TEXT
        ),
    },
    {
        "transformer_blocks.*": block(outputs=(1,), none=(), token_args=ROTARY_WITH_TEXT),
        "single_transformer_blocks.*": block(outputs=(1,), none=(), token_args=ROTARY_WITH_TEXT),
    },
    to_time=thousandths,
    grid=_image_ids,
    is_one_stack=True,
    num_text=text_length,
    text=TextSignature(positions="txt_ids"),
)
CHROMA = TransformerAdapter(
    ("ChromaTransformer2DModel",),
    {
        "transformer_blocks.*.attn": LayerSignature(
            keys_before=True, has_text_keys=True, none=(), outputs=(0, 2), token_args=ROTARY_WITH_TEXT + _MASK_PAIRS
        ),
        "single_transformer_blocks.*.attn": LayerSignature(
            none=("encoder_hidden_states",),
            has_text_before=True,
            keys_before=True,
            has_text_keys=True,
            token_args=ROTARY_WITH_TEXT + _MASK_PAIRS,
        ),
    },
    {
        "transformer_blocks.*": block(outputs=(1,), none=(), token_args=ROTARY_WITH_TEXT + _MASK),
        "single_transformer_blocks.*": block(none=(), has_text_before=True, token_args=ROTARY_WITH_TEXT + _MASK),
    },
    to_time=thousandths,
    grid=_image_ids,
    num_text=text_length,
    # The mask is added to attention's logits and so hides nothing; it goes with the tokens.
    text=TextSignature(positions="txt_ids", mask="attention_mask"),
)

ADAPTERS: tuple[Adapter, ...] = (FLUX, CHROMA)
