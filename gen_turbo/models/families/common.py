"""What the entries of several families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gen_turbo.models.adapter import LayerSignature, TokenArg

SELF = ("encoder_hidden_states", "attention_mask")
"""Self-attention alone is merged where an attention module serves for cross-attention too."""
POSITIONS_INSIDE = "it gives text its positions inside"
"""Why some models' text cannot be merged: what is left of it would get other positions."""
ROTARY = (TokenArg("image_rotary_emb"),)
ROTARY_WITH_TEXT = (TokenArg("image_rotary_emb", has_text_before=True),)


def thousandths(time: float) -> float:
    """The scheduler's time of models that are given a thousandth of it."""
    return 1000 * time


def share_of_the_way(time: float) -> float:
    """Lumina2 and Z-Image are given the share of the way from noise to image, which rises."""
    return 1000 * (1 - time)


def lengths(arguments: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, int]:
    """For each module the tokens of its argument, (B, T, C), of those that are given."""
    return {module: int(arguments[name].shape[1]) for module, name in names.items() if arguments.get(name) is not None}


def block(**differences: Any) -> LayerSignature:
    """The signature of a block, which adds its input itself."""
    return LayerSignature(is_residual=True, **differences)
