"""Flux and the transformers that share its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from gen_turbo.models.adapter import Adapter, LayerSignature, TokenArg
from gen_turbo.models.conditions import Region, TextSignature
from gen_turbo.models.families.common import ROTARY_WITH_TEXT, SELF, block, thousandths
from gen_turbo.models.transformer import Regions, TransformerAdapter, text_length

_MASK_PAIRS = tuple(TokenArg("attention_mask", axis=axis, has_batch=True, has_text_before=True) for axis in (2, 3))
_MASK = (TokenArg("attention_mask", axis=1, has_batch=True, has_text_before=True),)

_POSITIONS = {"pos_embed": ("img_ids", "txt_ids")}


def _image_ids(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """One region for each run of a number in the first column of the positions, its rows and columns by the others.

    References have another number than the target, as those of FLUX.1 Kontext, FLUX.2 and LongCat-Image-Edit.
    """
    ids = arguments["img_ids"]
    ids = (ids[0] if ids.ndim == 3 else ids)[:, :3]
    number = ids[:, 0].contiguous()
    lengths = torch.unique_consecutive(number, return_counts=True)[1].tolist()
    regions = []
    for part in ids[:, 1:].split(lengths):
        height, width = (int(size) + 1 for size in (part.amax(0) - part.amin(0)).tolist())
        num_frames, rest = divmod(len(part), height * width)
        if rest:
            return ()
        regions.append(Region(num_frames, (height, width)))
    return tuple(regions)


def _keeps_references(arguments: Mapping[str, Any]) -> str:
    """FLUX.2 klein-kv reads its references, before the target, in a first call of their own."""
    return "the call keeps the keys of its references" if arguments.get("kv_cache_mode") == "extract" else ""


FLUX = TransformerAdapter(
    ("FluxTransformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"),
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
    regions=_image_ids,
    has_references=True,
    is_one_stack=True,
    num_text=text_length,
    text=TextSignature(positions="txt_ids"),
    positions=_POSITIONS,
)
BRIA = replace(FLUX, models=("BriaTransformer2DModel",), to_time=float, has_references=False)
FLUX2 = TransformerAdapter(
    ("Flux2Transformer2DModel",),
    {
        "transformer_blocks.*.attn": LayerSignature(keys_before=True, has_text_keys=True, token_args=ROTARY_WITH_TEXT),
        # One projection makes queries, keys, values and the feed-forward's input.
        "single_transformer_blocks.*.attn": LayerSignature(
            has_text_before=True, keys_before=True, has_text_keys=True, token_args=ROTARY_WITH_TEXT
        ),
    },
    {
        "transformer_blocks.*": block(outputs=(1,), none=(), token_args=ROTARY_WITH_TEXT),
        "single_transformer_blocks.*": block(
            none=("encoder_hidden_states",), has_text_before=True, token_args=ROTARY_WITH_TEXT
        ),
    },
    to_time=thousandths,
    regions=_image_ids,
    has_references=True,
    left_alone=_keeps_references,
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
    regions=_image_ids,
    num_text=text_length,
    # The mask is added to attention's logits and so hides nothing; it goes with the tokens.
    text=TextSignature(positions="txt_ids", mask="attention_mask"),
    positions=_POSITIONS,
)

ADAPTERS: tuple[Adapter, ...] = (FLUX, BRIA, FLUX2, CHROMA)
