"""The image tokens of a call: where they are, of which image each is, and what is known of that image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_turbo.method import Grid, TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.columns import Columns

FRAME = -1
"""The origin of a frame of a video."""


class Frame(NamedTuple):
    """A frame of a video, or frames that are planned as a whole.

    Attributes:
        length: Tokens.
        grid: (height, width) of each frame in tokens, where there is one.
        num_frames: How many frames.
    """

    length: int
    grid: Grid | None
    num_frames: int = 1


Semantic = Callable[[str], Tensor | None]
"""Gives the semantic value of a group's tokens by its kind, (K, n); None where there is no such kind."""


@dataclass
class Encoded:
    """What a vision tower knows of the images that it was given last.

    Attributes:
        plans: The plan on the patches of each image, one row each; empty where none merged.
        values: Semantic value of the patches by kind, (n,) for each image, every one summing to one.
    """

    plans: list[TokenMap] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass
class Seen(Encoded):
    """What is known of the images whose features were made last.

    Attributes:
        features: Projected features of each image, (n, C).
        grids: (height, width) of each image in tokens, where there is one.
    """

    features: list[Tensor] = field(default_factory=list)
    grids: list[Grid | None] = field(default_factory=list)

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


@dataclass(frozen=True)
class Group:
    """Images of one call that have the same number of tokens and the same grid, and are planned together.

    Attributes:
        images: Which images.
        length: Tokens of each.
        grid: (height, width) of each, where there is one.
        origins: Which of the images seen each one is; None for one that was not seen, `FRAME` for a frame of a video.
        seen: What is known of those.
        kept: How many tokens of each stay, where images share a budget.
        whole: Tokens of each before any left, where some have left earlier; 0 where none has.
        num_frames: Frames of each, where videos are planned as a whole.
    """

    images: list[int]
    length: int
    grid: Grid | None
    origins: list[int | None]
    seen: Seen
    kept: int | None = None
    whole: int = 0
    num_frames: int = 1

    def ratio(self, reducer: TokenReducer) -> float:
        """The fraction that is removed: what is to be kept of these images, else what the method says."""
        return reducer.ratio_of(self.length) if self.kept is None else self.ratio_to(self.kept)

    def ratio_to(self, kept: int) -> float:
        """The fraction that is removed where so many stay."""
        # Half a token more, so that rounding down removes exactly the number.
        return max(0.0, 1 - (kept - 0.5) / self.length)

    def with_budget(self, rows: list[int], kept: int) -> Group:
        """Some of the images, each of which keeps so many tokens."""
        images, origins = [self.images[row] for row in rows], [self.origins[row] for row in rows]
        return replace(self, images=images, origins=origins, kept=kept)

    def value(self, kind: str) -> Tensor | None:
        """The tower's semantic value of the tokens, (K, n); None where it has none of that kind."""
        values = self.seen.values.get(kind, [])
        if all(len(value) != self.length for value in values) or FRAME in self.origins:
            return None
        return torch.stack([values[origin] for origin in self._known()])

    def plans(self) -> list[TokenMap]:
        """The tower's own plan of each image; none where features are no longer patches."""
        if all(plan.num_tokens != self.length for plan in self.seen.plans):
            return []
        return [self.seen.plans[origin] for origin in self._known()]

    def _known(self) -> list[int]:
        known = [origin for origin in self.origins if origin is not None]
        if len(known) < len(self.origins):
            raise ValueError(
                "the image features of this call were not made by this model's tower while the reducer was attached; "
                "pass pixel_values instead of features made before"
            )
        return known


