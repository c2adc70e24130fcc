"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gen_turbo.models.adapter import Adapter, LayerSignature, TokenArg
from gen_turbo.models.families.common import POSITIONS_INSIDE, block, thousandths
from gen_turbo.models.transformer import FrameGrid, TransformerAdapter, text_length


def _shapes(model: Any, arguments: Mapping[str, Any]) -> FrameGrid:
    """The one image of every row; several images in a row have no common grid."""
    shapes = arguments["img_shapes"]
    images = shapes[0] if isinstance(shapes[0], list) else shapes[:1]
    return (images[0][0], tuple(images[0][1:])) if len(images) == 1 else (1, None)


_ROTARY_OF_IMAGE = (TokenArg("image_rotary_emb", items=(0,)),)
QWEN_IMAGE = TransformerAdapter(
    ("QwenImageTransformer2DModel",),
    {"transformer_blocks.*.attn": LayerSignature(keys_before=True, none=(), token_args=_ROTARY_OF_IMAGE)},
    {"transformer_blocks.*": block(none=("modulate_index",), outputs=(1,), token_args=_ROTARY_OF_IMAGE)},
    to_time=thousandths,
    grid=_shapes,
    num_text=text_length,
    text=POSITIONS_INSIDE,
)

ADAPTERS: tuple[Adapter, ...] = (QWEN_IMAGE,)
