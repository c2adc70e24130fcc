"""Image transformers with blocks of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gen_turbo.models.adapter import SELF_ATTENTION, TEXT, Adapter, LayerSignature, ModelCall, TokenArg
from gen_turbo.models.conditions import Region, TextSignature
from gen_turbo.models.families.common import (
    POSITIONS_INSIDE,
    ROTARY,
    SELF,
    block,
    lengths,
    share_of_the_way,
    thousandths,
)
from gen_turbo.models.transformer import Regions, TransformerAdapter, patches, text_length

PIXART = TransformerAdapter(
    ("PixArtTransformer2DModel", "DiTTransformer2DModel"),
    {"transformer_blocks.*.attn1": SELF_ATTENTION},
    {"transformer_blocks.*": block()},
)
_HUNYUAN_DIT_TEXTS = {name: name for name in ("encoder_hidden_states", "encoder_hidden_states_t5")}
HUNYUAN_DIT = TransformerAdapter(
    ("HunyuanDiT2DModel",),
    {"blocks.*.attn1": LayerSignature(none=SELF, token_args=ROTARY)},
    # Long skip connections are merged with the tokens.
    {"blocks.*": block(also=("skip",), token_args=ROTARY)},
    counts=lambda arguments: {TEXT: sum(lengths(arguments, _HUNYUAN_DIT_TEXTS).values())},
)
SD3 = TransformerAdapter(
    ("SD3Transformer2DModel",),
    {"transformer_blocks.*.attn": LayerSignature(has_text_keys=True), "transformer_blocks.*.attn2": SELF_ATTENTION},
    {"transformer_blocks.*": block(none=(), outputs=(1,))},
    num_text=text_length,
    text=TextSignature(),
)


def _num_registers(model: Any) -> int:
    return int(model.register_tokens.shape[1])


AURA_FLOW = TransformerAdapter(
    ("AuraFlowTransformer2DModel",),
    {
        "joint_transformer_blocks.*.attn": LayerSignature(keys_before=True, has_text_keys=True, none=()),
        "single_transformer_blocks.*.attn": LayerSignature(has_text_before=True, keys_before=True, has_text_keys=True),
    },
    {
        "joint_transformer_blocks.*": block(none=(), outputs=(1,)),
        "single_transformer_blocks.*": block(none=(), has_text_before=True),
    },
    to_time=thousandths,
    # The model puts its registers before the text; the pipeline makes the text's padding zero.
    num_text=lambda model, arguments: text_length(model, arguments) + _num_registers(model),
    text=lambda model: TextSignature(num_before=_num_registers(model)),
)
COGVIEW = TransformerAdapter(
    ("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel"),
    {"transformer_blocks.*.attn1": LayerSignature(keys_before=True, has_text_keys=True, none=(), token_args=ROTARY)},
    {"transformer_blocks.*": block(none=(), token_args=ROTARY)},
    num_text=text_length,
    text=TextSignature(mask="attention_mask"),
)
_LUMINA = TokenArg("image_rotary_emb", axis=1, has_batch=True)
_LUMINA_WITH_TEXT = TokenArg("image_rotary_emb", axis=1, has_batch=True, has_text_before=True)
LUMINA2 = TransformerAdapter(
    ("Lumina2Transformer2DModel",),
    {
        "layers.*.attn": LayerSignature(
            has_text_before=True, keys_before=True, also=("encoder_hidden_states",), token_args=(_LUMINA_WITH_TEXT,)
        ),
        "noise_refiner.*.attn": LayerSignature(also=("encoder_hidden_states",), token_args=(_LUMINA,)),
    },
    {
        "layers.*": block(has_text_before=True, token_args=(_LUMINA_WITH_TEXT,)),
        "noise_refiner.*": block(token_args=(_LUMINA,)),
    },
    to_time=share_of_the_way,
    # Words of the longest text; where rows differ, the layers get a mask and are left alone.
    num_text=lambda model, arguments: int(arguments["encoder_attention_mask"].sum(1).max()),
    text=POSITIONS_INSIDE,
)


def _lists(arguments: Mapping[str, Any]) -> ModelCall:
    """Lists of latents and texts, of which the first distinguishes the guidance branches."""
    return ModelCall(_stacked(arguments["x"]), arguments["t"], arguments["cap_feats"][0])


def _stacked(images: Any) -> Tensor:
    """One tensor of a list of latents; of several sizes or nested lists, an empty one that says how many there are."""
    is_simple = isinstance(images[0], Tensor) and len({image.shape for image in images}) == 1
    return torch.stack(list(images)) if is_simple else torch.empty(len(images), 0)


def _patches_asked_for(model: Any, arguments: Mapping[str, Any]) -> Regions:
    patch, patch_frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    sample = _stacked(arguments["x"])
    if sample.ndim < 5:
        return ()
    frames, height, width = sample.shape[2:]
    return (Region(frames // patch_frames, (height // patch, width // patch)),)


_Z_MULTIPLE = 32
"""Text is padded to a multiple of this."""
_Z_ARGS = (TokenArg("freqs_cis", axis=1, has_batch=True),)
_Z_BLOCK = block(tokens="x", has_text_after=True, none=("attn_mask", "noise_mask"), token_args=_Z_ARGS)
Z_IMAGE = TransformerAdapter(
    ("ZImageTransformer2DModel",),
    # Image first, then padding and text.
    {
        "layers.*.attention": LayerSignature(has_text_after=True, token_args=_Z_ARGS),
        "noise_refiner.*.attention": LayerSignature(has_text_after=True, token_args=_Z_ARGS),
    },
    {"layers.*": _Z_BLOCK, "noise_refiner.*": _Z_BLOCK},
    to_time=share_of_the_way,
    regions=_patches_asked_for,
    num_text=lambda model, arguments: _Z_MULTIPLE * math.ceil(len(arguments["cap_feats"][0]) / _Z_MULTIPLE),
    text=POSITIONS_INSIDE,
    reading=_lists,
)


def _hidream(arguments: Mapping[str, Any]) -> ModelCall:
    return ModelCall(arguments["hidden_states"], arguments["timesteps"], arguments["encoder_hidden_states_t5"])


def _hidream_text(model: Any, arguments: Mapping[str, Any]) -> int:
    """T5's tokens, and Llama's of the last layer and of the block's own."""
    llama = arguments["encoder_hidden_states_llama3"]
    return int(arguments["encoder_hidden_states_t5"].shape[1] + 2 * llama[0].shape[-2])


