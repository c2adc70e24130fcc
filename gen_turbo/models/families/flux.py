"""Flux and the transformers that share its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from gen_turbo.models.adapter import Adapter, LayerSignature, TokenArg
from gen_turbo.models.conditions import Region, TextSignature
from gen_turbo.models.families.common import ROTARY, ROTARY_WITH_TEXT, SELF, block, lengths, thousandths
from gen_turbo.models.transformer import Regions, TransformerAdapter, text_length

_MASK_PAIRS = tuple(TokenArg("attention_mask", axis=axis, has_batch=True, has_text_before=True) for axis in (2, 3))
_MASK = (TokenArg("attention_mask", axis=1, has_batch=True, has_text_before=True),)

_POSITIONS = {"pos_embed": ("img_ids", "txt_ids")}


def _image_ids(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """One region for each image: rows of one length below each other, of one number in the first column.

    References have another number than the target, as those of FLUX.1 Kontext, FLUX.2 and LongCat-Image-Edit, or one of
    their own each.
    """
    ids = arguments["img_ids"]
    ids = (ids[0] if ids.ndim == 3 else ids)[:, :3].round().int().cpu()
    step = torch.diff(ids, dim=0)
    begins = (step.ne(step.new_tensor([0, 0, 1])).any(1).nonzero()[:, 0] + 1).tolist()
    lines = [(*ids[first].tolist(), last - first) for first, last in pairwise([0, *begins, len(ids)])]
    regions: list[Region] = []
    for before, (number, row, column, width) in zip([None, *lines], lines, strict=False):
        if before == (number, row - 1, column, width):
            regions[-1] = Region(1, (regions[-1].grid[0] + 1, width))
        else:
            regions.append(Region(1, (1, width)))
    # A target of lines that do not fit together has no grid.
    num_target = int((ids[:, 0] == ids[0, 0]).sum())
    return tuple(regions) if regions[0].num_tokens == num_target else ()


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
# Blocks that share text's features of one more layer of its encoder each; the model joins text and image between them.
FIBO = replace(
    FLUX,
    models=("BriaFiboTransformer2DModel",),
    whole=FLUX2.whole,
    to_time=float,
    is_one_stack=False,
    text="it gives every block a text of its own",
)


def _flux3_images(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """The target's, then those of the references, which come by arguments of their own."""
    ids = [arguments[name] for name in ("img_ids", "image_cond_ids") if arguments.get(name) is not None]
    return _image_ids(model, {"img_ids": torch.cat(ids)})


def _flux3_counts(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Every token of an image, a reference or the text has a modulation of its own; references may be none."""
    sources = {"image": "hidden_states", "image_cond": "image_cond_hidden_states", "txt": "encoder_hidden_states"}
    read = dict.fromkeys(("mode_blocks.image_cond.", "x_embedders.image_cond"), sources["image_cond"])
    read["norm_out.linear"] = sources["image"]
    for stack in ("early", "single"):
        read |= {f"{stack}_stream_modulations.{kind}.linear": source for kind, source in sources.items()}
    return dict.fromkeys(read, 0) | lengths(arguments, read)


# Every token has a modulation of its own; those of one image are the same.
_MODULATION = TokenArg("temb_mod", axis=1, has_batch=True)
FLUX3 = TransformerAdapter(
    ("Flux3Transformer2DModel",),
    {
        # Image, references and text run alone first, then together.
        "mode_blocks.image.*.attn": LayerSignature(token_args=ROTARY),
        "single_transformer_blocks.*.attn": LayerSignature(
            has_text_before=True, keys_before=True, has_text_keys=True, token_args=ROTARY_WITH_TEXT
        ),
    },
    {
        "mode_blocks.image.*": block(none=(), token_args=(*ROTARY, _MODULATION)),
        "single_transformer_blocks.*": block(outputs=(1,), none=(), token_args=(*ROTARY_WITH_TEXT, _MODULATION)),
    },
    to_time=thousandths,
    regions=_flux3_images,
    has_references=True,
    num_text=text_length,
    counts=_flux3_counts,
    text=TextSignature(positions="txt_ids"),
)

ADAPTERS: tuple[Adapter, ...] = (FLUX, BRIA, FLUX2, CHROMA, FIBO, FLUX3)
