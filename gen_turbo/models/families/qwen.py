"""Qwen-Image and Qwen-Image 2.1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gen_turbo.models.adapter import Adapter, LayerSignature, Region, TokenArg
from gen_turbo.models.families.common import POSITIONS_INSIDE, block, thousandths
from gen_turbo.models.transformer import Regions, TransformerAdapter, text_length


def _shapes(model: Any, arguments: Mapping[str, Any]) -> Regions:
    """The image of a row and the references behind it; the layers of one image are its frames."""
    shapes = arguments["img_shapes"]
    images = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    num_layers = len(images) - 1 if getattr(model.config, "use_layer3d_rope", False) else 1
    target = Region(num_layers * images[0][0], tuple(images[0][1:]))
    return (target, *(Region(image[0], tuple(image[1:])) for image in images[num_layers:]))


_MODULATION = TokenArg("modulate_index", axis=1, has_batch=True)
"""Which of two times modulates a token: references, which are clean, take zero."""
_ROTARY_OF_IMAGE = (TokenArg("image_rotary_emb", items=(0,)),)
QWEN_IMAGE = TransformerAdapter(
    ("QwenImageTransformer2DModel",),
    {"transformer_blocks.*.attn": LayerSignature(keys_before=True, none=(), token_args=_ROTARY_OF_IMAGE)},
    {"transformer_blocks.*": block(none=(), outputs=(1,), token_args=(*_ROTARY_OF_IMAGE, _MODULATION))},
    to_time=thousandths,
    regions=_shapes,
    has_references=True,
    num_text=text_length,
    text=POSITIONS_INSIDE,
)

_PREFIX = "text and references are a prefix that the model keeps the keys of"


def _prefix_length(model: Any, arguments: Mapping[str, Any]) -> int:
    """Tokens before the target: those of the text, and of references, of which four stand for one of the text's."""
    slots, target = arguments["img_mask"][0], arguments["img_shapes"][0][-1]
    num_tokens, num_target = torch.where(slots, 4, 1).sum(), math.prod(target)
    return int(num_tokens) - int(num_target)


def _target(model: Any, arguments: Mapping[str, Any]) -> Regions:
    frames, height, width = arguments["img_shapes"][0][-1]
    return (Region(frames, (height, width)),)


_FILLS_CACHE = ("segments", "cache_write_slice")
_BEHIND_PREFIX = (TokenArg("rotary_emb"), TokenArg("attention_mask", axis=3, has_batch=True, has_text_before=True))
QWEN_IMAGE_21 = TransformerAdapter(
    ("QwenImage21Transformer2DModel",),
    {"transformer_blocks.*.attn": LayerSignature(keys_before=True, none=_FILLS_CACHE, token_args=_BEHIND_PREFIX)},
    {"transformer_blocks.*": block(none=_FILLS_CACHE, token_args=(*_BEHIND_PREFIX, TokenArg("target_token_mask")))},
    to_time=thousandths,
    regions=_target,
    # The call that fills the cache runs in full.
    left_alone=lambda arguments: "" if arguments.get("kv_cache") is not None else "it keeps no cache of its prefix",
    num_text=_prefix_length,
    caches_text=True,
    text=_PREFIX,
)

ADAPTERS: tuple[Adapter, ...] = (QWEN_IMAGE, QWEN_IMAGE_21)
