"""Which of the images that the tower saw each image of a call is."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.method import Grid
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.run import Images


@dataclass
class Seen:
    """What is known of the images whose features were made last.

    Attributes:
        features: Projected features of each image, (n, C).
        grids: (height, width) of each image in tokens, where there is one.
        plans: The tower's plan on the patches of each image, one row each; empty where it merged none.
        values: Semantic value of the patches by kind, (n,) for each image.
    """

    features: list[Tensor] = field(default_factory=list)
    grids: list[Grid | None] = field(default_factory=list)
    plans: list[TokenMap] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.features, *chain(*self.values.values())))

    def find(self, features: list[Tensor]) -> list[int | None]:
        """Finds each image's place among those seen, by its features: `generate` repeats them for its beams.

        Raises:
            ValueError: If features are the beginning of an image: a prompt that comes in pieces.
        """
        return [self._place(one, index) for index, one in enumerate(features)]

    def _place(self, one: Tensor, guess: int) -> int | None:
        order = [guess % len(self.features), *range(len(self.features))] if self.features else []
        for index in order:
            other = self.features[index]
            if other is one or (other.shape == one.shape and torch.equal(other, one)):
                return int(index)
        for other in self.features:
            if len(one) < len(other) and torch.equal(other[: len(one)], one):
                raise ValueError(
                    f"a call brings {len(one)} of an image's {len(other)} tokens; prefill in one piece (leave out "
                    "prefill_chunk_size)"
                )
        return None


def seen_images(is_image_BL: Tensor, features: list[Tensor], seen: Seen) -> Images:
    """The images of a call, whose features stand where placeholders were.

    Raises:
        ValueError: If there are not as many placeholders as features.
    """
    lengths, count = [len(one) for one in features], int(is_image_BL.sum())
    origins = seen.find(features)
    if count != sum(lengths):
        raise ValueError(
            f"{count} image placeholders for {sum(lengths)} image features; pass every image of the prompt, and only "
            "those"
        )
    grids = [None if origin is None else seen.grids[origin] for origin in origins]
    return Images(is_image_BL, lengths, grids, origins)


def tell_of_features(given: dict[str, Any]) -> None:
    """Warns where a call without images brings embeddings in which there may be image features."""
    embeds = given.get("inputs_embeds")
    if given.get("input_ids") is None and embeds is not None and embeds.shape[1] > 1:
        warnings.warn(
            "a prompt came as inputs_embeds alone: images that are in it already are read in full; pass pixel_values, "
            "or image features as mm_encoder_outputs, to have their tokens reduced",
            NoEffectWarning,
            stacklevel=3,
        )