def _hidream_patches(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """Latents that are packed already come with their sizes."""
    if arguments["hidden_states"].ndim == 4:
        return patches(model, arguments)
    sizes = arguments.get("img_sizes")
    return (Region(1, (int(sizes[0][0]), int(sizes[0][1]))),) if sizes is not None else ()


# Latents that are not square are padded behind, and a mask says so.
_HIDREAM_ARGS = tuple(TokenArg(name, axis=1, has_batch=True) for name in ("image_rotary_emb", "hidden_states_masks"))
_HIDREAM = LayerSignature(tokens="norm_hidden_states", has_text_after=True, none=(), token_args=_HIDREAM_ARGS)
HIDREAM = TransformerAdapter(
    ("HiDreamImageTransformer2DModel",),
    {"double_stream_blocks.*.block.attn1": _HIDREAM, "single_stream_blocks.*.block.attn1": _HIDREAM},
    {
        "double_stream_blocks.*": block(none=(), has_text_after=True, token_args=_HIDREAM_ARGS),
        "single_stream_blocks.*": block(none=(), has_text_after=True, token_args=_HIDREAM_ARGS),
    },
    regions=_hidream_patches,
    num_text=_hidream_text,
    text="it gives every block a text of its own",
    reading=_hidream,
    ends_span=lambda model, name: True,
)


def _krea_grid(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """Rows and columns by the positions, which the text's come before."""
    places = arguments["position_ids"][text_length(model, arguments) :, 1:]
    height, width = (int(size) + 1 for size in (places.amax(0) - places.amin(0)).tolist())
    return (Region(1, (height, width)),) if height * width == len(places) else ()


def _krea_counts(arguments: Mapping[str, Any]) -> dict[str, int]:
    """Its text is the states of several layers, (B, T, layers, C), until they are one."""
    num_text, num_layers, width = arguments["encoder_hidden_states"].shape[1:]
    return {"text_fusion.layerwise": num_text * num_layers, "text_fusion.projector": num_text * width}


_KREA_ARGS = (
    TokenArg("image_rotary_emb", has_text_before=True),
    TokenArg("attention_mask", axis=3, has_batch=True, has_text_before=True),
)
KREA2 = TransformerAdapter(
    ("Krea2Transformer2DModel",),
    {
        "transformer_blocks.*.attn": LayerSignature(
            has_text_before=True, keys_before=True, none=(), token_args=_KREA_ARGS
        )
    },
    {"transformer_blocks.*": block(has_text_before=True, none=(), token_args=_KREA_ARGS)},
    to_time=thousandths,
    regions=_krea_grid,
    num_text=text_length,
    counts=_krea_counts,
    text="its text and image share one table of positions",
)

ADAPTERS: tuple[Adapter, ...] = (PIXART, HUNYUAN_DIT, SD3, AURA_FLOW, COGVIEW, LUMINA2, Z_IMAGE, HIDREAM, KREA2)
