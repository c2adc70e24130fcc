"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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

ADAPTERS: tuple[Adapter, ...] = (QWEN_IMAGE,)