@dataclass
class Images:
    """The image tokens of one call.

    Attributes:
        is_image_BL: Which columns are image tokens.
        lengths: Tokens of each image, in the order of the flattened mask.
        grids: (height, width) of each image, where there is one.
        origins: Which of the images that the tower saw last each one is; None for one that it did not see, `FRAME` for
            a frame of a video, of which nothing else is known.
        seen: What is known of the images that the tower saw last.
        wholes: Tokens of each image before any left; empty where none has.
        num_columns: Columns of the call before any left; 0 where none has.
        counts: How many frames of a video each is; empty where each is one image.
    """

    is_image_BL: Tensor
    lengths: list[int]
    grids: list[Grid | None]
    origins: list[int | None]
    seen: Seen = field(default_factory=Seen)
    wholes: list[int] = field(default_factory=list)
    num_columns: int = 0
    counts: list[int] = field(default_factory=list)
    _places: dict[tuple[int, ...], Tensor] = field(default_factory=dict, repr=False)
    _taken: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def columns(self) -> Tensor:
        """The places of all image tokens in the columns of all rows behind each other, in order."""
        return self.is_image_BL.flatten().nonzero()[:, 0]

    def groups(self) -> list[Group]:
        """The images by size, frames of videos apart."""
        found: dict[tuple[Any, ...], list[int]] = {}
        frames = [origin == FRAME for origin in self.origins]
        wholes, counts = self.wholes or [0] * len(frames), self.counts or [1] * len(frames)
        keys = zip(self.lengths, self.grids, wholes, counts, frames, strict=True)
        for image, key in enumerate(keys):
            found.setdefault(key, []).append(image)
        return [
            Group(images, length, grid, [self.origins[image] for image in images], self.seen, None, whole, count)
            for (length, grid, whole, count, _), images in found.items()
        ]

    def shortened(self, here: Columns, lengths: list[int]) -> Images:
        """The images in the columns that stay, where each keeps so many tokens."""
        is_same = lengths == self.lengths
        grids, counts = (self.grids, self.counts) if is_same else ([None] * len(lengths), [])
        before = self.wholes or self.lengths, self.num_columns or self.is_image_BL.numel()
        return Images(here.mask(self.is_image_BL), lengths, grids, self.origins, self.seen, *before, counts)

    def places(self, group: Group) -> Tensor:
        """The places of a group's tokens in the columns of all rows behind each other: (K, n)."""
        images = tuple(group.images)
        if images not in self._places:
            if images == tuple(range(len(self.lengths))):
                self._places[images] = self.columns.view(-1, group.length)
            else:
                starts = [0, *accumulate(self.lengths)]
                first = torch.tensor([starts[image] for image in images], device=self.is_image_BL.device)
                offset = torch.arange(group.length, device=first.device)
                self._places[images] = self.columns[first[:, None] + offset]
        return self._places[images]

    def anchors(self, group: Group, plan: TokenMap) -> Tensor:
        """The places of the tokens of a group that stay, one row behind the other."""
        places, anchor = self.places(group), plan.anchor_BM
        return places.gather(1, anchor if len(anchor) == len(places) else anchor.expand(len(places), -1)).view(-1)

    def tokens(self, x: Tensor, group: Group) -> Tensor:
        """A group's tokens (K, n, *rest) out of columns (B, L, *rest); those taken last are at hand."""
        key = tuple(group.images)
        known, tokens = self._taken.get(key, (None, None))
        if known is not x or tokens is None:
            places = self.places(group)
            tokens = x.flatten(0, 1).index_select(0, places.reshape(-1)).view(*places.shape, *x.shape[2:])
            self._taken[key] = x, tokens
        return tokens


def seen_images(is_image_BL: Tensor, features: list[Tensor], seen: Seen) -> Images:
    """The images of a call, whose features stand where placeholders were.

    Raises:
        ValueError: If there are not as many placeholders as features.
    """
    lengths, origins = [len(one) for one in features], seen.find(features)
    grids = [None if origin is None else seen.grids[origin] for origin in origins]
    images = Images(is_image_BL, lengths, grids, origins, seen)
    count = len(images.columns)
    if count != sum(lengths):
        raise ValueError(
            f"{count} image placeholders for {sum(lengths)} image features; pass every image of the prompt, and only "
            "those"
        )
    return images
